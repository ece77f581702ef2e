//! Agents, good and bad, against the server's half of exactly-once: hellos, records, ends, commits and crashes in any
//! order, with `Attempts` and `Receiver` joined as the store joins them. Whatever they say, what is stored is dense, in
//! order and never replaced, and nobody but the newest connection adds to it.

#![no_main]

use std::collections::BTreeMap;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use phonehome_fuzz::Input;
use phonehome_proto::{
    attempts::{Attempts, Lease},
    codec::{binary, json},
    event::{Event, Gap},
    frame::{AgentFrame, Count, Counts, End, Finished, FinishedAck, Hello, Record, Stream},
    id::{Digest, ProducerId, StepName},
    limits::{MAX_MESSAGE, MAX_PAYLOAD, MAX_WINDOW},
    receiver::{Ending, Receiver},
    tally::Tally,
};

fuzz_target!(|input: &[u8]| {
    let mut input = Input::new(input);
    let mut server = Server::default();
    while !input.is_empty() {
        let choice = input.byte();
        match choice % 8 {
            0 => server.hello(hello(&mut input, &server)),
            1 | 2 => {
                let at = server.pick(&mut input);
                let records = records(&mut input, &server, at);
                server.records(at, records);
            }
            3 => {
                let at = server.pick(&mut input);
                let finished = finished(&mut input, &server, at);
                server.finished(at, finished);
            }
            4 => {
                server.commit();
                if choice & 8 == 0 {
                    server.acknowledge();
                }
            }
            5 => server.crash(),
            kind => {
                let at = server.pick(&mut input);
                let length = usize::from(input.byte());
                if let Some(frame) = frame(kind, input.bytes(length)) {
                    server.frame(at, frame);
                }
            }
        }
        server.check();
    }
});

// --- What agents say ---

fn hello(input: &mut Input<'_>, server: &Server) -> Hello {
    let producer = ProducerId([input.below(4); 16]);
    let stored = server.logs.iter().find(|log| log.producer == producer).map_or(0, |log| log.tally.next());
    let (oldest, next) = (input.near(stored / 2), input.near(stored));
    Hello {
        build: "b".parse().expect("a name"),
        step: StepName::default(),
        producer,
        oldest,
        next,
        labels: BTreeMap::new(),
        agent: String::new(),
        capabilities: Vec::new(),
    }
}

fn records(input: &mut Input<'_>, server: &Server, at: usize) -> Vec<Record> {
    let mut tally =
        server.connections.get(at).map(|connection| connection.receiver.tally().clone()).unwrap_or_default();
    let first = input.near(tally.next());
    let count = 1 + u64::from(input.below(4));
    if first.checked_add(count).is_none() {
        return Vec::new(); // no codec lets this through
    }
    (first..first + count)
        .map(|seq| {
            let stream = Stream::from_number(input.below(3)).expect("there are three");
            let payload: Bytes = match input.below(16) {
                0 => Bytes::from_static(&[b'x'; MAX_PAYLOAD]),
                1 | 2 => gap(input).into(),
                length => Bytes::copy_from_slice(input.bytes(usize::from(length) - 3)),
            };
            let record = Record::new(seq, 0, stream, input.near(tally.offset(stream)), payload);
            if tally.expects(&record) {
                tally.add(&record);
            }
            record
        })
        .collect()
}

fn gap(input: &mut Input<'_>) -> Vec<u8> {
    let stream = Stream::from_number(input.below(3)).expect("there are three");
    Event::Gap(Gap { stream, bytes: input.near(1), cause: String::new() }).payload()
}

fn finished(input: &mut Input<'_>, server: &Server, at: usize) -> Finished {
    let tally = server.connections.get(at).map(|connection| connection.receiver.tally().clone()).unwrap_or_default();
    let mut finished = Finished {
        next: input.near(tally.next()),
        counts: tally.counts(),
        digest: tally.digest(),
        end: End::Exited(input.below(2)),
        time: 0,
        usage: None,
    };
    match input.below(8) {
        0 => finished.digest = Digest([input.byte(); 32]),
        1 => finished.counts.stdout.bytes = input.near(finished.counts.stdout.bytes),
        2 => finished.counts.event.records = input.near(finished.counts.event.records),
        _ => {}
    }
    finished
}

/// A frame in one of the two codecs. Its checksums are made right: no fuzzer finds them.
fn frame(kind: u8, bytes: &[u8]) -> Option<AgentFrame> {
    let frame = match kind {
        6 => binary::decode_agent(&Bytes::copy_from_slice(bytes)).ok()?,
        _ => json::decode_agent(str::from_utf8(bytes).ok()?).ok()?,
    };
    Some(match frame {
        AgentFrame::Records(records) => AgentFrame::Records(records.into_iter().map(with_checksum).collect()),
        other @ (AgentFrame::Hello(_) | AgentFrame::Finished(_) | AgentFrame::Pong(_)) => other,
    })
}

fn with_checksum(record: Record) -> Record {
    Record::new(record.seq, record.time, record.stream, record.offset, record.payload)
}

// --- The server, without its files and its tasks ---

#[derive(Default)]
struct Server {
    attempts: Attempts,
    logs: Vec<Log>,
    /// The newest, the older ones of which do not know yet that they are void.
    connections: Vec<Connection>,
}

/// One attempt as it is stored.
struct Log {
    producer: ProducerId,
    entries: Vec<Entry>,
    durable: usize,
    tally: Tally,
    lost: u64,
    /// It was taken back once in the life of this server.
    rewound: bool,
    finished: Option<(Finished, FinishedAck)>,
}

enum Entry {
    Record(Record),
    Hole { from: u64, to: u64 },
}

struct Connection {
    lease: Lease,
    receiver: Receiver,
}

/// Connections that are remembered.
const CONNECTIONS: usize = 3;

impl Server {
    fn pick(&self, input: &mut Input<'_>) -> usize {
        usize::from(input.below(CONNECTIONS as u8)) % self.connections.len().max(1)
    }

    fn frame(&mut self, at: usize, frame: AgentFrame) {
        match frame {
            AgentFrame::Hello(hello) => self.hello(hello),
            AgentFrame::Records(records) => self.records(at, records),
            AgentFrame::Finished(finished) => self.finished(at, finished),
            AgentFrame::Pong(_) => {}
        }
    }

    fn hello(&mut self, hello: Hello) {
        if !hello.is_reasonable() {
            return;
        }
        self.commit();
        if let Some(log) = self.logs.last().filter(|log| self.attempts.is_newest(log.producer))
            && log.producer == hello.producer
            && Receiver::resume(log.tally.clone(), 0, None).handle_hello(&hello).is_err()
        {
            return;
        }
        let Ok(lease) = self.attempts.handle_hello(hello.producer) else { return };
        if lease.new {
            self.logs.push(Log::new(hello.producer));
        }
        assert_eq!(lease.attempt as usize, self.logs.len());
        let log = self.logs.last_mut().expect("the lease is for it");
        assert_eq!(log.producer, hello.producer);
        let mut receiver = log.receiver();
        let stored = receiver.next();
        match receiver.handle_hello(&hello) {
            Err(_) => return,
            Ok(None) => assert!(hello.oldest <= stored && stored <= hello.next, "cannot resume"),
            Ok(Some(oldest)) => {
                assert!(oldest > stored);
                log.entries.push(Entry::Hole { from: stored, to: oldest });
                log.durable = log.entries.len();
                log.tally.skip_to(oldest);
                log.lost += oldest - stored;
                receiver = log.receiver();
            }
        }
        self.connections.insert(0, Connection { lease, receiver });
        self.connections.truncate(CONNECTIONS);
    }

    fn records(&mut self, at: usize, mut records: Vec<Record>) {
        let Some(connection) = self.connections.get_mut(at) else { return };
        let is_current = self.attempts.is_current(connection.lease);
        let log = &mut self.logs[connection.lease.attempt as usize - 1];
        let before = state(&connection.receiver);
        let next = connection.receiver.next();
        let offered = records.clone();
        if connection.receiver.handle_records(&mut records, |seq| log.stored_crc(seq)).is_err() {
            assert_eq!(state(&connection.receiver), before, "what was refused leaves a trace");
            return;
        }
        assert_eq!(connection.receiver.next(), next + records.len() as u64);
        assert!(records.iter().zip(next..).all(|(record, seq)| record.seq == seq), "not dense");
        assert!(offered.ends_with(&records), "not what was offered");
        assert!(connection.receiver.finished().is_none() || records.is_empty(), "a record after the end");
        if is_current {
            log.entries.extend(records.into_iter().map(Entry::Record));
            log.tally = connection.receiver.tally().clone();
        }
    }

    fn finished(&mut self, at: usize, finished: Finished) {
        let Some(connection) = self.connections.get_mut(at) else { return };
        let is_current = self.attempts.is_current(connection.lease);
        let log = &mut self.logs[connection.lease.attempt as usize - 1];
        let before = state(&connection.receiver);
        match connection.receiver.handle_finished(finished.clone()) {
            Err(_) => assert_eq!(state(&connection.receiver), before, "what was refused leaves a trace"),
            Ok(Ending::Resume(answer)) => {
                assert_eq!(answer, FinishedAck::Resume(connection.receiver.durable()));
                assert_eq!(state(&connection.receiver), before);
            }
            Ok(Ending::Repeat(answer)) => {
                assert_eq!(connection.receiver.finished(), Some(&(finished, answer)));
                assert_eq!(state(&connection.receiver), before);
            }
            Ok(Ending::Rewind(answer)) => {
                assert_eq!(answer, FinishedAck::Resume(connection.receiver.next()));
                assert_eq!(connection.receiver.next(), connection.receiver.acked().next());
                if is_current {
                    assert!(!std::mem::replace(&mut log.rewound, true), "taken back for ever");
                    log.rewind(connection.receiver.tally());
                }
            }
            Ok(Ending::Accept(answer)) if is_current => {
                assert_eq!(answer == FinishedAck::Complete, log.is_complete(&finished), "{answer:?}");
                log.finished = Some((finished, answer));
                self.attempts.finish();
                self.commit(); // the end is stored behind the records
            }
            Ok(Ending::Accept(_)) => {}
        }
    }

    /// Everything that is stored becomes durable, and whoever listens hears it.
    fn commit(&mut self) {
        self.logs.iter_mut().for_each(|log| log.durable = log.entries.len());
        for connection in &mut self.connections {
            let log = &self.logs[connection.lease.attempt as usize - 1];
            connection.receiver.handle_durable(&log.tally);
        }
    }

    /// Everybody is told what is durable.
    fn acknowledge(&mut self) {
        for connection in &mut self.connections {
            assert_eq!(connection.receiver.acknowledge(), connection.receiver.durable());
        }
    }

    /// What was not durable is gone, with every connection.
    fn crash(&mut self) {
        self.connections.clear();
        self.logs.iter_mut().for_each(Log::recover);
        let lives = self.logs.iter().map(|log| log.producer).collect();
        let finished = self.logs.last().is_some_and(|log| log.finished.is_some());
        self.attempts = Attempts::resume(lives, finished);
    }

    fn check(&self) {
        self.logs.iter().for_each(Log::check);
        let current: Vec<_> = self.connections.iter().filter(|each| self.attempts.is_current(each.lease)).collect();
        assert!(current.len() <= 1, "two may write");
        for connection in current {
            let log = &self.logs[connection.lease.attempt as usize - 1];
            assert_eq!(connection.lease.attempt as usize, self.logs.len(), "an old attempt may write");
            assert_eq!(connection.receiver.next(), log.tally.next());
            assert!(connection.receiver.durable() <= log.durable_next(), "said to be durable and is not");
            assert!(
                connection.receiver.acked().next() <= connection.receiver.durable(),
                "acknowledged and not durable"
            );
            assert!(log.in_flight() <= MAX_WINDOW + MAX_MESSAGE as u64, "a flood");
        }
    }
}

impl Log {
    fn new(producer: ProducerId) -> Self {
        Self {
            producer,
            entries: Vec::new(),
            durable: 0,
            tally: Tally::default(),
            lost: 0,
            rewound: false,
            finished: None,
        }
    }

    fn receiver(&self) -> Receiver {
        let mut receiver = Receiver::resume(self.tally.clone(), self.lost, self.finished.clone());
        if self.rewound {
            receiver.note_rewound();
        }
        receiver
    }

    /// Takes back every record beyond an account.
    fn rewind(&mut self, tally: &Tally) {
        assert!(tally.next() < self.tally.next(), "nothing is taken back");
        while self.entries.last().is_some_and(|last| last.next() > tally.next()) {
            assert!(matches!(self.entries.pop(), Some(Entry::Record(_))), "a hole is taken back");
        }
        self.durable = self.durable.min(self.entries.len());
        self.tally = tally.clone();
    }

    fn stored_crc(&self, seq: u64) -> Option<u32> {
        self.entries.iter().find_map(|entry| match entry {
            Entry::Record(record) if record.seq == seq => Some(record.crc),
            Entry::Record(_) | Entry::Hole { .. } => None,
        })
    }

    fn recover(&mut self) {
        self.entries.truncate(self.durable);
        let whole = self.tally.clone();
        (self.tally, self.lost, self.rewound) = (Tally::default(), 0, false);
        for entry in &self.entries {
            match entry {
                Entry::Record(record) => {
                    assert!(self.tally.expects(record), "a record that was stored is not expected again");
                    self.tally.add(record);
                }
                Entry::Hole { from, to } => {
                    assert_eq!(*from, self.tally.next());
                    self.tally.skip_to(*to);
                    self.lost += to - from;
                }
            }
        }
        if whole.next() == self.tally.next() {
            assert_eq!((whole.counts(), whole.digest()), (self.tally.counts(), self.tally.digest()));
            assert_eq!(whole.missing_bytes(), self.tally.missing_bytes());
        }
    }

    fn durable_next(&self) -> u64 {
        self.entries[..self.durable].last().map_or(0, Entry::next)
    }

    fn in_flight(&self) -> u64 {
        let costs = self.entries[self.durable..].iter().map(|entry| match entry {
            Entry::Record(record) => record.cost(),
            Entry::Hole { .. } => 0,
        });
        costs.sum()
    }

    /// Numbers have no gap that is not an entry.
    fn check(&self) {
        let next = self.entries.iter().fold(0, |next, entry| {
            let first = match entry {
                Entry::Record(record) => record.seq,
                Entry::Hole { from, .. } => *from,
            };
            assert_eq!(first, next, "a number is missing or stored twice");
            entry.next()
        });
        assert_eq!(next, self.tally.next());
    }

    /// Whether `finished` describes what is stored, counted anew, and nothing is missing.
    fn is_complete(&self, finished: &Finished) -> bool {
        let mut hasher = blake3::Hasher::new();
        let mut counts = Counts::default();
        for entry in &self.entries {
            let Entry::Record(record) = entry else { return false };
            let Count { records, bytes } = match record.stream {
                Stream::Stdout => &mut counts.stdout,
                Stream::Stderr => &mut counts.stderr,
                Stream::Event => &mut counts.event,
            };
            *records += 1;
            *bytes += record.payload.len() as u64;
            if record.stream.is_output() {
                hasher.update(&record.payload);
            } else if let Some(Event::Gap(Gap { bytes: 1.., .. })) = Event::parse(&record.payload) {
                return false;
            }
        }
        let digest = Digest(*hasher.finalize().as_bytes());
        (finished.next, finished.counts, finished.digest) == (self.tally.next(), counts, digest)
    }
}

impl Entry {
    fn next(&self) -> u64 {
        match self {
            Self::Record(record) => record.seq + 1,
            Self::Hole { to, .. } => *to,
        }
    }
}

/// Everything about a receiver that may matter later.
type State = (u64, u64, Counts, Digest, u64, Option<(Finished, FinishedAck)>);

fn state(receiver: &Receiver) -> State {
    let tally = receiver.tally();
    (
        tally.next(),
        receiver.durable(),
        tally.counts(),
        tally.digest(),
        tally.missing_bytes(),
        receiver.finished().cloned(),
    )
}
