# Functions that all scripts share: words for the reader, waiting with a reason, daemons by pid file.
# To be sourced by bash scripts; it sets the strict mode.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# What is built or downloaded once is kept here, keyed by version.
MOXLET_CACHE=${MOXLET_CACHE:-/var/cache/moxlet}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$MOXLET_CACHE/target}

KUBERNETES_VERSION=$(sed -nE 's/^(require)?[[:space:]]*k8s.io\/kubernetes (v[^ ]+).*/\2/p' "$ROOT/scripts/control-plane/go.mod")
KUBERNETES_BIN=$MOXLET_CACHE/kubernetes/$KUBERNETES_VERSION/bin
# The release build. moxlet-init lies beside moxlet.
MOXLET_BIN=${MOXLET_BIN:-$CARGO_TARGET_DIR/release}

say() { printf '%s\n' "$*"; }
warn() { printf 'warning: %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

need_root() { [ "$(id -u)" = 0 ] || fail "$1 must run as root (try: sudo $1)"; }

# need_tool NAME WHAT: is the program in PATH? Under sudo it may be there for the user and not for root.
need_tool() {
  command -v "$1" >/dev/null && return
  [ -z "${SUDO_USER:-}" ] || fail "$1 is not in root's PATH; if $SUDO_USER has it: sudo env \"PATH=\$PATH\" $0 …; else install $2"
  fail "$1 is not in PATH: install $2"
}

kubernetes_present() {
  local tool
  for tool in kube-apiserver kube-controller-manager kube-scheduler kubectl; do [ -x "$KUBERNETES_BIN/$tool" ] || return 1; done
}

# step TEXT COMMAND…: runs a command with its output in a log; shows TEXT and the seconds so far, and the log's end on failure.
step() {
  local text=$1 start=$SECONDS log pid rc=0; shift
  log=$(mktemp)
  "$@" >"$log" 2>&1 </dev/null &
  pid=$!
  if [ -t 1 ]; then
    while kill -0 "$pid" 2>/dev/null; do
      printf '\r\033[K%s … %d s' "$text" $((SECONDS - start)); sleep 0.2
    done
    printf '\r\033[K'
  else
    local shown=$SECONDS
    while kill -0 "$pid" 2>/dev/null; do
      sleep 0.1
      if [ $((SECONDS - shown)) -ge 60 ]; then shown=$SECONDS; say "$text … $((SECONDS - start)) s: $(tail -n 1 "$log" | cut -c1-120)"; fi
    done
  fi
  wait "$pid" || rc=$?
  if [ "$rc" != 0 ]; then
    say "$text: failed after $((SECONDS - start)) s; the end of its output:"
    tail -n 30 "$log" | sed 's/^/    /'
    rm -f "$log"
    return "$rc"
  fi
  say "$text: done in $((SECONDS - start)) s"
  rm -f "$log"
}

# wait_for REASON SECONDS COMMAND…: until the command succeeds.
wait_for() {
  local reason=$1 limit=$2 start=$SECONDS; shift 2
  until "$@" >/dev/null 2>&1; do
    if [ $((SECONDS - start)) -ge "$limit" ]; then
      printf 'error: waited %s s in vain for %s\n' "$limit" "$reason" >&2
      return 1
    fi
    sleep 0.1
  done
}

# The time a process was started at, in ticks since boot: with its id it names one process for ever. Nothing of one that has
# ended and only waits for its parent to look.
started_at() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 != "Z" && $1 != "X" { print $20 }'; }

# alive NAME DIR: is the daemon that DIR/NAME.pid names still there?
alive() {
  local pid ticks
  { read -r pid ticks <"$2/$1.pid"; } 2>/dev/null || return 1
  [ -n "$ticks" ] && [ "$(started_at "$pid")" = "$ticks" ]
}

pid_of() { local pid; { read -r pid _ <"$2/$1.pid"; } 2>/dev/null && printf '%s\n' "$pid"; }

# daemon NAME DIR COMMAND…: starts it if it is not there; log and pid file lie in DIR.
daemon() {
  local name=$1 dir=$2 pid; shift 2
  if alive "$name" "$dir"; then return 0; fi
  setsid nohup "$@" >>"$dir/$name.log" 2>&1 </dev/null &
  pid=$!
  printf '%s %s\n' "$pid" "$(started_at "$pid")" >"$dir/$name.pid"
}

# daemon_ready NAME DIR REASON SECONDS COMMAND…: as wait_for, but gives up as soon as the daemon has ended.
daemon_ready() {
  local name=$1 dir=$2 reason=$3 limit=$4 start=$SECONDS; shift 4
  until "$@" >/dev/null 2>&1; do
    if ! alive "$name" "$dir"; then
      printf 'error: %s ended while it was waited for (%s); the end of %s:\n' "$name" "$reason" "$dir/$name.log" >&2
      tail -n 8 "$dir/$name.log" | cut -c1-300 | sed 's/^/    /' >&2
      return 1
    fi
    if [ $((SECONDS - start)) -ge "$limit" ]; then
      printf 'error: waited %s s in vain for %s; see %s\n' "$limit" "$reason" "$dir/$name.log" >&2
      return 1
    fi
    sleep 0.1
  done
}

# stop_daemon NAME DIR [SECONDS]: SIGTERM, then SIGKILL after SECONDS (10). Nothing happens if it is not there.
stop_daemon() {
  local name=$1 dir=$2 limit=${3:-10} pid start=$SECONDS
  if alive "$name" "$dir"; then
    pid=$(pid_of "$name" "$dir")
    kill "$pid" 2>/dev/null || true
    while alive "$name" "$dir"; do
      if [ $((SECONDS - start)) -ge "$limit" ]; then kill -9 "$pid" 2>/dev/null || true; break; fi
      sleep 0.05
    done
  fi
  rm -f "$dir/$name.pid"
}

# install_packages NAME…: Debian packages. Services that only our installation brings are not to run: the scripts start their own,
# on loopback. policy-rc.d is Debian's way to say so; another's file is put back.
install_packages() (
  policy=/usr/sbin/policy-rc.d
  say "Debian packages to install: $*"
  restore() { rm -f "$policy"; if [ -e "$policy.moxlet" ]; then mv "$policy.moxlet" "$policy"; fi; }
  trap restore EXIT
  if [ -e "$policy" ] && [ ! -e "$policy.moxlet" ]; then mv "$policy" "$policy.moxlet"; fi
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
  export DEBIAN_FRONTEND=noninteractive
  step "apt-get update" apt-get update -q
  step "apt-get install" apt-get install -qy --no-install-recommends "$@"
)

# debian_mirror: the Debian mirror that this machine's apt uses.
debian_mirror() {
  local mirror
  mirror=$(apt-get indextargets --format '$(REPO_URI) $(LABEL)' 'Created-By: Packages' | awk '$2 == "Debian" { print $1; exit }')
  [ -n "$mirror" ] && printf '%s\n' "${mirror%/}"
}

# install_qemu: from the machine's own suite or, where that one's is old or cannot be installed (what is there of QEMU may come from
# elsewhere and be newer), from the mirror's backports. Fails if there is none. Versions before 9 emulate a processor on which a
# busy guest's kernel dies of a double fault every few minutes.
QEMU_OLDEST=9
install_qemu() (
  version() { qemu-system-x86_64 --version 2>/dev/null | sed -n '1s/.*version \([0-9.]*\).*/\1/p'; }
  good() { local there; there=$(version); [ "${there%%.*}" -ge $QEMU_OLDEST ] 2>/dev/null; }
  installable() { apt-get install --simulate -qq --no-install-recommends "$@" qemu-system-x86 >/dev/null 2>&1; }
  # The version that apt would install, "1:10.0.2+ds-2" as 10.
  candidate() { apt-cache policy qemu-system-x86 | sed -nE 's/^ *Candidate: ([0-9]+:)?([0-9]+)\..*/\2/p'; }
  if good; then say "QEMU: there ($(version))"; return 0; fi
  if { [ -n "$(candidate)" ] || apt-get update -qq; } && [ "$(candidate)" -ge $QEMU_OLDEST ] 2>/dev/null && installable; then
    install_packages qemu-system-x86
    return
  fi
  mirror=$(debian_mirror) || return 1
  suite=$(. /etc/os-release && printf '%s-backports\n' "${VERSION_CODENAME:-none}")
  parts=$(mktemp -d)
  trap 'rm -rf "$parts"' EXIT
  cp -a /etc/apt/sources.list.d/. "$parts"
  printf 'deb %s %s main\n' "$mirror" "$suite" >"$parts/moxlet-backports.list"
  export APT_CONFIG=$parts/apt.conf
  printf 'Dir::Etc::sourceparts "%s";\n' "$parts" >"$APT_CONFIG"
  say "QEMU is taken from $suite: this machine's suite has none of version $QEMU_OLDEST or later that can be installed"
  if apt-get update -qq && installable -t "$suite" && install_packages -t "$suite" qemu-system-x86; then return 0; fi
  unset APT_CONFIG
  if [ -z "$(version)" ]; then installable && install_packages qemu-system-x86 || return 1; fi
  warn "QEMU $(version) IS OLD: a guest may die in the middle of a test; version $QEMU_OLDEST or later is in no suite that can be had here"
)

# port_free PORT WHAT KEY: a clear word before something fails to listen.
port_free() {
  if ss -Hltn "sport = :$1" | grep -q .; then
    fail "port $1 ($2) is taken by: $(ss -Hltnp "sport = :$1" | sed -n 's/.*users:((\("[^"]*"\),pid=\([0-9]*\).*/\1, process \2/p' | head -n 1). Free it, or choose another by $3"
  fi
}
