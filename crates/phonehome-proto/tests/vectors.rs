//! The frozen bytes of version 1, and the document that describes them.
//!
//! `vectors/v1.json` is for authors of other agents and never changes: a change there is another version of the wire.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, wherever that happens")]

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use phonehome_proto::{
    close::{CloseCode, is_fatal},
    codec::{Codec, DecodeError, Message},
    event::{Event, Gap},
    frame::{
        Ack, AgentFrame, Cancel, CommandState, Count, Counts, Drain, Durable, End, Finished, FinishedAck, Hello, Ping,
        Pong, Record, ServerFrame, Stream, Usage, Welcome, checksum,
    },
    id::{Digest, ProducerId, StepName},
    limits,
    receiver::{Ending, Receiver},
    tally::Tally,
};
use serde_json::Value;

#[test]
fn the_file_is_frozen() {
    assert_eq!(Digest(*blake3::hash(VECTORS.as_bytes()).as_bytes()).to_string(), VECTORS_DIGEST);
}

#[test]
fn every_agent_frame_has_exactly_its_bytes_and_its_text() {
    let frames = agent_frames();
    let vectors = vectors("agent");
    assert_eq!(names(&vectors), frames.iter().map(|(name, _)| (*name).to_owned()).collect::<Vec<_>>());
    for ((name, frame), vector) in frames.into_iter().zip(&vectors) {
        let (binary, text) = messages(vector);
        assert_eq!(Codec::Binary.decode_agent(&binary).unwrap(), frame, "{name}");
        assert_eq!(Codec::Json.decode_agent(&text).unwrap(), frame, "{name}");
        assert_eq!(Codec::Binary.encode_agent(&frame).unwrap(), binary, "{name}");
        assert_eq!(value(&Codec::Json.encode_agent(&frame).unwrap()), value(&text), "{name}");
    }
}

#[test]
fn every_server_frame_has_exactly_its_bytes_and_its_text() {
    let frames = server_frames();
    let vectors = vectors("server");
    assert_eq!(names(&vectors), frames.iter().map(|(name, _)| (*name).to_owned()).collect::<Vec<_>>());
    for ((name, frame), vector) in frames.into_iter().zip(&vectors) {
        let (binary, text) = messages(vector);
        assert_eq!(Codec::Binary.decode_server(&binary).unwrap(), frame, "{name}");
        assert_eq!(Codec::Json.decode_server(&text).unwrap(), frame, "{name}");
        assert_eq!(Codec::Binary.encode_server(&frame).unwrap(), binary, "{name}");
        assert_eq!(value(&Codec::Json.encode_server(&frame).unwrap()), value(&text), "{name}");
    }
}

#[test]
fn every_variant_of_every_frame_is_among_the_vectors() {
    let agent = agent_frames().into_iter().flat_map(|(_, frame)| agent_marks(&frame));
    let server = server_frames().into_iter().flat_map(|(_, frame)| server_marks(&frame));
    let seen: BTreeSet<_> = agent.chain(server).collect();
    assert_eq!(seen, MARKS.into_iter().collect());
}

#[test]
fn what_is_wrong_is_refused_for_its_reason() {
    for vector in list("invalid") {
        let (codec, message) = match (&vector["binary"], &vector["text"]) {
            (Value::String(digits), Value::Null) => (Codec::Binary, Message::Binary(unhex(digits))),
            (Value::Null, Value::String(text)) => (Codec::Json, Message::Text(text.clone())),
            _ => panic!("{vector} is neither binary nor text"),
        };
        let refused = match text(&vector["direction"]) {
            "agent" => codec.decode_agent(&message).err(),
            _ => codec.decode_server(&message).err(),
        };
        assert_eq!(refused.as_ref().map(word), Some(text(&vector["error"])), "{}", vector["name"]);
    }
}

#[test]
fn checksums_are_as_computed_by_hand() {
    for vector in list("checksums") {
        let payload = unhex(text(&vector["payload"]));
        let (seq, offset) = (vector["seq"].as_u64().unwrap(), vector["offset"].as_u64().unwrap());
        assert_eq!(u64::from(checksum(seq, stream(&vector["stream"]), offset, &payload)), vector["crc"], "{vector}");
    }
}

#[test]
fn digests_are_as_computed_by_hand() {
    for vector in list("digests") {
        let mut tally = Tally::default();
        for record in vector["records"].as_array().unwrap() {
            let stream = stream(&record["stream"]);
            tally.add(&Record::new(tally.next(), 0, stream, tally.offset(stream), unhex(text(&record["payload"]))));
        }
        assert_eq!(tally.digest().to_string(), text(&vector["digest"]), "{vector}");
    }
}

#[test]
fn the_session_in_the_document_is_complete() {
    let mut receiver = Receiver::default();
    let (mut answers, mut asked) = (Vec::new(), Vec::new());
    for (info, body) in blocks(WIRE) {
        match info {
            "json agent" => match Codec::Json.decode_agent(&Message::Text(body)).unwrap() {
                AgentFrame::Hello(hello) => {
                    assert_eq!(receiver.handle_hello(&hello), Ok(None));
                    answers.push(ServerFrame::Welcome(worked_welcome()));
                }
                AgentFrame::Records(mut records) => {
                    receiver.handle_records(&mut records, |_| None).unwrap();
                    receiver.handle_durable(&receiver.tally().clone());
                    answers.push(ServerFrame::Ack(Ack { next: receiver.durable(), window: limits::WINDOW }));
                }
                AgentFrame::Finished(finished) => {
                    let Ok(Ending::Accept(answer)) = receiver.handle_finished(finished) else { panic!("no end") };
                    answers.push(ServerFrame::FinishedAck(answer));
                }
                AgentFrame::Pong(pong) => assert_eq!(asked.pop(), Some(pong.id)),
            },
            "json server" => match Codec::Json.decode_server(&Message::Text(body)).unwrap() {
                ServerFrame::Ping(ping) => asked.push(ping.id),
                answer @ (ServerFrame::Welcome(_)
                | ServerFrame::Ack(_)
                | ServerFrame::Cancel(_)
                | ServerFrame::FinishedAck(_)
                | ServerFrame::Drain(_)) => assert_eq!(Some(answer), answers.pop()),
            },
            _ => {}
        }
    }
    assert!(answers.is_empty() && asked.is_empty());
    assert_eq!(receiver.finished().unwrap().1, FinishedAck::Complete);
}

#[test]
fn the_bytes_in_the_document_say_the_same_as_its_text() {
    let mut compared = 0;
    let blocks = blocks(WIRE);
    for (at, (info, body)) in blocks.iter().enumerate().filter(|(_, (info, _))| info.starts_with("hex")) {
        let binary = Message::Binary(unhex(&without_comments(body)));
        let text = Message::Text(blocks[at - 1].1.clone());
        match *info {
            "hex agent" => {
                let frame = Codec::Json.decode_agent(&text).unwrap();
                assert_eq!(Codec::Binary.encode_agent(&frame).unwrap(), binary, "{text:?}");
            }
            _ => {
                let frame = Codec::Json.decode_server(&text).unwrap();
                assert_eq!(Codec::Binary.encode_server(&frame).unwrap(), binary, "{text:?}");
            }
        }
        compared += 1;
    }
    assert!(compared >= 6, "{compared} frames");
}

#[test]
fn the_document_has_the_limits_of_the_code() {
    let millis = |duration: std::time::Duration| duration.as_millis() as u64;
    let limits = BTreeMap::from([
        ("ACK_BYTES", limits::ACK_BYTES),
        ("ACK_DELAY", millis(limits::ACK_DELAY)),
        ("BACKOFF_MAX", millis(limits::BACKOFF_MAX)),
        ("BACKOFF_MIN", millis(limits::BACKOFF_MIN)),
        ("BACKOFF_UNREACHABLE", millis(limits::BACKOFF_UNREACHABLE)),
        ("DEAD_AFTER", millis(limits::DEAD_AFTER)),
        ("HEALTHY_AFTER", millis(limits::HEALTHY_AFTER)),
        ("HEARTBEAT", millis(limits::HEARTBEAT)),
        ("HELLO_TIMEOUT", millis(limits::HELLO_TIMEOUT)),
        ("MAX_ATTEMPTS", phonehome_proto::attempts::MAX_ATTEMPTS as u64),
        ("MAX_CLOSE_REASON", limits::MAX_CLOSE_REASON as u64),
        ("MAX_HEAD", limits::MAX_HEAD as u64),
        ("MAX_LABEL", limits::MAX_LABEL as u64),
        ("MAX_LABELS", limits::MAX_LABELS as u64),
        ("MAX_MESSAGE", limits::MAX_MESSAGE as u64),
        ("MAX_NAME", phonehome_proto::id::MAX_NAME as u64),
        ("MAX_PAYLOAD", limits::MAX_PAYLOAD as u64),
        ("MAX_RECORDS", limits::MAX_RECORDS as u64),
        ("MAX_TEXT", limits::MAX_TEXT as u64),
        ("MAX_WINDOW", limits::MAX_WINDOW),
        ("MIN_WINDOW", limits::MIN_WINDOW),
        ("RECORD_COST", limits::RECORD_COST),
        ("WINDOW", limits::WINDOW),
    ]);
    let written: BTreeMap<_, _> = rows(WIRE)
        .filter(|row| row[0].chars().all(|c| c.is_ascii_uppercase() || c == '_'))
        .map(|row| (row[0], row[1].parse().unwrap()))
        .collect();
    assert_eq!(written, limits);
}

#[test]
fn the_events_in_the_document_are_those_of_the_code() {
    let blocks = blocks(WIRE);
    let examples: Vec<_> = blocks.iter().filter(|(info, _)| *info == "json event").map(|(_, body)| body).collect();
    let events: Vec<_> = examples.iter().map(|body| Event::parse(body.as_bytes()).expect(body)).collect();
    for (event, body) in events.iter().zip(&examples) {
        assert_eq!(str::from_utf8(&event.payload()), Ok(body.as_str()), "with its members in the order of the code");
        let heading = format!("\n#### `{}`: ", event_name(event));
        assert_eq!(WIRE.matches(&heading).count(), 1, "{heading}");
    }
    let documented: BTreeSet<_> = events.iter().map(event_name).collect();
    assert_eq!(documented, EVENTS.into());
}

#[test]
fn the_document_has_the_close_codes_of_the_code() {
    let written: Vec<(u16, bool)> = rows(WIRE)
        .filter_map(|row| row[0].parse().ok().filter(|number| *number >= 4000).map(|number| (number, row[1] == "yes")))
        .collect();
    let known: Vec<_> = (4000..5000).filter(|number| CloseCode::from_number(*number).is_some()).collect();
    assert_eq!(written, known.into_iter().map(|number| (number, is_fatal(number))).collect::<Vec<_>>());
}

/// Every event. A new one needs an arm below, a word here and a place in the document.
const EVENTS: [&str; 12] = [
    "born",
    "cancelled",
    "error",
    "gap",
    "labels",
    "leftovers",
    "ready",
    "redaction",
    "stopping",
    "terminated",
    "took-over",
    "waiting",
];

fn event_name(event: &Event) -> &'static str {
    match event {
        Event::Born(_) => "born",
        Event::Cancelled(_) => "cancelled",
        Event::Error(_) => "error",
        Event::Gap(_) => "gap",
        Event::Labels(_) => "labels",
        Event::Leftovers(_) => "leftovers",
        Event::Ready(_) => "ready",
        Event::Redaction(_) => "redaction",
        Event::Stopping(_) => "stopping",
        Event::Terminated(_) => "terminated",
        Event::TookOver(_) => "took-over",
        Event::Waiting(_) => "waiting",
    }
}

const VECTORS: &str = include_str!("../vectors/v1.json");
const VECTORS_DIGEST: &str = "488fcf9682c4ec1fb4fdecf88467040e05d07fe0315cd0424621779007b0c0a0";
const WIRE: &str = include_str!("../../../docs/wire.md");

/// Everything a vector must show. A new variant needs an arm below, a word here and a vector.
const MARKS: [&str; 30] = [
    "ack",
    "cancel",
    "cancel absent",
    "cancel present",
    "command ended",
    "command running",
    "command waiting",
    "drain",
    "durable fsync",
    "durable memory",
    "durable quorum",
    "end exited",
    "end not-started",
    "end signalled",
    "finished",
    "finished-ack complete",
    "finished-ack incomplete",
    "finished-ack resume",
    "hello",
    "payload binary",
    "payload empty",
    "payload text",
    "ping",
    "records one",
    "records several",
    "stream event",
    "stream stderr",
    "stream stdout",
    "usage absent",
    "usage present",
];

fn agent_marks(frame: &AgentFrame) -> Vec<&'static str> {
    match frame {
        AgentFrame::Hello(_) => vec!["hello"],
        AgentFrame::Records(records) => {
            let several = if records.len() > 1 { "records several" } else { "records one" };
            records.iter().flat_map(record_marks).chain([several]).collect()
        }
        AgentFrame::Finished(finished) => {
            let end = match finished.end {
                End::Exited(_) => "end exited",
                End::NotStarted { .. } => "end not-started",
                End::Signalled { .. } => "end signalled",
            };
            vec!["finished", end, if finished.usage.is_some() { "usage present" } else { "usage absent" }]
        }
        AgentFrame::Pong(pong) => vec![match pong.command {
            CommandState::Waiting => "command waiting",
            CommandState::Running => "command running",
            CommandState::Ended => "command ended",
        }],
    }
}

fn record_marks(record: &Record) -> [&'static str; 2] {
    let stream = match record.stream {
        Stream::Stdout => "stream stdout",
        Stream::Stderr => "stream stderr",
        Stream::Event => "stream event",
    };
    let payload = match std::str::from_utf8(&record.payload) {
        Ok("") => "payload empty",
        Ok(_) => "payload text",
        Err(_) => "payload binary",
    };
    [stream, payload]
}

fn server_marks(frame: &ServerFrame) -> Vec<&'static str> {
    match frame {
        ServerFrame::Welcome(welcome) => {
            let durable = match welcome.durable {
                Durable::Memory => "durable memory",
                Durable::Fsync => "durable fsync",
                Durable::Quorum => "durable quorum",
            };
            vec![durable, if welcome.cancel.is_some() { "cancel present" } else { "cancel absent" }]
        }
        ServerFrame::Ack(_) => vec!["ack"],
        ServerFrame::Cancel(_) => vec!["cancel"],
        ServerFrame::FinishedAck(ack) => vec![match ack {
            FinishedAck::Complete => "finished-ack complete",
            FinishedAck::Incomplete(_) => "finished-ack incomplete",
            FinishedAck::Resume(_) => "finished-ack resume",
        }],
        ServerFrame::Drain(_) => vec!["drain"],
        ServerFrame::Ping(_) => vec!["ping"],
    }
}

/// The word of the file for a reason to refuse.
fn word(error: &DecodeError) -> &'static str {
    match error {
        DecodeError::BadChecksum(_) => "bad-checksum",
        DecodeError::BadEnd => "bad-end",
        DecodeError::BadHead(_) => "bad-head",
        DecodeError::BadHello => "bad-hello",
        DecodeError::BadText(_) => "bad-text",
        DecodeError::BadLength => "bad-length",
        DecodeError::BadBase64(_) => "bad-base64",
        DecodeError::RecordCount(_) => "record-count",
        DecodeError::TooLarge(_) => "too-large",
        DecodeError::TooLong(_) => "too-long",
        DecodeError::Truncated => "truncated",
        DecodeError::WrongKind => "wrong-kind",
    }
}

fn agent_frames() -> Vec<(&'static str, AgentFrame)> {
    let gap = Event::Gap(Gap { stream: Stream::Stderr, bytes: 4096, cause: "spool-full".into() }).payload();
    let records = |records: Vec<Record>| AgentFrame::Records(records);
    vec![
        ("hello with nothing but names", AgentFrame::Hello(least_hello())),
        ("hello that resumes, with labels", AgentFrame::Hello(full_hello())),
        ("one record of stdout", records(vec![record(0, Stream::Stdout, 0, b"hello\n")])),
        ("one record of stderr", records(vec![record(1, Stream::Stderr, 0, "größer\n".as_bytes())])),
        ("one record of the event stream, a gap", records(vec![record(2, Stream::Event, 0, &gap)])),
        ("a record without payload", records(vec![record(3, Stream::Stdout, 6, b"")])),
        ("a record that is not UTF-8", records(vec![record(4, Stream::Stdout, 6, b"\xff\xfe\x00")])),
        ("a record of control characters", records(vec![record(5, Stream::Stdout, 9, b"\x00\x01\x02\x03")])),
        ("a record of 251 bytes", records(vec![record(250, Stream::Stdout, 65_535, &[b'x'; 251])])),
        (
            "three records of three streams",
            records(vec![
                record(251, Stream::Stdout, 65_786, b"out\n"),
                record(252, Stream::Event, 78, b"{\"event\":\"born\"}"),
                record(253, Stream::Stderr, 4106, b""),
            ]),
        ),
        ("the last record there can be", {
            let (time, offset) = (u64::MAX, u64::MAX);
            records(vec![Record::new(u64::MAX - 1, time, Stream::Event, offset, Bytes::from_static(b"!"))])
        }),
        ("finished, exit code 0", AgentFrame::Finished(finished(End::Exited(0), None))),
        ("finished, exit code 255, with usage", AgentFrame::Finished(finished(End::Exited(255), Some(usage())))),
        (
            "finished, never started",
            AgentFrame::Finished(finished(End::NotStarted { code: 127, reason: "no such file".into() }, None)),
        ),
        (
            "finished by a signal",
            AgentFrame::Finished(finished(End::Signalled { signal: 11, core: true, oom: false }, None)),
        ),
        (
            "finished out of memory",
            AgentFrame::Finished(finished(End::Signalled { signal: 9, core: false, oom: true }, Some(usage()))),
        ),
        ("pong before the command", pong(1, CommandState::Waiting, 250, 0)),
        ("pong of a running command", pong(2, CommandState::Running, 251, 65_536)),
        ("pong after the command", pong(3, CommandState::Ended, 4_294_967_296, 198)),
    ]
}

fn server_frames() -> Vec<(&'static str, ServerFrame)> {
    let cancel = Cancel { reason: "the pusher hung up".into(), grace: 30_000 };
    let ping = |id| ServerFrame::Ping(Ping { id });
    vec![
        ("welcome, durable in memory", ServerFrame::Welcome(Welcome { durable: Durable::Memory, ..worked_welcome() })),
        ("welcome of a new attempt", ServerFrame::Welcome(worked_welcome())),
        (
            "welcome back, with a cancel",
            ServerFrame::Welcome(Welcome {
                attempt: 251,
                next: 70_000,
                durable: Durable::Quorum,
                window: limits::MIN_WINDOW,
                cancel: Some(cancel.clone()),
                capabilities: vec!["one".into(), "two".into()],
                ..worked_welcome()
            }),
        ),
        ("ack", ServerFrame::Ack(Ack { next: 4, window: limits::MAX_WINDOW })),
        ("cancel", ServerFrame::Cancel(cancel)),
        ("finished-ack, complete", ServerFrame::FinishedAck(FinishedAck::Complete)),
        ("finished-ack, incomplete", {
            ServerFrame::FinishedAck(FinishedAck::Incomplete("4096 bytes were dropped before they were sent".into()))
        }),
        ("finished-ack, resume", ServerFrame::FinishedAck(FinishedAck::Resume(17))),
        ("drain", ServerFrame::Drain(Drain { within: 5000 })),
        ("ping 0", ping(0)),
        ("ping 250, the last number of one byte", ping(250)),
        ("ping 251, the first of three", ping(251)),
        ("ping 65535, the last of three", ping(65_535)),
        ("ping 65536, the first of five", ping(65_536)),
        ("ping 4294967295, the last of five", ping(u64::from(u32::MAX))),
        ("ping 4294967296, the first of nine", ping(1 << 32)),
        ("ping 18446744073709551615, the last of nine", ping(u64::MAX)),
    ]
}

fn least_hello() -> Hello {
    Hello {
        build: "demo".parse().unwrap(),
        step: StepName::default(),
        producer: ProducerId(std::array::from_fn(|n| n as u8)),
        oldest: 0,
        next: 0,
        labels: BTreeMap::new(),
        agent: String::new(),
        capabilities: Vec::new(),
    }
}

fn full_hello() -> Hello {
    let labels = [("app", "shop"), ("größe", "5 µm"), ("pod", "builder-0")];
    Hello {
        build: "Build-7.x_y".parse().unwrap(),
        step: "test".parse().unwrap(),
        producer: ProducerId([0xfe; 16]),
        oldest: 250,
        next: 70_000,
        labels: labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
        agent: "phonehome-agent/0.1.0".into(),
        capabilities: vec!["one".into(), "two".into()],
    }
}

fn record(seq: u64, stream: Stream, offset: u64, payload: &[u8]) -> Record {
    Record::new(seq, 1_700_000_000_000_000 + seq, stream, offset, Bytes::copy_from_slice(payload))
}

fn finished(end: End, usage: Option<Usage>) -> Finished {
    let stdout = Count { records: 300, bytes: 70_000 };
    let stderr = Count { records: 1, bytes: 8 };
    let event = Count::default();
    let digest = Digest(std::array::from_fn(|n| 0xe0 + n as u8));
    Finished { next: 301, counts: Counts { stdout, stderr, event }, digest, end, time: 1_700_000_001_000_000, usage }
}

fn usage() -> Usage {
    Usage { wall: 12_345_678, user: 9_000_000, system: 250_000, max_rss: 8_589_934_592 }
}

fn pong(id: u64, command: CommandState, quiet: u64, held: u64) -> AgentFrame {
    AgentFrame::Pong(Pong { id, command, quiet, held })
}

fn worked_welcome() -> Welcome {
    Welcome {
        attempt: 1,
        next: 0,
        durable: Durable::Fsync,
        window: limits::WINDOW,
        heartbeat: limits::HEARTBEAT.as_millis() as u64,
        max_payload: limits::MAX_PAYLOAD as u32,
        max_message: limits::MAX_MESSAGE as u32,
        cancel: None,
        server: "phonehome-server/0.1.0".into(),
        capabilities: Vec::new(),
    }
}

fn list(name: &str) -> Vec<Value> {
    let file: Value = serde_json::from_str(VECTORS).unwrap();
    let list = file[name].as_array().unwrap().clone();
    assert!(!list.is_empty());
    list
}

fn vectors(direction: &str) -> Vec<Value> {
    list("frames").into_iter().filter(|vector| vector["direction"] == direction).collect()
}

fn names(vectors: &[Value]) -> Vec<String> {
    vectors.iter().map(|vector| text(&vector["name"]).to_owned()).collect()
}

fn messages(vector: &Value) -> (Message, Message) {
    (Message::Binary(unhex(text(&vector["binary"]))), Message::Text(vector["json"].to_string()))
}

fn value(message: &Message) -> Value {
    let Message::Text(text) = message else { panic!("not text") };
    serde_json::from_str(text).unwrap()
}

fn stream(value: &Value) -> Stream {
    serde_json::from_value(value.clone()).unwrap()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text"))
}

fn unhex(digits: &str) -> Bytes {
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    assert!(digits.len().is_multiple_of(2));
    digits.as_bytes().chunks(2).map(byte).collect()
}

/// Hexadecimal digits of a listing: no spaces, nothing after `#`.
fn without_comments(listing: &str) -> String {
    let digits = listing.lines().filter_map(|line| line.split('#').next());
    digits.flat_map(str::chars).filter(|c| !c.is_whitespace()).collect()
}

/// Fenced blocks of a document: what stands after the fence, and the body.
fn blocks(document: &str) -> Vec<(&str, String)> {
    let mut lines = document.lines();
    let mut blocks = Vec::new();
    while let Some(line) = lines.next() {
        if let Some(info) = line.strip_prefix("```") {
            blocks.push((info, lines.by_ref().take_while(|line| *line != "```").collect::<Vec<_>>().join("\n")));
        }
    }
    blocks
}

/// Cells of the tables of a document, without backquotes.
fn rows(document: &str) -> impl Iterator<Item = Vec<&str>> {
    let tables = document.lines().filter_map(|line| line.strip_prefix('|')?.strip_suffix('|'));
    tables.map(|row| row.split('|').map(|cell| cell.trim().trim_matches('`')).collect())
}
