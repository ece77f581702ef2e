//! The agent's options, as seen from both its ends.

use rustix::process::Signal;
use tokio::time::{Duration, Instant};

use crate::harness::{Hook, Mode, Process, Proxy, Scene, agent, skipped};

#[tokio::test]
async fn an_agent_whose_server_is_away_stays_no_longer_than_its_linger() {
    let hook = Hook::wait(&[]).await;
    let proxy = Proxy::to(hook.address(), Mode::Refuse, 0).await;
    for (linger, least) in [("0s", Duration::ZERO), ("1500ms", Duration::from_millis(1500))] {
        let started = Instant::now();
        let mut agent = hook.agent_through(&proxy, &["--linger", linger], "echo out; exit 5");
        assert_eq!(agent.ended().await, 5);
        let took = started.elapsed();
        assert!(took >= least && took < least + Duration::from_secs(10), "--linger {linger} took {took:?}");
        assert_eq!(agent.stdout.all().await, b"out\n");
        let own_log = String::from_utf8(agent.stderr.all().await).unwrap();
        assert!(own_log.contains("has not confirmed the end of the log"), "{own_log}");
    }
}

#[tokio::test]
async fn an_agent_whose_server_accepts_connections_and_says_nothing_does_not_stay_either() {
    let hook = Hook::wait(&[]).await;
    let proxy = Proxy::to(hook.address(), Mode::Stall, 0).await;
    let mut agent = hook.agent_through(&proxy, &["--linger", "500ms"], "exit 5");
    assert_eq!(agent.ended().await, 5);
}

#[tokio::test]
async fn term_ends_a_long_linger() {
    let hook = Hook::wait(&[]).await;
    let proxy = Proxy::to(hook.address(), Mode::Refuse, 0).await;
    let mut agent = hook.agent_through(&proxy, &["--linger", "10m", "--log-level", "info"], "exit 5");
    agent.stderr.shows("the command ended").await;
    agent.signal(Signal::TERM);
    assert_eq!(agent.ended().await, 5);
}

#[tokio::test]
async fn an_agent_does_not_stay_longer_than_delivery_takes() {
    let mut hook = Hook::wait(&[]).await;
    let started = Instant::now();
    let mut agent = hook.agent(&["--linger", "10m"], "echo built");
    assert_eq!((agent.ended().await, hook.ended().await.code), (0, 0));
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
}

#[tokio::test]
async fn merged_streams_keep_their_exact_order() {
    let script = "i=0; while [ $i -lt 1000 ]; do echo \"out $i\"; echo \"err $i\" >&2; i=$((i + 1)); done";
    let ended = Hook::run_agent(&[], &["--merge"], script).ended().await;
    let expected: String = (0..1000).map(|i| format!("out {i}\nerr {i}\n")).collect();
    assert!(ended.stdout() == expected, "{} bytes of {}", ended.stdout.len(), expected.len());
    assert!(!ended.stderr().contains("err"), "{}", ended.stderr());
}

#[tokio::test]
async fn output_is_copied_to_the_agents_own_streams_as_well() {
    let mut hook = Hook::wait(&[]).await;
    let mut agent = hook.agent(&[], "printf 'out\\0put'; printf 'err\\001or' >&2; exit 3");
    let ended = hook.ended().await;
    assert_eq!(agent.ended().await, 3);
    assert_eq!((&*agent.stdout.all().await, &*agent.stderr.all().await), (&b"out\0put"[..], &b"err\x01or"[..]));
    assert_eq!(ended.stdout, b"out\0put");
    assert!(ended.stderr.starts_with(b"err\x01or\n"));
}

#[tokio::test]
async fn nothing_is_copied_when_that_is_not_wanted() {
    let mut hook = Hook::wait(&[]).await;
    let mut agent = hook.agent(&["--tee", "off"], "echo out; echo err >&2");
    assert_eq!((hook.ended().await.stdout(), agent.ended().await), ("out\n".to_owned(), 0));
    assert_eq!((&*agent.stdout.all().await, &*agent.stderr.all().await), (&b""[..], &b""[..]));
}

#[tokio::test]
async fn a_closed_console_harms_neither_build_nor_log() {
    let mut hook = Hook::wait(&[]).await;
    let gate = hook.scene.gate("gate");
    let script = format!("echo going; {}; i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i + 1)); done", gate.pass());
    let mut agent = hook.agent(&[], &script);
    agent.stdout.shows("going\n").await;
    agent.stdout.stop_reading().await;
    agent.stderr.stop_reading().await;
    gate.open();
    let expected: String = (0..20_000).map(|i| format!("{i}\n")).collect();
    let ended = hook.ended().await;
    assert!(ended.stdout().strip_prefix("going\n") == Some(&*expected), "{}", ended.stderr());
    assert_eq!((ended.code, agent.ended().await), (0, 0));
}

#[tokio::test]
async fn a_token_may_come_from_a_file() {
    let mut hook = Hook::wait(&[]).await;
    let path = hook.scene.write("token", format!("{}\n", hook.variable("TOKEN")));
    let mut command = hook.agent_command(&["--token-file", path.to_str().unwrap()], "echo let in");
    let mut agent = Process::spawn(command.env_remove("PHONEHOME_TOKEN"));
    assert_eq!((hook.ended().await.stdout(), agent.ended().await), ("let in\n".to_owned(), 0));
}

#[tokio::test]
async fn the_command_sees_no_token() {
    let mut hook = Hook::wait(&[]).await;
    let token = hook.variable("TOKEN").to_owned();
    let mut agent = hook.agent(&["--tee", "off"], "env; tr '\\0' '\\n' </proc/self/environ");
    let environment = hook.ended().await.stdout();
    assert_eq!(agent.ended().await, 0);
    assert!(environment.contains("PHONEHOME_BUILD="), "what is no secret may be seen: {environment}");
    assert!(!environment.contains(&token) && !environment.contains("PHONEHOME_TOKEN"), "{environment}");
}

#[tokio::test]
async fn without_an_address_the_command_runs_unobserved_with_one_warning() {
    let scene = Scene::new();
    let script = "echo out; echo err >&2; exit 3";
    let mut agent = Process::spawn(scene.command(agent()).args(["--", "sh", "-c", script]));
    assert_eq!(agent.ended().await, 3);
    assert_eq!(agent.stdout.all().await, b"out\n");
    let stderr = String::from_utf8(agent.stderr.all().await).unwrap();
    assert_eq!((stderr.lines().count(), stderr.matches("unobserved").count()), (2, 1), "{stderr}");
}

#[tokio::test]
async fn a_bad_option_is_the_agents_own_error() {
    let scene = Scene::new();
    for options in [&["--no-such-option"][..], &["--url", "https://h", "--build", "b"], &["--url", "wss://h"]] {
        let mut agent = Process::spawn(scene.command(agent()).args(options).args(["--", "echo", "ran"]));
        assert_eq!(agent.ended().await, 125, "{options:?}");
        assert_eq!(agent.stdout.all().await, b"", "{options:?}");
    }
}

#[tokio::test]
async fn a_token_that_was_used_is_nowhere_in_the_agents_memory() {
    let mut hook = Hook::wait(&[]).await;
    let mut agent = hook.agent(&["--hold", "1h"], "echo out");
    assert_eq!(hook.ended().await.code, 0);
    agent.stderr.shows("holding").await;
    let token = hook.variable("TOKEN");
    match copies_in_memory(&agent, token.as_bytes()) {
        Ok(copies) => {
            assert_eq!(copies, 0);
            let build = hook.variable("BUILD").as_bytes();
            assert!(copies_in_memory(&agent, build).unwrap() > 0, "what is no secret is found");
        }
        Err(error) => skipped(&format!("an agent's memory cannot be read by this user: {error}")),
    }
    agent.signal(Signal::TERM);
    assert_eq!(agent.ended().await, 0);
}

/// How often `text` occurs in what a process has mapped and may write to (proc(5)).
fn copies_in_memory(process: &Process, text: &[u8]) -> std::io::Result<usize> {
    use std::{
        fs::{File, read_to_string},
        os::unix::fs::FileExt,
    };
    let pid = process.pid().as_raw_nonzero();
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let mut copies = 0;
    for line in read_to_string(format!("/proc/{pid}/maps"))?.lines() {
        let (range, rest) = line.split_once(' ').unwrap();
        if rest.starts_with("rw") {
            let (from, to) = range.split_once('-').unwrap();
            let [from, to] = [from, to].map(|number| u64::from_str_radix(number, 16).unwrap());
            let mut bytes = vec![0; usize::try_from(to - from).unwrap()];
            memory.read_exact_at(&mut bytes, from)?;
            copies += bytes.windows(text.len()).filter(|window| *window == text).count();
        }
    }
    Ok(copies)
}
