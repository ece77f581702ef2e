//! The network breaks; the log does not.

use phonehome_proto::frame::FinishedAck;
use phonehome_server::{Config, Durability, Expected, Server};

use crate::harness::{Caller, Hook, Mode, Process, Proxy, Random, Records, Scene, eventually, patiently};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// Every connection breaks, most of them in the middle of a message, half of them with a reset.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_four_megabytes_survive_a_network_that_cuts_every_connection() {
    let scene = Scene::new();
    let source = Random::new(24).bytes(24 * MIB as usize);
    scene.write("source", &source);
    let mut hook = Hook::wait_in(scene, &[]).await;
    let proxy = Proxy::to(hook.address(), Mode::Cut(64 * KIB..2 * MIB), 7).await;
    let mut agent = hook.agent_through(&proxy, &["--tee", "off"], "cat source; exit 7");
    let ended = hook.ended().await;
    assert_eq!(ended.stdout.len(), source.len(), "{}", ended.stderr());
    assert!(ended.stdout == source, "the same number of bytes, but not the same bytes");
    assert_eq!(ended.code, 7);
    let proof = format!("the log is complete: {} bytes in ", source.len());
    assert!(ended.stderr().contains(&proof), "{}", ended.stderr());
    assert!(ended.stderr().contains(&format!("BLAKE3 {}, ", blake3::hash(&source))), "{}", ended.stderr());
    assert!(!ended.stderr().contains(", 0 cuts survived"), "{}", ended.stderr());
    assert_eq!(agent.ended().await, 7);
    assert!(proxy.cut() >= 12, "only {} cuts", proxy.cut());
}

/// Cut within the handshake, the hello and the first records as well.
#[tokio::test]
async fn a_log_gets_through_cuts_after_a_few_bytes() {
    let script = "i=0; while [ $i -lt 9000 ]; do echo \"line $i\"; i=$((i + 1)); done; exit 3";
    let expected: String = (0..9000).map(|i| format!("line {i}\n")).collect();
    for seed in 0..4 {
        let mut hook = Hook::wait(&[]).await;
        let proxy = Proxy::to(hook.address(), Mode::Cut(1..6 * KIB), seed).await;
        let mut agent = hook.agent_through(&proxy, &["--tee", "off"], script);
        proxy.accepted(4).await;
        proxy.set(Mode::Forward);
        let ended = hook.ended().await;
        assert_eq!((ended.code, ended.stdout()), (3, expected.clone()), "seed {seed}: {}", ended.stderr());
        assert_eq!(agent.ended().await, 3);
    }
}

#[tokio::test]
async fn a_build_starts_before_the_server_is_there_and_loses_nothing() {
    let mut hook = Hook::wait(&[]).await;
    let proxy = Proxy::to(hook.address(), Mode::Refuse, 0).await;
    let script = "echo early; echo early too >&2; touch \"$E2E_SCENE/wrote\"; exit 2";
    let mut agent = hook.agent_through(&proxy, &["--tee", "off"], script);
    hook.scene.appears("wrote").await;
    proxy.accepted(2).await;
    proxy.set(Mode::Forward);
    let ended = hook.ended().await;
    assert_eq!((ended.code, ended.stdout()), (2, "early\n".to_owned()));
    assert!(ended.stderr().starts_with("early too\n"), "{}", ended.stderr());
    assert_eq!(agent.ended().await, 2);
}

#[tokio::test]
async fn a_command_may_wait_for_the_server_first() {
    let mut hook = Hook::wait(&[]).await;
    let proxy = Proxy::to(hook.address(), Mode::Refuse, 0).await;
    let script = "touch \"$E2E_SCENE/started\"; echo started";
    let mut agent = hook.agent_through(&proxy, &["--start", "connected"], script);
    proxy.accepted(3).await;
    assert!(!hook.scene.path("started").exists(), "three refusals are no welcome");
    proxy.set(Mode::Forward);
    assert_eq!(hook.ended().await.stdout(), "started\n");
    assert_eq!(agent.ended().await, 0);
}

/// More than all buffers on the way hold: the build waits, the agent's memory does not grow, and nothing is missing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_stalls_delays_the_build_and_loses_nothing() {
    let scene = Scene::new();
    let source = Random::new(12).bytes(12 * MIB as usize);
    scene.write("source", &source);
    let mut hook = Hook::wait_in(scene, &[]).await;
    let proxy = Proxy::to(hook.address(), Mode::Forward, 0).await;
    let script = "echo going; read -r _ <gate; cat source; touch wrote; echo done >&2";
    let gate = hook.scene.gate("gate");
    let options = ["--tee", "off", "--spool-memory", "1MiB"];
    let mut agent = hook.agent_through(&proxy, &options, script);
    hook.process.stdout.shows("going\n").await;
    proxy.set(Mode::Stall);
    gate.open();
    proxy.stalled().await;
    assert!(!hook.scene.path("wrote").exists(), "12 MiB do not fit into a spool of 1 MiB");
    proxy.set(Mode::Forward);
    let ended = hook.ended().await;
    assert!(ended.stdout.strip_prefix(b"going\n") == Some(&source), "{}", ended.stderr());
    assert_eq!((ended.code, agent.ended().await), (0, 0));
}

/// As after a restart: the server listens, and is told a moment later which builds there are.
#[tokio::test]
async fn an_agent_that_calls_before_its_build_is_expected_comes_back() {
    let scene = Scene::new();
    let listen = "127.0.0.1:0".parse().unwrap();
    let config = Config { listen, tls: false, data: scene.path("data"), durability: Durability::Os };
    let server = Server::spawn(config).await.unwrap();
    let url = server.url("127.0.0.1", server.local_addr().port());
    let mut agent = scene.command(crate::harness::agent());
    agent.args(["--tee", "off", "--url", &url, "--build", "early"]).env("PHONEHOME_TOKEN", "known-to-both");
    let mut agent = Process::spawn(agent.args(["--", "sh", "-c", "echo early; exit 3"]));
    eventually("it was turned away", || server.refusals().is_some()).await;
    let token = Some("known-to-both".to_owned());
    let build = server.expect(Expected { token, ..Expected::new("early".parse().unwrap()) }).unwrap();
    let verdict = patiently("a verdict", build.verdict()).await;
    assert_eq!((verdict.exit_code(), verdict.incomplete), (3, None));
    assert_eq!(agent.ended().await, 3);
}

/// It takes the time that the rate allows, and nothing else changes.
#[tokio::test]
async fn a_build_above_its_rate_is_slowed_and_complete() {
    let scene = Scene::new();
    let listen = "127.0.0.1:0".parse().unwrap();
    let config = Config { listen, tls: false, data: scene.path("data"), durability: Durability::Os };
    let server = Server::spawn(config).await.unwrap();
    let (token, rate) = (Some("secret".to_owned()), Some(256 * 1024));
    let build = server.expect(Expected { token, rate, ..Expected::new("fast".parse().unwrap()) }).unwrap();
    let url = server.url("127.0.0.1", server.local_addr().port());
    let mut agent = scene.command(crate::harness::agent());
    agent.args(["--tee", "off", "--spool-memory", "256KiB", "--url", &url, "--build", "fast"]);
    agent.env("PHONEHOME_TOKEN", "secret");
    let start = tokio::time::Instant::now();
    let mut agent = Process::spawn(agent.args(["--", "sh", "-c", "head -c 1500000 /dev/zero; exit 3"]));
    let verdict = patiently("a verdict", build.verdict()).await;
    assert_eq!((verdict.exit_code(), verdict.incomplete, verdict.steps[0].bytes), (3, None, 1_500_000));
    assert!(start.elapsed() > std::time::Duration::from_secs(1), "{:?}", start.elapsed());
    assert_eq!(agent.ended().await, 3);
}

/// An agent that was away for a while is not lost.
#[tokio::test]
async fn an_agent_that_comes_back_in_time_goes_on() {
    let mut hook = Hook::wait(&["--no-tls", "--lost-timeout", "1m"]).await;
    let (mut caller, _) = Caller::welcomed(&hook, 1).await;
    let mut records = Records::of(&["before\n"]);
    caller.send(records.frame()).await;
    hook.process.stdout.shows("before\n").await;
    drop(caller);
    records.push("after\n");
    let (mut caller, welcome) = Caller::resumed(&hook, 1, &records).await;
    assert_eq!((welcome.attempt, welcome.next), (1, 1));
    caller.send(records.frame()).await;
    caller.send(records.finished(0)).await;
    assert_eq!(caller.finished_ack().await, FinishedAck::Complete);
    caller.leave().await;
    let ended = hook.ended().await;
    assert_eq!((ended.code, ended.stdout()), (0, "before\nafter\n".to_owned()));
}
