# scripts/bench clones: containers on ZFS, in a guest that does nothing else. To be sourced after common.sh.

bench_clones_finish() {
  "$ROOT/tests/lab/guest" down "$work/guest" || true
  rm -rf --one-file-system "$work"
}

bench_clones() {
  work=$(mktemp -d /var/lib/moxlet-bench.XXXXXX)
  trap bench_clones_finish EXIT
  trap 'exit 130' INT TERM
  strip -o "$work/moxlet-bench" "$MOXLET_BIN/moxlet-bench"
  LAB_MEMORY=${LAB_MEMORY:-2048} "$ROOT/tests/lab/guest" up "$work/guest"
  "$ROOT/tests/lab/guest" copy "$work/guest" 1 "$work/moxlet-bench" /root
  # In a mount namespace of its own: systemd reads the whole table at each mount that it sees, which would be measured as well.
  "$ROOT/tests/lab/guest" ssh "$work/guest" 1 \
    "zpool create -O mountpoint=none bench /dev/vdb && mkdir -p /var/lib/bench && env BENCH_ZFS=bench BENCH_DIR=/var/lib/bench CLONES=${CLONES:-500} unshare --mount --propagation private /root/moxlet-bench clones"
}
