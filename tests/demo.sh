#!/bin/sh
# Shows phonehome at work: a bare repository builds what is pushed before it takes it. One push passes its tests, one
# does not. Checks its own result and removes everything again.
#
#   sh tests/demo.sh
#
# Needs Rust and git. The builder is a process on this machine, where a real one would be a container: the launcher is
# the only place that knows. Exit status: 0 all was as it should be, 1 something was not.
set -eu

top=$(cd "$(dirname "$0")/.." && pwd)

# Nothing of the caller's git counts here: no settings, and no repository, should a hook run this.
for name in $(env | sed -n 's/^\(GIT_[A-Z_0-9]*\)=.*/\1/p'); do
    unset "$name"
done
export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1

main() {
    say "Building phonehome-agent and phonehome-server"
    build_programs

    say "Making a bare repository whose pre-receive hook waits for a build"
    make_hooks
    show_hooks

    say "Making a small project with tests"
    make_project

    say "Pushing it: the build's output arrives while it runs, then its verdict"
    push
    [ "$push_status" -eq 0 ] || fail "the push should have been accepted, git push exited with $push_status"
    saw "checking leap.awk" "the build's standard output"
    saw "no case before 1583" "the build's standard error"
    saw "build succeeded; the log is complete: [0-9]* bytes in [0-9]* records, BLAKE3 [0-9a-f]*, 0 cuts survived" \
        "the verdict and its proof"
    verdict_is_last
    [ "$(seconds_between "checking leap.awk" "build succeeded")" -ge 1 ] ||
        fail "the output should have arrived while the build ran, not at its end"
    accepted=$(git -C "$work/project" rev-parse HEAD)
    [ "$(remote_main)" = "$accepted" ] || fail "main should be at the pushed commit $accepted"
    say "Accepted: main is at $(short "$accepted")"

    say "Breaking a rule and pushing again: a test fails, the build exits with 3"
    break_project
    push
    [ "$push_status" -ne 0 ] || fail "the push should have been refused"
    saw "FAIL 1900" "the failing test"
    saw "build failed.*exit code 3.*the log is complete" "the verdict"
    verdict_is_last
    saw "pre-receive hook declined" "git's refusal"
    [ "$(remote_main)" = "$accepted" ] || fail "main should still be at $accepted"
    say "Refused: main is still at $(short "$accepted")"

    say "All as it should be"
}

# --- The programs ---

# Cargo says where it puts them, whatever its settings are.
build_programs() {
    (cd "$top" && cargo build --locked --release -p phonehome-agent -p phonehome-server \
        --message-format json-render-diagnostics) >"$work/artifacts" || fail "the programs cannot be built"
    mkdir "$work/bin"
    for program in phonehome-agent phonehome-server; do
        built=$(sed -n "s|.*\"executable\":\"\([^\"]*/$program\)\".*|\1|p" "$work/artifacts")
        [ -x "$built" ] || fail "cargo built no $program"
        ln -s "$built" "$work/bin/$program"
    done
    PATH="$work/bin:$PATH"
}

# --- The repository ---

make_hooks() {
    project_git init --quiet --bare "$work/project.git"
    cat >"$work/project.git/hooks/pre-receive" <<-'END'
	#!/bin/sh
	# Its exit status decides the push.
	exec phonehome-server hook --listen 127.0.0.1:0 -- hooks/launch-builder
	END
    cat >"$work/project.git/hooks/launch-builder" <<-'END'
	#!/bin/sh
	# Starts a builder for what git names on standard input, and leaves it alone.
	set -eu
	read -r old new ref
	tree=$(mktemp -d "$DEMO/tree.XXXXXX")
	# Until the push is accepted, only git inside the hook sees its objects.
	git archive --output "$tree.tar" "$new"
	for name in $(env | sed -n 's/^\(GIT_[A-Z_0-9]*\)=.*/\1/p'); do
	    unset "$name"
	done
	cd "$tree"
	tar -xf "$tree.tar"
	echo "launcher: building $ref"
	phonehome-agent --tee off --log-level info -- sh ./build.sh </dev/null >"$DEMO/agent.log" 2>&1 &
	echo $! >"$DEMO/agent.pid"
	END
    chmod +x "$work/project.git/hooks/pre-receive" "$work/project.git/hooks/launch-builder"
    export DEMO="$work"
}

show_hooks() {
    sed 's/^/    /' "$work/project.git/hooks/pre-receive"
}

remote_main() { git -C "$work/project.git" rev-parse --verify --quiet refs/heads/main || echo missing; }

# --- The project ---

make_project() {
    project_git init --quiet "$work/project"
    cat >"$work/project/leap.awk" <<-'END'
	# Says whether a year is a leap year.
	{ print ($1 % 4 == 0 && ($1 % 100 != 0 || $1 % 400 == 0)) ? "leap" : "common" }
	END
    cat >"$work/project/cases" <<-'END'
	2024 leap
	1900 common
	2000 leap
	END
    cat >"$work/project/build.sh" <<-'END'
	#!/bin/sh
	step() { printf '\033[1;34m== %s\033[0m\n' "$*"; }

	step "checking leap.awk"
	awk -f leap.awk </dev/null || exit 2
	printf '\033[33mwarning:\033[0m no case before 1583\n' >&2
	sleep 1 # here and below: so that there is something to watch

	step "testing"
	failures=0
	while read -r year expected; do
	    sleep 1
	    result=$(echo "$year" | awk -f leap.awk)
	    if [ "$result" = "$expected" ]; then
	        printf '\033[32mok\033[0m   %s: %s\n' "$year" "$result"
	    else
	        printf '\033[31mFAIL %s: %s, should be %s\033[0m\n' "$year" "$result" "$expected" >&2
	        failures=$((failures + 1))
	    fi
	done <cases
	[ "$failures" -eq 0 ] || exit 3

	step "packing leap.tar"
	tar -cf leap.tar leap.awk
	END
    commit "Tell leap years"
    git -C "$work/project" remote add origin "$work/project.git"
}

break_project() {
    cat >"$work/project/leap.awk" <<-'END'
	# Says whether a year is a leap year.
	{ print $1 % 4 == 0 ? "leap" : "common" }
	END
    commit "Simplify the rule"
}

commit() {
    project_git -C "$work/project" add .
    project_git -C "$work/project" commit --quiet -m "$1"
}

project_git() {
    git -c user.name=Demo -c user.email=demo@example.org -c init.defaultBranch=main "$@"
}

# --- The push and what came of it ---

push() {
    : >"$work/push.log"
    { git -C "$work/project" push origin HEAD:refs/heads/main || echo $? >"$work/push.status"; } 2>&1 | show_and_time
    push_status=0
    [ ! -e "$work/push.status" ] || { read -r push_status <"$work/push.status"; rm "$work/push.status"; }
}

# Shows each line as it comes and notes when that was.
show_and_time() {
    while IFS= read -r line; do
        printf '    %s\n' "$line"
        printf '%s %s\n' "$(date +%s)" "$line" >>"$work/push.log"
    done
}

saw() { grep -q "$1" "$work/push.log" || fail "$2 is missing from what git push printed"; }

verdict_is_last() {
    grep "remote: " "$work/push.log" | tail -n 1 | grep -q "phonehome: build" ||
        fail "the verdict should have come after all of the build's output"
}

seconds_between() {
    first=$(sed -n "/$1/{s/ .*//p;q;}" "$work/push.log")
    last=$(sed -n "/$2/{s/ .*//p;q;}" "$work/push.log")
    echo $((last - first))
}

short() { git -C "$work/project" rev-parse --short "$1"; }

say() { printf '\n* %s\n' "$1"; }

fail() {
    printf '\ndemo failed: %s\n' "$1" >&2
    [ ! -s "$work/agent.log" ] || sed 's/^/agent: /' "$work/agent.log" >&2
    exit 1
}

# --- Before and after ---

clean_up() {
    ended_with=$?
    trap - EXIT
    trap '' HUP INT TERM
    stop_builder
    rm -rf "$work"
    exit "$ended_with"
}

# A builder is still there only when the demo was interrupted.
stop_builder() {
    pid=$(cat "$work/agent.pid" 2>/dev/null) || return 0
    is_agent "$pid" && kill -TERM "$pid" || return 0
    for _ in 1 2 3 4 5; do
        is_agent "$pid" || return 0
        sleep 1
    done
    kill -KILL "$pid" 2>/dev/null || true
}

is_agent() { [ "$(cat "/proc/$1/comm" 2>/dev/null)" = phonehome-agent ]; }

for tool in cargo git awk tar mktemp; do
    command -v "$tool" >/dev/null || { echo "demo failed: $tool is missing" >&2; exit 1; }
done
work=$(mktemp -d "${TMPDIR:-/tmp}/phonehome-demo.XXXXXX")
trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
# The hook keeps the log of a build there.
export TMPDIR="$work"
main
