#!/bin/sh
# Tries the API of a real server with what its description allows and with what it does not: schemathesis, all checks.
#
#   sh tests/openapi.sh [EXAMPLES]
#
# Needs Rust, python3 and, once, a way to a package index: schemathesis is installed into target/schemathesis. Exit
# status: 0 all was as it should be, 1 something was not, 77 nothing was tried: one line says why.
set -eu

top=$(cd "$(dirname "$0")/.." && pwd)
examples=${1:-40}
version=4.32.5
target=${CARGO_TARGET_DIR:-$top/target}
venv=$target/schemathesis
work=$(mktemp -d)
server=

main() {
    trap 'finish' EXIT
    trap 'exit 1' HUP INT TERM
    install
    cargo build --locked --quiet --manifest-path "$top/Cargo.toml" -p phonehome-server -p phonehome-agent
    start
    run one main 'for i in 1 2 3; do echo "line $i"; echo "error $i" >&2; done; exit 3'
    run several build 'echo built; printf "no end"' check 'echo checked'
    run silent main ':'
    ask POST builds '{"id":"waiting","timeouts":{"connect":null,"total":null}}' >/dev/null
    configure
    cd "$work" && PYTHONHASHSEED=0 "$venv/bin/schemathesis" --config-file "$work/schemathesis.toml" run \
        "$url/api/v1/openapi.json" --url "$url" --checks all --max-examples "$examples" --seed 1 \
        --generation-database none --phases examples,coverage,fuzzing --request-timeout 20 --workers 1 \
        --suppress-health-check all --no-color --continue-on-failure
}

install() {
    "$venv/bin/schemathesis" --version 2>/dev/null | grep -q "version $version" && return
    { python3 -m venv "$venv" && "$venv/bin/pip" install --quiet "schemathesis==$version"; } >"$work/install" 2>&1 ||
        skip "schemathesis $version cannot be installed: $(tail -n 1 "$work/install")"
}

start() {
    admin=phonehome_admin_$(printf '%064d' 1)
    : >"$work/server"
    # What is declared while this runs ends soon, so that nobody waits for it.
    PHONEHOME_ADMIN_TOKEN=$admin PHONEHOME_READ_TOKEN=phonehome_read_$(printf '%064d' 2) \
        "$target/debug/phonehome-server" serve --data "$work/data" --listen 127.0.0.1:0 --durability os \
        --connect-timeout 1s --timeout 5s >"$work/server" 2>&1 </dev/null &
    server=$!
    for _ in $(seq 100); do
        address=$(sed -n 's/.*"address":"\([0-9.:]*\)".*/\1/p' "$work/server")
        [ -z "$address" ] || break
        sleep 0.1
    done
    [ -n "$address" ] || fail "the server did not start: $(cat "$work/server")"
    url=http://$address
}

# run BUILD [STEP SCRIPT]...: a build that ends by itself.
run() {
    build=$1
    shift
    steps=
    token=phonehome_build_$(printf '%s' "$build" | sha256sum | cut -c1-64)
    agents=
    is_name=yes
    for argument in "$@"; do
        if [ -n "$is_name" ]; then
            steps=$steps${steps:+,}\"$argument\"
            is_name=
        else
            is_name=yes
        fi
    done
    ask POST builds "{\"id\":\"$build\",\"steps\":[$steps],\"token\":\"$token\"}" >/dev/null
    while [ $# -gt 0 ]; do
        PHONEHOME_URL=ws://$address PHONEHOME_BUILD=$build PHONEHOME_STEP=$1 PHONEHOME_TOKEN=$token PHONEHOME_TEE=off \
            "$target/debug/phonehome-agent" -- sh -c "$2" >/dev/null 2>&1 </dev/null &
        agents="$agents $!"
        shift 2
    done
    for agent in $agents; do
        wait "$agent" || true
    done
    ask GET "builds/$build/wait?timeout=30" | grep -q '"verdict":"' || fail "build $build did not end"
}

ask() {
    curl -sS --fail-with-body -X "$1" -H "Authorization: Bearer $admin" -H "Content-Type: application/json" \
        ${3:+-d "$3"} "$url/api/v1/$2"
}

configure() {
    cat >"$work/schemathesis.toml" <<TOML
headers = { Authorization = "Bearer $admin" }

[dictionaries.builds]
values = ["one", "several", "silent"]

[parameters]
"path.id" = { dictionary = "builds", probability = 0.9 }

[checks.positive_data_acceptance]
expected-statuses = ["2xx", "304", "404", "409", "410", "416", "429"]

# What is removed would be missing for the rest.
[[operations]]
include-name = "DELETE /api/v1/builds/{id}"
parameters = { "path.id" = "waiting" }

[[operations]]
include-name = "GET /api/v1/builds/{id}/wait"
parameters = { "query.timeout" = 1 }

# Whether a cursor is one, and which parameters make sense for a build, a schema cannot say. A build that has ended has
# a log that ends.
[[operations]]
include-name = "GET /api/v1/builds/{id}/log"
parameters = { "path.id" = "one" }
checks.positive_data_acceptance.expected-statuses = ["2xx", "304", "400", "404", "410", "416"]

[[operations]]
include-name = "GET /api/v1/builds/{id}/events"
parameters = { "path.id" = "several" }
checks.positive_data_acceptance.expected-statuses = ["2xx", "400", "404", "410", "503"]
TOML
}

finish() {
    [ -z "$server" ] || { kill "$server" 2>/dev/null && wait "$server"; } || true
    rm -rf "$work"
}

skip() {
    echo "skipped: $1"
    exit 77
}

fail() {
    echo "failed: $1" >&2
    exit 1
}

main
