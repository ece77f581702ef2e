//! A build delivered without an agent: with a websocket client and JSON, as the documentation says.

use phonehome_proto::codec::Codec;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use crate::harness::{Caller, Hook, Stored};

/// Sends what the documentation prints, and gets what it prints.
#[tokio::test]
async fn the_session_in_the_documentation_works_as_printed() {
    let mut hook = Hook::wait(&["--no-tls", "--build", "demo", "--data", "data"]).await;
    let mut caller = Caller::connect(&hook, Codec::Json).await;
    let mut spoken = 0;
    for (speaker, text) in documented_session() {
        let frame: Value = serde_json::from_str(&text).unwrap();
        match &*speaker {
            "agent" => caller.send_message(Message::text(text)).await,
            // A ping comes every 15 s only, and the window is the server's to choose.
            "server" if frame["type"] == "ping" => {}
            "server" => assert_eq!(without_window(json(&mut caller).await), without_window(frame)),
            other => panic!("neither agent nor server: {other}"),
        }
        spoken += 1;
    }
    assert!(spoken >= 7, "the documentation has no session any more");
    caller.leave().await;
    let ended = hook.ended().await;
    assert_eq!((ended.code, ended.stdout()), (0, "hello\n".to_owned()));
    Stored::read(&hook.scene.path("data"), "demo", "main", 1).assert_complete();
}

#[tokio::test]
async fn text_and_base64_on_both_streams_make_one_log() {
    let mut hook = Hook::wait(&["--no-tls", "--build", "by-hand", "--data", "data"]).await;
    let mut caller = Caller::connect(&hook, Codec::Json).await;
    let digest = blake3::hash("grüße\n\0\x01\x02end".as_bytes()).to_hex().to_string();
    let count = |records: u64, bytes: u64| json!({"records": records, "bytes": bytes});
    for frame in [
        json!({"type": "hello", "build": "by-hand", "producer": "ff".repeat(16), "labels": {"who": "me"}}),
        json!({"type": "records", "first": 0, "records": [
            {"time": 1, "stream": "stdout", "offset": 0, "text": "grüße\n"},
            {"time": 2, "stream": "stderr", "offset": 0, "data": "AAEC"},
        ]}),
        json!({"type": "records", "first": 2, "records": [{"time": 3, "stream": "stdout", "offset": 8, "text": "end"}]}),
        json!({"type": "finished", "next": 3, "digest": digest, "end": {"exited": 42}, "time": 4, "counts":
            {"stdout": count(2, 11), "stderr": count(1, 3), "event": count(0, 0)}}),
    ] {
        caller.send_message(Message::text(frame.to_string())).await;
    }
    let welcome = json(&mut caller).await;
    assert_eq!((&welcome["type"], &welcome["attempt"], &welcome["next"]), (&json!("welcome"), &json!(1), &json!(0)));
    let mut answer = json(&mut caller).await;
    while answer["type"] == "ack" {
        answer = json(&mut caller).await;
    }
    assert_eq!(answer, json!({"type": "finished-ack", "outcome": "complete"}));
    caller.leave().await;
    let ended = hook.ended().await;
    assert_eq!((ended.code, ended.stdout()), (42, "grüße\nend".to_owned()));
    assert!(ended.stderr.starts_with(b"\0\x01\x02\n"));
    Stored::read(&hook.scene.path("data"), "by-hand", "main", 1).assert_complete();
}

/// Nothing but the digest at the end can tell: there is no checksum.
#[tokio::test]
async fn what_was_damaged_on_the_way_is_sent_again() {
    let mut hook = Hook::wait(&["--no-tls", "--build", "by-hand", "--data", "data"]).await;
    let mut caller = welcomed(&hook).await;
    caller.send_messages([first("first\n"), second("dAmaged\n"), end("first\ndamaged\n")]).await;
    assert_eq!(answer(&mut caller).await, json!({"resume": 0}));
    caller.send_messages([first("first\n"), second("damaged\n"), end("first\ndamaged\n")]).await;
    assert_eq!(answer(&mut caller).await, "complete");
    caller.leave().await;
    let ended = hook.ended().await;
    assert_eq!((ended.code, ended.stdout.len()), (0, 14), "nothing is printed twice: {}", ended.stdout());
    let proof = format!("complete: 14 bytes in 2 records, BLAKE3 {},", blake3::hash(b"first\ndamaged\n"));
    assert!(ended.stderr().contains(&proof), "{}", ended.stderr());
    let stored = Stored::read(&hook.scene.path("data"), "by-hand", "main", 1);
    stored.assert_complete();
    assert_eq!(stored.log, b"first\ndamaged\n");
}

#[tokio::test]
async fn what_stays_damaged_is_taken_and_never_called_complete() {
    let mut hook = Hook::wait(&["--no-tls", "--build", "by-hand", "--data", "data"]).await;
    let mut caller = welcomed(&hook).await;
    let damaged = || [first("first\n"), second("dAmaged\n"), end("first\ndamaged\n")];
    caller.send_messages(damaged()).await;
    assert_eq!(answer(&mut caller).await, json!({"resume": 0}));
    caller.send_messages(damaged()).await;
    let incomplete = answer(&mut caller).await;
    let reason = incomplete["incomplete"].as_str().unwrap();
    assert_eq!(reason, "the digest differs from what was stored, also after the last records were sent again");
    caller.leave().await;
    let ended = hook.ended().await;
    assert_eq!(ended.code, 0, "verdict and completeness are independent");
    let digest = blake3::hash(b"first\ndAmaged\n");
    let told = format!("not complete: step main: {reason}; stored: 14 bytes in 2 records, BLAKE3 {digest},");
    assert!(ended.stderr().contains(&told), "{}", ended.stderr());
    let verdict = Stored::verdict(&hook.scene.path("data"), "by-hand").await;
    assert_eq!((&verdict["complete"], &verdict["steps"][0]["complete"]), (&json!(false), &json!(false)), "{verdict}");
    assert_eq!(verdict["incomplete"], *format!("step main: {reason}"));
    assert_eq!(verdict["steps"][0]["digest"], *digest.to_hex());
}

async fn welcomed(hook: &Hook) -> Caller {
    let mut caller = Caller::connect(hook, Codec::Json).await;
    let hello = json!({"type": "hello", "build": "by-hand", "producer": "0a".repeat(16), "next": 2});
    caller.send_message(Message::text(hello.to_string())).await;
    assert_eq!(json(&mut caller).await["type"], "welcome");
    caller
}

/// Record 0, without a checksum.
fn first(text: &str) -> Message {
    output(0, 0, text)
}

/// Record 1, behind `first\n`.
fn second(text: &str) -> Message {
    output(1, 6, text)
}

fn output(seq: u64, offset: u64, text: &str) -> Message {
    let record = json!({"time": 1, "stream": "stdout", "offset": offset, "text": text});
    Message::text(json!({"type": "records", "first": seq, "records": [record]}).to_string())
}

/// The end of a log of two records.
fn end(log: &str) -> Message {
    let none = json!({"records": 0, "bytes": 0});
    let counts = json!({"stdout": {"records": 2, "bytes": log.len()}, "stderr": none, "event": none});
    let digest = blake3::hash(log.as_bytes()).to_hex().to_string();
    let end =
        json!({"type": "finished", "next": 2, "counts": counts, "digest": digest, "end": {"exited": 0}, "time": 2});
    Message::text(end.to_string())
}

/// The outcome of the answer to FINISHED, past acknowledgements.
async fn answer(caller: &mut Caller) -> Value {
    loop {
        let mut frame = json(caller).await;
        if frame["type"] == "finished-ack" {
            return frame["outcome"].take();
        }
    }
}

#[tokio::test]
async fn a_client_without_an_end_hears_of_a_cancel() {
    let mut hook = Hook::wait(&["--no-tls", "--build", "by-hand", "--grace-period", "0s"]).await;
    let mut caller = Caller::connect(&hook, Codec::Json).await;
    let hello = json!({"type": "hello", "build": "by-hand", "producer": "00".repeat(16)});
    caller.send_message(Message::text(hello.to_string())).await;
    assert_eq!(json(&mut caller).await["type"], "welcome");
    hook.signal(rustix::process::Signal::TERM);
    let cancel = json(&mut caller).await;
    assert_eq!((&cancel["type"], &cancel["grace"]), (&json!("cancel"), &json!(0)));
    assert!(cancel["reason"].as_str().unwrap().contains("told to end"), "{cancel}");
    hook.signal(rustix::process::Signal::TERM); // the second wish does not wait for the client
    let ended = hook.ended().await;
    assert_eq!(ended.code, 130);
    assert!(ended.stderr().contains("the log is not complete"), "{}", ended.stderr());
}

async fn json(caller: &mut Caller) -> Value {
    match caller.message().await {
        Message::Text(text) => serde_json::from_str(text.as_str()).unwrap(),
        other => panic!("not text: {other:?}"),
    }
}

fn without_window(mut frame: Value) -> Value {
    frame.as_object_mut().unwrap().remove("window");
    frame
}

/// Who says what in the section "A session by hand".
fn documented_session() -> Vec<(String, String)> {
    let page = include_str!("../../docs/wire.md");
    let blocks = page.split("```json ").skip(1);
    let blocks = blocks.filter_map(|block| {
        let (speaker, rest) = block.split_once('\n')?;
        let (text, _) = rest.split_once("\n```")?;
        Some((speaker.to_owned(), text.to_owned()))
    });
    blocks.filter(|(speaker, _)| speaker == "agent" || speaker == "server").collect()
}
