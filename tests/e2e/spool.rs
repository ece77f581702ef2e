//! The agent's spool: more output than memory while the server is away, agents that die, disks that fail.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use rustix::process::{Signal, geteuid};
use serde_json::Value;
use tokio::time::{Duration, Instant};

use crate::harness::{Hook, Mode, Process, Proxy, Scene, Stored, eventually, skipped};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_goes_on_while_the_network_is_away_and_nothing_is_missing() {
    let mut hook = Hook::wait(&[]).await;
    let spool = hook.scene.path("spool");
    let proxy = Proxy::to(hook.address(), Mode::Cut(100 * KIB..200 * KIB), 3).await;
    let gate = hook.scene.gate("gate");
    let script = format!("seq 1 50000; {}; seq 1 1000000; touch wrote; exit 6", gate.pass());
    let mut agent = hook.agent_through(&proxy, &options(&spool, &["--spool-memory", "1MiB"]), &script);
    eventually("the first connection breaks", || proxy.cut() > 0).await;
    proxy.set(Mode::Refuse);
    gate.open();
    hook.scene.appears("wrote").await;
    assert!(bytes(&spool) > 4 * MIB, "{} bytes in the spool", bytes(&spool));
    assert_eq!(mode(&spool.join(user_dir())), 0o700);
    proxy.set(Mode::Forward);
    let ended = hook.ended().await;
    assert!(ended.stdout() == lines(1..=50_000) + &lines(1..=1_000_000), "{}", ended.stderr());
    assert!(ended.stderr().contains("the log is complete"), "{}", ended.stderr());
    assert_eq!((ended.code, agent.ended().await), (6, 6));
    assert_eq!(agent.stderr.all().await, b"");
    assert_eq!(fs::read_dir(&spool).unwrap().count(), 0, "{:?}", files(&spool));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_agent_delivers_what_a_killed_one_left_before_its_own() {
    let mut hook = Hook::wait(&["--data", "data", "--build", "b"]).await;
    let (spool, data) = (hook.scene.path("spool"), hook.scene.path("data"));
    let proxy = Proxy::to(hook.address(), Mode::Cut(50 * KIB..100 * KIB), 5).await;
    let script = "seq 1 300000; touch wrote; exec sleep 120";
    let mut first = hook.agent_through(&proxy, &options(&spool, &["--spool-memory", "1MiB"]), script);
    eventually("the first connection breaks", || proxy.cut() > 0).await;
    proxy.set(Mode::Refuse);
    hook.scene.appears("wrote").await;
    first.signal(Signal::KILL);
    assert_eq!(first.ended().await, 137);
    assert!(bytes(&spool) > 0);
    let mut second = hook.agent(&options(&spool, &[]), "seq 5 9; exit 4");
    let ended = hook.ended().await;
    let (whole, log) = (lines(1..=300_000), fs::read(attempt(&data, 1).join("log")).unwrap());
    assert!(whole.as_bytes().starts_with(&log), "not a prefix");
    // What the killed agent had not read or not written down: a pipe, and what came within 200 ms.
    assert!(log.len() as u64 + 3 * MIB > whole.len() as u64 && log.len() as u64 > 100 * KIB, "{} bytes", log.len());
    assert!(!attempt(&data, 1).join("finished.json").exists());
    Stored::read(&data, "b", "main", 2).assert_complete();
    let [took_over] = &of_kind("took-over", &data, 2)[..] else { panic!("{:?}", events(&data, 2)) };
    assert_eq!((&took_over["event"], &took_over["finished"]), (&"took-over".into(), &false.into()));
    assert!(took_over["records"].as_u64().unwrap() > 0);
    assert!(ended.stdout == [&log[..], b"5\n6\n7\n8\n9\n"].concat(), "{}", ended.stderr());
    assert!(ended.stderr().contains("attempt 2 of step main: its builder was started again"), "{}", ended.stderr());
    assert_eq!((ended.code, second.ended().await), (4, 4));
    assert_eq!(fs::read_dir(&spool).unwrap().count(), 0, "{:?}", files(&spool));
}

/// Crash after crash without a server: every attempt is delivered, the oldest first.
#[tokio::test]
async fn several_attempts_may_wait() {
    let mut hook = Hook::wait(&["--data", "data", "--build", "b"]).await;
    let (spool, data) = (hook.scene.path("spool"), hook.scene.path("data"));
    let proxy = Proxy::to(hook.address(), Mode::Refuse, 0).await;
    for life in 1..=3 {
        let script = format!("echo life {life}; exec sleep 120");
        let mut agent = hook.agent_through(&proxy, &options(&spool, &[]), &script);
        let text = format!("life {life}\n");
        eventually("the line is in the spool", || contents(&spool).contains(&text)).await;
        agent.signal(Signal::KILL);
        agent.ended().await;
    }
    let mut last = hook.agent(&options(&spool, &[]), "echo life 4");
    let ended = hook.ended().await;
    assert_eq!((ended.code, ended.stdout()), (0, "life 1\nlife 2\nlife 3\nlife 4\n".to_owned()));
    assert_eq!((last.ended().await, of_kind("took-over", &data, 4).len()), (0, 3), "{:?}", events(&data, 4));
    assert_eq!(fs::read_dir(&spool).unwrap().count(), 0, "{:?}", files(&spool));
}

/// The network was fast enough for most, the agent died all the same: the server has more than the spool.
#[tokio::test]
async fn what_the_server_has_beyond_the_spool_is_no_contradiction() {
    let mut hook = Hook::wait(&["--data", "data", "--build", "b"]).await;
    let spool = hook.scene.path("spool");
    let proxy = Proxy::to(hook.address(), Mode::Refuse, 0).await;
    let gate = hook.scene.gate("gate");
    let script = format!("echo early; {}; echo late; exec sleep 120", gate.pass());
    let mut command = hook.agent_command(&options(&spool, &[]), &script);
    let url = hook.variable("URL").replace(&hook.address().to_string(), &proxy.address().to_string());
    // The files of delivered records stay: as if it had been killed just before it could remove them.
    let mut first = Process::spawn(command.env("PHONEHOME_URL", url).env("PHONEHOME_FAULT", "eio@1+:remove:*"));
    eventually("the line is in the spool", || contents(&spool).contains("early\n")).await;
    proxy.set(Mode::Forward);
    hook.process.stdout.shows("early\n").await;
    gate.open();
    hook.process.stdout.shows("late\n").await;
    first.signal(Signal::KILL);
    first.ended().await;
    assert!(contents(&spool).contains("early\n"));
    let mut second = hook.agent(&options(&spool, &[]), "echo again");
    let ended = hook.ended().await;
    assert_eq!((ended.code, ended.stdout()), (0, "early\nlate\nagain\n".to_owned()), "{}", ended.stderr());
    assert_eq!((second.ended().await, second.stderr.all().await), (0, Vec::new()));
    assert_eq!(fs::read_dir(&spool).unwrap().count(), 0, "{:?}", files(&spool));
}

#[tokio::test]
async fn an_end_that_could_not_be_delivered_is_delivered_by_the_next_agent() {
    let mut hook = Hook::wait(&["--steps", "main,other", "--data", "data", "--build", "b"]).await;
    let (spool, data) = (hook.scene.path("spool"), hook.scene.path("data"));
    let proxy = Proxy::to(hook.address(), Mode::Refuse, 0).await;
    let mut first = hook.agent_through(&proxy, &options(&spool, &["--linger", "300ms"]), "echo one; exit 7");
    assert_eq!(first.ended().await, 7);
    let mut second = hook.agent(&["--spool-dir", spool.to_str().unwrap()], "echo two; exit 3");
    assert_eq!((second.ended().await, second.stdout.all().await), (3, b"two\n".to_vec()));
    let told = text(&second.stderr.all().await);
    assert!(told.contains("refuses this log") && told.contains("4005"), "{told}");
    let stored = Stored::read(&data, "b", "main", 1);
    stored.assert_complete();
    assert_eq!((stored.log, attempt(&data, 2).exists()), (b"one\n".to_vec(), false));
    let mut other = hook.agent(&options(&spool, &["--step", "other"]), "exit 0");
    let ended = hook.ended().await;
    assert_eq!((ended.code, other.ended().await), (7, 0));
    assert_eq!(ended.stdout(), "[main] one\n");
    assert!(ended.stderr().contains("the log is complete"), "{}", ended.stderr());
    assert_eq!(fs::read_dir(&spool).unwrap().count(), 0, "{:?}", files(&spool));
}

/// A wrong token is nobody's fault who comes later.
#[tokio::test]
async fn what_is_refused_stays_for_an_agent_that_is_not() {
    let mut hook = Hook::wait(&[]).await;
    let spool = hook.scene.path("spool");
    let proxy = Proxy::to(hook.address(), Mode::Refuse, 0).await;
    let mut first = hook.agent_through(&proxy, &options(&spool, &["--linger", "0s"]), "echo first");
    assert_eq!(first.ended().await, 0);
    let mut command = hook.agent_command(&options(&spool, &[]), "echo second; exit 2");
    let mut second = Process::spawn(command.env("PHONEHOME_TOKEN", "wrong"));
    assert_eq!(second.ended().await, 2);
    let told = text(&second.stderr.all().await);
    assert!(told.contains("what an earlier agent left, it stays where it is"), "{told}");
    assert!(contents(&spool).contains("first\n"));
    let mut third = hook.agent(&options(&spool, &["--linger", "1s"]), "exit 3");
    assert_eq!((third.ended().await, hook.ended().await.stdout()), (3, "first\n".to_owned()));
}

/// A spool that was away while its successor lived comes too late, and holds nobody up.
#[tokio::test]
async fn what_a_newer_attempt_has_displaced_is_refused_and_harms_nobody() {
    let mut hook = Hook::wait(&["--build", "b"]).await;
    let spool = hook.scene.path("spool");
    let step = spool.join(user_dir()).join("b/main");
    let proxy = Proxy::to(hook.address(), Mode::Forward, 0).await;
    let gate = hook.scene.gate("gate");
    let script = format!("echo early; {}; echo late; exec sleep 120", gate.pass());
    let mut first = hook.agent_through(&proxy, &options(&spool, &[]), &script);
    hook.process.stdout.shows("early\n").await;
    proxy.set(Mode::Stall);
    gate.open();
    eventually("the line is in the spool", || contents(&spool).contains("late\n")).await;
    first.signal(Signal::KILL);
    first.ended().await;
    let aside = hook.scene.path("aside");
    fs::rename(&step, &aside).unwrap();
    let mut second = hook.agent(&options(&spool, &[]), "echo second; exec sleep 120");
    hook.process.stdout.shows("second\n").await;
    second.signal(Signal::KILL);
    second.ended().await;
    drop(fs::remove_dir_all(&step)); // it may have nothing in it, or not be there
    fs::rename(&aside, &step).unwrap();
    let mut third = hook.agent(&options(&spool, &[]), "echo third");
    let ended = hook.ended().await;
    assert_eq!((ended.code, ended.stdout()), (0, "early\nsecond\nthird\n".to_owned()));
    assert_eq!(third.ended().await, 0);
    let told = text(&third.stderr.all().await);
    assert!(told.contains("4002") && told.contains("it stays where it is"), "{told}");
    assert!(contents(&spool).contains("late\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_reaches_an_agent_whose_records_are_on_disk() {
    let mut hook = Hook::wait(&["--grace-period", "20s"]).await;
    let spool = hook.scene.path("spool");
    let proxy = Proxy::to(hook.address(), Mode::Cut(50 * KIB..100 * KIB), 5).await;
    let script = "trap 'echo stopping; exit 3' TERM; seq 1 500000; touch wrote; while :; do sleep 0.1; done";
    let mut agent = hook.agent_through(&proxy, &options(&spool, &["--spool-memory", "256KiB"]), script);
    eventually("the first connection breaks", || proxy.cut() > 0).await;
    proxy.set(Mode::Refuse);
    hook.scene.appears("wrote").await;
    assert!(bytes(&spool) > MIB);
    hook.signal(Signal::TERM);
    proxy.set(Mode::Forward);
    let ended = hook.ended().await;
    assert!(ended.stdout() == lines(1..=500_000) + "stopping\n", "{}", ended.stderr());
    assert!(ended.stderr().contains("the log is complete"), "{}", ended.stderr());
    assert_eq!((ended.code, agent.ended().await), (130, 3));
    assert_eq!(fs::read_dir(&spool).unwrap().count(), 0, "{:?}", files(&spool));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropped_output_leaves_head_and_tail_and_a_count_that_adds_up() {
    let mut hook = Hook::wait(&["--data", "data", "--build", "b"]).await;
    let (spool, data) = (hook.scene.path("spool"), hook.scene.path("data"));
    let proxy = Proxy::to(hook.address(), Mode::Refuse, 0).await;
    let flags = ["--overflow", "drop", "--spool-memory", "1MiB", "--spool-limit", "2MiB"];
    let script = "seq 1 2000000; touch wrote; exit 3";
    let mut agent = hook.agent_through(&proxy, &options(&spool, &flags), script);
    hook.scene.appears("wrote").await;
    assert!(bytes(&spool) <= 2 * MIB, "{} bytes in the spool", bytes(&spool));
    proxy.set(Mode::Forward);
    let ended = hook.ended().await;
    let (whole, told) = (lines(1..=2_000_000), ended.stderr());
    let missing: usize = of_kind("gap", &data, 1).iter().map(|gap| gap["bytes"].as_u64().unwrap() as usize).sum();
    assert_eq!(ended.stdout.len() + missing, whole.len(), "{told}");
    let head = ended.stdout.iter().zip(whole.as_bytes()).take_while(|(one, other)| one == other).count();
    assert!(head as u64 > 2 * MIB + 256 * KIB, "only {head} bytes at the beginning");
    assert!(whole.as_bytes().ends_with(&ended.stdout[head..]), "the rest is not the end");
    assert!(ended.stdout.len() - head > 100 * KIB as usize, "only {} bytes at the end", ended.stdout.len() - head);
    let [gap] = &of_kind("gap", &data, 1)[..] else { panic!("{:?}", events(&data, 1)) };
    assert_eq!((&gap["event"], &gap["stream"], &gap["cause"]), (&"gap".into(), &"stdout".into(), &"spool-full".into()));
    assert!(told.contains(&format!("{missing} bytes of stdout of step main are missing here: spool-full")), "{told}");
    assert!(told.contains(&format!("the log is not complete: step main: {missing} bytes were dropped")), "{told}");
    assert_eq!((ended.code, agent.ended().await), (3, 3));
    let said = text(&agent.stderr.all().await);
    assert_eq!(said.matches("some of it is left out of the log").count(), 1, "{said}");
}

/// The disk has room for all: nothing may be dropped just because it is slower than the command.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_dropped_that_the_disk_has_room_for() {
    let mut hook = Hook::wait(&[]).await;
    let spool = hook.scene.path("spool");
    let proxy = Proxy::to(hook.address(), Mode::Refuse, 0).await;
    let flags = ["--overflow", "drop", "--spool-memory", "256KiB"];
    let mut agent = hook.agent_through(&proxy, &options(&spool, &flags), "seq 1 3000000; touch wrote");
    hook.scene.appears("wrote").await;
    proxy.set(Mode::Forward);
    let ended = hook.ended().await;
    assert!(ended.stdout() == lines(1..=3_000_000), "{}", ended.stderr());
    assert_eq!((ended.code, agent.ended().await), (0, 0));
}

#[tokio::test]
async fn a_blocked_command_goes_on_or_ends_when_the_server_is_away_for_too_long() {
    let hook = Hook::wait(&[]).await;
    let proxy = Proxy::to(hook.address(), Mode::Refuse, 0).await;
    let script = "seq 1 2000000; touch \"$E2E_SCENE/wrote\"; exit 5";
    for (wish, code) in [("continue", 5), ("stop", 143)] {
        let started = Instant::now();
        let flags = ["--tee", "off", "--linger", "0s", "--spool-memory", "256KiB"];
        let flags = [&flags[..], &["--offline-limit", "2s", "--on-offline", wish]].concat();
        let mut agent = hook.agent_through(&proxy, &flags, script);
        assert_eq!(agent.ended().await, code, "{wish}");
        let took = started.elapsed();
        assert!(took >= Duration::from_secs(2) && took < Duration::from_secs(30), "{wish} took {took:?}");
        assert_eq!(hook.scene.path("wrote").exists(), code == 5);
        drop(fs::remove_file(hook.scene.path("wrote"))); // it is there once
        let told = text(&agent.stderr.all().await);
        assert_eq!(told.contains("out of reach for --offline-limit"), code == 143, "{told}");
    }
}

#[tokio::test]
async fn required_delivery_changes_the_exit_code() {
    let mut hook = Hook::wait(&["--steps", "whole,cut"]).await;
    let proxy = Proxy::to(hook.address(), Mode::Refuse, 0).await;
    let required = ["--tee", "off", "--require-delivery"];
    let away = [&required[..], &["--linger", "300ms", "--step", "whole"]].concat();
    let mut agent = hook.agent_through(&proxy, &away, "exit 5");
    assert_eq!(agent.ended().await, 125);
    let told = text(&agent.stderr.all().await);
    assert!(told.contains("ended with exit code 5, but its log was not delivered"), "{told}");

    let mut agent = hook.agent(&[&required[..], &["--step", "whole"]].concat(), "exit 6");
    assert_eq!(agent.ended().await, 6);

    let flags = ["--step", "cut", "--overflow", "drop", "--spool-memory", "256KiB"];
    let script = "seq 1 1000000; touch \"$E2E_SCENE/wrote\"";
    let mut agent = hook.agent_through(&proxy, &[&required[..], &flags].concat(), script);
    hook.scene.appears("wrote").await;
    proxy.set(Mode::Forward);
    assert_eq!(agent.ended().await, 125);
    let told = text(&agent.stderr.all().await);
    assert!(told.contains("bytes were dropped before they were sent"), "{told}");
    assert_eq!(hook.ended().await.code, 6);

    let scene = Scene::new();
    let mut command = scene.command(crate::harness::agent());
    let mut agent = Process::spawn(command.args(["--require-delivery", "--", "sh", "-c", "touch ran"]));
    assert_eq!((agent.ended().await, scene.path("ran").exists()), (125, false));
    let told = text(&agent.stderr.all().await);
    assert!(told.contains("--require-delivery") && told.contains("--url"), "{told}");
}

#[tokio::test]
async fn a_directory_that_cannot_be_used_is_named_and_harms_no_build() {
    let user = user_dir();
    type Prepare = fn(&Path, &str);
    let cases: [(&str, Prepare, &str); 7] = [
        ("link", |spool, _| symlink(spool.parent().unwrap(), spool).unwrap(), "is a symbolic link"),
        ("link-within", |spool, user| symlink("/tmp", made(spool).join(user)).unwrap(), "is a symbolic link"),
        ("dangling", |spool, _| symlink("/nowhere/at/all", spool).unwrap(), "cannot be used"),
        ("file", |spool, _| fs::write(spool, "precious").unwrap(), "Not a directory"),
        ("file-within", |spool, user| fs::write(made(spool).join(user), "precious").unwrap(), "it is not a directory"),
        ("open", |spool, user| open_to_the_group(&made(spool).join(user)), "others may write to it; use chmod 700"),
        ("foreign", |spool, user| foreign(&made(spool).join(user)), "5-notes does not belong there; remove it"),
    ];
    for (name, prepare, why) in cases {
        let scene = Scene::new();
        let spool = scene.path(name);
        prepare(&spool, &user);
        is_told_and_harmless(scene, &spool, why).await;
    }
}

#[tokio::test]
async fn a_read_only_file_system_is_named_and_harms_no_build() {
    let scene = Scene::new();
    let spool = scene.path("read-only");
    let Some(_mounted) = Mounted::new(&spool, "size=1m,ro") else { return skipped("a tmpfs cannot be mounted") };
    is_told_and_harmless(scene, &spool, "Read-only file system").await;
}

/// With one warning, and what it says.
async fn is_told_and_harmless(scene: Scene, spool: &Path, why: &str) {
    let mut hook = Hook::wait_in(scene, &["--build", "b"]).await;
    let mut agent = hook.agent(&options(spool, &[]), "echo built; exit 3");
    let ended = hook.ended().await;
    assert_eq!((ended.code, ended.stdout(), agent.ended().await), (3, "built\n".to_owned(), 3), "{spool:?}");
    let told = text(&agent.stderr.all().await);
    assert_eq!(told.lines().count(), 1, "{told}");
    assert!(
        told.contains(why) && told.contains(spool.to_str().unwrap()) && told.contains("memory has to do"),
        "{told}"
    );
}

#[tokio::test]
async fn steps_and_users_share_a_volume() {
    let mut hook = Hook::wait(&["--steps", "one,two,three"]).await;
    let spool = hook.scene.path("volume");
    fs::create_dir(&spool).unwrap();
    fs::set_permissions(hook.scene.dir(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&spool, fs::Permissions::from_mode(0o1777)).unwrap();
    let proxy = Proxy::to(hook.address(), Mode::Refuse, 0).await;
    let url = hook.variable("URL").replace(&hook.address().to_string(), &proxy.address().to_string());
    let nobody = if geteuid().is_root() { 65534 } else { geteuid().as_raw() };
    let steps = [("one", geteuid().as_raw()), ("two", geteuid().as_raw()), ("three", nobody)];
    let mut first = Vec::new();
    for (step, uid) in steps {
        let script = format!("echo first of {step}; exec sleep 120");
        let mut command = hook.agent_command(&options(&spool, &["--step", step]), &script);
        first.push(Process::spawn(command.env("PHONEHOME_URL", &url).uid(uid)));
    }
    for (mut agent, (step, _)) in first.into_iter().zip(steps) {
        let text = format!("first of {step}\n");
        eventually("the line is in the spool", || contents(&spool).contains(&text)).await;
        agent.signal(Signal::KILL);
        agent.ended().await;
    }
    for (step, uid) in steps {
        let mut command = hook.agent_command(&options(&spool, &["--step", step]), &format!("echo second of {step}"));
        let mut agent = Process::spawn(command.uid(uid));
        assert_eq!((agent.ended().await, text(&agent.stderr.all().await)), (0, String::new()));
    }
    let expected = ["one", "two", "three"].map(|step| format!("[{step}] first of {step}\n[{step}] second of {step}\n"));
    assert_eq!(hook.ended().await.stdout(), expected.concat());
    assert_eq!(fs::read_dir(&spool).unwrap().count(), 0, "{:?}", files(&spool));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_may_die_at_any_write() {
    dies_at("kill", "write").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_may_die_within_any_write() {
    dies_at("torn", "write").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_may_die_as_it_makes_or_cuts_any_file() {
    for operation in ["open", "mkdir", "rename", "truncate"] {
        dies_at("kill", operation).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_may_die_as_it_removes_any_file() {
    dies_at("kill", "remove").await;
}

/// Kills an agent at its first operation of a kind, then another at its second, until none is left; each time the next
/// agent has to make the best of it.
async fn dies_at(action: &str, operation: &str) {
    if std::env::var_os("PHONEHOME_BIN_DIR").is_some() {
        return skipped("only programs that were built for tests fail on demand");
    }
    for turn in 1.. {
        let fault = format!("{action}@{turn}:{operation}:*");
        if !dies(&fault).await {
            assert!(turn > 1, "{fault}: there is no such operation");
            return;
        }
        assert!(turn < 60, "{fault}: that is more than it should need");
    }
}

/// Says whether the fault came to pass.
async fn dies(fault: &str) -> bool {
    let mut hook = Hook::wait(&["--no-tls", "--data", "data", "--build", "b"]).await;
    let (spool, data) = (hook.scene.path("spool"), hook.scene.path("data"));
    let proxy = Proxy::to(hook.address(), Mode::Refuse, 0).await;
    let url = hook.variable("URL").replace(&hook.address().to_string(), &proxy.address().to_string());
    let flags = options(&spool, &["--spool-memory", "256KiB", "--spool-limit", "1MiB", "--linger", "20s"]);
    let script = "echo first; seq 1 80000; touch wrote; exit 3";
    let mut first = hook.agent_command(&flags, script);
    let mut first = Process::spawn(first.env("PHONEHOME_URL", url).env("PHONEHOME_FAULT", fault));
    let mut wrote = false;
    eventually("the first agent has written or died", || {
        wrote = hook.scene.path("wrote").exists();
        wrote || first.has_ended()
    })
    .await;
    if wrote {
        let finished = || files(&spool).keys().any(|path| path.ends_with("finished"));
        eventually("the end is in the spool", || first.has_ended() || finished()).await;
    }
    proxy.set(Mode::Forward);
    let has_died = match first.ended().await {
        137 => true,
        3 => false,
        code => panic!("{fault}: the first agent ended with {code}: {}", text(&first.stderr.all().await)),
    };
    let mut told = String::new();
    if has_died {
        let mut second = hook.agent(&options(&spool, &["--linger", "3s"]), "echo second; exit 4");
        assert_eq!(second.ended().await, 4, "{fault}");
        told = text(&second.stderr.all().await);
    }
    let ended = hook.ended().await;
    let all = "first\n".to_owned() + &lines(1..=80_000);
    let last = (1..=2).rev().find(|number| attempt(&data, *number).exists()).unwrap();
    let stored = Stored::read(&data, "b", "main", last);
    stored.assert_complete();
    assert!(ended.stderr().contains("the log is complete"), "{fault}: {}", ended.stderr());
    if ended.code == 3 {
        assert!(stored.log == all.as_bytes() && last == 1, "{fault}: {told}");
        return has_died;
    }
    assert_eq!((ended.code, text(&stored.log)), (4, "second\n".to_owned()), "{fault}: {told}");
    let is_torn = fault.starts_with("torn") && told.contains("none of them is whole") && told.lines().count() == 1;
    assert!(told.is_empty() || is_torn, "{fault}: {told}");
    if last == 2 {
        let log = fs::read(attempt(&data, 1).join("log")).unwrap();
        assert!(all.as_bytes().starts_with(&log), "{fault}: not a prefix");
    }
    assert_eq!(fs::read_dir(&spool).map_or(0, Iterator::count), 0, "{fault}: {:?}", files(&spool));
    has_died
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_may_die_while_it_delivers_what_another_left() {
    if std::env::var_os("PHONEHOME_BIN_DIR").is_some() {
        return skipped("only programs that were built for tests fail on demand");
    }
    for operation in ["mkdir", "open", "remove"] {
        let mut turn = 1;
        while second_dies(&format!("kill@{turn}:{operation}:*")).await {
            turn += 1;
            assert!(turn < 60, "{operation}: that is more than it should need");
        }
        assert!(turn > 1, "{operation}: there is no such operation");
    }
}

/// Says whether the fault came to pass.
async fn second_dies(fault: &str) -> bool {
    let mut hook = Hook::wait(&["--no-tls"]).await;
    let spool = hook.scene.path("spool");
    let proxy = Proxy::to(hook.address(), Mode::Refuse, 0).await;
    let flags = options(&spool, &["--spool-memory", "256KiB", "--spool-limit", "1MiB", "--linger", "5s"]);
    let mut first = hook.agent_through(&proxy, &flags, "seq 1 80000; exec sleep 120");
    let all = lines(1..=80_000);
    eventually("all is in the spool", || bytes(&spool) > all.len() as u64).await;
    first.signal(Signal::KILL);
    first.ended().await;
    let mut command = hook.agent_command(&flags, "echo second; exit 4");
    let mut second = Process::spawn(command.env("PHONEHOME_FAULT", fault));
    let has_died = second.ended().await == 137;
    let mut last = second;
    if has_died {
        last = hook.agent(&flags, "echo third; exit 5");
        last.ended().await;
    }
    let ended = hook.ended().await;
    assert!(ended.stderr().contains("the log is complete"), "{fault}: {}", ended.stderr());
    // The second command may not have come to write anything, or not have been read.
    let printed = ended.stdout().strip_prefix(&all).map(str::to_owned).expect("the first attempt is complete");
    match ended.code {
        4 => assert_eq!(printed, "second\n", "{fault}"), // it may have died with nothing left to deliver
        5 => assert!(has_died && ["third\n", "second\nthird\n"].contains(&&*printed), "{fault}: {printed}"),
        code => panic!("{fault}: {code}"),
    }
    if ended.code == 5 || !has_died {
        assert_eq!(text(&last.stderr.all().await), "", "{fault}");
        assert_eq!(fs::read_dir(&spool).map_or(0, Iterator::count), 0, "{fault}: {:?}", files(&spool));
    }
    has_died
}

/// In the middle of a write, as file systems do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_system_that_gets_full_costs_memory_only() {
    let scene = Scene::new();
    let small = scene.path("small");
    let Some(_mounted) = Mounted::new(&small, "size=1m") else { return skipped("a tmpfs cannot be mounted") };
    let mut hook = Hook::wait_in(scene, &[]).await;
    let proxy = Proxy::to(hook.address(), Mode::Refuse, 0).await;
    let flags = options(&small, &["--spool-memory", "512KiB"]);
    let mut agent = hook.agent_through(&proxy, &flags, "seq 1 500000; exit 3");
    agent.stderr.shows("memory has to do").await;
    assert!(bytes(&small) > 500 * KIB, "{} bytes", bytes(&small));
    proxy.set(Mode::Forward);
    let ended = hook.ended().await;
    assert!(ended.stdout() == lines(1..=500_000), "{}", ended.stderr());
    assert_eq!((ended.code, agent.ended().await), (3, 3));
    assert!(ended.stderr().contains("the log is complete"), "{}", ended.stderr());
    assert_eq!(fs::read_dir(&small).unwrap().count(), 0, "{:?}", files(&small));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_takes_nothing_costs_memory_only() {
    if std::env::var_os("PHONEHOME_BIN_DIR").is_some() {
        return skipped("only programs that were built for tests fail on demand");
    }
    for fault in ["enospc@1+:write:*", "eio@1+:write:*", "enospc@2+:write:*", "eio@1+:mkdir:*", "enospc@1+:open:*"] {
        let mut hook = Hook::wait(&[]).await;
        let spool = hook.scene.path("spool");
        let proxy = Proxy::to(hook.address(), Mode::Refuse, 0).await;
        let url = hook.variable("URL").replace(&hook.address().to_string(), &proxy.address().to_string());
        let script = "seq 1 20000; touch fitted; seq 1 80000; exit 3";
        let mut command = hook.agent_command(&options(&spool, &["--spool-memory", "256KiB"]), script);
        let mut agent = Process::spawn(command.env("PHONEHOME_URL", url).env("PHONEHOME_FAULT", fault));
        hook.scene.appears("fitted").await;
        agent.stderr.shows("memory has to do").await;
        proxy.set(Mode::Forward);
        let ended = hook.ended().await;
        assert!(ended.stdout() == lines(1..=20_000) + &lines(1..=80_000), "{fault}: {}", ended.stderr());
        assert_eq!((ended.code, agent.ended().await), (3, 3));
        assert!(ended.stderr().contains("the log is complete"), "{fault}: {}", ended.stderr());
        let told = text(&agent.stderr.all().await);
        assert_eq!(told.lines().count(), 1, "{fault}: {told}");
        assert!(told.contains(spool.to_str().unwrap()), "{fault}: {told}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_megabytes_need_no_memory() {
    const LEN: u64 = 200 * 1000 * 1000;
    let mut hook = Hook::wait(&["--no-tls"]).await;
    let spool = hook.scene.path("spool");
    let proxy = Proxy::to(hook.address(), Mode::Refuse, 8).await;
    let script = format!("head -c {LEN} /dev/zero | tr '\\0' x; exit 2");
    let mut agent = hook.agent_through(&proxy, &options(&spool, &["--spool-memory", "1MiB"]), &script);
    let status = format!("/proc/{}/status", agent.pid().as_raw_nonzero());
    let mut peak = 0;
    let mut measure = |agent: &mut Process| {
        let status = fs::read_to_string(&status).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.strip_suffix("kB"));
        peak = line.map_or(peak, |kib| kib.trim().parse::<u64>().unwrap());
        agent.has_ended()
    };
    eventually("half of it is in the spool", || measure(&mut agent) || bytes(&spool) > LEN / 2).await;
    proxy.set(Mode::Cut(5 * MIB..40 * MIB));
    eventually("the agent ends", || measure(&mut agent)).await;
    let ended = hook.ended().await;
    assert_eq!(ended.stdout.len() as u64, LEN, "{}", ended.stderr());
    assert!(ended.stderr().contains("the log is complete"), "{}", ended.stderr());
    assert_eq!((ended.code, agent.ended().await), (2, 2));
    assert!(peak > 1024 && peak < 32 * 1024, "{peak} KiB");
}

/// With these flags and a spool in `spool`, and no copy of the output.
fn options<'a>(spool: &'a Path, flags: &[&'a str]) -> Vec<&'a str> {
    let linger = if flags.contains(&"--linger") { &[][..] } else { &["--linger", "1m"] };
    [&["--tee", "off", "--spool-dir", spool.to_str().unwrap()], linger, flags].concat()
}

fn user_dir() -> String {
    format!("phonehome-{}", geteuid().as_raw())
}

fn made(dir: &Path) -> &Path {
    fs::create_dir(dir).unwrap();
    dir
}

fn open_to_the_group(dir: &Path) {
    fs::set_permissions(made(dir), fs::Permissions::from_mode(0o770)).unwrap();
}

/// Puts something into the directory of step main, whatever the build.
fn foreign(dir: &Path) {
    let step = dir.join("b/main");
    fs::create_dir_all(&step).unwrap();
    for dir in [dir, &dir.join("b"), &step] {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).unwrap();
    }
    fs::write(step.join("5-notes"), "precious").unwrap();
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o777
}

fn attempt(data: &Path, number: u32) -> PathBuf {
    data.join("builds/b/main").join(number.to_string())
}

fn events(data: &Path, number: u32) -> Vec<Value> {
    let events = fs::read_to_string(attempt(data, number).join("events")).unwrap();
    events.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Those of one kind.
fn of_kind(kind: &str, data: &Path, number: u32) -> Vec<Value> {
    events(data, number).into_iter().filter(|event| event["event"] == kind).collect()
}

/// All files below a directory, with their sizes. They come and go.
fn files(dir: &Path) -> BTreeMap<PathBuf, u64> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(found) if found.is_dir() => all.append(&mut files(&entry.path())),
            Ok(found) => drop(all.insert(entry.path(), found.len())),
            Err(_) => {}
        }
    }
    all
}

fn bytes(dir: &Path) -> u64 {
    files(dir).values().sum()
}

fn contents(dir: &Path) -> String {
    files(dir).keys().map(|path| text(&fs::read(path).unwrap_or_default())).collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What `seq` writes.
fn lines(numbers: std::ops::RangeInclusive<u64>) -> String {
    numbers.fold(String::new(), |all, number| all + &number.to_string() + "\n")
}

/// A file system of a test's own.
struct Mounted(PathBuf);

impl Mounted {
    fn new(path: &Path, options: &str) -> Option<Self> {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(made(path)).stderr(std::process::Stdio::null());
        mount.status().is_ok_and(|status| status.success()).then(|| Self(path.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(&self.0).status()); // there is nothing left to do about it
    }
}
