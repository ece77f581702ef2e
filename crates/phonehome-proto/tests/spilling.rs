//! A sender whose middle lies elsewhere, against a plain queue: nothing is sent twice on a connection, out of order or
//! left out, and what is in neither memory nor the journal was acknowledged or is a hole the server hears of.

#![expect(clippy::unwrap_used, reason = "in a test a panic is a failure")]

use bytes::BytesMut;
use phonehome_proto::{
    codec::binary::{HEADROOM, Sealed, decode_agent, encode_agent, seal},
    frame::{Ack, AgentFrame, Counts, Durable, End, Finished, FinishedAck, Record, ServerFrame, Stream, Welcome},
    id::Digest,
    limits::RECORD_COST,
    sender::{Order, Outgoing, Sender},
};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn a_spilling_sender_is_a_queue(steps in prop::collection::vec(step(), 1..120), own_window in 1..4000u64) {
        let mut world = World::new(own_window);
        for step in steps {
            world.take(&step);
            world.check();
        }
        world.deliver_all();
    }
}

/// One thing that happens. Shares are parts of 255.
#[derive(Debug, Clone)]
enum Step {
    /// The server acknowledges this share of what it has received.
    Ack {
        share: u8,
        window: u64,
    },
    /// A connection is made; the server has kept this share of what it had received and not acknowledged.
    Connect(u8),
    Disconnect,
    /// What is spilled first cannot be read, nor can this many records after it.
    Lose(u64),
    Push(usize),
    /// The journal gives back this many records.
    Restore(usize),
    /// Memory is scarce: keep this much of the oldest.
    Spill(u64),
    Transmit(usize),
    /// This many more records are in the journal.
    Write(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (any::<u8>(), 1..6000u64).prop_map(|(share, window)| Step::Ack { share, window }),
        2 => any::<u8>().prop_map(Step::Connect),
        1 => Just(Step::Disconnect),
        1 => (1..5u64).prop_map(Step::Lose),
        10 => (0..600usize).prop_map(Step::Push),
        6 => (1..6usize).prop_map(Step::Restore),
        6 => (0..3000u64).prop_map(Step::Spill),
        6 => (1..6usize).prop_map(Step::Transmit),
        6 => (1..6u64).prop_map(Step::Write),
    ]
}

struct World {
    sender: Sender,
    /// All records there ever were.
    all: Vec<Sealed>,
    /// The journal has everything below, as far as it is not acknowledged.
    kept: u64,
    /// What the server has received: the next record it takes.
    received: u64,
    acked: u64,
    /// Records that it will never get.
    lost: Vec<u64>,
    window: u64,
    own_window: u64,
}

impl World {
    fn new(own_window: u64) -> Self {
        let mut sender = Sender::default();
        sender.limit_window(own_window);
        Self { sender, all: Vec::new(), kept: 0, received: 0, acked: 0, lost: Vec::new(), window: 0, own_window }
    }

    fn take(&mut self, step: &Step) {
        match step {
            Step::Ack { share, window } => self.ack(*share, *window),
            Step::Connect(share) => self.connect(*share),
            Step::Disconnect => self.sender.handle_disconnected(),
            Step::Lose(count) => self.lose(*count),
            Step::Push(len) => self.push(*len),
            Step::Restore(count) => self.restore(*count),
            Step::Spill(keep) => self.spill(*keep),
            Step::Transmit(count) => {
                (0..*count).for_each(|_| assert_ne!(self.transmit(), Some(true), "there is no end yet"))
            }
            Step::Write(count) => self.kept = (self.kept.max(self.sender.oldest()) + count).min(self.sender.next()),
        }
    }

    fn push(&mut self, len: usize) {
        let seq = self.all.len() as u64;
        let mut block = BytesMut::zeroed(HEADROOM + len);
        block[HEADROOM..].fill(seq as u8);
        let sealed = seal(block, seq, seq, Stream::Stdout, 0);
        self.all.push(sealed.clone());
        self.sender.push(sealed);
    }

    fn spill(&mut self, keep: u64) {
        let before = self.sender.cost();
        self.sender.spill(self.kept, keep);
        assert!(self.sender.cost() <= before);
    }

    fn restore(&mut self, count: usize) {
        let Some(first) = self.sender.spilled() else { return };
        for sealed in self.all[first as usize..].iter().take(count) {
            self.sender.restore(sealed.clone()); // those that were not spilled are no harm
        }
    }

    /// As the spool does it: only what the journal has is given up, and the connection with it.
    fn lose(&mut self, count: u64) {
        let Some(first) = self.sender.spilled() else { return };
        let next = (first + count).min(self.kept);
        let (before, held) = (self.sender.oldest(), self.sender.held_cost());
        let lost = self.sender.lose(next);
        assert_eq!(lost, held == 0, "possible once everything before is acknowledged");
        if lost {
            assert_eq!(before, first);
            self.sender.handle_disconnected();
        }
    }

    fn connect(&mut self, share: u8) {
        self.sender.handle_disconnected();
        self.received = self.acked + (self.received - self.acked) * u64::from(share) / 255;
        let oldest = self.sender.oldest();
        if oldest > self.received {
            self.lost.extend(self.received..oldest);
            self.received = oldest;
        }
        self.acked = self.received;
        self.window = 3000;
        self.sender.handle_connected();
        assert!(self.sender.poll_transmit().is_none(), "nothing before the welcome");
        let welcome = Welcome {
            attempt: 1,
            next: self.received,
            durable: Durable::Memory,
            window: self.window,
            heartbeat: 0,
            max_payload: 0,
            max_message: 0,
            cancel: None,
            server: String::new(),
            capabilities: Vec::new(),
        };
        self.sender.handle_frame(ServerFrame::Welcome(welcome)).unwrap();
    }

    fn ack(&mut self, share: u8, window: u64) {
        if !self.sender.is_welcomed() {
            return;
        }
        self.acked += (self.received - self.acked) * u64::from(share) / 255;
        self.window = window;
        self.sender.handle_frame(ServerFrame::Ack(Ack { next: self.acked, window })).unwrap();
    }

    /// The server receives what is sent next. Says whether that was the end.
    fn transmit(&mut self) -> Option<bool> {
        let message = match self.sender.poll_transmit()? {
            Outgoing::Message(message) => message,
            Outgoing::Frame(frame) => encode_agent(&frame).unwrap(),
        };
        match decode_agent(&message).unwrap() {
            AgentFrame::Records(records) => records.into_iter().for_each(|record| self.receive(&record)),
            AgentFrame::Finished(finished) => {
                assert_eq!(finished.next, self.received);
                return Some(true);
            }
            AgentFrame::Hello(_) | AgentFrame::Pong(_) => unreachable!("never polled"),
        }
        let in_flight: u64 = self.range(self.acked..self.received).map(Record::cost).sum();
        let last = self.range(self.received - 1..self.received).map(Record::cost).sum::<u64>();
        assert!(in_flight <= self.window.min(self.own_window) || in_flight == last, "{in_flight} in flight");
        Some(false)
    }

    fn receive(&mut self, record: &Record) {
        assert_eq!(record.seq, self.received, "in order, without a gap");
        assert!(*record == self.all[record.seq as usize].record, "as it was written");
        self.received += 1;
    }

    fn range(&self, seqs: std::ops::Range<u64>) -> impl Iterator<Item = &Record> {
        self.all[seqs.start as usize..seqs.end as usize].iter().map(|sealed| &sealed.record)
    }

    /// Compares with a plain queue of everything that is not acknowledged.
    fn check(&self) {
        let sender = &self.sender;
        assert_eq!((sender.next(), sender.claimed_next()), (self.all.len() as u64, self.all.len() as u64));
        let memory: Vec<u64> =
            sender.peek(sender.oldest(), usize::MAX).iter().map(|sealed| sealed.record.seq).collect();
        let elsewhere: Vec<u64> = (sender.oldest()..sender.next()).filter(|seq| !memory.contains(seq)).collect();
        assert_eq!(sender.spilled(), elsewhere.first().copied());
        assert!(elsewhere.windows(2).all(|pair| pair[1] == pair[0] + 1), "one gap: {elsewhere:?}");
        assert!(elsewhere.iter().all(|seq| *seq < self.kept), "{elsewhere:?} of {} in the journal", self.kept);
        let cost = |seqs: &mut dyn Iterator<Item = &u64>| -> u64 {
            seqs.map(|seq| self.all[*seq as usize].record.payload.len() as u64 + RECORD_COST).sum()
        };
        assert_eq!(sender.cost(), cost(&mut memory.iter()));
        let held = sender.spilled().unwrap_or(sender.next());
        assert_eq!(sender.held_cost(), cost(&mut memory.iter().filter(|seq| **seq < held)));
        if sender.is_welcomed() {
            assert_eq!(sender.oldest(), self.acked);
        }
    }

    /// From here on all goes well.
    fn deliver_all(mut self) {
        let next = self.all.len() as u64;
        let finished = Finished {
            next,
            counts: Counts::default(),
            digest: Digest([0; 32]),
            end: End::Exited(0),
            time: 0,
            usage: None,
        };
        self.sender.finish(finished);
        self.connect(255);
        for _ in 0..10 * next + 10 {
            if let Some(true) = self.transmit() {
                let answer = self.sender.handle_frame(ServerFrame::FinishedAck(FinishedAck::Complete));
                assert_eq!(answer, Ok(Order::Delivered(None)));
                assert_eq!(self.received, next);
                assert!(self.lost.iter().all(|seq| *seq < self.kept), "lost without a cause: {:?}", self.lost);
                return;
            }
            self.ack(255, 3000);
            self.restore(2);
            self.check();
        }
        panic!("it never ends");
    }
}
