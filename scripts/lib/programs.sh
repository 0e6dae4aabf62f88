# The programs of the workspace and of its tests, built together. To be sourced after common.sh.
#
# Cargo unites the features of what a call builds: `-p` this crate and `-p` that one compile most of their dependencies anew, each with
# features of its own. So every part of scripts/test builds all of the workspace by this one call, and shares it.

# build_programs LIST: writes to LIST a line for each program: its kind (bin, unit or test), name, the directory of its crate, its path.
build_programs() {
  (cd "$ROOT" && cargo build --locked --workspace --bins --tests --message-format=json-render-diagnostics) >"$1.messages" || return 1
  jq -r 'select(.reason == "compiler-artifact" and .executable)
    | [if .target.kind == ["test"] then "test" elif .profile.test then "unit" else "bin" end,
       .target.name, (.manifest_path | rtrimstr("/Cargo.toml")), .executable] | @tsv' "$1.messages" | sort -t $'\t' -k3,3 -k1,1 -k2,2 >"$1" || return 1
  rm "$1.messages"
}

# program LIST KIND NAME [CRATE]: its path. CRATE, such as tests/lab, where several crates have one of that name.
program() {
  local path
  path=$(awk -F'\t' -v kind="$2" -v name="$3" -v crate="$ROOT/${4:-}" \
    '$1 == kind && $2 == name && (crate ~ /\/$/ || $3 == crate) { print $4; exit }' "$1")
  [ -x "$path" ] || { echo "cargo named no program $3" >&2; return 1; }
  printf '%s\n' "$path"
}

# installed_programs LIST DIR: moxlet and moxlet-init side by side in DIR, as an installation has them.
installed_programs() {
  local moxlet init
  moxlet=$(program "$1" bin moxlet) && init=$("$ROOT/scripts/build-init" | tail -n 1) || return 1
  mkdir -p "$2" && install -m 755 "$moxlet" "$2/moxlet" && install -m 755 "$init" "$2/moxlet-init"
}

# run_programs LIST PATTERN [ARG…]: runs the tests whose `kind directory` matches the extended regular expression, one program after
# another, in the way of `cargo test`; says what each took. All are run, also after one that failed.
run_programs() {
  local list=$1 pattern=$2 kind name dir path start failed=0; shift 2
  while IFS=$'\t' read -r kind name dir path <&3; do
    [[ "$kind ${dir#"$ROOT/"}" =~ $pattern ]] || continue
    start=$SECONDS
    say "     Running $name of ${dir#"$ROOT/"} ($kind)"
    (cd "$dir" && CARGO_MANIFEST_DIR=$dir "$path" "$@" </dev/null) || failed=1
    say "     $name took $((SECONDS - start)) s"
  done 3<"$list"
  return $failed
}
