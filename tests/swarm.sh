#!/bin/sh
# What a server takes: a thousand builds at once, a line a second each, without TLS and with it, and a kill -9 in between.
# Fails when a line is lost or repeated, when the agents take more than 30 s to come back, or when memory or time to
# acknowledge are far beyond what they should be. Shows the figures.
#
#   sh tests/swarm.sh [AGENTS]        10000 is what a server is made for
#
# Needs Rust and, in $TMPDIR, a real file system: not an overlay. Time to acknowledge is the disk's more than the
# server's: a machine with other work fails only beyond five times the goal. Exit status: 0 all was as it should be, 1
# something was not, 77 there are too few descriptors.
set -eu

agents=${1:-1000}
seconds=15
# A server takes 30 MiB, and as much for each agent as 200 MiB are for ten thousand; 300 MiB with TLS. MiB.
plain=$((40 + agents * 18 / 1000))
tls=$((50 + agents * 26 / 1000))
# The goal is one second. Milliseconds.
late=5000

top=$(cd "$(dirname "$0")/.." && pwd)

main() {
    has_descriptors || exit 77
    build
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    load plain --max-resident "$plain"
    load tls --tls --max-resident "$tls"
}

# A socket for each agent at both ends, and the server's files.
has_descriptors() {
    hard=$(ulimit -H -n)
    [ "$hard" = unlimited ] || [ "$hard" -ge $((agents + 6000)) ] || {
        echo "skipped: $agents agents need $((agents + 6000)) descriptors, the hard limit is $hard"
        return 1
    }
}

# PHONEHOME_BIN_DIR names a directory with a server that is built already.
build() {
    cd "$top"
    target=$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
    if [ -n "${PHONEHOME_BIN_DIR:-}" ]; then
        cargo build --locked -p phonehome-tests --bin swarm
        server=$PHONEHOME_BIN_DIR/phonehome-server swarm=$target/debug/swarm
    else
        cargo build --release --locked -p phonehome-server -p phonehome-tests --bin phonehome-server --bin swarm
        server=$target/release/phonehome-server swarm=$target/release/swarm
    fi
}

load() {
    name=$1
    shift
    echo "== $agents agents, $name"
    "$swarm" --program "$server" --data "$work/$name" \
        --agents "$agents" --seconds "$seconds" --kill --finish --max-p99 "$late" --max-back 30 "$@"
    rm -rf "${work:?}/$name"
}

main
