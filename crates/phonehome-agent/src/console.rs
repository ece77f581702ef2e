//! The agent's own standard output and standard error: the command's bytes, copied, and the agent's lines between them.

use std::{
    io::{self, Write},
    os::fd::BorrowedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use phonehome_proto::frame::Stream;
use rustix::{
    event::{PollFd, PollFlags},
    io::Errno,
};
use tokio::sync::mpsc;

/// Both standard streams. A line of the agent's own waits until the command has finished the line it is writing.
#[derive(Debug, Clone, Default)]
pub struct Console(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// Whether the command is within a line on standard output, standard error.
    within_line: [bool; 2],
    /// Own lines that wait for its end.
    waiting: Vec<u8>,
    /// Set once a stream failed: nobody reads it any more.
    broken: [bool; 2],
}

/// Own lines kept back at most, bytes; beyond it they are written where they are.
const MAX_WAITING: usize = 16 * 1024;

/// Blocks on their way to the console's thread.
const QUEUE: usize = 16;

impl Console {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a block of the command's output. Blocks as long as the reader of the stream does.
    fn copy(&self, stream: Stream, block: &[u8]) {
        let at = usize::from(stream.number()).min(1);
        {
            let mut state = self.lock();
            if state.broken[at] {
                return;
            }
            state.within_line[at] = true; // own lines stay out while the block is being written, however long it takes
        }
        let written =
            if at == 0 { write_all(rustix::stdio::stdout(), block) } else { write_all(rustix::stdio::stderr(), block) };
        let mut state = self.lock();
        state.broken[at] = written.is_err(); // a closed console never harms the build; the log goes on to the server
        if let Some(last) = block.last() {
            state.within_line[at] = *last != b'\n';
        }
        state.flush_waiting();
    }

    /// A writer for lines of the agent's own.
    #[must_use]
    pub fn own_lines(&self) -> OwnLines {
        OwnLines(self.clone())
    }

    /// Writes the lines that still wait, below whatever the command left unfinished.
    pub fn finish(&self) {
        let mut state = self.lock();
        if state.waiting.is_empty() {
            return;
        }
        state.waiting.insert(0, b'\n');
        state.within_line = [false; 2];
        state.flush_waiting();
    }

    /// Starts a thread that copies blocks, so that a stalled reader never stalls the agent itself.
    ///
    /// # Errors
    ///
    /// When the system has no thread left.
    pub fn spawn_copier(&self) -> io::Result<Copier> {
        let (blocks, mut queue) = mpsc::channel::<(Stream, Bytes)>(QUEUE);
        let console = self.clone();
        let (done, finished) = tokio::sync::oneshot::channel();
        std::thread::Builder::new().name("console".into()).spawn(move || {
            while let Some((stream, block)) = queue.blocking_recv() {
                console.copy(stream, &block);
            }
            drop(done);
        })?;
        Ok(Copier { blocks, finished })
    }
}

/// Writes all of `block`, also to a descriptor that somebody else made non-blocking.
fn write_all(stream: BorrowedFd<'_>, mut block: &[u8]) -> io::Result<()> {
    while !block.is_empty() {
        match rustix::io::write(stream, block) {
            Ok(count) => block = &block[count..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                rustix::event::poll(&mut [PollFd::from_borrowed_fd(stream, PollFlags::OUT)], None)?;
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

impl State {
    fn flush_waiting(&mut self) {
        if self.within_line != [false; 2] || self.waiting.is_empty() {
            return;
        }
        self.broken[1] |= write_all(rustix::stdio::stderr(), &self.waiting).is_err();
        self.waiting.clear();
    }
}

/// Hands blocks to the thread that writes them.
#[derive(Debug)]
pub struct Copier {
    blocks: mpsc::Sender<(Stream, Bytes)>,
    finished: tokio::sync::oneshot::Receiver<()>,
}

impl Copier {
    /// Queues a block; waits while the reader of the stream is slow.
    pub async fn copy(&self, stream: Stream, block: Bytes) {
        drop(self.blocks.send((stream, block)).await); // the thread ends only after this sender is gone
    }

    /// Waits until everything is written.
    pub async fn finish(self) {
        drop(self.blocks);
        drop(self.finished.await); // it is never sent, only dropped
    }
}

/// Where the log writes: whole lines, when none of the command's is open.
#[derive(Debug)]
pub struct OwnLines(Console);

impl Write for OwnLines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut state = self.0.lock();
        state.waiting.extend_from_slice(line);
        if state.waiting.len() > MAX_WAITING {
            state.within_line = [false; 2];
        }
        state.flush_waiting();
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
