//! The server: the real `Attempts` and `Receiver`s, before a store that becomes durable when it likes.

use std::{collections::BTreeMap, rc::Rc};

use phonehome_proto::{
    attempts::{Attempts, Lease},
    close::CloseCode,
    frame::{Durable, Finished, FinishedAck, Hello, Record},
    id::{ProducerId, StepName},
    receiver::{AgentViolation, Ending, Receiver},
    tally::Tally,
};

use crate::{
    agent::{Script, producer},
    rules::{Broken, Rule, Seen, Situation},
    world::Model,
};

/// What outlives a connection.
#[derive(Clone, Default)]
pub(crate) struct Server {
    pub(crate) attempts: Attempts,
    /// Who made the attempts.
    pub(crate) lives: Vec<ProducerId>,
    /// One for each attempt.
    pub(crate) logs: Vec<Log>,
}

/// An attempt's log: a file of entries of which the first few are durable.
#[derive(Clone)]
pub(crate) struct Log {
    pub(crate) agent: usize,
    pub(crate) entries: Vec<Entry>,
    pub(crate) durable: usize,
    /// How much there was when a newer attempt was made.
    pub(crate) fenced: Option<usize>,
    /// Whether this process has made its agent send a part of it again.
    pub(crate) rewound: bool,
}

#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Entry {
    Finished(FinishedAck),
    Hole { count: u64, next: u64 },
    Record { agent: usize, seq: u64, altered: bool },
}

/// What the server keeps for a connection after its hello.
#[derive(Clone)]
pub(crate) struct Seat {
    pub(crate) lease: Lease,
    pub(crate) receiver: Rc<Receiver>,
    /// What it last said to be durable.
    pub(crate) acked: u64,
    /// Whether FINISHED came over this connection.
    pub(crate) told: bool,
    /// Whether it has said its last word: the answer, or one that is void.
    pub(crate) silent: bool,
}

impl Server {
    /// Takes a hello in: a seat and the resume point, or the code to close with.
    pub(crate) fn welcome(
        &mut self,
        who: usize,
        hello: &Hello,
        model: &Model,
        seen: &mut Seen,
    ) -> Result<Seat, CloseCode> {
        let identity = self.identity(who, model);
        if self.attempts.is_newest(identity) {
            // Before it voids a lease: a hello may be older than the one that got it.
            let mut stored = self.logs.last().map_or_else(Receiver::default, |log| log.receiver(model));
            stored.handle_hello(hello).map_err(|violation| violation.close_code())?;
        } else {
            self.commit(model); // what the older attempt handed over counts
        }
        let lease = self.attempts.handle_hello(identity)?;
        if lease.new {
            self.logs.iter_mut().for_each(|log| log.fenced = Some(log.entries.len()));
            self.lives.push(identity);
            self.logs.push(Log { agent: who, entries: Vec::new(), durable: 0, fenced: None, rewound: false });
        }
        let log = self.log_mut(lease);
        let mut receiver = log.greet(hello, model, seen)?;
        if model.lacks(Rule::ResumeFromDurable) {
            receiver.handle_durable(&receiver.tally().clone());
        }
        if model.lacks(Rule::RewindWhileHeld) {
            receiver.note_rewound();
        }
        let acked = receiver.acknowledge();
        Ok(Seat { lease, acked, receiver: Rc::new(receiver), told: false, silent: false })
    }

    /// Whom the server takes the agent for.
    fn identity(&self, who: usize, model: &Model) -> ProducerId {
        if model.lacks(Rule::SameProducerResumes) {
            producer(self.lives.len() + 10)
        } else if model.lacks(Rule::ProducerIsAttempt) {
            producer(0)
        } else {
            producer(who)
        }
    }

    /// Takes records in over one connection, and stores those that are new and may be stored.
    pub(crate) fn take(
        &mut self,
        seat: &mut Seat,
        records: &[(Record, Entry)],
        model: &Model,
        seen: &mut Seen,
    ) -> Result<(), CloseCode> {
        let log = self.log(seat.lease);
        let receiver = Rc::make_mut(&mut seat.receiver);
        let mut new: Vec<_> = records.iter().map(|(record, _)| record.clone()).collect();
        let mut result = receiver.handle_records(&mut new, |seq| log.crc(seq, model));
        if model.lacks(Rule::ConflictIsFatal) && matches!(result, Err(AgentViolation::Conflict(_))) {
            new.retain(|record| record.seq >= receiver.next());
            result = receiver.handle_records(&mut new, |_| None);
        }
        let has_known = result.is_ok() && new.len() < records.len();
        seen.note_when(has_known, Situation::Duplicate);
        seen.note_when(has_known && !new.is_empty(), Situation::DuplicateAndNew);
        let first_new = match result {
            Ok(()) if model.lacks(Rule::DuplicateIsIgnored) => 0,
            Ok(()) => records.len() - new.len(),
            Err(AgentViolation::OutOfOrder { .. }) if model.lacks(Rule::AboveNextIsRefused) => 0,
            Err(violation) => {
                seen.note_when(matches!(violation, AgentViolation::Conflict(_)), Situation::Conflict);
                seen.note_when(matches!(violation, AgentViolation::OutOfOrder { .. }), Situation::OutOfOrder);
                return Err(violation.close_code());
            }
        };
        if self.may_write(seat.lease, Rule::RecordNeedsLease, model) {
            let entries = records[first_new..].iter().map(|(_, entry)| entry.clone());
            self.log_mut(seat.lease).entries.extend(entries);
        } else if !new.is_empty() {
            seen.note(match self.is_newest(seat.lease) {
                true => Situation::FencedRecords,
                false => Situation::FencedRecordsOfOlderAttempt,
            });
        }
        Ok(())
    }

    /// Takes FINISHED in over one connection; `Some` is to be answered at once.
    pub(crate) fn finish(
        &mut self,
        seat: &mut Seat,
        model: &Model,
        seen: &mut Seen,
    ) -> Result<Option<FinishedAck>, CloseCode> {
        let log = self.log(seat.lease);
        let receiver = Rc::make_mut(&mut seat.receiver);
        if model.may_miss() {
            receiver.handle_durable(&log.durable_tally(model)); // its answer may name it; unseen is as good as later
        }
        let ending = receiver.handle_finished(log.script(model).finished.clone());
        let entry = match ending.map_err(|violation| violation.close_code())? {
            Ending::Accept(FinishedAck::Incomplete(_)) if model.lacks(Rule::DigestIsCompared) => FinishedAck::Complete,
            Ending::Accept(FinishedAck::Incomplete(_)) if model.lacks(Rule::GapIsIncomplete) => FinishedAck::Complete,
            Ending::Accept(answer) => answer,
            Ending::Repeat(answer) => {
                seen.note(Situation::FinishedAgain);
                seat.told = true;
                if !model.lacks(Rule::FinishedIsIdempotent) {
                    return Ok(None);
                }
                answer
            }
            Ending::Resume(_) if model.lacks(Rule::FinishedIsLast) => FinishedAck::Complete,
            Ending::Resume(answer) => {
                seen.note(Situation::ResumeAtFinished);
                seat.acked = seat.receiver.acked().next();
                return Ok(Some(answer));
            }
            Ending::Rewind(_) if model.lacks(Rule::DigestIsCompared) => FinishedAck::Complete,
            Ending::Rewind(answer) => return Ok(Some(self.rewind(seat, answer, model, seen))),
        };
        seat.told = true;
        if self.may_write(seat.lease, Rule::FinishedNeedsLease, model) {
            seen.note_when(entry != FinishedAck::Complete, Situation::Incomplete);
            let log = self.log_mut(seat.lease);
            seen.note_when(log.rewound && entry == FinishedAck::Complete, Situation::Mended);
            seen.note_when(says(&entry, "were sent again"), Situation::DiffersAgain);
            seen.note_when(says(&entry, "nothing was left"), Situation::NothingLeft);
            log.entries.push(Entry::Finished(entry));
        } else {
            seen.note(match self.is_newest(seat.lease) {
                true => Situation::FencedFinished,
                false => Situation::FencedFinishedOfOlderAttempt,
            });
        }
        Ok(None)
    }

    /// Takes back what one connection has stored beyond what it acknowledged. When its lease is void nothing happens, but
    /// it goes on as if it had, until it hears that it is superseded.
    fn rewind(&mut self, seat: &mut Seat, answer: FinishedAck, model: &Model, seen: &mut Seen) -> FinishedAck {
        let holds = self.attempts.is_current(seat.lease);
        seat.silent = !holds;
        if model.lacks(Rule::RewindFromAck) {
            seat.receiver = Rc::default();
        }
        if model.lacks(Rule::RewindOnce) {
            seat.receiver = Rc::new(Receiver::resume(seat.receiver.tally().clone(), 0, None));
        }
        let next = seat.receiver.next();
        let log = self.log_mut(seat.lease);
        log.rewound = !model.lacks(Rule::RewindOnce);
        if holds {
            seen.note(Situation::Rewound);
            seen.note_when(next > 0, Situation::RewoundPart);
            seen.note_when(next < log.durable_next(), Situation::RewoundDurable);
        } else {
            seen.note(Situation::FencedRewind);
        }
        if (holds || model.lacks(Rule::RewindNeedsLease)) && !model.lacks(Rule::RewindTakesBack) {
            log.take_back(next);
        }
        if model.lacks(Rule::RewindFromAck) { FinishedAck::Resume(next) } else { answer }
    }

    /// Whether the store takes something from the holder of `lease`.
    fn may_write(&self, lease: Lease, rule: Rule, model: &Model) -> bool {
        self.attempts.is_current(lease)
            || model.lacks(rule)
            || model.lacks(Rule::OlderConnectionIsVoid) && self.is_newest(lease)
    }

    fn is_newest(&self, lease: Lease) -> bool {
        lease.attempt as usize == self.logs.len()
    }

    /// Everything that was handed over becomes durable.
    pub(crate) fn commit(&mut self, model: &Model) {
        let Some(log) = self.logs.last_mut().filter(|log| log.durable < log.entries.len()) else { return };
        log.durable = log.entries.len();
        if log.has_durable_end() && !model.lacks(Rule::EndIsFirst) {
            self.attempts.finish();
        }
    }

    /// A new process finds this many entries of the newest log.
    pub(crate) fn crash(&mut self, kept: usize, model: &Model) {
        if let Some(log) = self.logs.last_mut() {
            log.entries.truncate(kept);
            (log.durable, log.rewound) = (kept, false);
        }
        if kept == 0 && model.lacks(Rule::AttemptIsDurable) {
            self.lives.pop();
            self.logs.pop();
        }
        let finished = self.logs.last().is_some_and(Log::has_durable_end) && !model.lacks(Rule::EndOutlivesCrash);
        self.attempts = Attempts::resume(self.lives.clone(), finished);
    }

    pub(crate) fn log(&self, lease: Lease) -> &Log {
        &self.logs[lease.attempt as usize - 1]
    }

    fn log_mut(&mut self, lease: Lease) -> &mut Log {
        &mut self.logs[lease.attempt as usize - 1]
    }

    /// What never may be in the logs.
    pub(crate) fn check(&self, model: &Model) -> Result<(), Broken> {
        for (at, log) in self.logs.iter().enumerate() {
            log.check(model)?;
            let is_last = at + 1 == self.logs.len();
            refute(!is_last && log.has_durable_end(), Broken::LateAttempt)?;
            refute(self.logs[..at].iter().any(|older| older.agent == log.agent), Broken::SplitAttempt)?;
        }
        Ok(())
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&[self.logs.len() as u8, u8::from(self.attempts.is_finished())]);
        for (log, life) in self.logs.iter().zip(&self.lives) {
            out.extend_from_slice(&[life.0[0], log.agent as u8, log.durable as u8, log.entries.len() as u8]);
            out.extend_from_slice(&[log.fenced.map_or(u8::MAX, |fenced| fenced as u8), u8::from(log.rewound)]);
            for entry in &log.entries {
                match entry {
                    Entry::Finished(answer) => {
                        out.push(1);
                        encode_answer(answer, out);
                    }
                    Entry::Hole { count, next } => out.extend_from_slice(&[2, *count as u8, *next as u8]),
                    Entry::Record { agent, seq, altered } => {
                        out.extend_from_slice(&[3, *agent as u8, *seq as u8, u8::from(*altered)]);
                    }
                }
            }
        }
    }
}

impl Log {
    fn script<'a>(&self, model: &'a Model) -> &'a Script {
        &model.scripts[self.agent]
    }

    /// The account of what is durable, how many records are lost, and the end.
    fn account(&self, model: &Model) -> (Tally, u64, Option<(Finished, FinishedAck)>) {
        let (mut tally, mut lost, mut end) = (Tally::default(), 0, None);
        for entry in &self.entries[..self.durable] {
            match entry {
                Entry::Finished(answer) => end = Some((self.script(model).finished.clone(), answer.clone())),
                Entry::Hole { count, next } => {
                    lost += count;
                    tally.skip_to(*next);
                }
                Entry::Record { agent, seq, altered } => tally.add(model.record(*agent, *seq, *altered)),
            }
        }
        (tally, lost, end)
    }

    /// The account of what is durable.
    pub(crate) fn durable_tally(&self, model: &Model) -> Tally {
        self.account(model).0
    }

    /// What a connection starts from: what is durable, and then what was only received.
    fn receiver(&self, model: &Model) -> Receiver {
        let (tally, lost, end) = self.account(model);
        let mut receiver = Receiver::resume(tally, lost, end);
        if self.rewound {
            receiver.note_rewound();
        }
        for entry in &self.entries[self.durable..] {
            match entry {
                Entry::Finished(_) => {
                    receiver.note_rewound(); // nothing is taken back from before an end
                    drop(receiver.handle_finished(self.script(model).finished.clone())); // as before
                }
                Entry::Hole { .. } => unreachable!("a hole is made durable first"),
                Entry::Record { agent, seq, altered } => {
                    let record = model.record(*agent, *seq, *altered).clone();
                    receiver.handle_records(&mut vec![record], |_| None).expect("it was taken before");
                }
            }
        }
        receiver
    }

    /// Answers a hello. What the agent no longer has is lost, and that is durable before anything else.
    fn greet(&mut self, hello: &Hello, model: &Model, seen: &mut Seen) -> Result<Receiver, CloseCode> {
        let mut receiver = self.receiver(model);
        let stored = receiver.next();
        if let Some(next) = receiver.handle_hello(hello).map_err(|violation| violation.close_code())? {
            seen.note(Situation::Hole);
            if !model.lacks(Rule::HoleIsRecorded) {
                self.entries.push(Entry::Hole { count: next - stored, next });
            }
            self.durable = self.entries.len();
            receiver.handle_durable(&receiver.tally().clone());
        }
        Ok(receiver)
    }

    fn crc(&self, seq: u64, model: &Model) -> Option<u32> {
        self.entries.iter().find_map(|entry| match entry {
            Entry::Record { agent, seq: stored, altered } if *stored == seq => {
                Some(model.record(*agent, seq, *altered).crc)
            }
            Entry::Finished(_) | Entry::Hole { .. } | Entry::Record { .. } => None,
        })
    }

    /// Whether the record is stored with other contents.
    pub(crate) fn contradicts(&self, record: &Record, model: &Model) -> bool {
        self.crc(record.seq, model).is_some_and(|crc| crc != record.crc)
    }

    /// Whether an end that is called incomplete now would be so for records that its agent still holds, and was never
    /// asked for.
    pub(crate) fn can_be_mended(&self, acked: u64) -> bool {
        let is_held = |entry: &Entry| match entry {
            Entry::Finished(_) | Entry::Hole { .. } => false,
            Entry::Record { seq, altered, .. } => *altered && *seq >= acked,
        };
        !self.rewound && self.entries.iter().any(is_held)
    }

    /// One more than the last durable record.
    pub(crate) fn durable_next(&self) -> u64 {
        self.entries[..self.durable].iter().fold(0, |next, entry| match entry {
            Entry::Finished(_) => next,
            Entry::Hole { next, .. } => *next,
            Entry::Record { seq, .. } => seq + 1,
        })
    }

    /// Takes back the records from `next` on, durable or not.
    fn take_back(&mut self, next: u64) {
        let is_kept = |entry: &Entry| match entry {
            Entry::Finished(_) => unreachable!("nothing is taken back from before an end"),
            Entry::Hole { .. } => true,
            Entry::Record { seq, .. } => *seq < next,
        };
        self.entries.retain(is_kept);
        self.durable = self.durable.min(self.entries.len());
    }

    pub(crate) fn end(&self) -> Option<&FinishedAck> {
        self.entries.last().and_then(|entry| match entry {
            Entry::Finished(answer) => Some(answer),
            Entry::Hole { .. } | Entry::Record { .. } => None,
        })
    }

    pub(crate) fn has_durable_end(&self) -> bool {
        self.end().is_some() && self.durable == self.entries.len()
    }

    /// Whether every byte that the command wrote is in it, as it was written.
    pub(crate) fn is_whole(&self, model: &Model) -> bool {
        let whole = (0..self.script(model).finished.next).map(|seq| self.record(seq));
        let records = self.entries.iter().filter(|entry| !matches!(entry, Entry::Finished(_)));
        !self.script(model).is_flawed && records.cloned().eq(whole)
    }

    fn record(&self, seq: u64) -> Entry {
        Entry::Record { agent: self.agent, seq, altered: false }
    }

    fn check(&self, model: &Model) -> Result<(), Broken> {
        refute(self.fenced.is_some_and(|fenced| self.entries.len() > fenced), Broken::Fenced)?;
        let (mut expected, mut lost, mut ended) = (0, 0, false);
        for entry in &self.entries {
            refute(ended, Broken::AfterEnd)?;
            match entry {
                Entry::Finished(answer) => {
                    ended = true;
                    refute(expected < self.script(model).finished.next, Broken::EarlyEnd)?;
                    refute(*answer == FinishedAck::Complete && !self.is_whole(model), Broken::FalseComplete)?;
                    refute(lost > 0 && !admits(answer, lost), Broken::SilentHole)?;
                }
                Entry::Hole { count, next } => {
                    refute(model.durable != Durable::Memory, Broken::Forgotten)?;
                    refute(expected + count != *next, Broken::NotAsProduced)?;
                    (expected, lost) = (*next, lost + count);
                }
                Entry::Record { agent, seq, altered } => {
                    refute(*agent != self.agent || *seq < expected, Broken::NotAsProduced)?;
                    refute(*altered && model.faults.alterations == 0, Broken::NotAsProduced)?;
                    refute(*seq > expected, Broken::SilentHole)?;
                    expected = seq + 1;
                }
            }
        }
        Ok(())
    }
}

impl Seat {
    /// What the next ack says, if that is news.
    pub(crate) fn ack(&self, log: &Log, model: &Model) -> Option<u64> {
        let next = if model.lacks(Rule::AckIsDurable) { self.receiver.next() } else { log.durable_next() };
        (next > self.acked && !self.silent).then_some(next)
    }

    /// Says what is durable.
    pub(crate) fn acknowledge(&mut self, log: &Log, model: &Model) -> u64 {
        let receiver = Rc::make_mut(&mut self.receiver);
        let durable = if model.lacks(Rule::AckIsDurable) { receiver.tally().clone() } else { log.durable_tally(model) };
        receiver.handle_durable(&durable);
        self.acked = receiver.acknowledge();
        self.acked
    }

    /// Its receiver once everything durable is acknowledged.
    fn abreast(&self) -> Rc<Receiver> {
        let mut receiver = self.receiver.clone();
        if receiver.durable() > receiver.acked().next() {
            Rc::make_mut(&mut receiver).acknowledge();
        }
        receiver
    }

    /// What FINISHED is answered with, once it may be.
    pub(crate) fn answer(&self, log: &Log, model: &Model) -> Option<FinishedAck> {
        let may = self.told && !self.silent && (log.has_durable_end() || model.lacks(Rule::AnswerIsDurable));
        log.end().filter(|_| may).cloned()
    }

    pub(crate) fn encode(&self, attempts: &Attempts, model: &Model, out: &mut Vec<u8>) {
        let flags = [attempts.is_current(self.lease), self.told, self.silent, self.receiver.finished().is_some()];
        out.extend_from_slice(&flags.map(u8::from));
        out.extend_from_slice(&[self.lease.attempt as u8, self.acked as u8]);
        out.push(u8::from(self.receiver.is_rewound()));
        for tally in [self.receiver.tally(), self.receiver.acked(), self.abreast().acked()] {
            out.push(tally.next() as u8);
            if model.may_miss() {
                // Otherwise the same number is the same account.
                out.extend_from_slice(&tally.digest().0[..4]);
            }
        }
    }
}

/// The greeting of an agent.
pub(crate) fn hello(who: usize, oldest: u64, next: u64) -> Hello {
    Hello {
        build: "model".parse().unwrap(),
        step: StepName::default(),
        producer: producer(who),
        oldest,
        next,
        labels: BTreeMap::new(),
        agent: String::new(),
        capabilities: Vec::new(),
    }
}

pub(crate) fn encode_answer(answer: &FinishedAck, out: &mut Vec<u8>) {
    match answer {
        FinishedAck::Complete => out.push(0),
        FinishedAck::Incomplete(reason) => {
            out.extend_from_slice(&[1, reason.len() as u8]);
            out.extend_from_slice(reason.as_bytes());
        }
        FinishedAck::Resume(next) => out.extend_from_slice(&[2, *next as u8]),
    }
}

/// Whether it says that so many records were lost.
fn admits(answer: &FinishedAck, lost: u64) -> bool {
    says(answer, &format!("{lost} records are gone"))
}

/// Whether it is a reason with these words.
fn says(answer: &FinishedAck, words: &str) -> bool {
    match answer {
        FinishedAck::Incomplete(reason) => reason.contains(words),
        FinishedAck::Complete | FinishedAck::Resume(_) => false,
    }
}

/// Fails with what is broken when it is.
pub(crate) fn refute(broken: bool, what: Broken) -> Result<(), Broken> {
    if broken { Err(what) } else { Ok(()) }
}
