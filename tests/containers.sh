#!/bin/sh
# Builds both images from binaries built elsewhere, runs them for real and checks what comes out.
#
#   tests/containers.sh AGENT SERVER
#
# AGENT and SERVER are the static binaries, as made by
#
#   cargo build --locked --profile dist --target x86_64-unknown-linux-musl -p phonehome-agent -p phonehome-server
#
# Needs podman with runc or crun, and a static busybox as the command inside an empty image (Debian: podman, runc,
# busybox-static). Needs no network, no registry, no systemd and no cgroup v2. BUILDER=buildah builds with buildah instead
# of podman. Images, containers, locks and sockets live in one temporary directory, which is gone at the end.
#
# Prints `ok` or `not ok` and what was checked, a line each, with `#` lines about a failure, then `N passed, N failed`.
# Exit status: 0 all passed, 1 something failed, 2 wrong arguments, 77 nothing was checked: one line says what is missing.
set -u

# What a bad option ends with: the agent's and the server's own errors, never the build's.
usage_error=125
# A container that should be up, or down, has so many seconds.
patience=15

main() {
    [ $# -eq 2 ] || { echo "usage: $0 AGENT SERVER" >&2; exit 2; }
    for binary in "$@"; do
        [ -f "$binary" ] || { echo "$0: $binary: no such file" >&2; exit 2; }
    done
    prepare "$@"

    build_images
    agent_alone
    agent_in_a_builder_image
    agent_and_signals
    agent_and_real_time_signals
    agent_from_an_init_container
    agent_beside_a_neighbour
    server

    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
}

# --- The checks ---

build_images() {
    for name in agent server; do
        build "phonehome-$name" --target prebuilt -f "$top/Dockerfile.$name" "$work/context"
        check "the $name's image builds from a binary built outside, without the compiler's image" [ $? -eq 0 ]
    done

    build builder -f "$work/Dockerfile.builder" "$work/context"
    check "a builder image takes the agent with COPY --from" [ $? -eq 0 ]
    build observed-server -f "$work/Dockerfile.observed-server" "$work/context"
    check "an image can be built on the server's" [ $? -eq 0 ]
}

agent_alone() {
    files phonehome-agent
    check "the agent's image holds one file" [ "$(cat "$work/files")" = phonehome-agent ]

    run phonehome-agent --version
    check "agent --version: exit code 0" exited 0
    check "agent --version: on stdout" grep -q '^phonehome-agent [0-9]' "$work/out"

    run phonehome-agent --no-such-option
    check "agent with a bad option: exit code $usage_error" exited "$usage_error"
    check "agent with a bad option: says so on stderr only" says_only_on_stderr no-such-option

    run phonehome-agent -- /phonehome-agent --version
    check "agent in an empty image, itself as the command: exit code 0" exited 0
    check "agent in an empty image, itself as the command: its stdout" grep -q '^phonehome-agent [0-9]' "$work/out"

    run phonehome-agent -- /no-such-command
    check "agent in an empty image, command missing: exit code 127" exited 127
    check "agent in an empty image, command missing: stderr names it" grep -q no-such-command "$work/err"
}

agent_in_a_builder_image() {
    run builder
    check "command succeeds: exit code 0" exited 0
    run builder /busybox sh -c 'exit 7'
    check "command fails: exit code 7" exited 7
    run builder /busybox sh -c 'kill -KILL $$'
    check "command is killed: exit code 137" exited 137
    run builder no-such-command
    check "command not in PATH: exit code 127" exited 127
    run builder /not-executable
    check "command not executable: exit code 126" exited 126

    run --user 65532:65532 --read-only builder /busybox sh -c 'exit 7'
    check "as any user on a read-only root: exit code 7" exited 7

    # The agent's own lines share stderr with the command's, and it warns when it has no address to phone.
    run --env PHONEHOME_LOG_LEVEL=error builder /busybox sh -c '/busybox cat /data; /busybox tac /lines >&2; exit 3'
    check "1 MiB of any bytes and a last line without end: exit code 3" exited 3
    check "stdout is the command's, byte for byte" cmp "$work/context/data" "$work/out"
    tac "$work/context/lines" >"$work/expected"
    check "stderr is the command's, byte for byte" cmp "$work/expected" "$work/err"

    # shellcheck disable=SC2016 # for the shell in the container
    run builder /busybox sh -c '/busybox cat /proc/1/comm; echo $PPID'
    check "the agent is PID 1 and the command's parent" [ "$(tr '\n' ' ' <"$work/out")" = "phonehome-agent 1 " ]

    # Three grandchildren whose parent is gone end before the command does; whoever is PID 1 has to reap them.
    run builder /busybox sh -c '/busybox sh -c "for i in 1 2 3; do /busybox sleep 0.2 & done"
        /busybox sleep 1; /busybox cat /proc/[0-9]*/stat'
    check "orphans end: exit code 0" exited 0
    check "orphans are reaped" [ "$(grep -c '^1 (phonehome-agent)' "$work/out"),$(grep -c ') Z ' "$work/out")" = 1,0 ]
}

agent_and_signals() {
    start builder /busybox sh -c 'echo ready; exec /busybox sleep 60'
    check "a command that runs on is up" prints ready
    stop
    check "podman stop, command takes TERM as it comes: exit code 143" exited 143

    start builder /busybox sh -c 'trap "echo stopping; exit 5" TERM; echo ready; while :; do /busybox sleep 0.1; done'
    check "a command that handles TERM is up" prints ready
    stop
    check "podman stop, command handles TERM: its own exit code 5" exited 5
    check "podman stop, command handles TERM: its last words are there" grep -q stopping "$work/out"
}

# A static binary's libc keeps signals for itself that other programs may use.
agent_and_real_time_signals() {
    # With a server, although there is none, it has threads.
    for number in 32 33 34 64; do
        start --env PHONEHOME_URL=ws://127.0.0.1:9 --env PHONEHOME_BUILD=b --env PHONEHOME_LINGER=0s \
            builder /busybox sh -c 'echo ready; exec /busybox sleep 60'
        check "a command for signal $number is up" prints ready
        signal "$number"
        check "podman kill, signal $number: exit code $((128 + number))" exited $((128 + number))
    done
}

# An image that knows nothing of the agent gets it by a volume.
agent_from_an_init_container() {
    mkdir "$work/shared"
    run --volume "$work/shared:/shared" phonehome-agent install /shared/phonehome-agent
    check "install into a volume: exit code 0" exited 0
    check "install into a volume: the same file" cmp "$work/context/phonehome-agent" "$work/shared/phonehome-agent"

    set -- --volume "$work/shared:/shared:ro" --entrypoint /shared/phonehome-agent probe
    # shellcheck disable=SC2016 # for the shell in the container
    run "$@" -- /busybox sh -c 'echo $PPID; exit 7'
    check "installed agent: the command's exit code 7" exited 7
    check "installed agent: it is PID 1" [ "$(cat "$work/out")" = 1 ]

    start "$@" -- /busybox sh -c 'echo ready; exec /busybox sleep 60'
    check "installed agent: a command that runs on is up" prints ready
    stop
    check "installed agent: podman stop, exit code 143" exited 143
}

# A pod may share one namespace of processes, whose PID 1 is somebody else.
agent_beside_a_neighbour() {
    neighbour /busybox sh -c '/busybox sleep 1000 & /busybox setsid /busybox sleep 1000 & wait'
    check "a neighbour's processes are up" eventually has_sleepers 2

    # shellcheck disable=SC2016 # for the shell in the container
    run --pid container:neighbour builder /busybox sh -c 'echo $PPID; /busybox setsid /busybox sleep 1000 & exit 3'
    check "beside a neighbour: exit code 3" exited 3
    check "beside a neighbour: the agent is not PID 1" [ "$(cat "$work/out")" -gt 1 ]
    check "beside a neighbour: what was left is named" grep -q 'still running after its end: pid [0-9]* (sleep\|busybox)' "$work/err"
    check "beside a neighbour: only the agent's own were ended" has_sleepers 2

    start --pid container:neighbour builder /busybox sh -c 'echo ready; exec /busybox sleep 1000'
    check "beside a neighbour: a command that runs on is up" prints ready
    stop
    check "beside a neighbour: podman stop, exit code 143" exited 143
    check "beside a neighbour: TERM ended nobody else" has_sleepers 2
    podman rm --force --time 0 neighbour >/dev/null 2>&1
}

server() {
    files phonehome-server
    check "the server's image holds the binary and /tmp" [ "$(tr '\n' ' ' <"$work/files")" = "phonehome-server tmp/ " ]
    check "server: entrypoint" image_has phonehome-server '{{json .Config.Entrypoint}}' '["/phonehome-server"]'
    check "server: user is a number" image_has phonehome-server '{{.Config.User}}' 65532:65532
    check "server: a port is exposed" image_has phonehome-server '{{json .Config.ExposedPorts}}' '{"8443/tcp":{}}'
    check "server: health check needs no shell" image_has phonehome-server '{{json .HealthCheck.Test}}' \
        '["CMD","/phonehome-server","healthcheck","https://127.0.0.1:8443/healthz"]'

    run phonehome-server --version
    check "server --version: exit code 0" exited 0
    check "server --version: on stdout" grep -q '^phonehome-server [0-9]' "$work/out"

    run phonehome-server --no-such-option
    check "server with a bad option: exit code $usage_error" exited "$usage_error"
    check "server with a bad option: says so on stderr only" says_only_on_stderr no-such-option

    run --entrypoint /busybox observed-server sh -c '/busybox id -u; /busybox touch /tmp/file'
    check "server: not root, and can write to /tmp" exited 0
    check "server: user id 65532" [ "$(cat "$work/out")" = 65532 ]
    run --user 1000:1000 --entrypoint /busybox observed-server touch /tmp/file
    check "server: any other user can write to /tmp as well" exited 0

    run phonehome-server healthcheck https://127.0.0.1:8443/healthz
    check "healthcheck fails when nobody listens" not exited 0

    # POD_IP is the address that the hook tells its launcher: a container without a network has no default route.
    start --env POD_IP=127.0.0.1 observed-server hook --listen 0.0.0.0:8443 -- /busybox sleep 60
    check "the image's own health check passes while a hook waits for its build" healthy
    remove
}

# --- What they lean on ---

# check WHAT COMMAND...: one line about whether COMMAND succeeds.
check() {
    what=$1
    shift
    if "$@" >"$work/check" 2>&1; then
        passed=$((passed + 1))
        echo "ok $what"
    else
        failed=$((failed + 1))
        echo "not ok $what"
        { echo "checked: $*"; cat "$work/check"; echo "container: $state"; tail -n 5 "$work/err"; } |
            LC_ALL=C tr -c '\n -~' '?' | cut -c 1-300 | sed 's/^/#   /'
    fi
}

not() { ! "$@"; }

# shellcheck disable=SC2086 # $storage: words without blanks
podman() { timeout -k 5 30 podman $storage --log-level error "$@"; }

# build TAG ARG...: the docker format, because HEALTHCHECK is no part of the other.
build() {
    tag=$1
    shift
    state="none, building $tag"
    if [ "$builder" = buildah ]; then
        # shellcheck disable=SC2086 # as in podman()
        timeout -k 5 30 buildah $storage --log-level error build --format docker --pull-never -t "$tag" "$@" >"$work/err" 2>&1
    else
        podman build --format docker --pull=never -t "$tag" "$@" >"$work/err" 2>&1
    fi
}

# shellcheck disable=SC2086 # $cgroup: two words or none
# run [OPTION...] IMAGE [ARG...]: to its end; leaves out, err and what `exited` compares.
run() {
    remove
    podman run $cgroup --name subject --no-healthcheck "$@" >"$work/out" 2>"$work/err"
    status=$?
    state=$(podman inspect -f '{{.State.Status}} {{.State.ExitCode}}' subject 2>&1)
}

# exited CODE: podman passed the code on, and it is the container's: podman has 125, 126 and 127 of its own as well,
# for a container that never started.
exited() { [ "$state, $status" = "exited $1, $1" ]; }

# shellcheck disable=SC2086 # as in run()
# start [OPTION...] IMAGE [ARG...]: in the background.
start() {
    remove
    podman run $cgroup --detach --name subject "$@" >"$work/out" 2>"$work/err"
    state=started
}

# shellcheck disable=SC2086 # as in run()
# neighbour COMMAND...: another container, whose namespace of processes others may join.
neighbour() {
    podman run $cgroup --detach --name neighbour probe "$@" >/dev/null 2>"$work/err"
}

# shellcheck disable=SC2016 # for the shell in the container
# has_sleepers COUNT: so many processes of the neighbour's namespace are `/busybox sleep 1000`.
has_sleepers() {
    run --pid container:neighbour probe /busybox sh -c \
        'for process in /proc/[0-9]*; do /busybox tr "\0" " " <$process/cmdline; echo; done 2>/dev/null'
    cat "$work/out"
    [ "$(grep -c '^/busybox sleep 1000 $' "$work/out")" -eq "$1" ]
}

# signal NUMBER: ends it, or nothing does before long; then like `run`.
signal() {
    podman kill --signal "$1" subject >/dev/null 2>"$work/err"
    eventually has_ended
    state=$(podman inspect -f '{{.State.Status}} {{.State.ExitCode}}' subject 2>&1)
    status=${state#* }
}
has_ended() { [ "$(podman inspect -f '{{.State.Status}}' subject 2>&1)" = exited ]; }

# stop: TERM, and KILL for who is still there after a while; then like `run`.
stop() {
    podman stop --time "$patience" subject >/dev/null 2>"$work/err"
    state=$(podman inspect -f '{{.State.Status}} {{.State.ExitCode}}' subject 2>&1)
    status=$(podman wait subject 2>&1)
    podman logs subject >"$work/out" 2>"$work/err"
}

remove() { podman rm --force --ignore --time 0 subject >/dev/null 2>&1; }

# prints TEXT: the container in the background does, before long.
prints() { eventually logs_have "$1"; }
logs_have() { podman logs subject 2>&1 | grep -q "$1"; }

healthy() { eventually podman healthcheck run subject || { podman logs subject >"$work/err" 2>&1; false; }; }

eventually() {
    deadline=$(($(date +%s) + patience))
    until "$@"; do
        [ "$(date +%s)" -lt "$deadline" ] || return 1
        sleep 0.1
    done
}

says_only_on_stderr() { [ ! -s "$work/out" ] && grep -q -e "$1" "$work/err"; }

# files IMAGE: the names in it, without what a container adds when it starts.
files() {
    remove
    state="none, listing $1"
    podman create --name subject --no-healthcheck "$1" >/dev/null 2>"$work/err"
    podman export subject 2>>"$work/err" | tar -tf - 2>>"$work/err" | sort >"$work/files"
}

image_has() {
    state="none, inspecting $1"
    podman image inspect -f "$2" "$1" >"$work/field" 2>"$work/err"
    cat "$work/field"
    [ "$(cat "$work/field")" = "$3" ]
}

# --- Before and after ---

skip() {
    echo "$1"
    exit 77
}

prepare() {
    for tool in podman busybox tar timeout; do
        command -v "$tool" >/dev/null || skip "missing: $tool"
    done
    builder=${BUILDER:-podman}
    command -v "$builder" >/dev/null || skip "missing: $builder"

    passed=0
    failed=0
    state=none
    storage=
    cgroup=
    top=$(cd "$(dirname "$0")/.." && pwd) || exit 2
    work=$(mktemp -d "${TMPDIR:-/tmp}/phonehome.XXXXXX") || exit 2
    trap clean_up EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    case $work in
    *[[:space:]]*) skip "missing: a TMPDIR without blanks" ;;
    esac

    # vfs asks nothing of the file system below, and plain copies are quick enough at this size.
    storage="--root $work/root --runroot $work/runroot --storage-driver vfs"
    # Root's containers get cgroups below one that can be removed; podman's usual one would stay.
    [ "$(id -u)" -ne 0 ] || cgroup="--cgroup-parent /$(basename "$work")"
    # Set here, so that this machine's settings do not matter:
    # - podman asks for more files and processes than a sandbox may allow;
    # - a network needs plug-ins, and no check needs a network;
    # - systemd may not be there; locks in files, because the usual ones in shared memory would stay.
    cat >"$work/containers.conf" <<-EOF
	[containers]
	cgroupns = "host"
	default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
	log_driver = "k8s-file"
	netns = "none"
	[engine]
	cgroup_manager = "cgroupfs"
	events_logger = "file"
	lock_type = "file"
	tmp_dir = "$work/libpod"
	[network]
	network_config_dir = "$work/networks"
	EOF
    export CONTAINERS_CONF="$work/containers.conf"
    export TMPDIR="$work/tmp"
    mkdir "$TMPDIR" "$work/context"
    : >"$work/out"
    : >"$work/err"

    cp "$1" "$work/context/phonehome-agent"
    cp "$2" "$work/context/phonehome-server"
    cp "$(command -v busybox)" "$work/context/busybox"
    echo 'not a program' >"$work/context/not-executable"
    chmod 0644 "$work/context/not-executable"
    { head -c 1048576 /dev/urandom; printf 'carriage\r\nreturn, and no end'; } >"$work/context/data"
    seq 10000 >"$work/context/lines"

    printf '%s\n' 'FROM scratch' 'COPY busybox /busybox' >"$work/Dockerfile.probe"
    cat >"$work/Dockerfile.builder" <<-EOF
	FROM scratch
	COPY --from=phonehome-agent /phonehome-agent /phonehome-agent
	COPY busybox not-executable data lines /
	ENTRYPOINT ["/phonehome-agent", "--"]
	CMD ["/busybox", "true"]
	EOF
    printf '%s\n' 'FROM phonehome-server' 'COPY busybox /busybox' >"$work/Dockerfile.observed-server"

    # Whatever cannot do this says nothing about phonehome.
    build probe -f "$work/Dockerfile.probe" "$work/context" ||
        skip "missing: a $builder that can build here: $(tail -n 1 "$work/err")"
    run probe /busybox true
    exited 0 || skip "missing: a podman that can run a static busybox here: $(tail -n 1 "$work/err")"
}

clean_up() {
    ended_with=$?
    trap - EXIT
    trap '' HUP INT TERM
    podman rm --all --force --time 0 >/dev/null 2>&1
    # Deepest first: what a container killed half-way left mounted.
    grep -o " $work/[^ ]*" /proc/self/mounts | sort -r | while read -r mounted; do
        umount -l "$mounted"
    done
    [ -z "$cgroup" ] || find /sys/fs/cgroup -depth -type d -path "*${cgroup#* }*" -exec rmdir {} + 2>/dev/null
    rm -rf "$work" || ended_with=1
    exit "$ended_with"
}

main "$@"
