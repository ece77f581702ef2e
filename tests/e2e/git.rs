//! A real `git push`: the build's output as `remote:` lines while it runs, its end as the push's, and pushers who leave.

mod repository;
mod sshd;

use std::path::Path;

use rustix::{
    fs::{FlockOperation, flock},
    process::{Signal, kill_process},
};

use self::{
    repository::{Repository, remote_lines},
    sshd::Sshd,
};
use crate::{
    harness::{Process, Stored, eventually, skipped},
    screen::assert_harmless,
};

/// Options that let a test look at the build afterwards.
const KEPT: &str = "--build pushed --data \"$E2E_SCENE/data\" --lock \"$E2E_SCENE/lock\"";

#[tokio::test]
async fn a_push_shows_the_build_live_and_in_order() {
    let repository = Repository::new();
    watch_a_push(&repository, |repository| repository.push()).await;
}

#[tokio::test]
async fn a_push_over_ssh_shows_the_build_live_and_in_order() {
    let repository = Repository::new();
    let Some(sshd) = Sshd::start(repository.scene()).await else { return };
    watch_a_push(&repository, |repository| repository.push_over(&sshd)).await;
}

#[tokio::test]
async fn a_failed_build_rejects_the_push() {
    let repository = Repository::new();
    reject_a_push(&repository, |repository| repository.push()).await;
}

#[tokio::test]
async fn a_failed_build_rejects_the_push_over_ssh() {
    let repository = Repository::new();
    let Some(sshd) = Sshd::start(repository.scene()).await else { return };
    reject_a_push(&repository, |repository| repository.push_over(&sshd)).await;
}

/// The launcher reads what is pushed where only it can: the objects are in quarantine until the hook says yes.
#[tokio::test]
async fn the_launcher_hands_over_what_is_pushed() {
    let repository = Repository::new();
    repository.install_launcher(
        "",
        "read -r old new ref; mkdir \"$E2E_SCENE/tree\"; git archive \"$new\" | tar -x -C \"$E2E_SCENE/tree\"",
        "cd \"$E2E_SCENE/tree\" && cat file && echo built",
    );
    repository.commit("contents of the first commit");
    let mut push = repository.push();
    assert_eq!(push.ended().await, 0);
    let told = push.stderr.all().await;
    assert_eq!(remote_lines(&told)[..2], ["contents of the first commit", "built"]);
}

#[tokio::test]
async fn a_pusher_who_is_killed_stops_the_build_and_frees_the_lock() {
    let repository = Repository::new();
    let reason = kill_a_push(&repository, |repository| repository.push(), &[]).await;
    assert_eq!(reason, "the pusher is gone");
}

/// As a Ctrl-C or a closed laptop has it: git and its ssh end together.
#[tokio::test]
async fn a_pusher_over_ssh_who_is_killed_stops_the_build_and_frees_the_lock() {
    let repository = Repository::new();
    let Some(sshd) = Sshd::start(repository.scene()).await else { return };
    let reason = kill_a_push(&repository, |repository| repository.push_over(&sshd), &[sshd::CLIENT]).await;
    assert_eq!(reason, "the pusher is gone");
}

/// The ssh of a killed git may live on for a while, and with it the whole connection.
#[tokio::test]
async fn a_pusher_whose_ssh_survives_him_stops_the_build_too() {
    let repository = Repository::new();
    let Some(sshd) = Sshd::start(repository.scene()).await else { return };
    let reason = kill_a_push(&repository, |repository| repository.push_over(&sshd), &[]).await;
    assert!(["the pusher is gone", "nobody has read the output for 30 s"].contains(&&*reason), "{reason}");
}

#[tokio::test]
async fn a_build_may_go_on_after_its_pusher_was_killed() {
    let repository = Repository::new();
    let gate = repository.scene().gate("gate");
    let script = format!("echo going; {}; {LOUD}; echo finished", gate.pass());
    repository.install(&format!("{KEPT} --on-hangup continue"), &script);
    repository.commit("one");
    let mut push = repository.push();
    push.stderr.shows("remote: going").await;
    push.signal(Signal::KILL);
    assert_eq!(push.ended().await, 137);
    gate.open();
    repository.scene().appears("wrote").await;
    let data = repository.scene().path("data");
    assert_eq!(Stored::verdict(&data, "pushed").await["verdict"], "succeeded");
    let stored = Stored::read(&data, "pushed", "main", 1);
    stored.assert_complete();
    assert!(stored.log.starts_with(b"going\nline 0,") && stored.log.ends_with(b"\nfinished\n"));
    eventually("the lock is free", || is_free(&repository.scene().path("lock"))).await;
}

#[tokio::test]
async fn a_pusher_who_pauses_delays_nothing_and_misses_nothing() {
    let repository = Repository::new();
    let gate = repository.scene().gate("gate");
    let script = format!("echo going; {}; {LOUD}", gate.pass());
    repository.install(KEPT, &script);
    repository.commit("one");
    let mut push = repository.push();
    push.stderr.shows("remote: going").await;
    push.signal(Signal::STOP);
    gate.open();
    repository.scene().appears("wrote").await; // far more than the pipes to the pusher hold
    Stored::verdict(&repository.scene().path("data"), "pushed").await;
    push.signal(Signal::CONT);
    assert_eq!(push.ended().await, 0);
    let told = push.stderr.all().await;
    let lines = remote_lines(&told);
    assert_eq!(lines[0], "going");
    assert_loud(&lines[1..]);
}

/// Takes the 30 s after which somebody who reads nothing is taken to be gone.
#[tokio::test]
async fn a_pusher_who_stalls_is_gone_after_a_while_and_the_build_never_waits_for_him() {
    let repository = Repository::new();
    let gate = repository.scene().gate("gate");
    let script = format!("{STOPPABLE} {}; {LOUD}; for i in $(seq 1200); do sleep 0.1; done", gate.pass());
    repository.install(KEPT, &script);
    repository.commit("one");
    let push = repository.push();
    push.stderr.shows("remote: going").await;
    push.signal(Signal::STOP);
    gate.open();
    repository.scene().appears("wrote").await;
    let data = repository.scene().path("data");
    assert!(!Stored::verdict_path(&data, "pushed").exists(), "the build is not stopped for a short pause");
    let verdict = Stored::verdict(&data, "pushed").await;
    assert_eq!(verdict["verdict"], "cancelled");
    assert_eq!(verdict["reason"], "nobody has read the output for 30 s");
    assert!(repository.scene().path("stopped").exists());
    Stored::read(&data, "pushed", "main", 1).assert_complete();
    eventually("the lock is free", || is_free(&repository.scene().path("lock"))).await;
}

#[tokio::test]
async fn a_build_cannot_drive_the_pushers_terminal() {
    let repository = Repository::new();
    let script = r#"printf 'start \033[31mred\033[0m\n\033[2J\033[1;1Hcleared\n'
        printf '\033]0;title\007nul\000after bell\007\n\302\2332J c1\n'
        printf '10%%\r20%%\r100%%\n'
        printf '\033]0;title\007err\000after\n' >&2
        printf 'no newline\033['"#;
    repository.install("--color always", script);
    repository.commit("one");
    let mut push = repository.push();
    assert_eq!(push.ended().await, 0);
    let told = push.stderr.all().await;
    assert_harmless(&told);
    let text = String::from_utf8(told.clone()).unwrap();
    assert!(text.contains("\x1b[31mred\x1b[0m"), "{text:?}");
    let lines = remote_lines(&told);
    // A NUL would make git drop what follows it.
    for line in ["cleared", "nulafter bell", "2J c1", "100%", "errafter", "no newline"] {
        assert!(lines.iter().any(|shown| shown == line), "{line} in {lines:?}");
    }
    assert!(lines.last().unwrap().contains("build succeeded; the log is complete"), "{lines:?}");
}

#[tokio::test]
async fn a_silent_build_is_said_to_be_alive() {
    let repository = Repository::new();
    let gate = repository.scene().gate("gate");
    repository.install("--keepalive 300ms", &gate.pass());
    repository.commit("one");
    let mut push = repository.push();
    push.stderr.shows("remote: phonehome: still building, 0 s without output").await;
    push.stderr.shows("remote: phonehome: still building, 1 s without output").await;
    gate.open();
    assert_eq!(push.ended().await, 0);
}

#[tokio::test]
async fn a_second_push_is_refused_while_the_first_is_built() {
    let repository = Repository::new();
    let gate = repository.scene().gate("gate");
    repository.install(KEPT, &format!("echo going; {}", gate.pass()));
    repository.commit("one");
    let mut first = repository.push();
    first.stderr.shows("remote: going").await;
    let mut second = repository.push_to("refs/heads/other");
    assert_eq!(second.ended().await, 1);
    let told = String::from_utf8(second.stderr.all().await).unwrap();
    assert!(told.contains("remote: phonehome: another push is being built: build pushed"), "{told}");
    assert_eq!(repository.tip("refs/heads/other"), None);
    gate.open();
    assert_eq!(first.ended().await, 0);
}

/// Writes a good megabyte.
const LOUD: &str = "i=0; while [ $i -lt 20000 ]; do echo \"line $i, which is as long as a line of a build may well be\"
    i=$((i + 1)); done; touch \"$E2E_SCENE/wrote\"";

fn assert_loud(lines: &[String]) {
    for (i, line) in lines.iter().take(20_000).enumerate() {
        assert_eq!(*line, format!("line {i}, which is as long as a line of a build may well be"));
    }
    assert_eq!(lines.len(), 20_001, "and one line of phonehome's own: {:?}", lines.last());
}

/// Writes down that it was told to stop, and how it ends then. What follows runs until that happens.
const STOPPABLE: &str = "trap 'echo stopping; touch \"$E2E_SCENE/stopped\"; exit 9' TERM; echo going;";

async fn watch_a_push(repository: &Repository, push: impl Fn(&Repository) -> Process) {
    let gate = repository.scene().gate("gate");
    let script = format!(
        "echo 'first line'; {}; i=0; while [ $i -lt 2000 ]; do echo \"line $i\"; i=$((i + 1)); done",
        gate.pass() // the build cannot end before the test has seen its first line
    );
    repository.install("", &script);
    let commit = repository.commit("one");
    let mut push = push(repository);
    push.stderr.shows("remote: first line").await;
    assert!(!push.has_ended());
    assert_eq!(repository.tip("refs/heads/main"), None, "the hook has not decided yet");
    gate.open();
    assert_eq!(push.ended().await, 0);
    let told = push.stderr.all().await;
    let expected = (0..2000).map(|i| format!("line {i}"));
    let expected: Vec<_> = ["first line".to_owned()].into_iter().chain(expected).collect();
    let mut lines = remote_lines(&told);
    let own_line = lines.pop().unwrap();
    let written = expected.join("\n") + "\n";
    let proof = format!("phonehome: build succeeded; the log is complete: {} bytes in ", written.len());
    let digest = format!(" BLAKE3 {}, 0 cuts survived", blake3::hash(written.as_bytes()));
    assert!(own_line.starts_with(&proof) && own_line.ends_with(&digest), "{own_line}");
    let differing = lines.iter().zip(&expected).find(|(line, expected)| line != expected);
    assert_eq!((lines.len(), differing), (expected.len(), None), "{}", told.escape_ascii());
    assert_eq!(repository.tip("refs/heads/main"), Some(commit));
}

async fn reject_a_push(repository: &Repository, push: impl Fn(&Repository) -> Process) {
    repository.install("", "echo fine");
    let good = repository.commit("good");
    assert_eq!(push(repository).ended().await, 0);
    assert_eq!(repository.tip("refs/heads/main"), Some(good.clone()));
    repository.install("", "echo broken >&2; exit 42");
    repository.commit("bad");
    let mut rejected = push(repository);
    assert_eq!(rejected.ended().await, 1);
    let told = rejected.stderr.all().await;
    let lines = remote_lines(&told);
    assert_eq!(lines[0], "broken");
    assert!(lines[1].contains("build failed: step main: exit code 42;"), "{lines:?}");
    let told = String::from_utf8(told).unwrap();
    assert!(told.contains("pre-receive hook declined"), "{told}");
    assert_eq!(repository.tip("refs/heads/main"), Some(good), "the branch has not moved");
}

/// Kills git and all who have one of these words in their command lines. Returns why the build was cancelled.
async fn kill_a_push(repository: &Repository, push: impl Fn(&Repository) -> Process, others: &[&str]) -> String {
    let script = format!("{STOPPABLE} for i in $(seq 1200); do sleep 0.1; done");
    repository.install(&format!("{KEPT} --keepalive 1s"), &script);
    repository.commit("one");
    let mut killed = push(repository);
    killed.stderr.shows("remote: going").await;
    let lock = repository.scene().path("lock");
    assert!(!is_free(&lock));
    killed.signal(Signal::KILL);
    for pid in others.iter().flat_map(|text| repository.scene().processes(text)) {
        kill_process(pid, Signal::KILL).unwrap_or(()); // git's end may have ended it
    }
    assert_eq!(killed.ended().await, 137);
    repository.scene().appears("stopped").await;
    let data = repository.scene().path("data");
    let verdict = Stored::verdict(&data, "pushed").await;
    assert_eq!(verdict["verdict"], "cancelled");
    Stored::read(&data, "pushed", "main", 1).assert_complete();
    eventually("the lock is free", || is_free(&lock)).await;
    assert_eq!(repository.tip("refs/heads/main"), None);
    repository.install("--lock \"$E2E_SCENE/lock\"", "echo again");
    assert_eq!(push(repository).ended().await, 0, "the next push is built");
    verdict["reason"].as_str().unwrap().to_owned()
}

/// Whether nobody holds the lock.
fn is_free(lock: &Path) -> bool {
    flock(std::fs::File::open(lock).unwrap(), FlockOperation::NonBlockingLockExclusive).is_ok()
}

/// Says that there was nothing to test with.
fn without(tool: &str) {
    skipped(&format!("there is no {tool} here"));
}
