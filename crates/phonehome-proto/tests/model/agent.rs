//! An agent: the real `Sender`, and what the uplink does around it.

use bytes::BytesMut;
use phonehome_proto::{
    close,
    codec::binary::{HEADROOM, Sealed, decode_agent, seal},
    event::{Event, Gap},
    frame::{Ack, AgentFrame, End, Finished, FinishedAck, Record, ServerFrame, Stream},
    id::ProducerId,
    limits::RECORD_COST,
    sender::{Order, Outgoing, Sender},
    tally::Tally,
};

use crate::{
    rules::{Broken, Rule, Seen, Situation},
    world::{Model, Up, Word, welcome},
};

/// What an agent's command writes, made once: every state of a search shares it.
pub(crate) struct Script {
    pub(crate) records: Vec<Sealed>,
    /// The same numbers with other bytes and fitting checksums: what a broken agent might send.
    pub(crate) altered: Vec<Record>,
    pub(crate) finished: Finished,
    /// Whether it cannot be complete: bytes are missing from the start, or the end is not that of the records.
    pub(crate) is_flawed: bool,
}

impl Script {
    /// This many records of one byte.
    pub(crate) fn plain(records: u64) -> Self {
        let mut script = Writer::default();
        (0..records).for_each(|seq| script.write(Stream::Stdout, &[b'a' + seq as u8]));
        script.end()
    }

    /// Two records, and between them bytes that were dropped: with a gap record that says so, or in silence.
    pub(crate) fn dropping(says_so: bool) -> Self {
        let mut script = Writer::default();
        script.write(Stream::Stdout, b"a");
        if says_so {
            let gap = Event::Gap(Gap { stream: Stream::Stdout, bytes: DROPPED, cause: "spool-full".into() });
            script.write(Stream::Event, &gap.payload());
        }
        script.skipped = if says_so { 0 } else { DROPPED };
        script.write(Stream::Stdout, b"b");
        Self { is_flawed: true, ..script.end() }
    }

    /// This many records, and an end with the digest of others.
    pub(crate) fn mistaken(records: u64) -> Self {
        let mut script = Self::plain(records);
        script.finished.digest.0[0] ^= 1;
        Self { is_flawed: true, ..script }
    }
}

/// How many bytes [`Script::dropping`] drops.
const DROPPED: u64 = 5;

#[derive(Default)]
struct Writer {
    records: Vec<Sealed>,
    altered: Vec<Record>,
    tally: Tally,
    skipped: u64,
}

impl Writer {
    fn write(&mut self, stream: Stream, payload: &[u8]) {
        let (seq, offset) = (self.tally.next(), self.tally.offset(stream) + self.skipped);
        let mut buffer = BytesMut::zeroed(HEADROOM);
        buffer.extend_from_slice(payload);
        let sealed = seal(buffer, seq, 0, stream, offset);
        self.tally.add(&sealed.record);
        self.altered.push(Record::new(seq, 0, stream, offset, vec![b'X'; payload.len()].into()));
        self.records.push(sealed);
    }

    fn end(self) -> Script {
        let (next, counts, digest) = (self.tally.next(), self.tally.counts(), self.tally.digest());
        let finished = Finished { next, counts, digest, end: End::Exited(0), time: 0, usage: None };
        Script { records: self.records, altered: self.altered, finished, is_flawed: false }
    }
}

/// How it ended for an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Delivered(Option<String>),
    Refused(u16),
}

/// One agent and an own account of what its `Sender` does not tell, which makes states comparable and the window's rule
/// checkable.
#[derive(Clone, Default)]
pub(crate) struct Agent {
    pub(crate) sender: Sender,
    /// Whether the command has ended.
    ended: bool,
    pub(crate) outcome: Option<Outcome>,
    /// One more than the last record sent on this connection.
    sent: u64,
    /// The highest `sent` of all connections.
    reached: u64,
    /// Whether FINISHED was sent on this connection.
    finished_sent: bool,
    /// Whether it was sent on any, where that matters.
    finished_was_said: bool,
    /// The window it was last told, bytes.
    window: u64,
}

/// Which of the 128 bits an agent drew.
pub(crate) fn producer(agent: usize) -> ProducerId {
    ProducerId([agent as u8 + 1; 16])
}

impl Agent {
    /// Whether it still tries.
    pub(crate) fn is_at_work(&self) -> bool {
        self.outcome.is_none()
    }

    /// Lets the command write so many more records, and end after the last one.
    pub(crate) fn produce(&mut self, count: u64, script: &Script, seen: &mut Seen) {
        let next = self.sender.next();
        seen.note_when(count > 0 && self.sender.spilled().is_some(), Situation::PushedBehindSpilled);
        let records = &script.records[next as usize..(next + count) as usize];
        records.iter().for_each(|sealed| self.sender.push(sealed.clone()));
        if !self.ended && self.sender.next() == script.finished.next {
            self.ended = true;
            self.sender.finish(script.finished.clone());
        }
    }

    /// Drops records below `kept` from memory, except for the oldest `keep`; says whether there were any.
    pub(crate) fn spill(&mut self, kept: u64, keep: u64, seen: &mut Seen) -> bool {
        let before = self.sender.cost();
        self.sender.spill(kept, keep * (RECORD_COST + 1));
        seen.note_when(self.sender.cost() < before, Situation::Spilled);
        self.sender.cost() < before
    }

    /// Whether records are elsewhere and are to come back.
    pub(crate) fn has_spilled(&self) -> bool {
        self.is_at_work() && self.sender.spilled().is_some()
    }

    /// Brings the first record back that is elsewhere, and with it two that were asked for in vain.
    pub(crate) fn restore(&mut self, script: &Script, seen: &mut Seen) {
        let Some(first) = self.sender.spilled() else { return };
        let around = [first + 1, first.saturating_sub(1), first].map(|seq| script.records.get(seq as usize));
        around.into_iter().flatten().for_each(|sealed| self.sender.restore(sealed.clone()));
        seen.note(Situation::Restored);
    }

    /// Whether everything it will ever say is on disk.
    pub(crate) fn can_recover(&self) -> bool {
        self.is_at_work() && self.ended
    }

    /// A new life goes on with what an old one left on disk: from `oldest` on, since not all that is delivered is removed
    /// at once.
    pub(crate) fn recover(&mut self, oldest: u64, script: &Script, seen: &mut Seen) {
        self.sender = Sender::recover(oldest, script.finished.next, Some(script.finished.clone()));
        self.reached = 0;
        seen.note(Situation::Recovered);
    }

    /// What it says next, if anything.
    pub(crate) fn transmit(&mut self, who: usize, model: &Model, seen: &mut Seen) -> Result<Option<Up>, Broken> {
        let Some(outgoing) = self.sender.poll_transmit() else {
            let in_memory = self.sender.spilled().unwrap_or(self.sender.next());
            seen.note_when(self.is_streaming() && self.sent < in_memory, Situation::WindowWasFull);
            return Ok(None);
        };
        let frame = match outgoing {
            Outgoing::Message(message) => decode_agent(&message).unwrap(),
            Outgoing::Frame(frame) => frame,
        };
        match frame {
            AgentFrame::Records(records) => self.send(&records, who, model, seen).map(Some),
            AgentFrame::Finished(finished) => {
                assert_eq!(finished, model.scripts[who].finished, "it is always the same");
                self.finished_sent = true;
                let once = model.lacks(Rule::FinishedIsSaidAgain);
                let said = once && std::mem::replace(&mut self.finished_was_said, true);
                Ok((!said).then_some(Up::Finished))
            }
            AgentFrame::Hello(_) | AgentFrame::Pong(_) => unreachable!("a sender says neither"),
        }
    }

    fn send(&mut self, records: &[Record], who: usize, model: &Model, seen: &mut Seen) -> Result<Up, Broken> {
        let (first, count) = (records[0].seq, records.len() as u64);
        let script = model.scripts[who].records.iter().map(|sealed| &sealed.record);
        assert!(records.iter().eq(script.skip(first as usize).take(records.len())), "a record never changes");
        seen.note_when(count > 1, Situation::Batch);
        self.sent = first + count;
        self.reached = self.reached.max(self.sent);
        let in_flight = &model.scripts[who].records[self.sender.oldest() as usize..self.sent as usize];
        let cost: u64 = in_flight.iter().map(|sealed| sealed.record.cost()).sum();
        if in_flight.len() > 1 && cost > self.window {
            return Err(Broken::Flooded);
        }
        if model.lacks(Rule::HoldUntilAcknowledged) {
            self.obey(ServerFrame::Ack(Ack { next: self.reached, window: self.window }), seen)?;
        }
        Ok(Up::Records { first, count, altered: false })
    }

    /// The connection broke, or was closed with this code.
    pub(crate) fn hang_up(&mut self, code: u16, model: &Model, seen: &mut Seen) {
        let was_welcomed = self.sender.is_welcomed();
        let superseded = code == close::CloseCode::Superseded.number();
        let returns = if model.lacks(Rule::OtherCodesReturn) {
            superseded && was_welcomed
        } else if model.lacks(Rule::SupersededOnceMore) {
            !close::is_fatal(code)
        } else if model.lacks(Rule::SupersededIsFinal) {
            superseded || !close::is_fatal(code)
        } else {
            close::may_return(code, was_welcomed)
        };
        if self.is_at_work() && !returns {
            self.outcome = Some(Outcome::Refused(code));
        }
        if superseded {
            seen.note(if returns { Situation::SupersededAndBack } else { Situation::Superseded });
        }
        seen.note_when(code == close::CloseCode::AlreadyFinished.number(), Situation::AlreadyFinished);
        self.sender.handle_disconnected();
    }

    /// Hears what the server says.
    pub(crate) fn hear(&mut self, word: Word, model: &Model, seen: &mut Seen) -> Result<(), Broken> {
        let felt = |window| if model.lacks(Rule::Window) { u64::MAX } else { window };
        let frame = match word {
            Word::Ack(next) => {
                self.window = model.windows.ack;
                ServerFrame::Ack(Ack { next, window: felt(self.window) })
            }
            Word::FinishedAck(answer) => ServerFrame::FinishedAck(answer),
            Word::Welcome { attempt, next } => {
                self.window = model.windows.welcome;
                welcome(attempt, next, felt(self.window), model.durable)
            }
        };
        self.obey(frame, seen)
    }

    fn obey(&mut self, frame: ServerFrame, seen: &mut Seen) -> Result<(), Broken> {
        let acknowledged = if let ServerFrame::Ack(ack) = &frame { Some(ack.next) } else { None };
        let resume = if let ServerFrame::FinishedAck(FinishedAck::Resume(next)) = &frame { Some(*next) } else { None };
        let spilled = self.sender.spilled();
        let order = self.sender.handle_frame(frame).map_err(|_| Broken::Violation)?;
        seen.note_when(spilled.is_some_and(|first| first < self.sender.oldest()), Situation::AckOverSpilled);
        match order {
            Order::Delivered(missing) => self.outcome = Some(Outcome::Delivered(missing)),
            Order::Welcome(welcome) => {
                self.reached = self.reached.max(welcome.next);
                self.start_at(welcome.next);
            }
            Order::Nothing => {
                let acknowledged = acknowledged.filter(|next| *next > self.sent);
                seen.note_when(acknowledged.is_some(), Situation::AckForEarlierConnection);
                self.sent = acknowledged.unwrap_or(self.sent);
                resume.into_iter().for_each(|next| self.start_at(next));
            }
            Order::Cancel(_) | Order::Drain(_) | Order::Pong(_) => unreachable!("never said"),
        }
        Ok(())
    }

    fn start_at(&mut self, next: u64) {
        (self.sent, self.finished_sent) = (next, false);
    }

    /// Whether it is welcomed and not done.
    pub(crate) fn is_streaming(&self) -> bool {
        self.sender.is_welcomed() && !self.sender.is_done()
    }

    /// Adds everything that decides what it does next. What a `Sender` resets with every `Welcome` counts only after
    /// one.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.push(self.sender.oldest() as u8);
        match &self.outcome {
            None => {
                let is_whole = self.sender.spilled().is_none();
                let flags = [self.ended, self.finished_was_said, self.sender.is_welcomed(), is_whole];
                out.push(0);
                out.extend_from_slice(&flags.map(u8::from));
                out.extend_from_slice(&[self.sender.next() as u8, self.reached as u8]);
                if let Some(first) = self.sender.spilled() {
                    let [held, all] = [self.sender.held_cost(), self.sender.cost()];
                    out.extend_from_slice(&[first as u8, (held / RECORD_COST) as u8, (all / RECORD_COST) as u8]);
                }
                if self.is_streaming() {
                    out.extend_from_slice(&[self.sent as u8, u8::from(self.finished_sent)]);
                    out.extend_from_slice(&self.window.to_le_bytes());
                }
            }
            Some(Outcome::Delivered(None)) => out.push(1),
            Some(Outcome::Delivered(Some(reason))) => {
                out.extend_from_slice(&[2, reason.len() as u8]);
                out.extend_from_slice(reason.as_bytes());
            }
            Some(Outcome::Refused(code)) => {
                out.push(3);
                out.extend_from_slice(&code.to_le_bytes());
            }
        }
    }
}
