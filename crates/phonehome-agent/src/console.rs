//! The agent's own standard output and standard error: the command's bytes, copied, and the agent's lines between them.

use std::{
    io,
    os::fd::BorrowedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use phonehome_env::descriptor::write_all;
use phonehome_proto::frame::Stream;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};
use tracing::warn;

use crate::command;

/// Both standard streams. A line of the agent's own waits until the command has finished the line it is writing; when
/// the command writes to the streams itself nobody sees its lines, and the agent's wait for its end.
#[derive(Debug, Clone, Default)]
pub struct Console(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// Whether the command is within a line on standard output, standard error.
    within_line: [bool; 2],
    /// Whether a block of the command's is being written there, which may take for ever.
    copying: [bool; 2],
    /// Own lines that wait for the end of the command's, or for somebody to read standard error.
    waiting: Vec<u8>,
    /// Whether the command has the streams to itself.
    lent: bool,
    /// Whether own lines may stand behind a line that the command has not finished.
    unfinished: bool,
    /// Set once a stream failed: nobody reads it any more.
    broken: [bool; 2],
}

/// Own lines kept back at most, bytes. Beyond it they no longer wait for the end of the command's line; what standard
/// error then does not take is dropped.
const MAX_WAITING: usize = 16 * 1024;

/// Own lines written at once, bytes: a pipe that is writable takes that many without blocking (pipe(7), `PIPE_BUF`).
const MAX_WRITE: usize = 4096;

/// Blocks on their way to the console's thread.
const QUEUE: usize = 16;

/// How long a copy may go without a block written before it is given up, once the command has ended.
pub(crate) const STALLED: Duration = Duration::from_secs(30);

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
            state.copying[at] = true;
        }
        let written =
            if at == 0 { write_all(rustix::stdio::stdout(), block) } else { write_all(rustix::stdio::stderr(), block) };
        let mut state = self.lock();
        state.copying[at] = false;
        state.broken[at] = written.is_err(); // a closed console never harms the build; the log goes on to the server
        if let Some(last) = block.last() {
            state.within_line[at] = *last != b'\n';
        }
        state.flush_waiting();
    }

    /// Writes a line of the agent's own as soon as the command is within none. It never blocks.
    pub fn own_line(&self, line: &str) {
        self.lock().own_line(line.as_bytes());
    }

    /// Leaves the streams to the command, whose bytes then go there unseen: own lines wait.
    pub fn lend(&self) {
        self.lock().lent = true;
    }

    /// Ends [`Self::lend`]. Whether the command has finished its last line is not known, so that own lines begin below
    /// it: at worst there is an empty line between.
    pub fn take_back(&self) {
        let mut state = self.lock();
        if std::mem::take(&mut state.lent) {
            state.unfinished = true;
            state.flush_waiting();
        }
    }

    /// Writes the lines that still wait, below whatever the command left unfinished, as far as that is possible at once.
    pub fn finish(&self) {
        self.take_back();
        let mut state = self.lock();
        state.leave_line();
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
        let (written, progress) = watch::channel(());
        std::thread::Builder::new().name("console".into()).spawn(move || {
            command::block_again();
            while let Some((stream, block)) = queue.blocking_recv() {
                console.copy(stream, &block);
                written.send_replace(());
            }
        })?;
        command::block_again();
        Ok(Copier { blocks, progress })
    }
}

impl State {
    fn own_line(&mut self, line: &[u8]) {
        if !self.has_room_for(line) && !self.lent {
            self.leave_line();
            self.flush_waiting();
        }
        if self.has_room_for(line) {
            self.waiting.extend_from_slice(line);
        }
        self.flush_waiting();
    }

    fn has_room_for(&self, line: &[u8]) -> bool {
        self.waiting.len() + line.len() <= MAX_WAITING
    }

    /// Waits for the end of the command's line no longer.
    fn leave_line(&mut self) {
        self.unfinished |= self.within_line != [false; 2];
        self.within_line = self.copying;
    }

    /// Writes own lines as far as nobody has to be waited for: this is called where everything else would wait too.
    fn flush_waiting(&mut self) {
        if self.may_flush() && std::mem::take(&mut self.unfinished) {
            self.waiting.insert(0, b'\n');
        }
        while self.may_flush() && is_writable(rustix::stdio::stderr()) {
            let lines = whole_lines(&self.waiting);
            match rustix::io::write(rustix::stdio::stderr(), lines) {
                Ok(count) => drop(self.waiting.drain(..count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => self.broken[1] = true,
            }
        }
        if self.broken[1] {
            self.waiting.clear();
        }
    }

    fn may_flush(&self) -> bool {
        !self.waiting.is_empty() && !self.lent && self.within_line == [false; 2] && !self.copying[1] && !self.broken[1]
    }
}

/// The lines at the start of `text` that [`MAX_WRITE`] has room for, or a part of a longer one.
fn whole_lines(text: &[u8]) -> &[u8] {
    let most = &text[..text.len().min(MAX_WRITE)];
    most.iter().rposition(|byte| *byte == b'\n').map_or(most, |end| &most[..=end])
}

/// Whether something can be written now, if only to learn that it fails.
fn is_writable(stream: BorrowedFd<'_>) -> bool {
    poll(&mut [PollFd::from_borrowed_fd(stream, PollFlags::OUT)], Some(&Timespec::default()))
        .is_ok_and(|ready| ready > 0)
}

/// Hands blocks to the thread that writes them.
#[derive(Debug)]
pub struct Copier {
    blocks: mpsc::Sender<(Stream, Bytes)>,
    /// Changes with each block written; its sender is gone when the last one is.
    progress: watch::Receiver<()>,
}

impl Copier {
    /// Queues a block; waits while the reader of the stream is slow.
    pub async fn copy(&self, stream: Stream, block: Bytes) {
        drop(self.blocks.send((stream, block)).await); // the thread ends only after this sender is gone
    }

    /// Waits until everything is written, or until nothing has been for too long.
    pub async fn finish(mut self) {
        drop(self.blocks);
        loop {
            match timeout(STALLED, self.progress.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return,
                Err(_) => return warn!("nobody reads the copy of the command's output; it is cut off"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_lines_wait_while_the_streams_are_lent() {
        let console = Console::default();
        console.lend();
        console.own_line("one\n");
        console.own_line("two\n");
        assert_eq!(console.lock().waiting, b"one\ntwo\n");
    }

    #[test]
    fn what_waits_is_bounded() {
        let mut state = State { lent: true, ..State::default() };
        for _ in 0..MAX_WAITING {
            state.own_line(b"a line that waits\n");
        }
        assert!(state.waiting.len() <= MAX_WAITING && state.waiting.ends_with(b"waits\n"));
    }
}
