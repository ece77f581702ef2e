#!/usr/bin/env bash
# Fuzzing: every program in tests/fuzz/src/bin is fed with inputs that a fuzzer makes up from what it has seen them do.
#
#   tests/fuzz.sh [SECONDS] [PROGRAM...]
#
# SECONDS is for each program, 10 if left out; without PROGRAM all run, one after the other. Every run starts from the
# inputs in tests/fuzz/corpus and those that earlier runs found, which are kept beside cargo's other output. Prints a line
# per program: executions, executions a second, edges of the code that were covered, inputs that covered new ones.
#
#   KEEP=1 tests/fuzz.sh 3600      also adds to tests/fuzz/corpus the best of what covers code that nothing there does
#
# Needs Rust, stable, and a C++ compiler for the fuzzer. tests/fuzz/README.md says how to add a program. Exit status:
# 0 nothing was found, 1 a program failed and the path of its input is printed, 2 nothing could be run.
set -u
exec </dev/null

top=$(cd "$(dirname "$0")/.." && pwd)
here=$top/tests/fuzz
target=${CARGO_TARGET_DIR:-$top/target}/fuzz
# How many inputs a run may add to what is kept of a program.
keep_limit=15
host=$(rustc -vV | sed -n 's/^host: //p')

main() {
    case ${1-} in
    -h | --help) usage; exit 0 ;;
    *[!0-9]* | "") seconds=10 ;;
    *) seconds=$1; shift ;;
    esac
    local program programs=("$@")
    [ $# -gt 0 ] || mapfile -t programs < <(basename -s .rs "$here"/src/bin/*.rs)
    for program in "${programs[@]}"; do
        [ -e "$here/src/bin/$program.rs" ] || { echo "there is no tests/fuzz/src/bin/$program.rs" >&2; exit 2; }
    done
    build || { echo "the programs cannot be built" >&2; exit 2; }
    printf '%-16s%12s%10s%9s%9s\n' "" executions "a second" covered new
    for program in "${programs[@]}"; do
        fuzz "$program" || exit 1
    done
}

usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0"; }

# What cargo-fuzz builds with, but for a sanitizer: there is no unsafe code here for it to look at. The flags are for the
# host as a target, so that neither macros nor build scripts are counted.
build() {
    local flags=(
        --cfg fuzzing
        -Cpasses=sancov-module
        -Cllvm-args=-sanitizer-coverage-level=4
        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
        -Cllvm-args=-sanitizer-coverage-pc-table
        -Cllvm-args=-sanitizer-coverage-trace-compares
        -Cllvm-args=-simplifycfg-branch-fold-threshold=0
    )
    (cd "$here" && RUSTFLAGS="${flags[*]}" CARGO_TARGET_DIR=$target \
        cargo build --quiet --locked --release --bins --target "$host")
}

fuzz() {
    local program=$1 status=0
    local found=$target/found/$program failing=$target/failing/$program log=$target/$program.log
    mkdir -p "$found" "$failing" "$here/corpus/$program"
    local before
    before=$(count "$found")
    timeout -s KILL $((seconds + 120)) "$(binary "$program")" "$found" "$here/corpus/$program" \
        -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=4096 -print_final_stats=1 \
        -artifact_prefix="$failing/" >"$log" 2>&1 || status=$?
    if [ "$status" -ne 0 ]; then
        grep -a -A 3 -e "panicked at" -e "ERROR: libFuzzer" "$log"
        local input
        input=$(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1)
        printf '%s failed with status %s; its input: %s\n' "$program" "$status" "${input:-none, see $log}"
        [ -z "$input" ] || printf 'once more: %s %s\n' "$(binary "$program")" "$input"
        return 1
    fi
    local executions covered
    executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    covered=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)
    printf '%-16s%12s%10s%9s%9s\n' "$program" "$executions" $((executions / (seconds > 0 ? seconds : 1))) "$covered" \
        $(($(count "$found") - before))
    [ -z "${KEEP-}" ] || keep "$program"
}

# Of the inputs that cover edges which the corpus does not, those that took longest to find: the others are soon found
# again.
keep() {
    local program=$1 name
    local found=$target/found/$program merged=$target/merged/$program
    rm -rf "$merged"
    mkdir -p "$merged"
    cp "$here/corpus/$program"/* "$merged"
    timeout -s KILL 600 "$(binary "$program")" -merge=1 -set_cover_merge=1 -use_counters=0 "$merged" "$found" \
        >"$target/$program.merge.log" 2>&1 || return
    (cd "$found" && ls -t) | while read -r name; do
        [ ! -e "$merged/$name" ] || [ -e "$here/corpus/$program/$name" ] || echo "$name"
    done | head -n "$keep_limit" | while read -r name; do
        cp "$found/$name" "$here/corpus/$program/"
    done
}

binary() { echo "$target/$host/release/$1"; }

count() { find "$1" -type f | wc -l; }

main "$@"
