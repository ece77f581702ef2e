#!/bin/sh
# Checks what docs/deploy has: its form, and that the build's pod runs as it says.
#
#   tests/deploy.sh AGENT SERVER
#
# AGENT and SERVER are the static binaries, as for tests/containers.sh. Each check says `ok`, `not ok` or `skipped`, a line
# each, and what is missing when it is skipped:
#
# - python3 with PyYAML for everything in YAML; kubernetes-validate (from PyPI) for the schemas of Kubernetes, strictly
# - systemd-analyze for the unit; promtool for the rules; docker for the compose file
# - podman and a static busybox for the pod, which runs without a network: a server and a build side by side
#
# Exit status: 0 nothing failed, 1 something did, 2 wrong arguments.
set -u

main() {
    if [ $# -ne 2 ] || [ ! -f "$1" ] || [ ! -f "$2" ]; then
        echo "usage: $0 AGENT SERVER" >&2
        exit 2
    fi
    passed=0
    failed=0
    skipped=0
    top=$(cd "$(dirname "$0")/.." && pwd) || exit 2
    deploy=$top/docs/deploy
    work=$(mktemp -d "${TMPDIR:-/tmp}/phonehome-deploy.XXXXXX") || exit 2
    trap clean_up EXIT
    trap 'exit 130' INT TERM HUP

    manifests
    unit "$2"
    rules
    compose
    options "$2"
    pod "$1" "$2"

    echo "$passed passed, $failed failed, $skipped skipped"
    [ "$failed" -eq 0 ]
}

# --- The checks ---

manifests() {
    has_python yaml || { skip "manifests: python3 with PyYAML"; return; }
    check "every file is YAML" python3 - "$deploy" <<-'EOF'
	import glob, sys, yaml
	for path in glob.glob(sys.argv[1] + "/*.yaml"):
	    assert [document for document in yaml.safe_load_all(open(path)) if document], path
	EOF
    has_python kubernetes_validate || { skip "schemas of Kubernetes: pip install kubernetes-validate"; return; }
    for name in kubernetes builder-job; do
        check "$name.yaml follows the schemas of Kubernetes" python3 - "$deploy/$name.yaml" <<-'EOF'
	import sys, kubernetes_validate, yaml
	for document in yaml.safe_load_all(open(sys.argv[1])):
	    kubernetes_validate.validate(document, "1.30", strict=True)
	EOF
    done
}

unit() {
    command -v systemd-analyze >/dev/null || { skip "the unit: systemd-analyze"; return; }
    sed "s,/usr/bin/phonehome-server,$(realpath "$1")," "$deploy/phonehome-server.service" >"$work/phonehome-server.service"
    check "the unit is understood, without a warning" silent systemd-analyze verify "$work/phonehome-server.service"
    check "the unit is hardened: exposure of at most 1.5" \
        systemd-analyze security --offline=true --threshold=15 --no-pager "$work/phonehome-server.service"
}

rules() {
    if command -v promtool >/dev/null; then
        check "promtool takes the rules" promtool check rules "$deploy/prometheus-rules.yaml"
    else
        skip "the rules' expressions: promtool"
    fi
    grep -o 'phonehome_[a-z_]*' "$deploy/prometheus-rules.yaml" | sed 's/_bucket$//' | sort -u >"$work/used"
    # shellcheck disable=SC2016 # for awk
    check "the rules use metrics that are there" awk '
        NR == FNR { used[$0]; next }
        { gsub(/[`|]/, ""); delete used[$1] }
        END { for (name in used) { print "unknown: " name; bad = 1 } exit bad }' "$work/used" "$top/docs/metrics.md"
}

compose() {
    if command -v docker >/dev/null && docker compose version >/dev/null 2>&1; then
        check "docker compose takes the file" docker compose -f "$deploy/compose.yaml" config --quiet
    else
        skip "the compose file: docker with compose"
    fi
}

# Every variable in the manifests is one that the programs know.
options() {
    "$1" serve --help >"$work/help" 2>&1
    # shellcheck disable=SC2013 # they are words
    for name in $(grep -oh 'PHONEHOME_[A-Z_]*' "$deploy/kubernetes.yaml" "$deploy/compose.yaml" \
        "$deploy/phonehome-server.service" | sort -u); do
        case $name in
        PHONEHOME_PORT | PHONEHOME_ADMIN_TOKEN | PHONEHOME_READ_TOKEN) continue ;; # what is no option, and what has none
        esac
        check "the server knows $name" grep -q "\[env: $name=" "$work/help"
    done
}

# The pod of the Job, with a server beside it in place of the one across the network.
pod() {
    for tool in podman busybox; do
        command -v "$tool" >/dev/null || { skip "the pod: $tool"; return; }
    done
    has_python yaml || { skip "the pod: python3 with PyYAML"; return; }
    prepare_podman "$@"
    podman run --rm probe /busybox true >"$work/check" 2>&1 || { skip "the pod: a podman that can run containers: $(tail -n 1 "$work/check")"; return; }

    mkdir "$work/token" "$work/pod" "$work/spool" "$work/data" "$work/phonehome"
    chmod 0755 "$work"
    printf 'app="builder"\nteam="web"\n' >"$work/pod/labels"
    printf 'git.example.org/commit="0123abcd"\n' >"$work/pod/annotations"
    chmod -R a+rX "$work/token" "$work/pod"
    for dir in spool phonehome; do
        chown 1000:1000 "$work/$dir" 2>/dev/null || chmod 0777 "$work/$dir"
    done
    chown 65532:65532 "$work/data" 2>/dev/null || chmod 0777 "$work/data"
    server=server
    podman run --detach --name server --read-only --network none --volume "$work/data:/data" \
        --env PHONEHOME_DATA=/data/phonehome --env PHONEHOME_ADMIN_TOKEN=admin-of-this-test --env PHONEHOME_LIFECYCLE_LOG=- \
        observed-server serve >/dev/null 2>&1
    check "the server is ready, on a read-only root" eventually ask readyz
    ask api/v1/builds '{"id": "build-42"}' >"$work/declared"
    check "a build can be declared" grep -q phonehome_build_ "$work/declared"
    grep -o 'phonehome_build_[0-9a-f]*' "$work/declared" >"$work/token/token"
    check "the Job's pod can be written for podman" translate
    chmod 0644 "$work/token/token"
    podman rm --force --time 10 server >/dev/null 2>&1 # the one in the pod goes on with the same directory
    server=build-42-server
    check "podman kube play starts it" podman kube play --network none "$work/pod.yaml"
    check "the build's output is on its own stdout" eventually logged build-42-build 'done'
    check "the server proves that it is complete" eventually verdict '"verdict":"succeeded".*"complete":true'
    check "the lifecycle log tells of pod and container" logged $server '"container":"build".*"state":"terminated"'
    check "labels of the Downward API are there" logged $server '"team":"web"'
    podman stop --time 10 $server >/dev/null 2>&1
    check "the server ends when it is told to, with 0" [ "$(podman inspect -f '{{.State.ExitCode}}' $server)" = 0 ]
}

# --- What they lean on ---

# Podman knows no Downward API and no secrets as volumes: their files are put there by this script.
translate() {
    python3 - "$deploy/builder-job.yaml" "$work" <<-'EOF'
	import json, sys, yaml
	job = yaml.safe_load(open(sys.argv[1]))
	work = sys.argv[2]
	spec = job["spec"]["template"]["spec"]
	here = {"token": work + "/token", "pod": work + "/pod", "spool": work + "/spool", "phonehome": work + "/phonehome"}
	for volume in spec["volumes"]:
	    name = volume["name"]
	    volume.clear()
	    volume.update(name=name, hostPath={"path": here[name], "type": "DirectoryOrCreate"})
	build = spec["containers"][0]
	values = {"PHONEHOME_URL": "ws://127.0.0.1:8443", "PHONEHOME_BUILD": "build-42", "POD_NAME": "build-42-x",
	          "POD_NAMESPACE": "ci", "POD_UID": "u", "POD_IP": "127.0.0.1", "NODE_NAME": "here"}
	build["env"] = [{"name": e["name"], "value": values.get(e["name"], e.get("value"))} for e in build["env"]]
	build["image"] = "localhost/probe:latest"
	build["args"] = ["/busybox"] + build["args"][0].replace("/bin/sh", "sh").split() + build["args"][1:]
	spec["initContainers"][0]["image"] = "localhost/phonehome-agent:latest"
	server = {"name": "server", "image": "localhost/observed-server:latest", "args": ["serve"],
	          "securityContext": dict(build["securityContext"], runAsUser=65532), "volumeMounts": [{"name": "data", "mountPath": "/data"}],
	          "env": [{"name": "PHONEHOME_DATA", "value": "/data/phonehome"},
	                  {"name": "PHONEHOME_ADMIN_TOKEN", "value": "admin-of-this-test"},
	                  {"name": "PHONEHOME_LIFECYCLE_LOG", "value": "-"}]}
	spec["volumes"].append({"name": "data", "hostPath": {"path": work + "/data", "type": "Directory"}})
	spec["containers"].append(server)
	for container in spec["containers"] + spec["initContainers"]:
	    container.pop("resources", None)
	    container["imagePullPolicy"] = "Never"
	pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "build-42"}, "spec": spec}
	json.dump(pod, open(work + "/pod.yaml", "w"))
	EOF
}

# ask PATH [BODY]: as admin, from inside the server's container.
ask() {
    podman exec "$server" /busybox wget -q -O - --header "Authorization: Bearer admin-of-this-test" \
        --header "Content-Type: application/json" ${2:+--post-data "$2"} "http://127.0.0.1:8443/$1"
}

verdict() { ask api/v1/builds/build-42 | tr -d '\n' | grep -q "$1"; }

logged() { podman logs "$1" 2>&1 | grep -q "$2"; }

# shellcheck disable=SC2086 # $storage: words without blanks
podman() { timeout -k 5 60 podman $storage --log-level error "$@"; }

# The same podman as in tests/containers.sh, which says why.
prepare_podman() {
    storage="--root $work/root --runroot $work/runroot --storage-driver vfs"
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
    export CONTAINERS_CONF="$work/containers.conf" TMPDIR="$work/tmp"
    mkdir "$TMPDIR" "$work/context"
    cp "$1" "$work/context/phonehome-agent"
    cp "$2" "$work/context/phonehome-server"
    cp "$(command -v busybox)" "$work/context/busybox"
    printf '%s\n' 'FROM scratch' 'COPY busybox /busybox' >"$work/Dockerfile.probe"
    printf '%s\n' 'FROM phonehome-server' 'COPY busybox /busybox' >"$work/Dockerfile.observed-server"
    for name in agent server; do
        podman build -q --pull=never -t "phonehome-$name" --target prebuilt -f "$top/Dockerfile.$name" "$work/context" >"$work/check" 2>&1
    done
    for name in probe observed-server; do
        podman build -q --pull=never -t "$name" -f "$work/Dockerfile.$name" "$work/context" >"$work/check" 2>&1
    done
}

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
        sed 's/^/#   /' "$work/check"
    fi
}

skip() {
    skipped=$((skipped + 1))
    echo "skipped $1 is missing"
}

silent() { [ -z "$("$@" 2>&1 | tee /dev/stderr)" ]; }

has_python() { command -v python3 >/dev/null && python3 -c "import $1" 2>/dev/null; }

# eventually COMMAND...: within 15 seconds.
eventually() {
    for _ in $(seq 30); do
        "$@" && return
        sleep 0.5
    done
    return 1
}

clean_up() {
    ended_with=$?
    trap - EXIT
    if [ -n "${storage:-}" ]; then
        podman pod rm --all --force --time 0 >/dev/null 2>&1
        podman rm --all --force --time 0 >/dev/null 2>&1
        grep -o " $work/[^ ]*" /proc/self/mounts | sort -r | while read -r mounted; do umount -l "$mounted"; done
    fi
    rm -rf "$work" || ended_with=1
    exit "$ended_with"
}

main "$@"
