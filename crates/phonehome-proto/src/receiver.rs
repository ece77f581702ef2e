//! The server's half of exactly-once: what is stored, what is a duplicate, what is a lie.

use crate::{
    close::CloseCode,
    frame::{Finished, FinishedAck, Hello, Record},
    limits::{MAX_MESSAGE, MAX_WINDOW, RECORD_COST},
    tally::Tally,
};

/// One attempt's log as its server knows it.
///
/// `received` runs ahead of `durable` by what the store has not confirmed yet; only the latter is ever acknowledged, and
/// `acked` follows it. What lies above `acked` the agent still holds: from there a log whose digest is wrong can be sent
/// again.
#[derive(Debug, Clone, Default)]
pub struct Receiver {
    received: Tally,
    durable: Tally,
    acked: Tally,
    /// Whether the attempt was sent again once; that is enough.
    rewound: bool,
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
    /// The records do not add up, and the agent still holds the last of them. Everything that was stored beyond
    /// [`Receiver::tally`], which has stepped back, must be taken back; then answer with this.
    Rewind(FinishedAck),
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
        Self { acked: stored.clone(), durable: stored.clone(), received: stored, rewound: false, lost, finished }
    }

    /// Everything below was handed to the store.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.received.next()
    }

    /// Everything below is durable: what `Welcome` and `Ack` may say.
    #[must_use]
    pub fn durable(&self) -> u64 {
        self.durable.next()
    }

    /// The account of what was acknowledged.
    #[must_use]
    pub fn acked(&self) -> &Tally {
        &self.acked
    }

    /// What a `Welcome` or an `Ack` is about to say: everything below is durable. From here on the agent no longer holds
    /// it.
    pub fn acknowledge(&mut self) -> u64 {
        self.acked.clone_from(&self.durable);
        self.acked.next()
    }

    /// Whether the end of the log has made the agent send a part of it again.
    #[must_use]
    pub fn is_rewound(&self) -> bool {
        self.rewound
    }

    /// The attempt was sent again once on an earlier connection.
    pub fn note_rewound(&mut self) {
        self.rewound = true;
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
        // Another connection may have got further: then nothing of this one is unacknowledged.
        let heads = self.next().saturating_sub(self.durable.next()).saturating_mul(RECORD_COST);
        let payload = self.received.bytes().saturating_sub(self.durable.bytes());
        let more: u64 = records.iter().map(Record::cost).sum();
        let unacked = heads.saturating_add(payload).saturating_add(more);
        if unacked > MAX_WINDOW + MAX_MESSAGE as u64 { Err(AgentViolation::Flooded) } else { Ok(()) }
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

    /// The store has made everything up to here durable.
    pub fn handle_durable(&mut self, durable: &Tally) {
        if durable.next() > self.durable.next() {
            self.durable.clone_from(durable);
        }
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
            return Ok(Ending::Resume(FinishedAck::Resume(self.acknowledge())));
        }
        if finished.next < self.next() {
            return Err(AgentViolation::OtherEnd);
        }
        let differs = self.differs(&finished);
        if differs.is_some() && self.may_rewind() {
            return Ok(Ending::Rewind(FinishedAck::Resume(self.rewind())));
        }
        let answer = self.missing(differs).map_or(FinishedAck::Complete, FinishedAck::Incomplete);
        self.finished = Some((finished, answer.clone()));
        Ok(Ending::Accept(answer))
    }

    /// What of the agent's account is not what was stored. When records are lost nothing can agree.
    fn differs(&self, finished: &Finished) -> Option<&'static str> {
        if self.lost > 0 {
            None
        } else if self.received.counts() != finished.counts {
            Some("the counts of records and bytes differ from what was stored")
        } else if self.received.digest() != finished.digest {
            Some("the digest differs from what was stored")
        } else {
            None
        }
    }

    /// Whether the agent still holds records that could be sent again, for the first time.
    fn may_rewind(&self) -> bool {
        !self.rewound && self.acked.next() < self.next()
    }

    /// Steps back to what was acknowledged, as if nothing had come after it, and says where that is.
    fn rewind(&mut self) -> u64 {
        self.received.clone_from(&self.acked);
        self.durable.clone_from(&self.acked);
        self.rewound = true;
        self.acked.next()
    }

    /// What keeps the log from being complete.
    fn missing(&self, differs: Option<&str>) -> Option<String> {
        if self.lost > 0 {
            return Some(format!("{} records are gone, neither side has them any more", self.lost));
        }
        let remedy = if self.rewound {
            "also after the last records were sent again"
        } else {
            "and nothing was left that could be sent again"
        };
        let dropped = self.received.missing_bytes();
        let dropped = (dropped > 0).then(|| format!("{dropped} bytes were dropped before they were sent"));
        let differs = differs.map(|what| format!("{what}, {remedy}"));
        let reasons: Vec<_> = differs.into_iter().chain(dropped).collect();
        (!reasons.is_empty()).then(|| reasons.join("; "))
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
        receiver.handle_durable(with_records(2).0.tally());
        receiver.handle_durable(with_records(1).0.tally());
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
        receiver.handle_durable(with_records(1).0.tally());
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
    fn rule_4_holds_at_the_highest_sequence_numbers_too() {
        let (mut tally, start) = (Tally::default(), u64::MAX - 1000);
        tally.skip_to(start);
        let mut receiver = Receiver::resume(tally, start, None);
        let block = "x".repeat(MAX_PAYLOAD);
        let flooded = (0..200).find_map(|n| {
            receiver.handle_records(&mut vec![output(start + n, n * MAX_PAYLOAD as u64, &block)], |_| None).err()
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
        assert!(reason.contains("4 records are gone"), "{reason}");
    }

    #[test]
    fn rule_9_counts_and_digest_are_checked_against_what_was_stored() {
        let (mut receiver, _) = with_records(2);
        let good = end_of(&receiver);
        receiver.note_rewound();
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
    fn rule_9_a_log_that_does_not_add_up_is_sent_again_from_what_was_acknowledged() {
        let (mut receiver, stored) = with_records(4);
        let good = end_of(&receiver);
        receiver = with_records(2).0;
        receiver.handle_durable(with_records(2).0.tally());
        assert_eq!(receiver.acknowledge(), 2);
        receiver.handle_records(&mut vec![output(2, 6, "abc"), output(3, 9, "XYZ")], |_| None).unwrap();
        receiver.handle_durable(&receiver.tally().clone());
        let ending = receiver.handle_finished(good.clone());
        assert_eq!(ending, Ok(Ending::Rewind(FinishedAck::Resume(2))));
        assert_eq!((receiver.next(), receiver.durable(), receiver.is_rewound()), (2, 2, true));
        assert_eq!(receiver.tally().digest().0, *blake3::hash(b"abcabc").as_bytes());
        receiver.handle_records(&mut vec![stored[2].clone(), stored[3].clone()], |_| None).unwrap();
        assert_eq!(receiver.handle_finished(good), Ok(Ending::Accept(FinishedAck::Complete)));
    }

    #[test]
    fn rule_9_a_log_is_sent_again_once_and_the_reason_says_so() {
        let (mut receiver, stored) = with_records(2);
        let mut wrong = end_of(&receiver);
        wrong.digest.0[0] ^= 1;
        assert_eq!(receiver.handle_finished(wrong.clone()), Ok(Ending::Rewind(FinishedAck::Resume(0))));
        receiver.handle_records(&mut stored.clone(), |_| None).unwrap();
        let reason = incomplete(&mut receiver, wrong.clone());
        assert_eq!(reason, "the digest differs from what was stored, also after the last records were sent again");

        let (mut elsewhere, _) = with_records(2);
        elsewhere.note_rewound();
        assert_eq!(incomplete(&mut elsewhere, wrong), reason);
    }

    #[test]
    fn rule_9_what_was_acknowledged_cannot_be_sent_again() {
        let (mut receiver, _) = with_records(2);
        receiver.handle_durable(&receiver.tally().clone());
        receiver.acknowledge();
        let mut wrong = end_of(&receiver);
        wrong.counts.stdout.bytes -= 1;
        let reason = incomplete(&mut receiver, wrong);
        assert!(reason.starts_with("the counts of records and bytes differ"), "{reason}");
        assert!(reason.ends_with("nothing was left that could be sent again"), "{reason}");
        assert!(!receiver.is_rewound());
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

    /// Why an end is accepted and not complete.
    fn incomplete(receiver: &mut Receiver, finished: Finished) -> String {
        match receiver.handle_finished(finished) {
            Ok(Ending::Accept(FinishedAck::Incomplete(reason))) => reason,
            other => panic!("{other:?}"),
        }
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
