//! Callers, good and bad, against a whole server on a machine in memory, whose time costs nothing: requests, websocket
//! frames and pauses in any order, over several connections. Whatever they send, they are answered in HTTP and in frames
//! of the wire, or hung up on in time; without a build's token nothing opens and nothing is written; little memory is
//! taken; what was acknowledged is stored; and a good agent that comes last is served.

#![no_main]

use std::{collections::BTreeMap, io, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use phonehome_env::{Env, Nature, Workers};
use phonehome_fuzz::{Input, disk::MemoryDisk, memory::Meter};
use phonehome_proto::{
    codec::{Codec, Message},
    frame::{AgentFrame, CommandState, End, Finished, FinishedAck, Hello, Pong, Record, ServerFrame, Stream},
    id::{Attempt, BuildId, ProducerId, StepName},
    tally::Tally,
};
use phonehome_server::{Clocks, Config, Durability, Expected, ExpectedBuild, Server, fuzzing::survey};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf},
    task::JoinHandle,
    time::{sleep, timeout},
};

#[global_allocator]
static MEMORY: Meter = Meter::new();

/// Most memory that a server takes with its callers, bytes: each has buffers of some 64 KiB for both directions, and a
/// message at most.
const BOUND: usize = 16 * 1024 * 1024;

/// The longest a server waits for anybody who is silent, or does not listen.
const PATIENCE: Duration = Duration::from_secs(240);

const DATA: &str = "/data";
/// Builds and their tokens. The last is the good agent's.
const BUILDS: [(&str, &str); 3] = [("b", "token-of-b"), ("other", "token-of-other"), ("good", "token-of-good")];
const GOOD: usize = 2;
const CALLERS: usize = 6;

fuzz_target!(|input: &[u8]| {
    let disk = MemoryDisk::default();
    disk.put(&Path::new(DATA).join("reserve"), vec![0; 1024 * 1024]); // to write it every time would take longest
    let ((), memory) = MEMORY.measure(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        let heard = runtime.expect("there are threads").block_on(World::run(&disk, Input::new(input)));
        check(&disk, heard);
    });
    assert!(memory <= BOUND, "{memory} bytes for {} bytes of input", input.len());
});

/// A server and who calls it.
struct World {
    server: Server,
    builds: Vec<ExpectedBuild>,
    callers: Vec<Caller>,
    /// Who speaks.
    at: usize,
}

struct Caller {
    stream: WriteHalf<DuplexStream>,
    sent: Vec<u8>,
    heard: JoinHandle<Vec<u8>>,
    codec: Codec,
    tally: Tally,
}

/// What a caller sent and what it got, until it was hung up on.
struct Heard {
    sent: Vec<u8>,
    got: Vec<u8>,
}

impl World {
    async fn run(disk: &MemoryDisk, mut input: Input<'_>) -> Vec<Heard> {
        let mut world = Self::new(disk);
        let shape = input.byte();
        world.connect(shape & 8 == 8);
        if shape & 1 == 1 {
            let codec = if shape & 2 == 0 { Codec::Binary } else { Codec::Json };
            world.open(codec, 0).await;
            let hello = hello(0, 0, 0);
            world.frame(&AgentFrame::Hello(hello)).await;
        }
        while !input.is_empty() {
            world.act(&mut input).await;
        }
        world.good_agent().await;
        if shape & 4 == 4 {
            timeout(PATIENCE, world.server.shutdown(Duration::from_secs(5))).await.expect("it goes down");
        }
        let mut heard = Vec::new();
        for Caller { stream, sent, heard: got, .. } in world.callers {
            let got = timeout(PATIENCE, got).await.expect("whoever is silent is hung up on").expect("it only reads");
            drop(stream);
            heard.push(Heard { sent, got });
        }
        heard
    }

    fn new(disk: &MemoryDisk) -> Self {
        let env = Env {
            disk: Arc::new(disk.clone()),
            nature: Arc::new(Still),
            workers: Workers::Tasks(Arc::new(|| Duration::from_millis(2))),
            ..Env::real()
        };
        let config =
            Config { listen: ([0, 0, 0, 0], 0).into(), tls: false, data: DATA.into(), durability: Durability::Fsync };
        let server = Server::deaf(env, &config).expect("the data directory can be had");
        let builds = BUILDS.map(|(id, token)| {
            let clocks = if id == BUILDS[GOOD].0 { no_limits() } else { Clocks::default() };
            let expected = Expected { token: Some(token.to_owned()), clocks, ..Expected::new(build(id)) };
            server.expect(expected).expect("it is new")
        });
        Self { server, builds: builds.into(), callers: Vec::new(), at: 0 }
    }

    fn connect(&mut self, slowly: bool) {
        let (ours, theirs) = tokio::io::duplex(16 * 1024);
        self.server.serve(theirs);
        let (reader, stream) = tokio::io::split(ours);
        let heard = tokio::spawn(listen(reader, slowly));
        self.at = self.callers.len();
        self.callers.push(Caller { stream, sent: Vec::new(), heard, codec: Codec::Binary, tally: Tally::default() });
    }

    async fn act(&mut self, input: &mut Input<'_>) {
        let choice = input.byte();
        match choice & 15 {
            0 | 1 => {
                let length = usize::from(input.byte());
                self.send(input.bytes(length)).await;
            }
            2 => {
                let request = request(input);
                self.send(&request).await;
            }
            3 => {
                let codec = if choice & 16 == 0 { Codec::Binary } else { Codec::Json };
                self.open(codec, usize::from(choice >> 5 & 1)).await;
            }
            4 => {
                let hello = hello(usize::from(choice >> 4 & 1), input.near(0), input.near(0));
                self.frame(&AgentFrame::Hello(Hello { producer: ProducerId([choice >> 6; 16]), ..hello })).await;
            }
            5 | 6 => {
                let records = self.records(input, 1 + (choice >> 4 & 3));
                self.frame(&AgentFrame::Records(records)).await;
            }
            7 => {
                let finished = self.finished(input);
                self.frame(&AgentFrame::Finished(finished)).await;
            }
            8 => {
                self.frame(&AgentFrame::Pong(Pong {
                    id: choice.into(),
                    quiet: 0,
                    held: 0,
                    command: CommandState::Running,
                }))
                .await
            }
            9 => {
                let (first, second, length) = (input.byte(), input.byte(), usize::from(input.byte()));
                self.send(&websocket(first, second, input.bytes(length))).await;
            }
            10 => {
                let length = usize::from(input.byte());
                let opcode = if self.callers[self.at].codec == Codec::Json { 1 } else { 2 };
                self.send(&websocket(0x80 | opcode, 0, input.bytes(length))).await;
            }
            11 => sleep(Duration::from_millis(1 << (choice >> 4))).await,
            12 if self.callers.len() < CALLERS => self.connect(choice & 16 == 16),
            13 => self.at = usize::from(choice >> 4) % self.callers.len(),
            14 => drop(timeout(PATIENCE, self.callers[self.at].stream.shutdown()).await),
            12 => {}
            _ => self.builds[usize::from(choice >> 4 & 1)].cancel("the test says so"),
        }
    }

    /// A build's whole life.
    async fn good_agent(&mut self) {
        self.connect(false);
        self.open(Codec::Binary, GOOD).await;
        self.frame(&AgentFrame::Hello(hello(GOOD, 0, 0))).await;
        let records = self.records(&mut Input::new(&[]), 3);
        self.frame(&AgentFrame::Records(records)).await;
        let finished = self.finished(&mut Input::new(&[]));
        self.frame(&AgentFrame::Finished(finished)).await;
        sleep(Duration::from_secs(1)).await;
    }

    /// What a good agent asks.
    async fn open(&mut self, codec: Codec, build: usize) {
        let (token, offer) = (BUILDS[build].1, codec.subprotocol());
        self.callers[self.at].codec = codec;
        let request = format!(
            "GET /v1/agent HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: BwcHBwcHBwcHBwcHBwcHBw==\r\n\
             Sec-WebSocket-Protocol: {offer}\r\nAuthorization: Bearer {token}\r\n\r\n"
        );
        self.send(request.as_bytes()).await;
        sleep(Duration::from_millis(1)).await; // what comes before the answer is no websocket frame
    }

    async fn frame(&mut self, frame: &AgentFrame) {
        let wire = match self.callers[self.at].codec.encode_agent(frame) {
            Ok(Message::Binary(bytes)) => websocket(0x82, 0, &bytes),
            Ok(Message::Text(text)) => websocket(0x81, 0, text.as_bytes()),
            Err(_) => return,
        };
        self.send(&wire).await;
    }

    async fn send(&mut self, bytes: &[u8]) {
        let caller = &mut self.callers[self.at];
        caller.sent.extend_from_slice(bytes);
        let sent = timeout(PATIENCE, caller.stream.write_all(bytes)).await.expect("it listens, or hangs up");
        drop(sent); // it has hung up, perhaps
    }

    fn records(&mut self, input: &mut Input<'_>, count: u8) -> Vec<Record> {
        let tally = &mut self.callers[self.at].tally;
        let first = input.near(tally.next());
        if first.checked_add(count.into()).is_none() {
            return Vec::new(); // no codec lets this through
        }
        let records = (first..first + u64::from(count)).map(|seq| {
            let choice = input.byte();
            let stream = Stream::from_number(choice % 3).expect("there are three");
            let offset = if choice & 4 == 0 { tally.offset(stream) } else { input.near(tally.offset(stream)) };
            let payload = match choice >> 3 {
                31 => Bytes::from_static(&[b'x'; 60_000]),
                length => Bytes::copy_from_slice(input.bytes(length.into())),
            };
            let record = Record::new(seq, 0, stream, offset, payload);
            if tally.expects(&record) {
                tally.add(&record);
            }
            record
        });
        records.collect()
    }

    fn finished(&mut self, input: &mut Input<'_>) -> Finished {
        let tally = &self.callers[self.at].tally;
        let (counts, mut digest) = (tally.counts(), tally.digest());
        if input.below(4) == 3 {
            digest.0[0] ^= 1;
        }
        Finished { next: input.near(tally.next()), counts, digest, end: End::Exited(0), time: 1, usage: None }
    }
}

/// Reads until the server hangs up. Whoever is slow does not read for longer than any server waits.
async fn listen(mut stream: ReadHalf<DuplexStream>, slowly: bool) -> Vec<u8> {
    if slowly {
        sleep(PATIENCE / 2).await;
    }
    let mut got = Vec::new();
    drop(stream.read_to_end(&mut got).await); // what counts is what came before
    got
}

/// A request that may be a good one, piece by piece.
fn request(input: &mut Input<'_>) -> Vec<u8> {
    const METHODS: [&str; 4] = ["GET", "HEAD", "POST", "OPTIONS"];
    const PATHS: [&str; 8] =
        ["/v1/agent", "/a/v1/agent", "/healthz", "/", "*", "http://h/v1/agent?x", "/v1/agent/", "/v1/%61gent"];
    const HEADERS: [&str; 24] = [
        "Host: x",
        "Connection: Upgrade",
        "connection: keep-alive, upgrade",
        "Connection: close",
        "Upgrade: websocket",
        "Upgrade: h2c, WebSocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Version: 8",
        "Sec-WebSocket-Key: BwcHBwcHBwcHBwcHBwcHBw==",
        "Sec-WebSocket-Key: ",
        "Sec-WebSocket-Protocol: phonehome.v1",
        "Sec-WebSocket-Protocol: phonehome.v1.json",
        "Sec-WebSocket-Protocol: phonehome.v2, phonehome.v1",
        "Authorization: Bearer token-of-b",
        "Authorization: bearer   token-of-other",
        "Authorization: Bearer token-of-",
        "Authorization: Basic token-of-b",
        "Authorization: Bearer",
        "Content-Length: 5",
        "Transfer-Encoding: chunked",
        "Expect: 100-continue",
        "Content-Length: 18446744073709551615",
        "Cookie: x\u{e9}",
        " folded: line",
    ];
    let (first, count) = (input.byte(), input.below(32));
    let version = if first >> 5 & 1 == 0 { "1.1" } else { "1.0" };
    let (method, path) = (METHODS[usize::from(first & 3)], PATHS[usize::from(first >> 2 & 7)]);
    let mut request = format!("{method} {path} HTTP/{version}\r\n").into_bytes();
    for _ in 0..count {
        match usize::from(input.byte()) {
            at if at < HEADERS.len() => request.extend_from_slice(HEADERS[at].as_bytes()),
            length => request.extend_from_slice(input.bytes(length - HEADERS.len())),
        }
        request.extend_from_slice(b"\r\n");
    }
    if first >> 6 & 1 == 0 {
        request.extend_from_slice(b"\r\n");
    }
    request
}

/// A frame as clients send it (RFC 6455, section 5.2), masked with nothing. Bits of `odd` make it another.
fn websocket(first: u8, odd: u8, payload: &[u8]) -> Vec<u8> {
    let mask = if odd & 1 == 0 { 0x80 } else { 0 };
    let mut wire = vec![first];
    match (payload.len(), odd >> 1 & 3) {
        (len @ 0..126, 0) => wire.push(mask | len as u8),
        (len @ 0..65_536, 0 | 1) => {
            wire.push(mask | 126);
            wire.extend_from_slice(&(len as u16).to_be_bytes());
        }
        (len, 0..=2) => {
            wire.push(mask | 127);
            wire.extend_from_slice(&(len as u64).to_be_bytes());
        }
        (len, _) => {
            wire.push(mask | 127);
            wire.extend_from_slice(&((len as u64) << (odd >> 3)).to_be_bytes()); // more than comes
        }
    }
    if mask > 0 {
        wire.extend_from_slice(&[0; 4]);
    }
    wire.extend_from_slice(payload);
    wire
}

fn hello(at: usize, oldest: u64, next: u64) -> Hello {
    Hello {
        build: build(BUILDS[at].0),
        step: StepName::default(),
        producer: ProducerId([0; 16]),
        oldest,
        next,
        labels: BTreeMap::new(),
        agent: "fuzz".into(),
        capabilities: Vec::new(),
    }
}

fn no_limits() -> Clocks {
    Clocks { connect: None, idle: None, lost: None, total: None, ..Clocks::default() }
}

fn build(id: &str) -> BuildId {
    id.parse().expect("a name")
}

/// A machine without chance, and without time of day.
#[derive(Debug)]
struct Still;

impl Nature for Still {
    fn fill(&self, bytes: &mut [u8]) -> io::Result<()> {
        bytes.fill(7);
        Ok(())
    }

    fn now(&self) -> u64 {
        0
    }
}

// --- What is demanded of the answers ---

/// What was acknowledged of the attempts: everything below a number, and the end.
#[derive(Default)]
struct Promised(BTreeMap<Attempt, (u64, Option<FinishedAck>)>);

/// Looks at everything that callers got and at what is on the disk then.
fn check(disk: &MemoryDisk, heard: Vec<Heard>) {
    let mut promised: [Promised; BUILDS.len()] = Default::default();
    let mut tokens = [false; BUILDS.len()];
    for Heard { sent, got } in &heard {
        let shown = BUILDS.map(|(_, token)| contains(sent, token));
        tokens = [0, 1, 2].map(|at| tokens[at] || shown[at]);
        if let Some((head, frames)) = answers(got) {
            let first = shown.iter().position(|shown| *shown).expect("it is opened to somebody without a token");
            let codec = if head.contains("phonehome.v1.json") { Codec::Json } else { Codec::Binary };
            let mut unknown = Promised::default();
            // With several tokens in one stream it is not known which was the header.
            let is_known = shown.iter().filter(|shown| **shown).count() == 1;
            let promised = if is_known { &mut promised[first] } else { &mut unknown };
            messages(codec, frames, promised);
        }
    }
    let end = promised[GOOD].0.get(&1).and_then(|(_, end)| end.as_ref());
    assert_eq!(end, Some(&FinishedAck::Complete), "the good agent is not served");
    for (at, (id, _)) in BUILDS.into_iter().enumerate() {
        let dir = Path::new(DATA).join("builds").join(id);
        if !tokens[at] {
            let mut written = disk.below(&dir);
            written.remove(&dir.join("verdict.json")); // that nobody came
            assert!(written.is_empty(), "a caller without the token has written {:?}", written.keys());
            continue;
        }
        let stored = survey(&(Arc::new(disk.clone()) as _), Path::new(DATA), &build(id)).expect("it can be read");
        for (attempt, (next, end)) in &promised[at].0 {
            let stored = stored.iter().find(|stored| stored.attempt == *attempt).expect("the attempt is stored");
            assert!(stored.next >= *next, "{next} acknowledged, {} stored", stored.next);
            if let Some(end) = end {
                assert_eq!(stored.finished.as_ref().map(|(_, answer)| answer), Some(end), "another end is stored");
            }
        }
    }
}

/// Goes through the answers, up to the one that opens a websocket. Gives that one and what follows it.
fn answers(mut got: &[u8]) -> Option<(String, &[u8])> {
    while !got.is_empty() {
        let end = got.windows(4).position(|four| four == b"\r\n\r\n").expect("a whole answer") + 4;
        let (head, rest) = got.split_at(end);
        let head = str::from_utf8(head).expect("only text").to_owned();
        let status = status(&head);
        if status == 101 {
            return Some((head, rest));
        }
        let length =
            head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
        let length: usize = length.unwrap_or(0);
        let has_no_body = rest.is_empty() || rest.starts_with(b"HTTP/1."); // HEAD
        got = if has_no_body { rest } else { rest.get(length..).expect("a whole answer") };
        assert!(has_no_body || rest[..length].is_ascii());
    }
    None
}

/// The status line's number (RFC 9112, section 4).
fn status(head: &str) -> u16 {
    let line = head.lines().next().unwrap_or_default();
    let rest = line.strip_prefix("HTTP/1.1 ").or_else(|| line.strip_prefix("HTTP/1.0 ")).expect("a status line");
    let (status, reason) = rest.split_once(' ').expect("a status line");
    assert!(!reason.is_empty() && reason.bytes().all(|byte| matches!(byte, b' '..=b'~')), "{line}");
    let status = status.parse().expect("a status");
    assert!(matches!(status, 101 | 200 | 400 | 401 | 404 | 405 | 414 | 426 | 431), "{line}");
    status
}

/// Goes through websocket frames as servers send them: whole messages, nothing masked. The last may be cut.
fn messages(codec: Codec, mut wire: &[u8], promised: &mut Promised) {
    let (mut attempt, mut acknowledged, mut is_closed) = (None, 0, false);
    while let Some((opcode, payload, rest)) = next_frame(wire) {
        assert!(!is_closed, "a frame behind the last");
        wire = rest;
        let message = match opcode {
            1 => Message::Text(str::from_utf8(payload).expect("text").to_owned()),
            2 => Message::Binary(Bytes::copy_from_slice(payload)),
            8 => {
                is_closed = true;
                assert!(payload.is_empty() || payload.len() >= 2 && str::from_utf8(&payload[2..]).is_ok());
                continue;
            }
            9 | 10 => continue,
            _ => panic!("opcode {opcode}"),
        };
        let next = match codec.decode_server(&message).expect("a frame of the wire") {
            ServerFrame::Welcome(welcome) => {
                assert!(attempt.replace(welcome.attempt).is_none(), "welcomed twice");
                welcome.next
            }
            ServerFrame::Ack(ack) => ack.next,
            ServerFrame::FinishedAck(FinishedAck::Resume(next)) => next,
            ServerFrame::FinishedAck(answer @ (FinishedAck::Complete | FinishedAck::Incomplete(_))) => {
                let attempt = attempt.expect("welcomed first");
                promised.0.entry(attempt).or_default().1 = Some(answer);
                continue;
            }
            ServerFrame::Cancel(_) | ServerFrame::Drain(_) | ServerFrame::Ping(_) => continue,
        };
        assert!(next >= acknowledged, "{next} acknowledged after {acknowledged}");
        acknowledged = next;
        let entry = promised.0.entry(attempt.expect("welcomed first")).or_default();
        entry.0 = entry.0.max(next);
    }
}

fn next_frame(wire: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let [first, second, rest @ ..] = wire else { return None };
    assert!(first & 0xf0 == 0x80 && second & 0x80 == 0, "not a whole message of a server: {first:x} {second:x}");
    let (len, rest) = match second {
        126 => (usize::from(u16::from_be_bytes(rest.get(..2)?.try_into().expect("two"))), &rest[2..]),
        127 => (u64::from_be_bytes(rest.get(..8)?.try_into().expect("eight")) as usize, &rest[8..]),
        len => (usize::from(*len), rest),
    };
    Some((first & 15, rest.get(..len)?, &rest[len..]))
}

fn contains(sent: &[u8], token: &str) -> bool {
    sent.windows(token.len()).any(|part| part == token.as_bytes())
}
