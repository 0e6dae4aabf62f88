# scripts/bench image: who pulls images how fast. To be sourced after common.sh, images.sh and clean.sh, in a mount namespace of its
# own: whatever is mounted here ends with it.

# bench_image_peers: what Moxlet is measured against. What podman brings for networks of its own goes: others may take it for theirs.
bench_image_peers() {
  local conflist=/etc/cni/net.d/87-podman-bridge.conflist there=no missing=() tool
  for tool in podman mmdebstrap zstd curl; do command -v "$tool" >/dev/null || missing+=("$tool"); done
  command -v crun >/dev/null || command -v runc >/dev/null || missing+=(crun)
  [ ${#missing[@]} -gt 0 ] || return 0
  if [ -e "$conflist" ]; then there=yes; fi
  install_packages "${missing[@]}"
  [ $there = yes ] || rm -f "$conflist"
  if [ -d /run/systemd/system ]; then systemctl disable --now podman.socket podman-auto-update.timer >/dev/null 2>&1 || true; fi
}

bench_image_finish() {
  local pid=${driver:-}
  # The measuring program and what it has started: they are in a session of their own.
  if [ -n "$pid" ]; then kill -- "-$pid" 2>/dev/null || true; fi
  if [ -d "$work/registry" ]; then stop_daemon registry "$work/registry"; fi
  mounts_below "$work" | while read -r path; do umount "$path" 2>/dev/null || umount -l "$path" 2>/dev/null || true; done
  rmdir "$work" 2>/dev/null || true
  for path in "${made[@]}"; do rm -rf --one-file-system "$path"; done
}

bench_image() {
  local port=${MOXLET_BENCH_PORT:-18443} layout tag path
  work=$(mktemp -d /run/moxlet-bench.XXXXXX)
  # What podman and skopeo note of blobs outside the directories that they are given.
  made=()
  for path in /var/lib/containers/cache /run/containers; do [ -e "$path" ] || made+=("$path"); done
  trap bench_image_finish EXIT
  trap 'exit 130' INT TERM

  layout=$("$ROOT/tests/bench/make-images")
  # podman wants one kind of cgroups; both are here on some machines.
  if mountpoint -q /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi
  mount -t tmpfs -o size=10g,mode=711 moxlet-bench "$work"
  registry_up "$work/registry" "$port"
  # Layers as they are: what skopeo remembers of earlier runs makes it name the gzip twin of a zstd layer instead.
  for tag in big big-next debian-gzip debian-zstd; do
    step "pushing $tag" skopeo copy -q --preserve-digests --dest-tls-verify=false "oci:$layout:$tag" "docker://127.0.0.1:$port/bench/$tag:1"
  done
  export BENCH_DIR=$work/measured BENCH_REGISTRY=127.0.0.1:$port BENCH_MOXLET=$MOXLET_BIN/moxlet BENCH_LAYOUT=$layout
  export no_proxy=127.0.0.1 NO_PROXY=127.0.0.1
  mkdir "$BENCH_DIR"
  setsid "$MOXLET_BIN/moxlet-bench" image &
  driver=$!
  wait "$driver"
}
