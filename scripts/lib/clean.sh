# What a `moxlet up` may leave on a machine, to be listed or removed from outside. To be sourced after common.sh.

# Paths of the CTs below ROOT_DIR: <lxcpath>/<name>.
cts() { find "$1" -xdev -maxdepth 5 -path '*/ct/*/config' -printf '%h\n' 2>/dev/null || true; }
# Mount points below ROOT_DIR, deepest first.
mounts_below() { awk -v below="$1/" 'index($5, below) == 1 || $5 "/" == below { print $5 }' /proc/self/mountinfo | sort -r | sed 's/\\040/ /g'; }
# Processes of LXC whose command line names ROOT_DIR: the monitors and what starts them.
monitors() {
  local dir command
  for dir in /proc/[0-9]*; do
    command=$(tr '\0' ' ' <"$dir/cmdline" 2>/dev/null) || continue
    case $command in "[lxc monitor] $1/"*|*lxc-start*" $1/"*) printf '%s %s\n' "${dir#/proc/}" "$command" ;; esac
  done
}
cgroups_of() { # NAME
  find /sys/fs/cgroup -maxdepth 4 -type d \( -name "lxc.payload.$1" -o -name "lxc.monitor.$1" -o -name "$1" \) 2>/dev/null || true
}

# leaks ROOT_DIR BRIDGE: one line a thing. Mounts of the directories that `moxlet up` itself keeps shared are none.
leaks() {
  local root=$1 bridge=$2 path
  for path in $(cts "$root"); do echo "CT $path"; done
  monitors "$root" | sed 's/^/process /'
  mounts_below "$root" | while read -r path; do
    # A directory bound on itself, to be a shared mount, is the agent's own; so are all layers with a pod's ids
    # and the records of a store on ZFS.
    case $path in "$root"/storage/mapped/*|"$root"/storage/state) continue ;; esac
    [ "$(awk -v p="$path" '$5 == p { n = split($4, a, "/"); m = split(p, b, "/"); print (a[n] == b[m] && $0 ~ /shared:/) }' /proc/self/mountinfo | tail -n 1)" = 1 ] \
      || echo "mount $path"
  done
  if [ -d "/sys/class/net/$bridge/brif" ]; then
    for path in "/sys/class/net/$bridge/brif"/*; do [ ! -e "$path" ] || echo "interface $(basename "$path") on $bridge"; done
  fi
  find "$root" -xdev -path '*ipam*' -type f -name '*[0-9].[0-9]*' ! -name 'last_reserved*' -printf 'address %f\n' 2>/dev/null || true
}

# clean ROOT_DIR BRIDGE: removes it all, by force, and ROOT_DIR itself.
clean() {
  local root=$1 bridge=$2 path name pid cgroup
  for path in $(cts "$root"); do
    name=$(basename "$path")
    timeout 20 lxc-stop -P "$(dirname "$path")" -n "$name" -k >/dev/null 2>&1 || true
  done
  for pid in $(monitors "$root" | cut -d' ' -f1); do kill -9 "$pid" 2>/dev/null || true; done
  for path in $(cts "$root"); do
    for cgroup in $(cgroups_of "$(basename "$path")"); do
      if [ -r "$cgroup/cgroup.procs" ]; then xargs -r kill -9 <"$cgroup/cgroup.procs" 2>/dev/null || true; fi
      find "$cgroup" -depth -type d -exec rmdir {} + 2>/dev/null || true
    done
  done
  mounts_below "$root" | while read -r path; do umount "$path" 2>/dev/null || umount -l "$path" 2>/dev/null || true; done
  if ip link show "$bridge" >/dev/null 2>&1; then ip link delete "$bridge"; fi
  nft delete table ip "moxlet_${bridge//[!a-zA-Z0-9]/_}" 2>/dev/null || true
  if [ -z "$(mounts_below "$root")" ]; then rm -rf --one-file-system "$root"; else warn "mounts are left below $root"; return 1; fi
}
