//! The server's half of exactly-once: what is stored, what is a duplicate, what is a lie.

use crate::{
    close::CloseCode,
    frame::{Finished, FinishedAck, Hello, Record},
    limits::{MAX_MESSAGE, MAX_WINDOW, RECORD_COST},
    tally::Tally,
};

/// One attempt's log as its server knows it.
///
/// `received` runs ahead of `durable` by what the store has not confirmed yet; only the latter is ever acknowledged.
#[derive(Debug, Clone, Default)]
pub struct Receiver {
    received: Tally,
    durable: u64,
    durable_bytes: u64,
    lost: u64,
    finished: Option<(Finished, FinishedAck)>,
}

/// What to do with a FINISHED.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// Store it, then answer with this.
    Accept(FinishedAck),
    /// It was accepted before: answer the same again, once it is stored.
    Repeat(FinishedAck),
    /// Records are missing: answer so and store nothing.
    Resume(FinishedAck),
}

/// How an agent broke the protocol. Nothing of the offending frame is stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AgentViolation {
    /// A record after FINISHED.
    #[error("record {0} comes after FINISHED")]
    AfterFinished(u64),
    /// A record that is stored with other contents.
    #[error("record {0} is stored already, with other bytes")]
    Conflict(u64),
    /// More bytes unacknowledged than any window allows.
    #[error("more than {MAX_WINDOW} bytes are unacknowledged")]
    Flooded,
    /// The agent denies records that are stored.
    #[error("the agent knows of {agent} records, {stored} are stored")]
    Forgotten {
        /// What it says its next number is.
        agent: u64,
        /// What is stored.
        stored: u64,
    },
    /// FINISHED does not fit the records or an earlier FINISHED.
    #[error("FINISHED contradicts what is stored")]
    OtherEnd,
    /// A record above the next one expected.
    #[error("record {got} arrived where {expected} was expected")]
    OutOfOrder {
        /// Its number.
        got: u64,
        /// The number expected.
        expected: u64,
    },
    /// A record that does not start where its stream has got to.
    #[error("record {0} does not start where its stream ended")]
    WrongOffset(u64),
}

impl AgentViolation {
    /// What to close the connection with.
    #[must_use]
    pub fn close_code(&self) -> CloseCode {
        CloseCode::Protocol
    }
}

impl Receiver {
    /// Goes on with what a store holds, all of it durable.
    #[must_use]
    pub fn resume(stored: Tally, lost: u64, finished: Option<(Finished, FinishedAck)>) -> Self {
        Self { durable: stored.next(), durable_bytes: stored.bytes(), received: stored, lost, finished }
    }

    /// Everything below was handed to the store.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.received.next()
    }

    /// Everything below is durable: what `Welcome` and `Ack` say.
    #[must_use]
    pub fn durable(&self) -> u64 {
        self.durable
    }

    /// The account of everything received.
    #[must_use]
    pub fn tally(&self) -> &Tally {
        &self.received
    }

    /// The end of the attempt, once accepted, and what was answered.
    #[must_use]
    pub fn finished(&self) -> Option<&(Finished, FinishedAck)> {
        self.finished.as_ref()
    }

    /// Compares what an agent holds with what is stored. When the agent no longer holds what is missing here, the
    /// records up to its oldest are lost: the caller stores that fact, and the attempt is incomplete.
    ///
    /// # Errors
    ///
    /// When the agent denies records that are stored.
    pub fn handle_hello(&mut self, hello: &Hello) -> Result<Option<u64>, AgentViolation> {
        let stored = self.next();
        if hello.next < stored {
            return Err(AgentViolation::Forgotten { agent: hello.next, stored });
        }
        if hello.oldest <= stored {
            return Ok(None);
        }
        self.lost += hello.oldest - stored;
        self.received.skip_to(hello.oldest);
        Ok(Some(hello.oldest))
    }

    /// Takes consecutive records and keeps those that are new, to be stored in this order. `stored_crc` tells the
    /// checksum of a record that is stored already.
    ///
    /// # Errors
    ///
    /// When one of them breaks a rule; then none may be stored.
    pub fn handle_records(
        &mut self,
        records: &mut Vec<Record>,
        stored_crc: impl Fn(u64) -> Option<u32>,
    ) -> Result<(), AgentViolation> {
        let next = self.next();
        let known = records.iter().take_while(|record| record.seq < next).count();
        let conflict =
            records.iter().take(known).find(|record| stored_crc(record.seq).is_some_and(|crc| crc != record.crc));
        if let Some(record) = conflict {
            return Err(AgentViolation::Conflict(record.seq));
        }
        records.drain(..known);
        self.check_room(records)?;
        let mut received = self.received.clone();
        for record in records.iter() {
            self.check(record, &received)?;
            received.add(record);
        }
        self.received = received;
        Ok(())
    }

    fn check_room(&self, records: &[Record]) -> Result<(), AgentViolation> {
        let total = |next: u64, bytes: u64| next.saturating_mul(RECORD_COST).saturating_add(bytes);
        let unacked = total(self.next(), self.received.bytes()).saturating_sub(total(self.durable, self.durable_bytes));
        let more: u64 = records.iter().map(Record::cost).sum();
        if unacked + more > MAX_WINDOW + MAX_MESSAGE as u64 { Err(AgentViolation::Flooded) } else { Ok(()) }
    }

    fn check(&self, record: &Record, received: &Tally) -> Result<(), AgentViolation> {
        if self.finished.is_some() {
            return Err(AgentViolation::AfterFinished(record.seq));
        }
        if record.seq != received.next() {
            return Err(AgentViolation::OutOfOrder { got: record.seq, expected: received.next() });
        }
        if received.expects(record) { Ok(()) } else { Err(AgentViolation::WrongOffset(record.seq)) }
    }

    /// The store has made everything below `next`, with `bytes` of payload in all, durable.
    pub fn handle_durable(&mut self, next: u64, bytes: u64) {
        self.durable = self.durable.max(next);
        self.durable_bytes = self.durable_bytes.max(bytes);
    }

    /// Takes the end in.
    ///
    /// # Errors
    ///
    /// When it contradicts what is stored.
    pub fn handle_finished(&mut self, finished: Finished) -> Result<Ending, AgentViolation> {
        if let Some((known, answer)) = &self.finished {
            return if *known == finished { Ok(Ending::Repeat(answer.clone())) } else { Err(AgentViolation::OtherEnd) };
        }
        if finished.next > self.next() {
            // Not `next`: the agent forgets what is below.
            return Ok(Ending::Resume(FinishedAck::Resume(self.durable)));
        }
        if finished.next < self.next() {
            return Err(AgentViolation::OtherEnd);
        }
        let answer = self.missing(&finished).map_or(FinishedAck::Complete, FinishedAck::Incomplete);
        self.finished = Some((finished, answer.clone()));
        Ok(Ending::Accept(answer))
    }

    /// What keeps the log from being complete.
    fn missing(&self, finished: &Finished) -> Option<String> {
        if self.lost > 0 {
            return Some(format!("the server lost {} acknowledged records", self.lost));
        }
        if self.received.missing_bytes() > 0 {
            return Some(format!("{} bytes were dropped before they were sent", self.received.missing_bytes()));
        }
        if self.received.counts() != finished.counts {
            return Some("the counts of records and bytes differ from what was stored".into());
        }
        (self.received.digest() != finished.digest).then(|| "the digest differs from what was stored".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        event::{Event, Gap},
        frame::{End, Stream},
        id::ProducerId,
        limits::MAX_PAYLOAD,
    };

    #[test]
    fn rule_1_a_duplicate_is_ignored_and_a_record_above_next_is_never_stored() {
        let (mut receiver, stored) = with_records(3);
        let mut again = vec![stored[1].clone(), stored[2].clone(), output(3, 9, "new")];
        receiver.handle_records(&mut again, crc_of(&stored)).unwrap();
        assert_eq!(again.iter().map(|record| record.seq).collect::<Vec<_>>(), [3]);
        let refused = receiver.handle_records(&mut vec![output(5, 12, "x")], crc_of(&stored));
        assert_eq!(refused, Err(AgentViolation::OutOfOrder { got: 5, expected: 4 }));
        assert_eq!(receiver.next(), 4);
    }

    #[test]
    fn rule_1_the_same_number_with_other_bytes_is_fatal() {
        let (mut receiver, stored) = with_records(2);
        let refused = receiver.handle_records(&mut vec![output(1, 3, "XXX")], crc_of(&stored));
        assert_eq!(refused, Err(AgentViolation::Conflict(1)));
        assert!(crate::close::is_fatal(refused.unwrap_err().close_code().number()));
    }

    #[test]
    fn rule_1_an_agent_that_denies_stored_records_is_refused() {
        let (mut receiver, _) = with_records(2);
        assert_eq!(receiver.handle_hello(&hello(0, 1)), Err(AgentViolation::Forgotten { agent: 1, stored: 2 }));
    }

    #[test]
    fn rule_2_received_is_not_yet_durable() {
        let (mut receiver, _) = with_records(2);
        assert_eq!((receiver.next(), receiver.durable()), (2, 0));
        receiver.handle_durable(2, 6);
        receiver.handle_durable(1, 3);
        assert_eq!(receiver.durable(), 2);
    }

    #[test]
    fn rule_2_finished_is_idempotent_and_works_with_no_output_at_all() {
        let mut receiver = Receiver::default();
        let end = end_of(&receiver);
        assert_eq!(receiver.handle_finished(end.clone()), Ok(Ending::Accept(FinishedAck::Complete)));
        assert_eq!(receiver.handle_finished(end.clone()), Ok(Ending::Repeat(FinishedAck::Complete)));
        assert_eq!(receiver.handle_finished(Finished { end: End::Exited(9), ..end }), Err(AgentViolation::OtherEnd));
        let refused = receiver.handle_records(&mut vec![output(0, 0, "late")], |_| None);
        assert_eq!(refused, Err(AgentViolation::AfterFinished(0)));
    }

    #[test]
    fn rule_2_finished_before_its_records_asks_for_them() {
        let (mut receiver, _) = with_records(2);
        receiver.handle_durable(1, 3);
        let early = Finished { next: 5, ..end_of(&receiver) };
        assert_eq!(receiver.handle_finished(early), Ok(Ending::Resume(FinishedAck::Resume(1))));
        assert!(receiver.finished().is_none());
    }

    #[test]
    fn rule_4_an_agent_that_ignores_every_window_is_cut_off() {
        let mut receiver = Receiver::default();
        let block = "x".repeat(MAX_PAYLOAD);
        let flooded = (0..200).find_map(|n| {
            receiver.handle_records(&mut vec![output(n, n * MAX_PAYLOAD as u64, &block)], |_| None).err()
        });
        assert_eq!(flooded, Some(AgentViolation::Flooded));
    }

    #[test]
    fn rule_8_a_gap_is_in_the_log_and_in_the_completeness() {
        let (mut receiver, _) = with_records(1);
        let gap = Event::Gap(Gap { stream: Stream::Stdout, bytes: 10, cause: "spool-full".into() });
        let gap = Record::new(1, 0, Stream::Event, 0, gap.payload().into());
        receiver.handle_records(&mut vec![gap, output(2, 13, "end")], |_| None).unwrap();
        let Ok(Ending::Accept(FinishedAck::Incomplete(reason))) = receiver.handle_finished(end_of(&receiver)) else {
            panic!("a gap went unnoticed")
        };
        assert!(reason.contains("10 bytes"), "{reason}");
    }

    #[test]
    fn rule_8_records_that_nobody_has_any_more_are_said_to_be_lost() {
        let mut receiver = Receiver::default();
        assert_eq!(receiver.handle_hello(&hello(4, 6)), Ok(Some(4)));
        receiver.handle_records(&mut vec![output(4, 12, "abc")], |_| None).unwrap();
        let Ok(Ending::Accept(FinishedAck::Incomplete(reason))) = receiver.handle_finished(end_of(&receiver)) else {
            panic!("a loss went unnoticed")
        };
        assert!(reason.contains("4 acknowledged records"), "{reason}");
    }

    #[test]
    fn rule_9_counts_and_digest_are_checked_against_what_was_stored() {
        let (receiver, _) = with_records(2);
        let good = end_of(&receiver);
        let mut other = good.clone();
        other.digest.0[0] ^= 1;
        let mut fewer = good.clone();
        fewer.counts.stdout.bytes -= 1;
        for (finished, complete) in [(good, true), (other, false), (fewer, false)] {
            let ending = receiver.clone().handle_finished(finished);
            assert_eq!(matches!(ending, Ok(Ending::Accept(FinishedAck::Complete))), complete);
        }
    }

    #[test]
    fn a_refused_message_leaves_no_trace() {
        let (mut receiver, stored) = with_records(1);
        let good = output(1, 3, "abc");
        let refused = receiver.handle_records(&mut vec![good.clone(), output(2, 7, "x")], crc_of(&stored));
        assert_eq!((refused, receiver.next()), (Err(AgentViolation::WrongOffset(2)), 1));
        receiver.handle_records(&mut vec![good], crc_of(&stored)).unwrap();
        assert_eq!(receiver.tally().digest().0, *blake3::hash(b"abcabc").as_bytes());
    }

    #[test]
    fn a_stream_cannot_jump_without_a_gap() {
        let (mut receiver, stored) = with_records(1);
        let refused = receiver.handle_records(&mut vec![output(1, 4, "x")], crc_of(&stored));
        assert_eq!(refused, Err(AgentViolation::WrongOffset(1)));
    }

    fn output(seq: u64, offset: u64, text: &str) -> Record {
        Record::new(seq, 0, Stream::Stdout, offset, text.to_owned().into())
    }

    fn with_records(count: u64) -> (Receiver, Vec<Record>) {
        let mut receiver = Receiver::default();
        let stored: Vec<_> = (0..count).map(|seq| output(seq, 3 * seq, "abc")).collect();
        receiver.handle_records(&mut stored.clone(), |_| None).unwrap();
        (receiver, stored)
    }

    fn crc_of(stored: &[Record]) -> impl Fn(u64) -> Option<u32> {
        |seq| stored.get(seq as usize).map(|record| record.crc)
    }

    fn end_of(receiver: &Receiver) -> Finished {
        let tally = receiver.tally();
        let (next, counts, digest) = (tally.next(), tally.counts(), tally.digest());
        Finished { next, counts, digest, end: End::Exited(0), time: 0, usage: None }
    }

    fn hello(oldest: u64, next: u64) -> Hello {
        Hello {
            build: "b".parse().unwrap(),
            step: crate::id::StepName::default(),
            producer: ProducerId([1; 16]),
            oldest,
            next,
            labels: std::collections::BTreeMap::new(),
            agent: String::new(),
            capabilities: Vec::new(),
        }
    }
}
