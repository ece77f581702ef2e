//! Both codecs: every frame comes back as it was, nothing makes a decoder panic, nothing beyond a limit gets in.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, wherever that happens")]

use bytes::Bytes;
use phonehome_proto::{
    codec::{Codec, DecodeError, EncodeError, Message, binary, json},
    frame::{
        Ack, AgentFrame, Cancel, CommandState, Count, Counts, Drain, Durable, End, Finished, FinishedAck, Hello, Ping,
        Pong, Record, ServerFrame, Stream, Usage, Welcome,
    },
    id::{Digest, ProducerId},
    limits::{MAX_HEAD, MAX_LABEL, MAX_LABELS, MAX_MESSAGE, MAX_PAYLOAD, MAX_RECORDS},
};
use proptest::{
    collection::{btree_map, vec},
    option,
    prelude::*,
    sample::{Index, select},
};

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_an_agent_says_arrives_as_it_was_in_both_codecs(frame in agent_frame()) {
        for codec in CODECS {
            let message = codec.encode_agent(&frame).unwrap();
            prop_assert_eq!(&codec.decode_agent(&message).unwrap(), &frame);
        }
    }

    #[test]
    fn what_a_server_says_arrives_as_it_was_in_both_codecs(frame in server_frame()) {
        for codec in CODECS {
            let message = codec.encode_server(&frame).unwrap();
            prop_assert_eq!(&codec.decode_server(&message).unwrap(), &frame);
        }
    }

    #[test]
    fn noise_makes_no_decoder_panic(noise in vec(any::<u8>(), 0..400)) {
        read_everything(&noise);
    }

    #[test]
    fn noise_with_a_fitting_head_makes_no_decoder_panic(
        kind in 0..8u8,
        noise in vec(any::<u8>(), 0..400),
        cut in any::<Index>(),
    ) {
        let head = [&[kind], &noise[..cut.index(noise.len() + 1)]].concat();
        read_everything(&[&(head.len() as u16).to_be_bytes(), &head[..], &noise[head.len() - 1..]].concat());
    }

    #[test]
    fn a_damaged_message_makes_no_decoder_panic(
        agent in agent_frame(),
        server in server_frame(),
        damages in vec(damage(), 1..4),
    ) {
        for codec in CODECS {
            for message in [codec.encode_agent(&agent).unwrap(), codec.encode_server(&server).unwrap()] {
                let mut wire = bytes_of(message);
                damages.iter().for_each(|damage| damage.apply(&mut wire));
                read_everything(&wire);
            }
        }
    }

    #[test]
    fn a_flipped_bit_in_a_record_is_noticed(record in record(), bit in 0..8u8, at in any::<Index>()) {
        prop_assume!(!record.payload.is_empty());
        let len = record.payload.len();
        let mut wire = bytes_of(Codec::Binary.encode_agent(&AgentFrame::Records(vec![record])).unwrap());
        let payload = wire.len() - len;
        wire[payload + at.index(len)] ^= 1 << bit;
        let refused = Codec::Binary.decode_agent(&Message::Binary(wire.into()));
        prop_assert!(matches!(refused, Err(DecodeError::BadChecksum(_))), "{:?}", refused);
    }
}

#[test]
fn lengths_out_of_this_world_are_refused_and_not_allocated() {
    let huge = [&[253][..], &(1u64 << 60).to_le_bytes()].concat();
    let producer = [7; 16];
    let heads = [
        // Hello: the build's name, then the step's, then the labels' number, then the capabilities'.
        [&[0], &huge[..]].concat(),
        [&[0, 1, b'b'], &huge[..]].concat(),
        [&[0, 1, b'b', 1, b's'], &producer[..], &[0, 0], &huge].concat(),
        [&[0, 1, b'b', 1, b's'], &producer[..], &[0, 0, 0, 0], &huge].concat(),
        // Records: how many there are.
        [&[1, 0], &huge[..]].concat(),
    ];
    for head in heads {
        let refused = Codec::Binary.decode_agent(&with_length(&head));
        assert!(matches!(refused, Err(DecodeError::BadHead(_))), "{refused:?}");
    }
    // Welcome: the server's name. Cancel: the reason. FinishedAck: what is missing.
    for head in [&[0, 1, 0, 0, 0, 0, 0, 0, 0][..], &[2], &[3, 1]] {
        let refused = Codec::Binary.decode_server(&with_length(&[head, &huge].concat()));
        assert!(matches!(refused, Err(DecodeError::BadHead(_))), "{refused:?}");
    }
}

#[test]
fn a_message_beyond_its_limit_is_refused_unread() {
    let wire = Message::Binary(vec![0; MAX_MESSAGE + 1].into());
    assert!(matches!(Codec::Binary.decode_agent(&wire), Err(DecodeError::TooLarge(_))));
    assert!(matches!(Codec::Binary.decode_server(&wire), Err(DecodeError::TooLarge(_))));
    let text = Message::Text(" ".repeat(MAX_MESSAGE) + r#"{"type":"ping","id":1}"#);
    assert!(matches!(Codec::Json.decode_agent(&text), Err(DecodeError::TooLarge(_))));
    assert!(matches!(Codec::Json.decode_server(&text), Err(DecodeError::TooLarge(_))));
}

#[test]
fn a_message_beyond_its_limit_is_not_written() {
    let large = || Record::new(0, 0, Stream::Stdout, 0, vec![b'x'; MAX_PAYLOAD].into());
    let records = AgentFrame::Records((0..4).map(|_| large()).collect());
    let cancel = ServerFrame::Cancel(Cancel { reason: "x".repeat(MAX_HEAD), grace: 0 });
    for codec in CODECS {
        assert!(matches!(codec.encode_agent(&records), Err(EncodeError::TooLarge(_))));
    }
    assert!(matches!(Codec::Binary.encode_server(&cancel), Err(EncodeError::HeadTooLarge(_))));
}

#[test]
fn a_payload_up_to_its_limit_is_taken_and_no_longer_one() {
    for codec in CODECS {
        for (len, taken) in [(MAX_PAYLOAD, true), (MAX_PAYLOAD + 1, false)] {
            let frame = AgentFrame::Records(vec![Record::new(0, 0, Stream::Stdout, 0, vec![b'x'; len].into())]);
            match codec.decode_agent(&codec.encode_agent(&frame).unwrap()) {
                Ok(decoded) => assert!(taken && decoded == frame),
                Err(error) => assert!(!taken && matches!(error, DecodeError::TooLong(_)), "{error}"),
            }
        }
    }
}

#[test]
fn one_to_the_limit_of_records_are_taken_and_no_other_number() {
    for codec in CODECS {
        for (count, taken) in [(0, false), (1, true), (MAX_RECORDS, true), (MAX_RECORDS + 1, false)] {
            let records = (0..count as u64).map(|seq| Record::new(seq, 0, Stream::Stderr, seq, "x".into()));
            let frame = AgentFrame::Records(records.collect());
            match codec.decode_agent(&codec.encode_agent(&frame).unwrap()) {
                Ok(decoded) => assert!(taken && decoded == frame),
                Err(error) => assert!(!taken && matches!(error, DecodeError::RecordCount(_)), "{error}"),
            }
        }
    }
}

#[test]
fn sequence_numbers_do_not_run_over() {
    let record = |seq| AgentFrame::Records(vec![Record::new(seq, 0, Stream::Stdout, 0, Bytes::new())]);
    for codec in CODECS {
        let decode = |seq| codec.decode_agent(&codec.encode_agent(&record(seq)).unwrap());
        assert_eq!(decode(u64::MAX - 1).unwrap(), record(u64::MAX - 1));
        assert!(matches!(decode(u64::MAX), Err(DecodeError::RecordCount(1))));
    }
}

#[test]
fn a_hello_beyond_its_limits_is_refused() {
    let labels = |count: usize, len: usize| (0..count).map(|n| (format!("{n:04}"), "v".repeat(len - 4))).collect();
    let good = Hello { labels: labels(8, MAX_LABEL), ..hello() };
    let bad = [
        Hello { labels: labels(MAX_LABELS + 1, 8), ..hello() },
        Hello { labels: labels(1, MAX_LABEL + 1), ..hello() },
        Hello { labels: [(String::new(), "v".to_owned())].into(), ..hello() },
        Hello { oldest: 2, next: 1, ..hello() },
    ];
    for codec in CODECS {
        let decode =
            |hello: &Hello| codec.decode_agent(&codec.encode_agent(&AgentFrame::Hello(hello.clone())).unwrap());
        assert!(decode(&good).is_ok());
        for hello in &bad {
            assert!(matches!(decode(hello), Err(DecodeError::BadHello)), "{hello:?}");
        }
    }
}

#[test]
fn text_and_binary_do_not_mix() {
    let ping = ServerFrame::Ping(Ping { id: 1 });
    let pong = AgentFrame::Pong(Pong { id: 1, command: CommandState::Running, quiet: 0, held: 0 });
    for (codec, other) in [(Codec::Binary, Codec::Json), (Codec::Json, Codec::Binary)] {
        let refused = codec.decode_server(&other.encode_server(&ping).unwrap());
        assert!(matches!(refused, Err(DecodeError::WrongKind)));
        let refused = codec.decode_agent(&other.encode_agent(&pong).unwrap());
        assert!(matches!(refused, Err(DecodeError::WrongKind)));
    }
}

#[test]
fn text_nested_beyond_reason_is_refused() {
    for depth in ["[", r#"{"type":"records","first":0,"records":["#] {
        let text = Message::Text(depth.repeat(MAX_MESSAGE / depth.len()));
        assert!(matches!(Codec::Json.decode_agent(&text), Err(DecodeError::BadText(_))));
        assert!(matches!(Codec::Json.decode_server(&text), Err(DecodeError::BadText(_))));
    }
}

const CODECS: [Codec; 2] = [Codec::Binary, Codec::Json];

/// Every decoder reads `wire`; what they take is within the limits and can be said again.
fn read_everything(wire: &[u8]) {
    let binary = Bytes::copy_from_slice(wire);
    if let Ok(frame) = binary::decode_agent(&binary) {
        check_limits(&frame);
        assert_eq!(binary::decode_agent(&binary::encode_agent(&frame).unwrap()).unwrap(), frame);
    }
    if let Ok(frame) = binary::decode_server(&binary) {
        assert_eq!(binary::decode_server(&binary::encode_server(&frame).unwrap()).unwrap(), frame);
    }
    let text = String::from_utf8_lossy(wire);
    if let Ok(frame) = json::decode_agent(&text) {
        check_limits(&frame);
        assert_eq!(json::decode_agent(&json::encode_agent(&frame).unwrap()).unwrap(), frame);
    }
    if let Ok(frame) = json::decode_server(&text) {
        assert_eq!(json::decode_server(&json::encode_server(&frame).unwrap()).unwrap(), frame);
    }
    for codec in CODECS {
        for message in [Message::Binary(binary.clone()), Message::Text(text.to_string())] {
            if let Ok(AgentFrame::Records(records)) = codec.decode_agent(&message) {
                assert!(records.iter().all(Record::is_intact));
            }
            drop(codec.decode_server(&message));
        }
    }
}

fn check_limits(frame: &AgentFrame) {
    let AgentFrame::Records(records) = frame else { return };
    assert!((1..=MAX_RECORDS).contains(&records.len()));
    assert!(records.iter().all(|record| record.payload.len() <= MAX_PAYLOAD));
    assert!(records.windows(2).all(|pair| pair[1].seq == pair[0].seq + 1));
}

fn with_length(head: &[u8]) -> Message {
    Message::Binary([&(head.len() as u16).to_be_bytes(), head].concat().into())
}

fn bytes_of(message: Message) -> Vec<u8> {
    match message {
        Message::Binary(wire) => wire.to_vec(),
        Message::Text(text) => text.into_bytes(),
    }
}

/// What can happen to a message.
#[derive(Debug, Clone)]
enum Damage {
    Cut(Index),
    Flip(Index, u8),
    Grow(Vec<u8>),
    Insert(Index, u8),
    Remove(Index),
    /// The likely places for trouble: a length or a number at its end.
    Set(Index, u8),
}

impl Damage {
    fn apply(&self, wire: &mut Vec<u8>) {
        let len = wire.len();
        match self {
            Self::Grow(more) => wire.extend_from_slice(more),
            Self::Cut(at) => wire.truncate(at.index(len + 1)),
            Self::Insert(at, byte) => wire.insert(at.index(len + 1), *byte),
            _ if len == 0 => {}
            Self::Flip(at, bit) => wire[at.index(len)] ^= 1 << bit,
            Self::Remove(at) => drop(wire.remove(at.index(len))),
            Self::Set(at, byte) => wire[at.index(len)] = *byte,
        }
    }
}

fn damage() -> impl Strategy<Value = Damage> {
    let edge = select(&[0, 1, 2, 250, 251, 252, 253, 254, 255, b'"', b'{', b'}', b'\\', b'-', b'9'][..]);
    prop_oneof![
        any::<Index>().prop_map(Damage::Cut),
        (any::<Index>(), 0..8u8).prop_map(|(at, bit)| Damage::Flip(at, bit)),
        vec(any::<u8>(), 1..20).prop_map(Damage::Grow),
        (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Damage::Insert(at, byte)),
        any::<Index>().prop_map(Damage::Remove),
        (any::<Index>(), edge).prop_map(|(at, byte)| Damage::Set(at, byte)),
    ]
}

fn agent_frame() -> impl Strategy<Value = AgentFrame> {
    prop_oneof![
        any_hello().prop_map(AgentFrame::Hello),
        (0..u64::MAX - 30, vec(record(), 1..30)).prop_map(|(first, records)| AgentFrame::Records(row(first, records))),
        finished().prop_map(AgentFrame::Finished),
        (number(), command(), number(), number()).prop_map(|(id, command, quiet, held)| AgentFrame::Pong(Pong {
            id,
            command,
            quiet,
            held
        })),
    ]
}

fn server_frame() -> impl Strategy<Value = ServerFrame> {
    prop_oneof![
        any_welcome().prop_map(ServerFrame::Welcome),
        (number(), number()).prop_map(|(next, window)| ServerFrame::Ack(Ack { next, window })),
        cancel().prop_map(ServerFrame::Cancel),
        finished_ack().prop_map(ServerFrame::FinishedAck),
        number().prop_map(|within| ServerFrame::Drain(Drain { within })),
        number().prop_map(|id| ServerFrame::Ping(Ping { id })),
    ]
}

fn any_hello() -> impl Strategy<Value = Hello> {
    let labels = btree_map("[a-zß./]{1,20}", ".{0,40}", 0..6);
    let texts = (labels, ".{0,20}", vec("[a-z-]{1,10}", 0..3));
    let range = (number(), number()).prop_map(|(a, b)| (a.min(b), a.max(b)));
    (name(), name(), any::<[u8; 16]>(), range, texts).prop_map(
        |(build, step, producer, (oldest, next), (labels, agent, capabilities))| Hello {
            build: build.parse().unwrap(),
            step: step.parse().unwrap(),
            producer: ProducerId(producer),
            oldest,
            next,
            labels,
            agent,
            capabilities,
        },
    )
}

/// Numbered from 0; [`row`] gives a record its place.
fn record() -> impl Strategy<Value = Record> {
    let payload = prop_oneof![
        3 => vec(any::<u8>(), 0..300),
        3 => ".{0,100}".prop_map(String::into_bytes),
        1 => vec(0..0x20u8, 0..300),
    ];
    (number(), select(&Stream::ALL[..]), number(), payload)
        .prop_map(|(time, stream, offset, payload)| Record::new(0, time, stream, offset, payload.into()))
}

fn row(first: u64, records: Vec<Record>) -> Vec<Record> {
    (first..).zip(records).map(|(seq, r)| Record::new(seq, r.time, r.stream, r.offset, r.payload)).collect()
}

fn finished() -> impl Strategy<Value = Finished> {
    let usage = (number(), number(), number(), number());
    let usage = usage.prop_map(|(wall, user, system, max_rss)| Usage { wall, user, system, max_rss });
    let counts = (count(), count(), count()).prop_map(|(stdout, stderr, event)| Counts { stdout, stderr, event });
    (number(), counts, any::<[u8; 32]>(), end(), number(), option::of(usage)).prop_map(
        |(next, counts, digest, end, time, usage)| Finished { next, counts, digest: Digest(digest), end, time, usage },
    )
}

fn end() -> impl Strategy<Value = End> {
    prop_oneof![
        any::<u8>().prop_map(End::Exited),
        (1..=u8::MAX, ".{0,60}").prop_map(|(code, reason)| End::NotStarted { code, reason }),
        any::<(u8, bool, bool)>().prop_map(|(signal, core, oom)| End::Signalled { signal, core, oom }),
    ]
}

fn any_welcome() -> impl Strategy<Value = Welcome> {
    let durable = select(&[Durable::Memory, Durable::Fsync, Durable::Quorum][..]);
    let limits = any::<(u32, u32)>();
    let texts = (option::of(cancel()), ".{0,20}", vec("[a-z-]{1,10}", 0..3));
    (any::<u32>(), number(), durable, number(), number(), limits, texts).prop_map(
        |(attempt, next, durable, window, heartbeat, (max_payload, max_message), (cancel, server, capabilities))| {
            Welcome {
                attempt,
                next,
                durable,
                window,
                heartbeat,
                max_payload,
                max_message,
                cancel,
                server,
                capabilities,
            }
        },
    )
}

fn cancel() -> impl Strategy<Value = Cancel> {
    (".{0,60}", number()).prop_map(|(reason, grace)| Cancel { reason, grace })
}

fn finished_ack() -> impl Strategy<Value = FinishedAck> {
    prop_oneof![
        Just(FinishedAck::Complete),
        ".{0,60}".prop_map(FinishedAck::Incomplete),
        number().prop_map(FinishedAck::Resume),
    ]
}

fn count() -> impl Strategy<Value = Count> {
    (number(), number()).prop_map(|(records, bytes)| Count { records, bytes })
}

fn command() -> impl Strategy<Value = CommandState> {
    select(&[CommandState::Waiting, CommandState::Running, CommandState::Ended][..])
}

fn name() -> impl Strategy<Value = String> {
    "[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
}

/// Of every length on the wire, and the first and last of each.
fn number() -> impl Strategy<Value = u64> {
    let edges = [0, 250, 251, 0xffff, 0x1_0000, 0xffff_ffff, 0x1_0000_0000, u64::MAX];
    prop_oneof![select(edges.to_vec()), 0..1000u64, any::<u64>()]
}

fn hello() -> Hello {
    Hello {
        build: "b".parse().unwrap(),
        step: "s".parse().unwrap(),
        producer: ProducerId([7; 16]),
        oldest: 0,
        next: 0,
        labels: std::collections::BTreeMap::new(),
        agent: String::new(),
        capabilities: Vec::new(),
    }
}
