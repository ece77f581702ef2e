//! The server dies and comes back; what it had accepted counts.

use phonehome_proto::{codec::Codec, frame::FinishedAck};
use phonehome_server::{BuildLog, Config, Durability, Expected, ExpectedBuild, LogItem, Outcome, Server, Verdict};

use crate::harness::{Caller, Records, Scene, patiently};

/// Its verdict is all that a crash took.
#[tokio::test]
async fn an_end_that_was_accepted_gives_the_verdict_without_its_agent() {
    let scene = Scene::new();
    let (server, build) = expect(&scene, &["main"]).await;
    deliver(&server, "main", 1, &["one\n", "two\n"]).await;
    let first = patiently("the first verdict", build.verdict()).await;
    drop((server, build));
    std::fs::remove_file(scene.path("data/builds/restarted/verdict.json")).unwrap();

    let (_server, build) = expect(&scene, &["main"]).await;
    let verdict = patiently("the verdict, without an agent", build.verdict()).await;
    assert_eq!(Verdict { ended: first.ended, ..verdict.clone() }, first);
    assert!(verdict.is_complete() && verdict.outcome == Outcome::Succeeded, "{verdict:?}");
    assert!(scene.path("data/builds/restarted/verdict.json").exists());
    assert_eq!(text(build.log()).await, "one\ntwo\n");
}

/// The agent of one step is long gone, that of the other carries on.
#[tokio::test]
async fn a_build_goes_on_where_it_was() {
    let scene = Scene::new();
    let (server, build) = expect(&scene, &["main", "other"]).await;
    deliver(&server, "main", 1, &["from main\n"]).await;
    let mut records = Records::of(&["before\n"]);
    let (mut caller, _) = resumed(&server, "other", 2, &records).await;
    caller.send(records.frame()).await;
    drop(caller.frame().await); // acknowledged
    drop((server, build, caller));

    let (server, build) = expect(&scene, &["main", "other"]).await;
    records.push("after\n");
    let (mut caller, next) = resumed(&server, "other", 2, &records).await;
    assert_eq!(next, 1);
    caller.send(records.frame()).await;
    caller.send(records.finished(0)).await;
    assert_eq!(caller.finished_ack().await, FinishedAck::Complete);
    caller.leave().await;
    let verdict = patiently("the verdict", build.verdict()).await;
    assert!(verdict.is_complete() && verdict.outcome == Outcome::Succeeded, "{verdict:?}");
    let steps: Vec<_> = verdict.steps.iter().map(|step| (step.step.as_str(), step.bytes, step.cuts)).collect();
    assert_eq!(steps, [("main", 10, 0), ("other", 13, 1)]);
    let log = text(build.log()).await;
    assert!(log.contains("from main\n") && log.contains("before\n") && log.contains("after\n"), "{log}");
}

/// An agent whose FINISHED was stored may still hear so.
#[tokio::test]
async fn an_agent_that_missed_the_answer_gets_it_after_the_verdict() {
    let scene = Scene::new();
    let (server, build) = expect(&scene, &["main"]).await;
    let records = deliver(&server, "main", 1, &["all\n"]).await;
    patiently("the first verdict", build.verdict()).await;
    drop((server, build));
    std::fs::remove_file(scene.path("data/builds/restarted/verdict.json")).unwrap();

    let (server, build) = expect(&scene, &["main"]).await;
    patiently("the verdict", build.verdict()).await;
    let (mut caller, next) = resumed(&server, "main", 1, &records).await;
    assert_eq!(next, 1);
    caller.send(records.finished(0)).await;
    assert_eq!(caller.finished_ack().await, FinishedAck::Complete);
}

async fn expect(scene: &Scene, steps: &[&str]) -> (Server, ExpectedBuild) {
    let listen = "127.0.0.1:0".parse().unwrap();
    let config = Config { listen, tls: false, data: scene.path("data"), durability: Durability::Fsync };
    let server = Server::spawn(config).await.unwrap();
    let steps = steps.iter().map(|step| step.parse().unwrap()).collect();
    let token = Some(TOKEN.to_owned());
    let expected = Expected { steps, token, ..Expected::new("restarted".parse().unwrap()) };
    let build = server.expect(expected).unwrap();
    (server, build)
}

async fn resumed(server: &Server, step: &str, producer: u8, records: &Records) -> (Caller, u64) {
    use phonehome_proto::frame::{AgentFrame, ServerFrame};
    let mut caller = Caller::connect_to(server.local_addr(), TOKEN, Codec::Binary).await;
    let AgentFrame::Hello(mut hello) = records.hello("restarted", producer) else { panic!("no hello") };
    hello.step = step.parse().unwrap();
    caller.send(AgentFrame::Hello(hello)).await;
    match caller.frame().await {
        ServerFrame::Welcome(welcome) => (caller, welcome.next),
        other => panic!("not a welcome: {other:?}"),
    }
}

async fn deliver(server: &Server, step: &str, producer: u8, texts: &[&str]) -> Records {
    let records = Records::of(texts);
    let (mut caller, _) = resumed(server, step, producer, &records).await;
    caller.send(records.frame()).await;
    caller.send(records.finished(0)).await;
    assert_eq!(caller.finished_ack().await, FinishedAck::Complete);
    caller.leave().await;
    records
}

async fn text(mut log: BuildLog) -> String {
    let mut all = String::new();
    while let Some(item) = patiently("an item", log.next()).await.unwrap() {
        if let LogItem::Record(found) = item {
            all.push_str(std::str::from_utf8(&found.record.payload).unwrap());
        }
    }
    all
}

const TOKEN: &str = "phonehome_build_0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
