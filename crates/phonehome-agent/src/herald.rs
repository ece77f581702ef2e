//! Facts about the build on their way into its log.
//!
//! Whatever part of the agent learns something tells it here, with the time at which it happened; the [`Recorder`]
//! gives it a number as soon as it comes by and there is room. Telling never waits: what finds the queue full is left out
//! and counted.
//!
//! [`Recorder`]: crate::recorder::Recorder

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use phonehome_env::Nature;
use phonehome_proto::{
    event::{Event, Fault},
    frame::UnixMicros,
};
use tokio::sync::mpsc::{self, error::TrySendError};
use tracing::warn;

use crate::log;

/// Tells. Its clones tell the same recorder.
#[derive(Debug, Clone)]
pub(crate) struct Herald {
    nature: Arc<dyn Nature>,
    news: mpsc::Sender<News>,
    /// Facts that found the queue full since [`Self::take_left_out`].
    left_out: Arc<AtomicU64>,
}

/// Something that happened.
#[derive(Debug)]
pub(crate) struct News {
    pub(crate) time: UnixMicros,
    pub(crate) event: Event,
}

/// Facts that wait for the recorder at most. They are few: each is a change in the life of one command.
pub(crate) const QUEUE: usize = 256;

/// Bytes of the own log that go with a fault: what led to it, and far below the size of a record.
const TRACE: usize = 8 * 1024;

impl Herald {
    /// A herald, and what it tells.
    pub(crate) fn new(nature: Arc<dyn Nature>) -> (Self, mpsc::Receiver<News>) {
        let (news, told) = mpsc::channel(QUEUE);
        (Self { nature, news, left_out: Arc::default() }, told)
    }

    /// Tells of something that failed on this side, and what led to it.
    pub(crate) fn fault(&self, reason: String) {
        self.tell(Event::Error(Fault { reason, trace: log::recent(TRACE) }));
    }

    /// Tells what has just happened.
    pub(crate) fn tell(&self, event: Event) {
        match self.news.try_send(News { time: self.nature.now(), event }) {
            Ok(()) | Err(TrySendError::Closed(_)) => {} // closed: the log has ended, or there is none
            Err(TrySendError::Full(news)) => {
                if self.left_out.fetch_add(1, Ordering::Relaxed) == 0 {
                    warn!(event = ?news.event, "facts about the build are left out of its log, first this one");
                }
            }
        }
    }

    /// How many facts were left out since the last call.
    pub(crate) fn take_left_out(&self) -> u64 {
        self.left_out.swap(0, Ordering::Relaxed)
    }
}
