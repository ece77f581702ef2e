//! From blocks of output to numbered records, and what becomes of output for which there is no room.
//!
//! With [`Overflow::Block`] nobody reads the command's pipes until there is room: the pipe fills, the command waits and
//! nothing is lost. With [`Overflow::Drop`], and also when the server has been away for too long or time is up, reading
//! goes on: what was recorded stays, the newest output is kept in a ring, and what falls out between the two is counted.
//! A block gets its number when it leaves the ring, behind a gap record with the count, so that numbers stay dense and
//! the gap stands where the bytes are missing.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use phonehome_env::Env;
use phonehome_proto::{
    codec::binary::{HEADROOM, seal},
    event::{Event, Fault, Gap, TookOver},
    frame::{End, Finished, Stream, UnixMicros, Usage},
    limits::RECORD_COST,
    tally::Tally,
};
use tokio::sync::mpsc;
use tracing::warn;

use crate::{
    config::{OnOffline, Overflow},
    herald::{Herald, News},
    outbox::Outbox,
    redact::Redactor,
};

/// The account of an attempt and the way into its outbox.
#[derive(Debug)]
pub struct Recorder {
    env: Env,
    outbox: Arc<Outbox>,
    tally: Tally,
    policy: Policy,
    ring: Ring,
    herald: Herald,
    news: mpsc::Receiver<News>,
    redactor: Option<Redactor>,
    out_of_time: bool,
    /// Why output was dropped last.
    cause: Cause,
    warned: bool,
}

/// Why there was no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    Offline,
    OutOfTime,
    SpoolFull,
}

impl Cause {
    fn name(self) -> &'static str {
        match self {
            Self::Offline => "offline",
            Self::OutOfTime => "out-of-time",
            Self::SpoolFull => "spool-full",
        }
    }
}

/// When output may be dropped.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Policy {
    pub(crate) overflow: Overflow,
    /// How long nothing may get better before a full outbox no longer holds up the command.
    pub(crate) offline_limit: Option<Duration>,
    pub(crate) on_offline: OnOffline,
    /// Bytes of the newest output that are kept while older is dropped.
    pub(crate) ring: u64,
}

/// The newest output, for which there was no room.
#[derive(Debug, Default)]
struct Ring {
    blocks: VecDeque<(Stream, UnixMicros, Bytes)>,
    cost: u64,
    /// Bytes of standard output and standard error that fell out.
    dropped: [u64; 2],
}

impl Recorder {
    pub(crate) fn new(env: Env, outbox: Arc<Outbox>, policy: Policy) -> Self {
        let (tally, ring) = (Tally::default(), Ring::default());
        let (herald, news) = Herald::new(env.nature.clone());
        let (cause, warned, out_of_time) = (Cause::SpoolFull, false, false);
        Self { env, outbox, tally, policy, ring, herald, news, redactor: None, out_of_time, cause, warned }
    }

    /// Masks facts as well: the name of a program may hold a secret, or an error that quotes it.
    pub(crate) fn redact(&mut self, redactor: Redactor) {
        self.redactor = Some(redactor);
    }

    /// One whose records go nowhere, for output that is only copied.
    pub(crate) fn for_nobody(env: Env) -> Self {
        let policy = Policy { overflow: Overflow::Drop, offline_limit: None, on_offline: OnOffline::Continue, ring: 0 };
        let outbox = Arc::new(Outbox::new(0));
        outbox.abandon();
        Self::new(env, outbox, policy)
    }

    /// The way to have facts recorded from anywhere.
    pub(crate) fn herald(&self) -> Herald {
        self.herald.clone()
    }

    /// Leaves output where it is for a moment when the server has enough to confirm. Cancel safe.
    pub(crate) async fn keep_pace(&self) {
        self.outbox.keep_pace().await;
    }

    /// Waits until a block can be taken, if need be at the cost of an older one. Cancel safe.
    pub async fn ready(&mut self) {
        while !self.outbox.has_room() && self.may_drop().is_none() {
            let (offline_limit, is_relieved) = (self.policy.offline_limit, self.outbox.is_relieved());
            tokio::select! {
                biased; // room first: with it nothing need be dropped
                () = self.outbox.room() => {}
                () = self.outbox.unrelieved(), if is_relieved => {}
                () = offline(&self.outbox, offline_limit) => {}
            }
        }
        self.drain();
    }

    /// Records a fact that was told, or output that had no room before: waits for one or the other. As long as there is no
    /// room, facts wait where they are. Cancel safe.
    pub(crate) async fn attend(&mut self) {
        let has_room = self.outbox.has_room();
        tokio::select! {
            biased; // what happened first is recorded first
            () = self.outbox.room(), if !has_room || !self.ring.is_empty() => self.drain(),
            Some(news) = self.news.recv(), if has_room => self.told(news),
        }
    }

    /// Records what was told, and after the last of it how much could not be told.
    fn told(&mut self, News { time, event }: News) {
        self.event(time, event);
        if !self.news.is_empty() {
            return;
        }
        let left_out = self.herald.take_left_out();
        if left_out > 0 {
            let reason = format!("{left_out} facts about the build are left out here: there was no room for them");
            self.event(self.env.nature.now(), Event::Error(Fault { reason, trace: Vec::new() }));
        }
    }

    /// Waits no longer, whatever that costs: time is up.
    pub(crate) fn hurry(&mut self) {
        self.out_of_time = true;
    }

    /// Why output for which there is no room is dropped; `None` when the command has to wait.
    fn may_drop(&self) -> Option<Cause> {
        let offline = match self.policy.on_offline {
            OnOffline::Continue => self.policy.offline_limit.is_some_and(|limit| self.outbox.is_offline(limit)),
            OnOffline::Stop => false,
        };
        match self.policy.overflow {
            _ if self.out_of_time => Some(Cause::OutOfTime),
            _ if self.outbox.is_relieved() => None, // it is only the disk that is slower than the command
            Overflow::Drop => Some(Cause::SpoolFull),
            Overflow::Block => offline.then_some(Cause::Offline),
        }
    }

    /// Takes a block of output: [`HEADROOM`] free bytes, then what was read. Returns the latter.
    pub fn record(&mut self, stream: Stream, block: BytesMut) -> Bytes {
        self.drain();
        if self.ring.is_empty() && self.outbox.has_room() {
            return self.push(stream, self.env.nature.now(), block);
        }
        let payload = block.freeze().slice(HEADROOM..);
        self.ring.push(stream, self.env.nature.now(), payload.clone());
        let before = self.ring.dropped;
        self.ring.trim(self.policy.ring);
        if before == [0; 2] && self.ring.dropped != before {
            self.cause = self.may_drop().unwrap_or(Cause::SpoolFull);
            if !std::mem::replace(&mut self.warned, true) {
                let cause = self.cause.name();
                warn!(cause, "there is no room for the command's output; some of it is left out of the log");
            }
        }
        payload
    }

    fn event(&mut self, time: UnixMicros, mut event: Event) {
        if let Some(redactor) = &self.redactor {
            redactor.mask_event(&mut event); // before it is cut: half a secret is not found
        }
        self.push(Stream::Event, time, with_headroom(&event.fitted().payload()));
    }

    pub(crate) fn took_over(&mut self, records: u64, finished: bool) {
        self.event(self.env.nature.now(), Event::TookOver(TookOver { records, finished }));
    }

    fn push(&mut self, stream: Stream, time: UnixMicros, block: BytesMut) -> Bytes {
        let sealed = seal(block, self.tally.next(), time, stream, self.tally.offset(stream));
        self.tally.add(&sealed.record);
        let payload = sealed.record.payload.clone();
        self.outbox.push(sealed);
        payload
    }

    /// Records what is in the ring, as far as there is room.
    fn drain(&mut self) {
        while !self.ring.is_empty() && self.outbox.has_room() {
            self.record_oldest();
        }
    }

    fn record_oldest(&mut self) {
        for (stream, bytes) in self.ring.take_dropped() {
            let cause = self.cause.name().to_owned();
            self.event(self.env.nature.now(), Event::Gap(Gap { stream, bytes, cause }));
        }
        if let Some((stream, time, payload)) = self.ring.pop() {
            self.push(stream, time, with_headroom(&payload));
        }
    }

    /// Records what the ring holds and what was told, beyond the limit if need be: it is in memory in any case.
    pub(crate) fn catch_up(&mut self) {
        while !self.ring.is_empty() {
            self.record_oldest();
        }
        while let Ok(news) = self.news.try_recv() {
            self.told(news);
        }
    }

    /// Ends the log with all that is not recorded yet.
    pub fn finish(mut self, mut end: End, usage: Option<Usage>) {
        self.catch_up();
        if let (Some(redactor), End::NotStarted { reason, .. }) = (&self.redactor, &mut end) {
            redactor.mask_in_place(reason);
        }
        self.outbox.finish(Finished {
            next: self.tally.next(),
            counts: self.tally.counts(),
            digest: self.tally.digest(),
            end: end.fitted(),
            time: self.env.nature.now(),
            usage,
        });
    }

    /// The account so far.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }
}

async fn offline(outbox: &Outbox, limit: Option<Duration>) {
    match limit {
        Some(limit) if !outbox.is_offline(limit) => outbox.offline(limit).await,
        Some(_) | None => std::future::pending().await,
    }
}

fn with_headroom(payload: &[u8]) -> BytesMut {
    let mut block = BytesMut::zeroed(HEADROOM + payload.len());
    block[HEADROOM..].copy_from_slice(payload);
    block
}

impl Ring {
    fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    fn push(&mut self, stream: Stream, time: UnixMicros, payload: Bytes) {
        self.cost += cost(&payload);
        self.blocks.push_back((stream, time, payload));
    }

    fn pop(&mut self) -> Option<(Stream, UnixMicros, Bytes)> {
        let block = self.blocks.pop_front()?;
        self.cost -= cost(&block.2);
        Some(block)
    }

    /// Drops the oldest blocks until the rest costs no more than `limit`; the newest one stays.
    fn trim(&mut self, limit: u64) {
        while self.cost > limit && self.blocks.len() > 1 {
            if let Some((stream, _, payload)) = self.pop() {
                self.dropped[usize::from(stream.number()).min(1)] += payload.len() as u64;
            }
        }
    }

    fn take_dropped(&mut self) -> impl Iterator<Item = (Stream, u64)> + use<> {
        let dropped = std::mem::take(&mut self.dropped);
        [Stream::Stdout, Stream::Stderr].into_iter().zip(dropped).filter(|(_, bytes)| *bytes > 0)
    }
}

fn cost(payload: &Bytes) -> u64 {
    payload.len() as u64 + RECORD_COST
}

#[cfg(test)]
mod tests {
    use phonehome_proto::{
        event::{Cancelled, Ready, Waiting},
        frame::{Ack, Durable, Record, ServerFrame, Welcome},
        limits::{MAX_PAYLOAD, MAX_TEXT, MAX_WINDOW},
    };
    use tokio::time::{advance, timeout};

    use super::*;
    use crate::herald::QUEUE;

    #[tokio::test]
    async fn the_middle_is_left_out_and_counted_where_it_was() {
        let outbox = Arc::new(Outbox::new(4 * BLOCK));
        let mut recorder = recorder(&outbox, Overflow::Drop, 2 * BLOCK);
        for number in 0..9u8 {
            recorder.ready().await;
            recorder.record(Stream::Stdout, block(number, MAX_PAYLOAD));
            recorder.record(Stream::Stderr, block(100 + number, 3));
        }
        recorder.finish(End::Exited(0), None);
        let records = records(&outbox);
        let all: Vec<_> = (0..9u8).flat_map(|at| [(Stream::Stdout, at), (Stream::Stderr, 100 + at)]).collect();
        let shown = |records: &[Record]| -> Vec<_> {
            records.iter().map(|record| (record.stream, record.payload[0])).collect()
        };
        let head = records.iter().position(|record| record.stream == Stream::Event).unwrap();
        assert_eq!(shown(&records[..head]), all[..head]);
        let tail = records.len() - head - 2;
        assert_eq!((shown(&records[head + 2..]), tail), (all[18 - tail..].to_vec(), 3));
        let missing = &all[head..18 - tail];
        let lost = |stream| missing.iter().filter(|(of, _)| *of == stream).count() as u64;
        let gap = |stream, bytes| Event::Gap(Gap { stream, bytes, cause: "spool-full".into() });
        let gaps = [
            gap(Stream::Stdout, lost(Stream::Stdout) * MAX_PAYLOAD as u64),
            gap(Stream::Stderr, 3 * lost(Stream::Stderr)),
        ];
        assert_eq!(
            records[head..head + 2].iter().filter_map(|record| Event::parse(&record.payload)).collect::<Vec<_>>(),
            gaps
        );
        let end = outbox.look(|sender| sender.finished().cloned()).unwrap();
        assert_eq!((end.next, end.counts.records()), (records.len() as u64, records.len() as u64));
        assert!(records.iter().enumerate().all(|(at, record)| record.seq == at as u64 && record.is_intact()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_blocked_command_goes_on_once_the_server_was_away_for_too_long() {
        for (on_offline, goes_on) in [(OnOffline::Continue, true), (OnOffline::Stop, false)] {
            let outbox = Arc::new(Outbox::new(BLOCK));
            let mut recorder = recorder(&outbox, Overflow::Block, BLOCK);
            recorder.policy.on_offline = on_offline;
            recorder.record(Stream::Stdout, block(0, MAX_PAYLOAD));
            assert!(timeout(LIMIT / 2, recorder.ready()).await.is_err());
            assert_eq!(timeout(LIMIT, recorder.ready()).await.is_ok(), goes_on, "{on_offline:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_dropped_while_a_spool_makes_room() {
        let outbox = Arc::new(Outbox::new(BLOCK));
        outbox.relieve(true);
        let mut recorder = recorder(&outbox, Overflow::Drop, BLOCK);
        recorder.record(Stream::Stdout, block(0, MAX_PAYLOAD));
        assert!(timeout(10 * LIMIT, recorder.ready()).await.is_err(), "however long it takes");
        outbox.relieve(false);
        timeout(LIMIT, recorder.ready()).await.unwrap();
        outbox.relieve(true);
        recorder.hurry();
        timeout(LIMIT, recorder.ready()).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_in_the_ring_is_recorded_as_soon_as_there_is_room() {
        let outbox = Arc::new(Outbox::new(BLOCK));
        let mut recorder = recorder(&outbox, Overflow::Drop, BLOCK);
        (0..3).for_each(|number| drop(recorder.record(Stream::Stdout, block(number, MAX_PAYLOAD))));
        advance(LIMIT).await;
        assert!(timeout(LIMIT, recorder.attend()).await.is_err());
        deliver(&outbox);
        recorder.attend().await;
        let rest: Vec<_> = records(&outbox).iter().map(|record| (record.seq, record.stream)).collect();
        assert_eq!(rest, [(1, Stream::Event), (2, Stream::Stdout)]);
    }

    #[tokio::test]
    async fn whatever_is_told_fits_a_record_and_no_secret_is_cut_in_two() {
        let outbox = Arc::new(Outbox::new(8 * BLOCK));
        let mut recorder = recorder(&outbox, Overflow::Block, BLOCK);
        recorder.redact(Redactor::new([b"hunter22".to_vec().into()]).unwrap().unwrap());
        let endless = format!("{}hunter22{}", "x".repeat(MAX_TEXT - 9), "\u{1}".repeat(100_000));
        recorder.herald().tell(Event::Cancelled(Cancelled { reason: endless.clone() }));
        recorder.attend().await;
        recorder.herald().tell(Event::Waiting(Waiting { r#for: vec![endless.clone(); 40] }));
        recorder.finish(End::NotStarted { code: 143, reason: endless }, None);
        let records = records(&outbox);
        assert_eq!(records.len(), 2);
        for record in records {
            assert!(!String::from_utf8_lossy(&record.payload).contains("hunte"));
            assert!(Event::parse(&record.payload).is_some());
        }
        let Some(End::NotStarted { reason, .. }) = outbox.look(|sender| sender.finished().cloned()).map(|end| end.end)
        else {
            panic!("it is another end now")
        };
        assert!((MAX_TEXT - 3..=MAX_TEXT).contains(&reason.len()) && !reason.contains("hunte"), "{reason}");
    }

    #[tokio::test(start_paused = true)]
    async fn facts_wait_for_room_and_those_that_cannot_wait_are_counted() {
        let outbox = Arc::new(Outbox::new(2 * BLOCK - 2 * RECORD_COST));
        let mut recorder = recorder(&outbox, Overflow::Block, BLOCK);
        recorder.record(Stream::Stdout, block(0, MAX_PAYLOAD));
        (0..QUEUE + 5).for_each(|at| recorder.herald().tell(ready(at)));
        assert!(timeout(LIMIT, recorder.attend()).await.is_err());
        assert_eq!(recorder.tally().next(), 1, "memory does not grow");
        deliver(&outbox);
        while recorder.tally().next() < 2 + QUEUE as u64 {
            timeout(LIMIT, recorder.attend()).await.expect("there is room");
        }
        let mut facts: Vec<_> = events(&outbox);
        let Some(Event::Error(Fault { reason, .. })) = facts.pop() else { panic!("it is not said: {facts:?}") };
        assert!(reason.starts_with("5 facts "), "{reason}");
        assert_eq!(facts, (0..QUEUE).map(ready).collect::<Vec<_>>());
        assert!(timeout(LIMIT, recorder.attend()).await.is_err(), "it is said once");
    }

    #[tokio::test]
    async fn the_end_waits_for_no_room_and_has_the_facts_before_it() {
        let outbox = Arc::new(Outbox::new(BLOCK));
        let mut recorder = recorder(&outbox, Overflow::Block, BLOCK);
        recorder.record(Stream::Stdout, block(0, MAX_PAYLOAD));
        (0..QUEUE + 1).for_each(|at| recorder.herald().tell(ready(at)));
        recorder.finish(End::Exited(0), None);
        let end = outbox.look(|sender| sender.finished().cloned()).unwrap();
        assert_eq!((end.next, events(&outbox).len()), (QUEUE as u64 + 2, QUEUE + 1));
        assert!(matches!(events(&outbox).last(), Some(Event::Error(_))));
    }

    fn ready(at: usize) -> Event {
        Event::Ready(Ready { by: at.to_string() })
    }

    fn events(outbox: &Outbox) -> Vec<Event> {
        records(outbox).iter().filter_map(|record| Event::parse(&record.payload)).collect()
    }

    const BLOCK: u64 = MAX_PAYLOAD as u64 + RECORD_COST;
    const LIMIT: Duration = Duration::from_secs(60);

    fn recorder(outbox: &Arc<Outbox>, overflow: Overflow, ring: u64) -> Recorder {
        let policy = Policy { overflow, offline_limit: Some(LIMIT), on_offline: OnOffline::Continue, ring };
        Recorder::new(Env::real(), outbox.clone(), policy)
    }

    fn block(first: u8, len: usize) -> BytesMut {
        with_headroom(&vec![first; len])
    }

    fn records(outbox: &Outbox) -> Vec<Record> {
        let sealed = outbox.look(|sender| sender.peek(sender.oldest(), usize::MAX));
        sealed.into_iter().map(|sealed| sealed.record).collect()
    }

    /// Plays a server that takes everything.
    fn deliver(outbox: &Outbox) {
        let welcome = Welcome {
            attempt: 1,
            next: 0,
            durable: Durable::Memory,
            window: MAX_WINDOW,
            heartbeat: 0,
            max_payload: 0,
            max_message: 0,
            cancel: None,
            server: String::new(),
            capabilities: Vec::new(),
        };
        outbox.with(|sender| {
            sender.handle_connected();
            sender.handle_frame(ServerFrame::Welcome(welcome)).unwrap();
            while sender.poll_transmit().is_some() {}
            sender.handle_frame(ServerFrame::Ack(Ack { next: sender.next(), window: MAX_WINDOW })).unwrap();
        });
    }
}
