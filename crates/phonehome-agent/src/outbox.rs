//! What lies between capture and uplink: records the server has not confirmed, in memory, up to a limit.
//!
//! When the limit is reached a [`crate::spool`] may move some to disk; otherwise there is no room, and what then becomes
//! of the command's output is one choice, made in [`crate::recorder`]. When the server will never take this build's
//! records, the outbox is abandoned: it stays empty and holds nobody up.

use std::{
    pin::pin,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use phonehome_proto::{
    codec::binary::Sealed,
    frame::Finished,
    limits::{MAX_PAYLOAD, MIN_WINDOW, WINDOW},
    sender::Sender,
};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep_until, timeout},
};

/// The sender, shared between the task that fills it and those that empty it.
#[derive(Debug)]
pub(crate) struct Outbox {
    state: Mutex<State>,
    limit: u64,
    filled: Notify,
    freed: Notify,
    /// For the spool: something has changed.
    stirred: Notify,
    /// For the spool: there is no time to lose.
    pressed: Notify,
    /// Since when records wait, or the server is away, without anything getting better.
    trouble: watch::Sender<Option<Instant>>,
    /// Whether a spool makes room.
    relief: watch::Sender<bool>,
}

/// What a server that keeps up needs to be sent without a pause, bytes: what is on its way, and as much again as is gathered
/// meanwhile. It keeps the agent small in memory beside a command that writes as fast as it can. Where confirmations take
/// longer, because the server is far away, it doubles until they come in time.
const READ_AHEAD: u64 = WINDOW + WINDOW / 2;

/// How long the next read waits for a confirmation at most. They come every few milliseconds while output flows.
const PACE: Duration = Duration::from_millis(10);

/// How long nothing may get better until there is no point in that: a first connection takes less.
const STUCK: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct State {
    sender: Sender,
    /// What had been forgotten at the last look, and whether the server was there.
    seen: (u64, bool),
    abandoned: bool,
    /// What the last hello said does not hold any more.
    is_stale: bool,
    /// What may be held before a confirmation is waited for, bytes; at least [`READ_AHEAD`].
    read_ahead: u64,
}

impl Outbox {
    pub(crate) fn new(limit: u64) -> Self {
        Self::holding(Sender::default(), limit)
    }

    /// Goes on with what an earlier life left.
    pub(crate) fn holding(mut sender: Sender, limit: u64) -> Self {
        sender.limit_window(keep(limit));
        Self {
            state: Mutex::new(State { sender, ..State::default() }),
            limit,
            filled: Notify::new(),
            freed: Notify::new(),
            stirred: Notify::new(),
            pressed: Notify::new(),
            trouble: watch::Sender::new(Some(Instant::now())),
            relief: watch::Sender::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until one more full record fits.
    pub(crate) async fn room(&self) {
        loop {
            let mut freed = pin!(self.freed.notified());
            freed.as_mut().enable();
            if self.has_room() {
                return;
            }
            freed.await;
        }
    }

    pub(crate) fn has_room(&self) -> bool {
        let state = self.lock();
        state.abandoned || state.sender.cost() + MAX_PAYLOAD as u64 <= self.limit
    }

    /// Gives the server a moment to confirm what it has, before more is held than it needs at once: the rest may as well
    /// wait in the pipe. One that is slow or away holds nobody up, that is what the memory is for.
    pub(crate) async fn keep_pace(&self) {
        let confirmed = async {
            while self.is_ahead() {
                self.freed.notified().await;
            }
        };
        if timeout(PACE, confirmed).await.is_err() {
            let mut state = self.lock();
            state.read_ahead = state.read_ahead.max(READ_AHEAD).saturating_mul(2).min(self.limit);
        }
    }

    fn is_ahead(&self) -> bool {
        let mut state = self.lock();
        let held = state.sender.cost();
        if held <= READ_AHEAD {
            state.read_ahead = 0; // they come in time again
        }
        let is_ahead = held > state.read_ahead.max(READ_AHEAD);
        drop(state); // the next line takes it, too
        is_ahead && !self.is_offline(STUCK)
    }

    /// Holds a record for the uplink.
    pub(crate) fn push(&self, sealed: Sealed) {
        self.change(|state| {
            if !state.abandoned {
                state.sender.push(sealed);
            }
        });
        self.filled.notify_one();
    }

    /// Adds the end of the log.
    pub(crate) fn finish(&self, finished: Finished) {
        self.change(|state| {
            if !state.abandoned {
                state.sender.finish(finished);
            }
        });
        self.filled.notify_one();
    }

    /// Waits until something was pushed, or came back from the spool, since the last call.
    pub(crate) async fn filled(&self) {
        self.filled.notified().await;
    }

    /// Waits until something has changed since the last call.
    pub(crate) async fn stirred(&self) {
        self.stirred.notified().await;
    }

    /// Waits until the spool is needed at once.
    pub(crate) async fn pressed(&self) {
        self.pressed.notified().await;
    }

    /// Makes the spool look at once.
    pub(crate) fn press(&self) {
        self.pressed.notify_one();
    }

    /// Lets the uplink work with the sender, and the capture go on if that made room.
    pub(crate) fn with<T>(&self, work: impl FnOnce(&mut Sender) -> T) -> T {
        self.change(|state| work(&mut state.sender))
    }

    /// Lets anybody look at the sender.
    pub(crate) fn look<T>(&self, look: impl FnOnce(&Sender) -> T) -> T {
        look(&self.lock().sender)
    }

    /// Drops from memory what is on disk as well, when memory is scarce.
    pub(crate) fn spill(&self, kept: u64) {
        let mut state = self.lock();
        let before = state.sender.cost();
        if self.is_tight(before) {
            state.sender.spill(kept, self.keep());
        }
        let freed = state.sender.cost() < before;
        drop(state);
        if freed {
            self.freed.notify_one();
        }
    }

    /// Gives up on spilled records, if everything before them is delivered. The server hears of it in the next hello.
    pub(crate) fn lose(&self, next: u64) -> bool {
        let lost = self.change(|state| {
            let lost = state.sender.lose(next);
            state.is_stale |= lost;
            lost
        });
        if lost {
            self.filled.notify_one();
        }
        lost
    }

    /// Whether the connection has to be made anew, once.
    pub(crate) fn take_stale(&self) -> bool {
        std::mem::take(&mut self.lock().is_stale)
    }

    /// Takes back what the spool has read, for the uplink.
    pub(crate) fn restore(&self, records: Vec<Sealed>) {
        self.with(|sender| records.into_iter().for_each(|sealed| sender.restore(sealed)));
        self.filled.notify_one();
    }

    fn change<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let before = state.sender.cost();
        let result = work(&mut state);
        let cost = state.sender.cost();
        self.note(&mut state);
        let pressed = self.is_tight(cost) || state.sender.spilled().is_some();
        drop(state);
        if cost < before {
            self.freed.notify_one();
        }
        self.stirred.notify_one();
        if pressed {
            self.pressed.notify_one();
        }
        result
    }

    /// What is left of the memory at this cost, bytes.
    pub(crate) fn rest(&self, cost: u64) -> u64 {
        self.limit.saturating_sub(cost)
    }

    /// Whether memory is getting scarce.
    pub(crate) fn is_tight(&self, cost: u64) -> bool {
        cost > self.limit - self.limit / 4
    }

    /// Cost of the oldest records that stay in memory in any case: what is in flight.
    pub(crate) fn keep(&self) -> u64 {
        keep(self.limit)
    }

    /// Keeps the time since when nothing gets better: something is not delivered, or the server is away.
    fn note(&self, state: &mut State) {
        let (sender, here) = (&state.sender, state.sender.is_welcomed());
        let better = sender.oldest() > state.seen.0 || here && !state.seen.1;
        let well = state.abandoned || sender.is_done() || here && sender.oldest() == sender.next();
        state.seen = (sender.oldest(), here);
        self.trouble.send_if_modified(|trouble| {
            let now = match (well, *trouble) {
                (true, _) => None,
                (false, Some(since)) if !better => Some(since),
                (false, _) => Some(Instant::now()),
            };
            std::mem::replace(trouble, now) != now
        });
    }

    /// Something has got better of which the sender does not know.
    pub(crate) fn encourage(&self) {
        self.trouble.send_if_modified(|trouble| {
            *trouble = trouble.map(|_| Instant::now());
            trouble.is_some()
        });
    }

    /// Says whether a full memory is going to have room again without the server.
    pub(crate) fn relieve(&self, relief: bool) {
        self.relief.send_if_modified(|known| std::mem::replace(known, relief) != relief);
    }

    pub(crate) fn is_relieved(&self) -> bool {
        *self.relief.borrow()
    }

    /// Waits until only the server can make room.
    pub(crate) async fn unrelieved(&self) {
        drop(self.relief.subscribe().wait_for(|relief| !relief).await); // the sender is held here: it is no error
    }

    /// Whether it has been so for this long.
    pub(crate) fn is_offline(&self, limit: Duration) -> bool {
        self.trouble.borrow().is_some_and(|since| since.elapsed() >= limit)
    }

    /// Waits until it has.
    pub(crate) async fn offline(&self, limit: Duration) {
        let mut trouble = self.trouble.subscribe();
        loop {
            let since = *trouble.borrow_and_update();
            tokio::select! {
                biased; // what has changed may have moved the deadline
                _ = trouble.changed() => {}
                () = expiry(since.map(|since| since + limit)) => return,
            }
        }
    }

    /// Drops everything and holds nothing from here on: nobody will take it.
    pub(crate) fn abandon(&self) {
        self.change(|state| *state = State { abandoned: true, ..State::default() });
        self.press();
    }

    pub(crate) fn is_abandoned(&self) -> bool {
        self.lock().abandoned
    }
}

/// Half of the memory is for what is in flight or about to be, the rest for what is on its way to the disk.
fn keep(limit: u64) -> u64 {
    (limit / 2).max(MIN_WINDOW)
}

/// Pending for ever without a deadline.
pub(crate) async fn expiry(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use phonehome_proto::{
        codec::binary::{HEADROOM, seal},
        frame::{Ack, Durable, ServerFrame, Stream, Welcome},
    };

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_full_outbox_has_no_room_until_it_is_abandoned() {
        let outbox = Outbox::new(2 * MAX_PAYLOAD as u64);
        outbox.push(seal(BytesMut::zeroed(HEADROOM + MAX_PAYLOAD), 0, 0, Stream::Stdout, 0));
        assert!(timeout(Duration::from_secs(60), outbox.room()).await.is_err());
        outbox.abandon();
        outbox.room().await;
        outbox.push(seal(BytesMut::zeroed(HEADROOM + 1), 7, 0, Stream::Stdout, 0));
        assert_eq!(outbox.with(|sender| sender.cost()), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_offline_when_nothing_gets_better_for_too_long() {
        let (limit, almost) = (Duration::from_secs(60), Duration::from_secs(59));
        let outbox = Outbox::new(1 << 20);
        tokio::time::advance(almost).await;
        assert!(!outbox.is_offline(limit), "nobody has answered yet");
        welcome(&outbox);
        tokio::time::advance(10 * limit).await;
        assert!(!outbox.is_offline(limit), "there is nothing to deliver");
        (0..2).for_each(|seq| outbox.push(seal(BytesMut::zeroed(HEADROOM + 1), seq, 0, Stream::Stdout, seq)));
        outbox.with(|sender| while sender.poll_transmit().is_some() {});
        tokio::time::advance(almost).await;
        outbox.with(|sender| sender.handle_frame(ServerFrame::Ack(Ack { next: 1, window: WINDOW }))).unwrap();
        tokio::time::advance(almost).await;
        assert!(!outbox.is_offline(limit), "one was acknowledged");
        outbox.offline(limit).await;
        assert!(outbox.is_offline(limit), "the other was not");
        outbox.with(Sender::handle_disconnected);
        welcome(&outbox);
        assert!(!outbox.is_offline(limit), "the server is back");
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_answers_is_given_a_moment_to_confirm() {
        let outbox = Outbox::new(8 << 20);
        let full = |seq| seal(BytesMut::zeroed(HEADROOM + MAX_PAYLOAD), seq, 0, Stream::Stdout, seq);
        let records = READ_AHEAD / MAX_PAYLOAD as u64 + 1;
        (0..records).for_each(|seq| outbox.push(full(seq)));
        let forget = || outbox.lock().read_ahead = 0;
        let paced = async |outbox: &Outbox| {
            let start = Instant::now();
            outbox.keep_pace().await;
            start.elapsed()
        };
        assert!(paced(&outbox).await >= PACE, "the first connection is on its way");
        forget();
        tokio::time::advance(STUCK).await;
        assert_eq!(paced(&outbox).await, Duration::ZERO, "nobody answers: the memory is for that");
        welcome(&outbox);
        assert!(paced(&outbox).await >= PACE, "it is slow");
        assert_eq!(paced(&outbox).await, Duration::ZERO, "and gets twice as much");
        forget();
        outbox.with(|sender| while sender.poll_transmit().is_some() {});
        let ack = ServerFrame::Ack(Ack { next: 2, window: WINDOW });
        let confirmed = async { outbox.with(|sender| sender.handle_frame(ack)).map(drop) };
        let (waited, confirmed) = tokio::join!(paced(&outbox), confirmed);
        assert!(confirmed.is_ok() && waited < PACE, "{waited:?}");
    }

    fn welcome(outbox: &Outbox) {
        let welcome = Welcome {
            attempt: 1,
            next: outbox.with(|sender| sender.oldest()),
            durable: Durable::Memory,
            window: WINDOW,
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
        });
    }
}
