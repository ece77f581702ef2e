//! What lies between capture and uplink: records the server has not confirmed, in memory, up to a limit.
//!
//! When the limit is reached the capture waits, the pipe fills and the command waits: nothing is lost. When the server
//! will never take this build's records, the outbox is abandoned: it stays empty and holds nobody up.

use std::{
    pin::pin,
    sync::{Mutex, MutexGuard, PoisonError},
};

use phonehome_proto::{codec::binary::Sealed, frame::Finished, limits::MAX_PAYLOAD, sender::Sender};
use tokio::sync::Notify;

/// The sender, shared between the task that fills it and the one that empties it.
#[derive(Debug)]
pub(crate) struct Outbox {
    state: Mutex<State>,
    limit: u64,
    filled: Notify,
    freed: Notify,
}

#[derive(Debug, Default)]
struct State {
    sender: Sender,
    abandoned: bool,
}

impl Outbox {
    pub(crate) fn new(limit: u64) -> Self {
        Self { state: Mutex::default(), limit, filled: Notify::new(), freed: Notify::new() }
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

    fn has_room(&self) -> bool {
        let state = self.lock();
        state.abandoned || state.sender.cost() + MAX_PAYLOAD as u64 <= self.limit
    }

    /// Holds a record for the uplink.
    pub(crate) fn push(&self, sealed: Sealed) {
        let mut state = self.lock();
        if !state.abandoned {
            state.sender.push(sealed);
            self.filled.notify_one();
        }
    }

    /// Adds the end of the log.
    pub(crate) fn finish(&self, finished: Finished) {
        let mut state = self.lock();
        if !state.abandoned {
            state.sender.finish(finished);
            self.filled.notify_one();
        }
    }

    /// Waits until something was pushed since the last call.
    pub(crate) async fn filled(&self) {
        self.filled.notified().await;
    }

    /// Lets the uplink work with the sender, and the capture go on if that made room.
    pub(crate) fn with<T>(&self, work: impl FnOnce(&mut Sender) -> T) -> T {
        let mut state = self.lock();
        let before = state.sender.cost();
        let result = work(&mut state.sender);
        if state.sender.cost() < before {
            self.freed.notify_one();
        }
        result
    }

    /// Drops everything and holds nothing from here on: nobody will take it.
    pub(crate) fn abandon(&self) {
        *self.lock() = State { sender: Sender::default(), abandoned: true };
        self.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use phonehome_proto::{
        codec::binary::{HEADROOM, seal},
        frame::Stream,
    };

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_full_outbox_holds_the_capture_until_it_is_abandoned() {
        let outbox = Outbox::new(2 * MAX_PAYLOAD as u64);
        outbox.push(seal(BytesMut::zeroed(HEADROOM + MAX_PAYLOAD), 0, 0, Stream::Stdout, 0));
        let waiting = tokio::time::timeout(std::time::Duration::from_secs(60), outbox.room());
        assert!(waiting.await.is_err());
        outbox.abandon();
        outbox.room().await;
        outbox.push(seal(BytesMut::zeroed(HEADROOM + 1), 7, 0, Stream::Stdout, 0));
        assert_eq!(outbox.with(|sender| sender.cost()), 0);
    }
}
