//! From the command's pipes to numbered records.
//!
//! A block is read into a buffer that becomes record, message and tee source at once. What was read goes out at once;
//! when blocks come in quick succession the next read waits a moment, so that line-sized writes gather in the pipe
//! instead of costing a message each. A lone line never waits.

use std::{
    io,
    os::fd::AsFd,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::{BufMut, BytesMut};
use phonehome_proto::{
    codec::binary::{HEADROOM, seal},
    frame::{End, Finished, Stream, UnixMicros},
    limits::MAX_PAYLOAD,
    tally::Tally,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::{
    net::unix::pipe::Receiver,
    sync::{oneshot, watch},
    time::Instant,
};
use tracing::warn;

use crate::{console::Copier, outbox::Outbox};

/// Reads both pipes to their ends.
pub(crate) struct Capture {
    pub(crate) stdout: Option<Receiver>,
    pub(crate) stderr: Option<Receiver>,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) copier: Option<Copier>,
    /// When output was last seen, for heartbeats.
    pub(crate) last_output: watch::Sender<Instant>,
}

/// What has been read, for FINISHED.
#[derive(Debug, Default)]
pub(crate) struct Captured {
    pub(crate) tally: Tally,
    pub(crate) copier: Option<Copier>,
}

/// Blocks closer together than this are a burst.
const BURST: Duration = Duration::from_micros(500);

/// How long the next read waits within a burst. The pipe's 1 MiB hold what is written meanwhile.
const PAUSE: Duration = Duration::from_millis(1);

/// Smallest read worth a system call when a buffer is nearly used up, bytes.
const MIN_READ: usize = 4 * 1024;

impl Capture {
    /// Runs until both pipes are at their ends, or until `stop` says that nobody is left who should write to them; then
    /// what is already in the pipes is still read.
    pub(crate) async fn run(mut self, mut stop: oneshot::Receiver<()>) -> Captured {
        let mut tally = Tally::default();
        let mut buffer = BytesMut::new();
        let mut stopped = false;
        while self.stdout.is_some() || self.stderr.is_some() {
            self.outbox.room().await;
            let stream = tokio::select! {
                biased;
                stream = self.readable() => stream,
                _ = &mut stop, if !stopped => { stopped = true; continue }
                () = std::future::ready(()), if stopped && !self.holds_bytes() => break,
            };
            let Some(full) = self.read(stream, &mut buffer, &mut tally).await else { continue };
            let now = Instant::now();
            let burst = now.duration_since(self.last_output.send_replace(now)) < BURST;
            if burst && !full {
                tokio::time::sleep(PAUSE).await;
            }
        }
        Captured { tally, copier: self.copier }
    }

    /// Whether a pipe has something to read at this moment, asked of the system: the runtime may not know yet.
    fn holds_bytes(&self) -> bool {
        [&self.stdout, &self.stderr].into_iter().flatten().any(|pipe| {
            let mut polled = [PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN)];
            poll(&mut polled, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
        })
    }

    /// Waits for a pipe with something to read, or at its end.
    async fn readable(&mut self) -> Stream {
        tokio::select! {
            () = readable(self.stdout.as_ref()) => Stream::Stdout,
            () = readable(self.stderr.as_ref()) => Stream::Stderr,
        }
    }

    /// Reads one block and passes it on. Says whether as much came as there was room for; `None` when nothing came.
    async fn read(&mut self, stream: Stream, buffer: &mut BytesMut, tally: &mut Tally) -> Option<bool> {
        let pipe = if stream == Stream::Stdout { &mut self.stdout } else { &mut self.stderr };
        let room = prepare(buffer);
        match pipe.as_ref()?.try_read_buf(&mut (&mut *buffer).limit(room)) {
            Ok(0) => *pipe = None,
            Ok(count) => {
                self.pass_on(stream, buffer.split(), tally).await;
                return Some(count == room);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                warn!(?stream, "reading the command's output failed: {error}");
                *pipe = None;
            }
        }
        None
    }

    async fn pass_on(&mut self, stream: Stream, block: BytesMut, tally: &mut Tally) {
        let sealed = seal(block, tally.next(), now_micros(), stream, tally.offset(stream));
        tally.add(&sealed.record);
        let payload = self.copier.is_some().then(|| sealed.record.payload.clone());
        self.outbox.push(sealed);
        if let (Some(copier), Some(payload)) = (&self.copier, payload) {
            copier.copy(stream, payload).await;
        }
    }
}

/// Never completes without a pipe.
async fn readable(pipe: Option<&Receiver>) {
    match pipe {
        Some(pipe) => drop(pipe.readable().await), // an error shows again in the read that follows
        None => std::future::pending().await,
    }
}

/// Leaves headroom in a buffer with space behind it, and says how much may be read into that space.
fn prepare(buffer: &mut BytesMut) -> usize {
    if buffer.capacity() < HEADROOM + MIN_READ {
        *buffer = BytesMut::with_capacity(HEADROOM + MAX_PAYLOAD);
    }
    buffer.resize(HEADROOM, 0);
    (buffer.capacity() - HEADROOM).min(MAX_PAYLOAD)
}

impl Captured {
    /// The last record of the attempt.
    pub(crate) fn finished(&self, end: End) -> Finished {
        Finished {
            next: self.tally.next(),
            counts: self.tally.counts(),
            digest: self.tally.digest(),
            end,
            time: now_micros(),
            usage: None,
        }
    }
}

/// The wall clock; 0 for a clock before 1970.
pub(crate) fn now_micros() -> UnixMicros {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_micros() as UnixMicros)
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    async fn every_byte_of_both_pipes_becomes_a_record() {
        let (mut stdout, out) = tokio::net::unix::pipe::pipe().unwrap();
        let (mut stderr, err) = tokio::net::unix::pipe::pipe().unwrap();
        let outbox = Arc::new(Outbox::new(8 << 20));
        let (_stop, stopped) = oneshot::channel();
        let capture = tokio::spawn(capture(out, err, &outbox).run(stopped));
        let text = vec![b'x'; 3 * MAX_PAYLOAD + 1];
        stdout.write_all(&text).await.unwrap();
        stderr.write_all(b"e").await.unwrap();
        drop((stdout, stderr));
        let captured = capture.await.unwrap();
        let counts = captured.tally.counts();
        assert_eq!((counts.stdout.bytes, counts.stderr.bytes), (text.len() as u64, 1));
        assert_eq!(outbox.with(|sender| sender.next()), counts.records());
    }

    #[tokio::test]
    async fn a_stopped_capture_still_reads_what_is_in_the_pipe() {
        let (mut stdout, out) = tokio::net::unix::pipe::pipe().unwrap();
        let (_stderr, err) = tokio::net::unix::pipe::pipe().unwrap();
        stdout.write_all(b"last words").await.unwrap();
        let (stop, stopped) = oneshot::channel();
        stop.send(()).unwrap();
        let outbox = Arc::new(Outbox::new(8 << 20));
        let captured = capture(out, err, &outbox).run(stopped).await;
        assert_eq!(captured.tally.counts().stdout.bytes, 10);
    }

    fn capture(stdout: Receiver, stderr: Receiver, outbox: &Arc<Outbox>) -> Capture {
        let (last_output, _) = watch::channel(Instant::now());
        Capture { stdout: Some(stdout), stderr: Some(stderr), outbox: outbox.clone(), copier: None, last_output }
    }
}
