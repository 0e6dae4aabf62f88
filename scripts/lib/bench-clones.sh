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
  "$ROOT/tests/lab/guest" ssh "$work/guest" 1 \
    "zpool create -O mountpoint=none bench /dev/vdb && mkdir -p /var/lib/bench && env BENCH_ZFS=bench BENCH_DIR=/var/lib/bench CLONES=${CLONES:-500} /root/moxlet-bench clones"
}
