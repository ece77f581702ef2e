//! One of the hook's own output streams, written by a thread so that a reader who stalls stops nothing else.

use std::{
    io::{self, ErrorKind},
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use phonehome_env::descriptor::write_all;
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

/// A stream that is written in order.
#[derive(Debug)]
pub(super) struct Outlet {
    blocks: mpsc::Sender<Bytes>,
    ended: oneshot::Receiver<io::Result<()>>,
    /// Bytes written so far, to all streams: tells a slow reader from none.
    written: Arc<AtomicU64>,
    /// A reader who takes nothing for this long is gone.
    stall: Option<Duration>,
}

/// Nobody reads this stream, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unread(pub(crate) String);

/// Blocks between printer and thread.
const QUEUE: usize = 4;

/// Bytes written at once: a reader who takes this much in the time of a stall still reads.
const PIECE: usize = 16 * 1024;

impl Outlet {
    pub(super) fn open(
        stream: BorrowedFd<'static>,
        written: Arc<AtomicU64>,
        stall: Option<Duration>,
    ) -> io::Result<Self> {
        let (blocks, mut queue) = mpsc::channel::<Bytes>(QUEUE);
        let (end, ended) = oneshot::channel();
        let count = written.clone();
        std::thread::Builder::new().name("outlet".into()).spawn(move || {
            let mut write = |block: Bytes| {
                block.chunks(PIECE).try_for_each(|piece| {
                    write_all(stream, piece)?;
                    count.fetch_add(piece.len() as u64, Ordering::Relaxed);
                    Ok(())
                })
            };
            let result = std::iter::from_fn(|| queue.blocking_recv()).try_for_each(&mut write);
            drop(end.send(result)); // the printer may be gone
        })?;
        Ok(Self { blocks, ended, written, stall })
    }

    /// Queues a block as soon as there is room, or finds out that nobody reads.
    pub(super) async fn write(&mut self, block: Bytes) -> Result<(), Unread> {
        if block.is_empty() {
            return Ok(());
        }
        match watch(&self.written, self.stall, self.blocks.send(block)).await? {
            Ok(()) => Ok(()),
            Err(_) => Err(self.broken().await),
        }
    }

    async fn broken(&mut self) -> Unread {
        match (&mut self.ended).await {
            Ok(Err(error)) if error.kind() == ErrorKind::BrokenPipe => Unread("the pusher is gone".into()),
            Ok(Err(error)) => Unread(format!("the output cannot be written: {error}")),
            Ok(Ok(())) | Err(_) => Unread("the output was closed".into()),
        }
    }

    /// Waits until everything is written.
    pub(super) async fn finish(mut self) -> Result<(), Unread> {
        drop(self.blocks);
        match watch(&self.written, self.stall, &mut self.ended).await? {
            Ok(Err(error)) => Err(Unread(format!("the output cannot be written: {error}"))),
            Ok(Ok(())) | Err(_) => Ok(()),
        }
    }
}

/// Waits for `work` as long as anything is being written.
async fn watch<T>(written: &AtomicU64, stall: Option<Duration>, work: impl Future<Output = T>) -> Result<T, Unread> {
    let Some(stall) = stall else { return Ok(work.await) };
    let mut work = std::pin::pin!(work);
    loop {
        let before = written.load(Ordering::Relaxed);
        match timeout(stall, &mut work).await {
            Ok(result) => return Ok(result),
            Err(_) if written.load(Ordering::Relaxed) == before => {
                return Err(Unread(format!("nobody has read the output for {} s", stall.as_secs())));
            }
            Err(_) => {}
        }
    }
}

/// Whether a stream is a pipe or a socket: what lies between a hook and git.
pub(super) fn is_pipe(stream: BorrowedFd<'_>) -> bool {
    rustix::fs::fstat(stream.as_fd()).is_ok_and(|stat| {
        let kind = rustix::fs::FileType::from_raw_mode(stat.st_mode);
        matches!(kind, rustix::fs::FileType::Fifo | rustix::fs::FileType::Socket)
    })
}
