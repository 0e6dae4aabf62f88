# What tests/lab/run and tests/lab/pve share. To be sourced after common.sh and images.sh, with these set: run, programs, HERE
# (this machine's address on the guest's bridge), PORT (the registry's).

guest() { local verb=$1; shift; "$ROOT/tests/lab/guest" "$verb" "$run" "$@"; }
in_net() { nsenter --net="$run/net" "$@"; }

. "$ROOT/scripts/lib/programs.sh"

# The list of all programs: the one that scripts/test has made, or one's own.
list=${MOXLET_TEST_PROGRAMS:-$programs/list}
build_list() { [ -n "${MOXLET_TEST_PROGRAMS:-}" ] || build_programs "$list"; }
# built KIND NAME [CRATE]: a program, without its debugging information, which is most of what would be copied.
built() {
  local path; path=$(program "$list" "$@") || return 1
  strip -o "$programs/$2" "$path"
}
built_init() { local path; path=$("$ROOT/scripts/build-init" | tail -n 1) && install -m 755 "$path" "$programs/moxlet-init"; }

# Images come from a registry on this machine's end of the guest's bridge.
registry() {
  local script='. "$1/scripts/lib/common.sh"; . "$1/scripts/lib/images.sh"; registry_up "$2/registry" "$3" && push_images "$2/images" "$3"'
  mkdir -p "$run/registry" && make_images "$run/images" || return 1
  REGISTRY_ADDRESS=$HERE in_net bash -c "$script" registry "$ROOT" "$run" "$PORT"
}

# in_guest VARIABLE=VALUE… PROGRAM [ARG…]: a test program, with what all of them are to know of the guest. The tests' clean-up
# calls the project's scripts.
in_guest() {
  local line dir variables=(); dir=/root/$(basename "$programs")
  while [[ $1 == *=* ]]; do variables+=("$1"); shift; done
  local program=$1; shift
  printf -v line '%q ' env CARGO_MANIFEST_DIR="$ROOT/tests/component" MOXLET_TEST_SLOW="${MOXLET_TEST_SLOW:-10}" MOXLET_TEST_REGISTRY="$HERE:$PORT" \
    MOXLET_INIT="$dir/moxlet-init" MOXLET_PROGRAM="$dir/moxlet" TMPDIR=/var/lib "${variables[@]}" "$dir/$program" "$@"
  guest ssh 1 "cd /root && $line 2>&1"
}
