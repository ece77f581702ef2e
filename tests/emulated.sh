#!/bin/sh
# Runs an agent built for another machine, by an emulator, and checks that it does its work there.
#
#   tests/emulated.sh EMULATOR AGENT SERVER
#
# EMULATOR runs one program of the other machine, qemu-aarch64-static say; SERVER is phonehome-server for this one. The
# commands are this machine's own: the emulator runs the agent alone. It cannot make a process adopt orphans
# (PR_SET_CHILD_SUBREAPER), of which the agent warns; nothing here needs that.
#
# Prints `ok` or `not ok` and what was checked, a line each. Exit status: 0 all passed, 1 something failed, 2 wrong
# arguments.
set -u

# Everything here takes a second or two.
patience=30

main() {
    [ $# -eq 3 ] || { echo "usage: $0 EMULATOR AGENT SERVER" >&2; exit 2; }
    emulator=$1 agent=$2 server=$3
    work=$(mktemp -d) || exit 1
    trap 'rm -rf "$work"' EXIT

    ends_with 0 "it starts" --version
    ends_with 7 "the command's exit code is the agent's" -- sh -c 'exit 7'
    ends_with 127 "a command that is not there" -- /nowhere
    # shellcheck disable=SC2016 # the command's own parent is meant
    ends_with 9 "TERM reaches the command" -- sh -c 'trap "exit 9" TERM; kill -TERM "$PPID"; while :; do sleep 1; done'
    streams

    [ "$failed" -eq 0 ]
}

# ends_with CODE WHAT ARGUMENT...: runs the agent with the arguments.
ends_with() {
    expected=$1 what=$2
    shift 2
    timeout -s KILL "$patience" "$emulator" "$agent" "$@" </dev/null >"$work/out" 2>"$work/err"
    code=$?
    check "$what: exit code $code" [ "$code" -eq "$expected" ]
}

# Two megabytes over TLS, to a server that tells whether it has all of them.
streams() {
    seq 1 300000 >"$work/expected"
    timeout -s KILL "$patience" "$server" hook --listen 127.0.0.1:0 -- \
        "$emulator" "$agent" --tee off -- sh -c "cat '$work/expected'; exit 5" </dev/null >"$work/out" 2>"$work/err"
    code=$?
    check "the exit code comes back over TLS: $code" [ "$code" -eq 5 ]
    check "so does every byte" cmp -s "$work/expected" "$work/out"
}

# check WHAT COMMAND...
check() {
    what=$1
    shift
    if "$@"; then
        echo "ok $what"
    else
        echo "not ok $what"
        sed 's/^/# /' "$work/err"
        failed=$((failed + 1))
    fi
}

failed=0
main "$@"
