//! The agent's half of exactly-once: what it holds, what is on its way, what may be forgotten.
//!
//! Held records are in memory, but for a middle that may lie elsewhere, on a disk say:
//!
//! ```text
//! | forgotten | held | spilled, elsewhere | tail |
//!          oldest                              next
//! ```
//!
//! ```text
//! Offline --connected--> Greeting --Welcome--> Streaming --FinishedAck--> Done
//!    ^-------disconnected----'------------------'
//! ```

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;

use crate::{
    codec::binary::Sealed,
    frame::{Ack, AgentFrame, Cancel, Finished, FinishedAck, Record, ServerFrame, Welcome},
    limits::{GATHER, MAX_RECORDS, WINDOW},
};

/// Records that are not yet accepted, and how far the server has them.
#[derive(Debug, Clone)]
pub struct Sender {
    /// The oldest, without a gap: what is sent next is among them.
    held: VecDeque<Sealed>,
    /// How many records after those are not in memory.
    spilled: u64,
    /// The newest, after those. Empty when nothing is spilled.
    tail: VecDeque<Sealed>,
    oldest: u64,
    /// Of `held` and of `tail`.
    cost: [u64; 2],
    sent: u64,
    /// The highest `sent` of all connections: what the server may have.
    reached: u64,
    in_flight: u64,
    window: u64,
    /// The most in flight, whatever the server grants.
    own_window: u64,
    /// Payload that small records are gathered to, bytes.
    gather: usize,
    finished: Option<Finished>,
    /// Whether an earlier life left this: the server may have more of it than is known here.
    is_recovered: bool,
    phase: Phase,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    Offline,
    Greeting,
    Streaming { finished_sent: bool },
    Done,
}

/// What to write to the socket next.
#[derive(Debug)]
pub enum Outgoing {
    /// A binary message, ready as it is.
    Message(Bytes),
    /// A frame to encode.
    Frame(AgentFrame),
}

/// What a server's frame asks of the agent.
#[derive(Debug, PartialEq, Eq)]
pub enum Order {
    /// End the command.
    Cancel(Cancel),
    /// The log is accepted; the connection can be closed. `None`: complete, otherwise what is missing.
    Delivered(Option<String>),
    /// Connect again within this time.
    Drain(Duration),
    /// Nothing beyond what [`Sender::poll_transmit`] says.
    Nothing,
    /// Answer a ping with this id.
    Pong(u64),
    /// The stream is open.
    Welcome(Welcome),
}

/// How a server broke the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ServerViolation {
    /// It acknowledges or asks for a record outside what this agent has.
    #[error("the server speaks of record {next}, this agent has {oldest} to {end}")]
    OutOfRange {
        /// What the server named.
        next: u64,
        /// The lowest number it could have named.
        oldest: u64,
        /// The highest.
        end: u64,
    },
    /// A frame that has no meaning at this point.
    #[error("the server sent {0} at the wrong time")]
    Unexpected(&'static str),
}

impl Default for Sender {
    fn default() -> Self {
        Self {
            held: VecDeque::new(),
            spilled: 0,
            tail: VecDeque::new(),
            oldest: 0,
            cost: [0; 2],
            sent: 0,
            reached: 0,
            in_flight: 0,
            window: WINDOW,
            own_window: u64::MAX,
            gather: GATHER,
            finished: None,
            is_recovered: false,
            phase: Phase::Offline,
        }
    }
}

impl Sender {
    /// Goes on with records that an earlier life left elsewhere: all of `oldest..next` are spilled. The server may have
    /// more than these, which were acknowledged without that life hearing of it. An end that counts more than these holds
    /// once the server turns out to have the rest.
    ///
    /// # Panics
    ///
    /// When there are fewer than none.
    #[must_use]
    pub fn recover(oldest: u64, next: u64, finished: Option<Finished>) -> Self {
        assert!(oldest <= next, "a range of records");
        let spilled = next - oldest;
        // All of it may have been sent by that life.
        Self { oldest, sent: oldest, reached: next, spilled, finished, is_recovered: true, ..Self::default() }
    }

    /// Holds the next record.
    ///
    /// # Panics
    ///
    /// When its number is not [`Self::next`], or after [`Self::finish`].
    pub fn push(&mut self, sealed: Sealed) {
        assert_eq!(sealed.record.seq, self.next(), "records are numbered densely");
        assert!(self.finished.is_none(), "FINISHED is the last record");
        let newest = usize::from(self.spilled > 0);
        self.cost[newest] += sealed.record.cost();
        if newest == 0 { self.held.push_back(sealed) } else { self.tail.push_back(sealed) }
    }

    /// Adds the end. It is sent after every record.
    pub fn finish(&mut self, finished: Finished) {
        assert_eq!(finished.next, self.next(), "FINISHED counts every record");
        self.finished = Some(finished);
    }

    /// Keeps what is in flight below `cost`, or one record, whatever window the server grants: what is in flight stays in
    /// memory.
    pub fn limit_window(&mut self, cost: u64) {
        self.own_window = cost;
    }

    /// Gathers small records into messages of this much payload, bytes, and no more than [`GATHER`]: on a link that breaks
    /// before a larger one is through.
    pub fn gather(&mut self, payload: usize) {
        self.gather = payload.min(GATHER);
    }

    /// The lowest sequence number held.
    #[must_use]
    pub fn oldest(&self) -> u64 {
        self.oldest
    }

    /// The sequence number of the next record.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.held_end() + self.spilled + self.tail.len() as u64
    }

    fn held_end(&self) -> u64 {
        self.oldest + self.held.len() as u64
    }

    /// What the records in memory cost, bytes.
    #[must_use]
    pub fn cost(&self) -> u64 {
        self.cost[0] + self.cost[1]
    }

    /// The end of the log, once there is one that all records are known to.
    #[must_use]
    pub fn finished(&self) -> Option<&Finished> {
        self.finished.as_ref().filter(|finished| finished.next == self.next())
    }

    /// What a hello says is next. An earlier life's records may have been more than are known here, so there is no telling:
    /// the server is asked to name any.
    #[must_use]
    pub fn claimed_next(&self) -> u64 {
        if self.is_recovered { u64::MAX } else { self.next() }
    }

    /// The records in memory from `first` on, until they come to `most` bytes of payload; at least one, if there is one.
    #[must_use]
    pub fn peek(&self, first: u64, most: usize) -> Vec<Sealed> {
        let tail = self.held_end() + self.spilled;
        let held = self.held.iter().skip(first.saturating_sub(self.oldest) as usize);
        let tail = self.tail.iter().skip(first.saturating_sub(tail) as usize);
        let mut payload = 0;
        held.chain(tail)
            .take_while(|sealed| {
                let fits = payload == 0 || payload + sealed.record.payload.len() <= most;
                payload += sealed.record.payload.len().max(1);
                fits
            })
            .cloned()
            .collect()
    }

    /// Drops records from memory that are kept elsewhere as well: those below `kept`, except for what is on its way to the
    /// server and for the oldest up to a cost of `keep`. They come back through [`Self::restore`].
    pub fn spill(&mut self, kept: u64, keep: u64) {
        while self.spilled > 0 && self.tail.front().is_some_and(|sealed| sealed.record.seq < kept) {
            self.cost[1] -= self.tail.pop_front().map_or(0, |sealed| sealed.record.cost());
            self.spilled += 1;
        }
        if self.spilled == 0 {
            self.part(kept, keep);
        }
        while kept >= self.held_end() && self.held_end() > self.sent && self.cost[0] > keep {
            self.cost[0] -= self.held.pop_back().map_or(0, |sealed| sealed.record.cost());
            self.spilled += 1;
        }
        self.close_gap();
    }

    /// Makes the records from `kept` on the tail, if any before them can be dropped.
    fn part(&mut self, kept: u64, keep: u64) {
        if kept <= self.sent || self.cost[0] <= keep {
            return;
        }
        let at = kept.saturating_sub(self.oldest).min(self.held.len() as u64) as usize;
        let newer: u64 = self.held.range(at..).map(|sealed| sealed.record.cost()).sum();
        if self.cost[0] - newer > keep {
            self.tail = self.held.split_off(at);
            self.cost = [self.cost[0] - newer, newer];
        }
    }

    /// The number of the first record that is not in memory.
    #[must_use]
    pub fn spilled(&self) -> Option<u64> {
        (self.spilled > 0).then(|| self.held_end())
    }

    /// What the oldest records in memory cost, up to the first that is not there, bytes.
    #[must_use]
    pub fn held_cost(&self) -> u64 {
        self.cost[0]
    }

    /// Takes a record back. One that is not the first of those that were spilled is not needed any more.
    pub fn restore(&mut self, sealed: Sealed) {
        if self.spilled() != Some(sealed.record.seq) {
            return;
        }
        self.cost[0] += sealed.record.cost();
        self.held.push_back(sealed);
        self.spilled -= 1;
        self.close_gap();
    }

    fn close_gap(&mut self) {
        if self.spilled == 0 {
            self.held.append(&mut self.tail);
            self.cost = [self.cost[0] + self.cost[1], 0];
        }
    }

    /// The spilled records below `next` cannot be had back: nobody has them any more. Possible once everything before
    /// them is acknowledged; the next hello then says what is missing. Says whether it was.
    pub fn lose(&mut self, next: u64) -> bool {
        let possible = self.held.is_empty() && self.spilled > 0;
        if possible {
            self.forget_below(next.min(self.oldest + self.spilled));
            self.sent = self.sent.max(self.oldest);
            self.reached = self.reached.max(self.oldest);
        }
        possible
    }

    /// Whether the server has accepted FINISHED.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.phase == Phase::Done
    }

    /// Whether the server has welcomed this connection.
    #[must_use]
    pub fn is_welcomed(&self) -> bool {
        matches!(self.phase, Phase::Streaming { .. } | Phase::Done)
    }

    /// A connection is open and the hello is on its way.
    pub fn handle_connected(&mut self) {
        if !self.is_done() {
            self.phase = Phase::Greeting;
        }
    }

    /// The connection is gone, and with it everything that was not acknowledged.
    pub fn handle_disconnected(&mut self) {
        self.sent = self.oldest;
        self.in_flight = 0;
        if !self.is_done() {
            self.phase = Phase::Offline;
        }
    }

    /// Takes one frame in and says what to do with it.
    ///
    /// # Errors
    ///
    /// When the server broke the protocol; the connection is of no use any more.
    pub fn handle_frame(&mut self, frame: ServerFrame) -> Result<Order, ServerViolation> {
        match frame {
            ServerFrame::Welcome(welcome) => self.handle_welcome(welcome),
            ServerFrame::Ack(ack) => self.handle_ack(ack),
            ServerFrame::FinishedAck(ack) => self.handle_finished_ack(ack),
            ServerFrame::Cancel(cancel) => Ok(Order::Cancel(cancel)),
            ServerFrame::Drain(drain) => Ok(Order::Drain(Duration::from_millis(drain.within))),
            ServerFrame::Ping(ping) => Ok(Order::Pong(ping.id)),
        }
    }

    fn handle_welcome(&mut self, welcome: Welcome) -> Result<Order, ServerViolation> {
        if self.phase != Phase::Greeting {
            return Err(ServerViolation::Unexpected("Welcome"));
        }
        self.check_range(welcome.next, self.claimed_next())?;
        self.forget_below(welcome.next);
        self.oldest = welcome.next; // beyond everything, if an earlier life had more
        self.sent = welcome.next;
        self.reached = self.reached.max(welcome.next);
        self.in_flight = 0;
        self.window = welcome.window;
        self.phase = Phase::Streaming { finished_sent: false };
        Ok(Order::Welcome(welcome))
    }

    fn handle_ack(&mut self, ack: Ack) -> Result<Order, ServerViolation> {
        let Phase::Streaming { .. } = self.phase else {
            return Err(ServerViolation::Unexpected("Ack"));
        };
        self.window = ack.window;
        if ack.next > self.oldest {
            // What an earlier connection carried may become durable before it is sent again on this one.
            self.check_range(ack.next, self.reached)?;
            self.in_flight = self.in_flight.saturating_sub(self.forget_below(ack.next));
            self.sent = self.sent.max(ack.next);
        }
        Ok(Order::Nothing)
    }

    fn handle_finished_ack(&mut self, ack: FinishedAck) -> Result<Order, ServerViolation> {
        if self.phase != (Phase::Streaming { finished_sent: true }) {
            return Err(ServerViolation::Unexpected("FinishedAck"));
        }
        let missing = match ack {
            FinishedAck::Complete => None,
            FinishedAck::Incomplete(reason) => Some(reason),
            FinishedAck::Resume(next) => return self.rewind(next).map(|()| Order::Nothing),
        };
        self.forget_below(self.next());
        self.phase = Phase::Done;
        Ok(Order::Delivered(missing))
    }

    /// Sends again from `next`, which is what the server lacks.
    fn rewind(&mut self, next: u64) -> Result<(), ServerViolation> {
        self.check_range(next, self.next())?;
        self.forget_below(next);
        self.sent = next;
        self.in_flight = 0;
        self.phase = Phase::Streaming { finished_sent: false };
        Ok(())
    }

    fn check_range(&self, next: u64, end: u64) -> Result<(), ServerViolation> {
        let oldest = self.oldest;
        if (oldest..=end).contains(&next) { Ok(()) } else { Err(ServerViolation::OutOfRange { next, oldest, end }) }
    }

    /// Drops what is durable and says what it cost.
    fn forget_below(&mut self, next: u64) -> u64 {
        let mut freed = self.forget_held(next);
        let elsewhere = self.spilled.min(next.saturating_sub(self.oldest));
        self.spilled -= elsewhere;
        self.oldest += elsewhere;
        self.close_gap();
        freed += self.forget_held(next);
        freed
    }

    fn forget_held(&mut self, next: u64) -> u64 {
        let mut freed = 0;
        while self.oldest < next {
            let Some(sealed) = self.held.pop_front() else { break };
            freed += sealed.record.cost();
            self.oldest += 1;
        }
        self.cost[0] -= freed;
        freed
    }

    /// What to send next; `None` until a frame, a record or a connection arrives.
    pub fn poll_transmit(&mut self) -> Option<Outgoing> {
        let Phase::Streaming { finished_sent } = self.phase else { return None };
        if self.sent < self.held_end() {
            return self.next_batch();
        }
        let finished = self.finished().filter(|_| !finished_sent && self.sent == self.next())?.clone();
        self.phase = Phase::Streaming { finished_sent: true };
        Some(Outgoing::Frame(AgentFrame::Finished(finished)))
    }

    /// One large record as it is, or small ones gathered.
    fn next_batch(&mut self) -> Option<Outgoing> {
        let start = (self.sent - self.oldest) as usize;
        let mut payload = 0;
        let mut count = 0;
        for Sealed { record, .. } in self.held.range(start..).take(MAX_RECORDS) {
            let fits_window = self.in_flight == 0 || self.in_flight + record.cost() <= self.window.min(self.own_window);
            let fits_message = count == 0 || payload + record.payload.len() <= self.gather;
            if !(fits_window && fits_message) {
                break;
            }
            self.in_flight += record.cost();
            payload += record.payload.len();
            count += 1;
        }
        self.sent += count as u64;
        self.reached = self.reached.max(self.sent);
        match count {
            0 => None,
            1 => Some(Outgoing::Message(self.held[start].message.clone())),
            _ => Some(Outgoing::Frame(AgentFrame::Records(self.records(start, count)))),
        }
    }

    fn records(&self, start: usize, count: usize) -> Vec<Record> {
        self.held.range(start..start + count).map(|sealed| sealed.record.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;

    use super::*;
    use crate::{
        codec::binary::{HEADROOM, decode_agent, seal},
        frame::{Counts, Drain, Durable, End, Ping, Stream},
        id::Digest,
        limits::{MAX_MESSAGE, MAX_PAYLOAD},
    };

    #[test]
    fn rule_1_the_server_says_where_to_resume() {
        let mut sender = streaming(3, 0);
        assert_eq!(sent(&mut sender), [0, 1, 2]);
        sender.handle_disconnected();
        sender.handle_connected();
        sender.handle_frame(welcome(1)).unwrap();
        assert_eq!((sender.oldest(), sent(&mut sender)), (1, vec![1, 2]));
    }

    #[test]
    fn rule_1_a_resume_point_outside_what_is_held_is_refused() {
        for next in [1, 9] {
            let mut sender = streaming(3, 2);
            sender.handle_disconnected();
            sender.handle_connected();
            let refused = sender.handle_frame(welcome(next)).unwrap_err();
            assert_eq!(refused, ServerViolation::OutOfRange { next, oldest: 2, end: 3 });
        }
    }

    #[test]
    fn rule_2_only_an_acknowledgement_frees_and_an_old_one_changes_nothing() {
        let mut sender = streaming(3, 0);
        assert_eq!((sent(&mut sender).len(), sender.oldest()), (3, 0));
        sender.handle_frame(ack(2)).unwrap();
        sender.handle_frame(ack(1)).unwrap();
        assert_eq!((sender.oldest(), sender.next()), (2, 3));
        assert!(sender.handle_frame(ack(4)).is_err());
    }

    #[test]
    fn rule_2_what_an_earlier_connection_carried_may_be_acknowledged_on_the_next() {
        let mut sender = streaming(4, 0);
        assert_eq!(sent(&mut sender), [0, 1, 2, 3]);
        sender.push(record(4, 10));
        sender.handle_disconnected();
        sender.handle_connected();
        sender.handle_frame(welcome(1)).unwrap();
        sender.handle_frame(ack(3)).unwrap();
        assert_eq!((sender.oldest(), sent(&mut sender)), (3, vec![3, 4]));
        assert_eq!(sender.in_flight, sender.cost());
        assert!(sender.handle_frame(ack(6)).is_err());
    }

    #[test]
    fn rule_2_finished_follows_every_record_and_is_sent_again_after_a_cut() {
        let mut sender = streaming(1, 0);
        sender.finish(finished(1));
        assert_eq!(sent(&mut sender), [0, FINISHED]);
        sender.handle_disconnected();
        sender.handle_connected();
        sender.handle_frame(welcome(1)).unwrap();
        assert_eq!(sent(&mut sender), [FINISHED]);
        assert_eq!(sender.handle_frame(ServerFrame::FinishedAck(FinishedAck::Complete)), Ok(Order::Delivered(None)));
        assert!(sender.is_done());
    }

    #[test]
    fn rule_2_finished_goes_out_with_zero_records() {
        let mut sender = streaming(0, 0);
        sender.finish(finished(0));
        assert_eq!(sent(&mut sender), [FINISHED]);
    }

    #[test]
    fn a_server_that_lacks_records_at_the_end_gets_them_again() {
        let mut sender = streaming(3, 0);
        sender.finish(finished(3));
        sent(&mut sender);
        sender.handle_frame(ServerFrame::FinishedAck(FinishedAck::Resume(1))).unwrap();
        assert_eq!(sent(&mut sender), [1, 2, FINISHED]);
    }

    #[test]
    fn what_is_spilled_comes_back_in_its_place() {
        let mut sender = streaming(8, 0);
        sender.limit_window(2 * record(0, 10).record.cost());
        let cost = record(0, 10).record.cost();
        sender.spill(6, 3 * cost);
        assert_eq!((sender.spilled(), sender.held_cost(), sender.cost()), (Some(3), 3 * cost, 5 * cost));
        assert_eq!((sender.next(), sent(&mut sender)), (8, vec![0, 1]));
        sender.push(record(8, 10));
        assert_eq!(sender.peek(6, 1000).iter().map(|sealed| sealed.record.seq).collect::<Vec<_>>(), [6, 7, 8]);
        sender.handle_frame(ack(2)).unwrap();
        sender.restore(record(4, 10));
        sender.restore(record(3, 10));
        assert_eq!((sender.spilled(), sent(&mut sender)), (Some(4), vec![2, 3]));
        sender.handle_disconnected();
        sender.handle_connected();
        sender.handle_frame(welcome(3)).unwrap();
        sender.handle_frame(ack(4)).unwrap();
        assert_eq!(sent(&mut sender), [0u64; 0], "record 4 is elsewhere");
        (4..6).for_each(|seq| sender.restore(record(seq, 10)));
        assert_eq!((sender.spilled(), sent(&mut sender)), (None, vec![4, 5]));
        assert_eq!((sender.held_cost(), sender.cost()), (5 * cost, 5 * cost));
    }

    #[test]
    fn what_the_server_has_of_the_spilled_is_forgotten() {
        let mut sender = streaming(8, 0);
        sender.spill(6, 0);
        sender.handle_disconnected();
        sender.handle_connected();
        assert_eq!(sender.spilled(), Some(0));
        sender.handle_frame(welcome(4)).unwrap();
        assert_eq!((sender.oldest(), sender.spilled(), sender.next()), (4, Some(4), 8));
        sender.handle_frame(ack(4)).unwrap();
        sender.handle_disconnected();
        sender.handle_connected();
        sender.handle_frame(welcome(7)).unwrap();
        assert_eq!((sender.oldest(), sender.spilled(), sent(&mut sender)), (7, None, vec![7]));
    }

    #[test]
    fn what_is_in_flight_stays_in_memory() {
        let mut sender = streaming(8, 0);
        assert_eq!(sent(&mut sender).len(), 8);
        sender.spill(8, 0);
        assert_eq!((sender.spilled(), sender.oldest()), (None, 0));
        sender.handle_disconnected();
        sender.spill(8, 0);
        assert_eq!((sender.spilled(), sender.cost()), (Some(0), 0));
    }

    #[test]
    fn what_an_earlier_life_left_is_sent_once_it_is_there() {
        let finished = finished(5);
        let mut sender = Sender::recover(3, 5, Some(finished.clone()));
        sender.handle_connected();
        sender.handle_frame(welcome(3)).unwrap();
        assert!(sender.poll_transmit().is_none());
        sender.restore(record(3, 10));
        sender.restore(record(4, 10));
        assert_eq!((sent(&mut sender), sender.finished()), (vec![3, 4, FINISHED], Some(&finished)));
    }

    #[test]
    fn what_the_server_has_of_an_earlier_life_may_be_more_than_was_left() {
        for (stored, end) in [(5, vec![]), (8, vec![FINISHED]), (9, vec![])] {
            let mut sender = Sender::recover(3, 5, Some(finished(8)));
            assert_eq!((sender.claimed_next(), sender.finished()), (u64::MAX, None));
            sender.handle_connected();
            sender.handle_frame(welcome(stored)).unwrap();
            assert_eq!((sender.oldest(), sender.next(), sender.spilled()), (stored, stored, None));
            assert_eq!(sent(&mut sender), end, "{stored} are stored");
        }
    }

    #[test]
    fn what_cannot_be_had_back_is_left_out_at_the_next_hello() {
        let mut sender = streaming(6, 0);
        sender.spill(4, 2 * record(0, 10).record.cost());
        assert!(!sender.lose(4), "two are still to be delivered");
        assert_eq!(sent(&mut sender), [0, 1]);
        sender.handle_frame(ack(2)).unwrap();
        assert!(sender.lose(4));
        assert_eq!((sender.oldest(), sender.next(), sender.spilled()), (4, 6, None));
        sender.handle_disconnected();
        sender.handle_connected();
        sender.handle_frame(welcome(4)).unwrap();
        assert_eq!(sent(&mut sender), [4, 5]);
    }

    #[test]
    fn rule_4_the_window_bounds_what_is_in_flight() {
        let mut sender = Sender::default();
        (0..40).for_each(|seq| sender.push(record(seq, MAX_PAYLOAD)));
        connect(&mut sender);
        let first = sent(&mut sender).len() as u64;
        assert!(first * record(0, MAX_PAYLOAD).record.cost() <= WINDOW && first >= 15, "{first}");
        assert!(sender.poll_transmit().is_none());
        sender.handle_frame(ServerFrame::Ack(Ack { next: 2, window: WINDOW })).unwrap();
        assert_eq!(sent(&mut sender), [first, first + 1]);
    }

    #[test]
    fn rule_4_a_window_smaller_than_a_record_still_moves() {
        let mut sender = Sender::default();
        (0..3).for_each(|seq| sender.push(record(seq, MAX_PAYLOAD)));
        sender.handle_connected();
        let ServerFrame::Welcome(mut narrow) = welcome(0) else { unreachable!() };
        narrow.window = 1;
        sender.handle_frame(ServerFrame::Welcome(narrow)).unwrap();
        assert_eq!(sent(&mut sender), [0]);
    }

    #[test]
    fn rule_5_no_message_exceeds_its_limit_however_records_are_gathered() {
        for len in [0, 1, 100, GATHER - 1, MAX_PAYLOAD] {
            let mut sender = Sender::default();
            (0..2000).for_each(|seq| sender.push(record(seq, len)));
            connect(&mut sender);
            while let Some(outgoing) = sender.poll_transmit() {
                assert!(wire(outgoing).len() <= MAX_MESSAGE);
            }
        }
    }

    #[test]
    fn what_is_gathered_can_be_made_smaller() {
        let mut sender = streaming(8, 0);
        sender.gather(25);
        let Some(Outgoing::Frame(AgentFrame::Records(records))) = sender.poll_transmit() else { panic!("no batch") };
        assert_eq!(records.len(), 2);
        sender.gather(0);
        assert!(matches!(sender.poll_transmit(), Some(Outgoing::Message(_))), "one at a time at least");
    }

    #[test]
    fn orders_pass_through() {
        let mut sender = streaming(0, 0);
        let cancel = Cancel { reason: "hung up".into(), grace: 1000 };
        assert_eq!(sender.handle_frame(ServerFrame::Cancel(cancel.clone())), Ok(Order::Cancel(cancel)));
        assert_eq!(sender.handle_frame(ServerFrame::Ping(Ping { id: 7 })), Ok(Order::Pong(7)));
        let drain = ServerFrame::Drain(Drain { within: 20 });
        assert_eq!(sender.handle_frame(drain), Ok(Order::Drain(Duration::from_millis(20))));
    }

    #[test]
    fn frames_out_of_place_are_refused() {
        let mut sender = Sender::default();
        assert!(sender.handle_frame(welcome(0)).is_err());
        assert!(sender.handle_frame(ack(0)).is_err());
        connect(&mut sender);
        assert!(sender.handle_frame(welcome(0)).is_err());
        assert!(sender.handle_frame(ServerFrame::FinishedAck(FinishedAck::Complete)).is_err());
    }

    const FINISHED: u64 = u64::MAX;

    fn record(seq: u64, len: usize) -> Sealed {
        seal(BytesMut::zeroed(HEADROOM + len), seq, 0, Stream::Stdout, 0)
    }

    /// Holds `count` records, of which the server already has `acked`.
    fn streaming(count: u64, acked: u64) -> Sender {
        let mut sender = Sender::default();
        (0..count).for_each(|seq| sender.push(record(seq, 10)));
        sender.handle_connected();
        sender.handle_frame(welcome(acked)).unwrap();
        sender
    }

    fn connect(sender: &mut Sender) {
        sender.handle_connected();
        sender.handle_frame(welcome(0)).unwrap();
    }

    fn welcome(next: u64) -> ServerFrame {
        ServerFrame::Welcome(Welcome {
            attempt: 1,
            next,
            durable: Durable::Memory,
            window: WINDOW,
            heartbeat: 15_000,
            max_payload: MAX_PAYLOAD as u32,
            max_message: MAX_MESSAGE as u32,
            cancel: None,
            server: String::new(),
            capabilities: Vec::new(),
        })
    }

    fn ack(next: u64) -> ServerFrame {
        ServerFrame::Ack(Ack { next, window: WINDOW })
    }

    fn finished(next: u64) -> Finished {
        Finished { next, counts: Counts::default(), digest: Digest([0; 32]), end: End::Exited(0), time: 0, usage: None }
    }

    fn wire(outgoing: Outgoing) -> Bytes {
        match outgoing {
            Outgoing::Message(message) => message,
            Outgoing::Frame(frame) => crate::codec::binary::encode_agent(&frame).unwrap(),
        }
    }

    /// Sequence numbers in the order in which they go out.
    fn sent(sender: &mut Sender) -> Vec<u64> {
        let mut seqs = Vec::new();
        while let Some(outgoing) = sender.poll_transmit() {
            match decode_agent(&wire(outgoing)).unwrap() {
                AgentFrame::Records(records) => seqs.extend(records.iter().map(|record| record.seq)),
                AgentFrame::Finished(_) => seqs.push(FINISHED),
                AgentFrame::Hello(_) | AgentFrame::Pong(_) => unreachable!("never polled"),
            }
        }
        seqs
    }
}
