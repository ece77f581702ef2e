//! One life of an agent is one attempt: its connections replace each other, and a new life fences the old one.

use phonehome_proto::frame::FinishedAck;

use crate::harness::{Caller, Hook, Records, Stored};

#[tokio::test]
async fn a_second_connection_of_the_same_agent_resumes_and_closes_the_first() {
    let mut hook = Hook::wait(&["--no-tls"]).await;
    let (mut older, welcome) = Caller::welcomed(&hook, 1).await;
    assert_eq!((welcome.attempt, welcome.next), (1, 0));
    let mut records = Records::of(&["one\n", "two\n"]);
    older.send(records.frame()).await;
    hook.process.stdout.shows("two\n").await;

    let (mut newer, welcome) = Caller::resumed(&hook, 1, &records).await;
    assert_eq!((welcome.attempt, welcome.next), (1, 2), "it goes on where the first had got to");
    assert_eq!(older.closed().await.0, 4002);

    newer.send(records.frame()).await; // again: duplicates are harmless
    records.push("three\n");
    newer.send(records.frame()).await;
    newer.send(records.finished(3)).await;
    assert_eq!(newer.finished_ack().await, FinishedAck::Complete);
    newer.leave().await;
    let ended = hook.ended().await;
    assert_eq!((ended.code, ended.stdout()), (3, "one\ntwo\nthree\n".to_owned()));
}

#[tokio::test]
async fn a_new_agent_is_the_next_attempt_and_the_old_one_can_store_nothing_more() {
    let mut hook = Hook::wait(&["--no-tls", "--data", "data", "--build", "twice"]).await;
    let (mut first, _) = Caller::welcomed(&hook, 1).await;
    let records = Records::of(&["from the first life\n"]);
    first.send(records.frame()).await;
    hook.process.stdout.shows("first life").await;

    let (mut second, welcome) = Caller::welcomed(&hook, 2).await;
    assert_eq!((welcome.attempt, welcome.next), (2, 0));
    first.try_send(records.finished(9)).await; // whether it is sent or not, it must not count
    assert_eq!(first.closed().await.0, 4002);
    let mut back_again = Caller::connect(&hook, phonehome_proto::codec::Codec::Binary).await;
    back_again.send(records.hello(hook.variable("BUILD"), 1)).await;
    assert_eq!(back_again.closed().await.0, 4002, "in place of a welcome, which is final");
    assert!(!hook.process.has_ended(), "the end of a fenced attempt ends nothing");

    let records = Records::of(&["from the second life\n"]);
    second.send(records.frame()).await;
    second.send(records.finished(3)).await;
    assert_eq!(second.finished_ack().await, FinishedAck::Complete);
    second.leave().await;
    let ended = hook.ended().await;
    assert_eq!((ended.code, ended.stdout()), (3, "from the first life\nfrom the second life\n".to_owned()));
    assert!(ended.stderr().contains("attempt 2 of step main"), "{}", ended.stderr());

    let data = hook.scene.path("data");
    Stored::read(&data, "twice", "main", 2).assert_complete();
    let first = data.join("builds/twice/main/1");
    assert_eq!(std::fs::read(first.join("log")).unwrap(), b"from the first life\n");
    assert!(!first.join("finished.json").exists());
}

#[tokio::test]
async fn a_builder_that_is_started_again_takes_over() {
    let mut hook = Hook::wait(&[]).await;
    let mut first = hook.agent(&["--tee", "off"], "echo first; exec sleep 120");
    hook.process.stdout.shows("first\n").await;
    first.signal(rustix::process::Signal::KILL);
    assert_eq!(first.ended().await, 137);
    let mut second = hook.agent(&["--tee", "off"], "echo second; exit 5");
    let ended = hook.ended().await;
    assert_eq!((ended.code, ended.stdout()), (5, "first\nsecond\n".to_owned()));
    assert!(ended.stderr().contains("attempt 2"), "{}", ended.stderr());
    assert_eq!(second.ended().await, 5);
}

#[tokio::test]
async fn finished_again_is_answered_again() {
    let mut hook = Hook::wait(&["--no-tls", "--steps", "main,other"]).await;
    let (mut older, _) = Caller::welcomed(&hook, 1).await;
    let records = Records::of(&["all there is\n"]);
    older.send(records.frame()).await;
    older.send(records.finished(0)).await;
    assert_eq!(older.finished_ack().await, FinishedAck::Complete);
    let (mut newer, welcome) = Caller::resumed(&hook, 1, &records).await;
    assert_eq!(welcome.next, 1);
    newer.send(records.finished(0)).await;
    assert_eq!(newer.finished_ack().await, FinishedAck::Complete);
    assert!(!hook.process.has_ended(), "the other step is awaited");
}
