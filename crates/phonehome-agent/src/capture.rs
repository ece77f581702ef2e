//! From the command's pipes to numbered records.
//!
//! A block is read into a buffer that becomes record, message and tee source at once. What was read goes out at once;
//! when blocks come in quick succession the next read waits a moment, so that line-sized writes gather in the pipe
//! instead of costing a message each. A lone line never waits.
//!
//! With secrets to redact, what was read is masked on its way into that buffer, and only what was masked goes on.

mod masking;

use std::{io, os::fd::AsFd, time::Duration};

use bytes::{BufMut, BytesMut};
use phonehome_proto::{codec::binary::HEADROOM, frame::Stream, limits::MAX_PAYLOAD};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::{sync::watch, time::Instant};
use tracing::warn;

use self::masking::Masking;
use crate::{
    command::{PIPE_SIZE, Source, Sources},
    console::{Copier, STALLED},
    outbox::expiry,
    probe::output::OutputWatch,
    recorder::Recorder,
    redact::Redactor,
};

/// Reads the command's output to its end.
pub(crate) struct Capture {
    sources: [Option<Source>; 2],
    recorder: Recorder,
    copier: Option<Copier>,
    masking: Option<Masking>,
    /// Who waits for a line of the output, as it is recorded.
    watched: Option<OutputWatch>,
    /// When output was last seen, for heartbeats.
    last_output: watch::Sender<Instant>,
    waivers: watch::Receiver<Waivers>,
    /// Which stream is looked at first.
    turns: [Stream; 2],
    /// What may still be read from each pipe once nobody is left to fill it, bytes.
    rest: [usize; 2],
}

/// What a capture need not wait for any more.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Waivers {
    /// A copy that makes no progress: the command has ended, so it is not the command that waits for its reader.
    pub(crate) stalled_copy: bool,
    /// A slow copy.
    pub(crate) copy: bool,
    /// Writers: nobody is left who should write; only what is in the pipes is still read.
    pub(crate) writers: bool,
    /// Room in the outbox: time is up.
    pub(crate) room: bool,
}

/// What has been read, for FINISHED.
#[derive(Debug)]
pub(crate) struct Captured {
    pub(crate) recorder: Recorder,
    pub(crate) copier: Option<Copier>,
}

/// Blocks closer together than this are a burst.
const BURST: Duration = Duration::from_micros(500);

/// How long the next read waits within a burst. The pipe's 1 MiB hold what is written meanwhile.
const PAUSE: Duration = Duration::from_millis(1);

/// Smallest read worth a system call when a buffer is nearly used up, bytes.
const MIN_READ: usize = 4 * 1024;

impl Capture {
    pub(crate) fn new(
        sources: Sources,
        recorder: Recorder,
        copier: Option<Copier>,
        redactor: Option<Redactor>,
        last_output: watch::Sender<Instant>,
        waivers: watch::Receiver<Waivers>,
    ) -> Self {
        let sources = [Some(sources.stdout), sources.stderr];
        Self {
            sources,
            recorder,
            copier,
            masking: redactor.map(Masking::new),
            watched: None,
            last_output,
            waivers,
            turns: [Stream::Stdout, Stream::Stderr],
            rest: [PIPE_SIZE; 2],
        }
    }

    /// Shows the output to somebody who waits for a line of it.
    pub(crate) fn watched_by(self, watched: Option<OutputWatch>) -> Self {
        Self { watched, ..self }
    }

    /// Runs until both pipes are at their ends, or until nothing is left that the [`Waivers`] let it wait for.
    pub(crate) async fn run(mut self) -> Captured {
        let mut buffer = BytesMut::new();
        while self.sources.iter().any(Option::is_some) {
            let Some(stream) = self.readable().await else { break };
            self.recorder.keep_pace().await;
            self.room().await;
            let Some(full) = self.read(stream, &mut buffer).await else { continue };
            let now = Instant::now();
            let burst = now.duration_since(self.last_output.send_replace(now)) < BURST;
            if burst && !full {
                tokio::time::sleep(PAUSE).await;
            }
        }
        self.finish_masking().await;
        Captured { recorder: self.recorder, copier: self.copier }
    }

    /// Waits for a pipe with something to read, or at its end. `None` when the pipes are empty and need not be waited
    /// for.
    async fn readable(&mut self) -> Option<Stream> {
        loop {
            let held_until = self.poll_masking().await;
            let writers_waived = self.waivers.borrow_and_update().writers;
            if writers_waived && !self.holds_bytes() {
                return None;
            }
            let Self { sources, waivers, turns, recorder, .. } = &mut *self;
            let [first, second] = *turns;
            tokio::select! {
                biased; // the stream that was not read last goes first: neither can starve the other
                () = readable(source(sources, first)) => {
                    *turns = [second, first];
                    return Some(first);
                }
                () = readable(source(sources, second)) => return Some(second),
                () = recorder.attend() => {}
                () = waived(waivers, |waivers| waivers.writers), if !writers_waived => {}
                () = expiry(held_until) => {}
            }
        }
    }

    /// Whether a pipe has something to read at this moment.
    fn holds_bytes(&self) -> bool {
        self.sources.iter().flatten().any(holds_bytes)
    }

    /// Waits until the recorder takes one more block.
    async fn room(&mut self) {
        let is_late = tokio::select! {
            biased; // as long as there is room, time does not matter
            () = self.recorder.ready() => false,
            () = waived(&mut self.waivers, |waivers| waivers.room) => true,
        };
        if is_late {
            self.recorder.hurry();
        }
    }

    /// Reads one block and passes it on. Says whether the next read should come at once, because as much came as there was
    /// room for; `None` when nothing came.
    async fn read(&mut self, stream: Stream, buffer: &mut BytesMut) -> Option<bool> {
        let at = usize::from(stream.number());
        let draining = self.waivers.borrow().writers;
        let room = prepare(buffer).min(if draining { self.rest[at] } else { usize::MAX });
        let source = self.sources[at].as_ref()?;
        let gathers = source.gathers();
        match source.try_read(&mut (&mut *buffer).limit(room)) {
            Ok(0) => self.sources[at] = None,
            Ok(count) => {
                self.rest[at] -= if draining { count } else { 0 };
                self.deliver(stream, buffer).await;
                return Some(count == room || !gathers);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                warn!(?stream, "reading the command's output failed: {error}");
                self.sources[at] = None;
            }
        }
        None
    }

    /// Passes on what the buffer holds, which is free afterwards.
    async fn deliver(&mut self, stream: Stream, buffer: &mut BytesMut) {
        match &mut self.masking {
            None => self.pass_on(stream, buffer.split()).await,
            Some(masking) => {
                masking.mask(stream, &buffer[HEADROOM..], Instant::now());
                self.pass_on_masked().await;
            }
        }
    }

    async fn pass_on_masked(&mut self) {
        while let Some((stream, block)) = self.masking.as_mut().and_then(Masking::next) {
            self.room().await;
            self.pass_on(stream, block).await;
        }
    }

    /// Passes on what has been held back for long enough, though not while its other half waits in the pipe: this task
    /// may have waited for room meanwhile. Says when there is more of it.
    async fn poll_masking(&mut self) -> Option<Instant> {
        let masking = self.masking.as_mut()?;
        if masking.deadline()? <= Instant::now() {
            let sources = &self.sources;
            masking.poll(Instant::now(), |stream| source(sources, stream).is_some_and(holds_bytes));
            self.pass_on_masked().await;
        }
        self.masking.as_ref()?.deadline()
    }

    /// Passes on what is still held back, and tells what was redacted.
    async fn finish_masking(&mut self) {
        let Some(masking) = &mut self.masking else { return };
        [Stream::Stdout, Stream::Stderr].into_iter().for_each(|stream| masking.finish(stream));
        self.recorder.herald().tell(masking.account());
        self.pass_on_masked().await;
    }

    async fn pass_on(&mut self, stream: Stream, block: BytesMut) {
        let payload = self.recorder.record(stream, block);
        if let Some(watched) = &mut self.watched {
            watched.feed(stream, &payload);
        }
        let Some(copier) = &self.copier else { return };
        let copied = tokio::select! {
            biased;
            () = copier.copy(stream, payload) => true,
            () = late(&mut self.waivers) => false,
        };
        if !copied {
            warn!("nobody reads the copy of the command's output; it is cut off");
            self.copier = None;
        }
    }
}

fn source(sources: &[Option<Source>; 2], stream: Stream) -> Option<&Source> {
    sources[usize::from(stream.number())].as_ref()
}

/// Whether there is something to read, or an end. Asked of the system: the runtime may not know yet.
fn holds_bytes(source: &impl AsFd) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(source.as_fd(), PollFlags::IN)];
    poll(&mut polled, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

/// Never completes without a source.
async fn readable(source: Option<&Source>) {
    match source {
        Some(source) => source.readable().await,
        None => std::future::pending().await,
    }
}

/// Completes when a copy that has not found room since now need not be waited for.
async fn late(waivers: &mut watch::Receiver<Waivers>) {
    waived(waivers, |waivers| waivers.stalled_copy || waivers.copy).await;
    tokio::select! {
        () = tokio::time::sleep(STALLED) => {}
        () = waived(waivers, |waivers| waivers.copy) => {}
    }
}

/// Never completes when nobody is left to waive anything.
async fn waived(waivers: &mut watch::Receiver<Waivers>, which: impl FnMut(&Waivers) -> bool) {
    if waivers.wait_for(which).await.is_err() {
        std::future::pending().await
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use phonehome_env::Env;
    use phonehome_proto::{
        event::{self, Event},
        frame::End,
        tally::Tally,
    };
    use tokio::io::AsyncWriteExt;

    use tokio::net::unix::pipe::Receiver;

    use super::*;
    use crate::{
        config::{OnOffline, Overflow},
        outbox::Outbox,
        recorder::Policy,
        redact,
    };

    #[tokio::test]
    async fn every_byte_of_both_pipes_becomes_a_record() {
        let (mut stdout, out) = tokio::net::unix::pipe::pipe().unwrap();
        let (mut stderr, err) = tokio::net::unix::pipe::pipe().unwrap();
        let outbox = Arc::new(Outbox::new(8 << 20));
        let (_waive, waivers) = watch::channel(Waivers::default());
        let capture = tokio::spawn(capture(out, Some(err), &outbox, waivers).run());
        let text = vec![b'x'; 3 * MAX_PAYLOAD + 1];
        stdout.write_all(&text).await.unwrap();
        stderr.write_all(b"e").await.unwrap();
        drop((stdout, stderr));
        let captured = capture.await.unwrap();
        let counts = captured.recorder.tally().counts();
        assert_eq!((counts.stdout.bytes, counts.stderr.bytes), (text.len() as u64, 1));
        assert_eq!(outbox.with(|sender| sender.next()), counts.records());
    }

    #[tokio::test]
    async fn a_flood_on_one_stream_does_not_starve_the_other() {
        let (mut stdout, out) = tokio::net::unix::pipe::pipe().unwrap();
        let (mut stderr, err) = tokio::net::unix::pipe::pipe().unwrap();
        rustix::pipe::fcntl_setpipe_size(&out, PIPE_SIZE).unwrap();
        stdout.write_all(&vec![b'x'; 8 * MAX_PAYLOAD]).await.unwrap();
        stderr.write_all(b"e").await.unwrap();
        drop((stdout, stderr));
        let outbox = Arc::new(Outbox::new(8 << 20));
        let (_waive, waivers) = watch::channel(Waivers::default());
        capture(out, Some(err), &outbox, waivers).run().await;
        let streams = first_streams(&outbox);
        assert!(streams.contains(&Stream::Stderr), "{streams:?}");
    }

    #[tokio::test]
    async fn without_writers_it_still_reads_what_is_in_the_pipe() {
        let (mut stdout, out) = tokio::net::unix::pipe::pipe().unwrap();
        let (_stderr, err) = tokio::net::unix::pipe::pipe().unwrap();
        stdout.write_all(b"last words").await.unwrap();
        let (_waive, waivers) = watch::channel(Waivers { writers: true, ..Waivers::default() });
        let outbox = Arc::new(Outbox::new(8 << 20));
        let captured = capture(out, Some(err), &outbox, waivers).run().await;
        assert_eq!(captured.recorder.tally().counts().stdout.bytes, 10);
    }

    #[tokio::test]
    async fn a_writer_that_never_pauses_does_not_keep_it() {
        let (mut stdout, out) = tokio::net::unix::pipe::pipe().unwrap();
        let writer = tokio::spawn(async move { while stdout.write_all(&[b'x'; MAX_PAYLOAD]).await.is_ok() {} });
        let (_waive, waivers) = watch::channel(Waivers { writers: true, ..Waivers::default() });
        let outbox = Arc::new(Outbox::new(8 << 20));
        while !holds_bytes(&out) {
            tokio::task::yield_now().await;
        }
        let captured = tokio::time::timeout(PATIENCE, capture(out, None, &outbox, waivers).run()).await.unwrap();
        assert!((1..=PIPE_SIZE as u64).contains(&captured.recorder.tally().counts().stdout.bytes));
        writer.await.unwrap();
    }

    #[tokio::test]
    async fn a_full_outbox_holds_it_until_time_is_up() {
        let (mut stdout, out) = tokio::net::unix::pipe::pipe().unwrap();
        stdout.write_all(b"more").await.unwrap();
        drop(stdout);
        let (waive, waivers) = watch::channel(Waivers::default());
        let outbox = Arc::new(Outbox::new(0));
        let mut capture = tokio::spawn(capture(out, None, &outbox, waivers).run());
        assert!(tokio::time::timeout(Duration::from_millis(50), &mut capture).await.is_err());
        waive.send_modify(|waivers| waivers.room = true);
        let captured = tokio::time::timeout(PATIENCE, capture).await.unwrap().unwrap();
        captured.recorder.finish(End::Exited(0), None);
        assert_eq!(outbox.look(|sender| sender.finished().unwrap().counts.stdout.bytes), 4);
    }

    #[tokio::test]
    async fn a_secret_in_two_writes_is_masked_in_the_records_and_in_the_digest() {
        let (mut stdout, out) = tokio::net::unix::pipe::pipe().unwrap();
        let (mut stderr, err) = tokio::net::unix::pipe::pipe().unwrap();
        let outbox = Arc::new(Outbox::new(8 << 20));
        let (_waive, waivers) = watch::channel(Waivers::default());
        let mut capture = capture(out, Some(err), &outbox, waivers);
        capture.masking = Some(Masking::new(redactor("hunter22")));
        let mut output = capture.last_output.subscribe();
        let capture = tokio::spawn(capture.run());
        stdout.write_all(b"password: hunt").await.unwrap();
        output.changed().await.unwrap();
        stdout.write_all(b"er22\nhunt").await.unwrap();
        stderr.write_all(b"hunter2").await.unwrap();
        drop((stdout, stderr));
        let recorder = capture.await.unwrap().recorder;
        recorder.finish(End::Exited(0), None);
        let records: Vec<_> =
            outbox.look(|sender| sender.peek(0, usize::MAX)).into_iter().map(|it| it.record).collect();
        let of = |stream| -> Vec<u8> {
            records.iter().filter(|record| record.stream == stream).flat_map(|record| record.payload.to_vec()).collect()
        };
        assert_eq!(of(Stream::Stdout), b"password: [redacted]\nhunt");
        assert_eq!(of(Stream::Stderr), b"hunter2", "the beginning of a secret is none");
        let event = Event::Redaction(event::Redaction { values: 1, replaced: 1 });
        assert_eq!(of(Stream::Event), event.payload());
        let mut tally = Tally::default();
        records.iter().for_each(|record| tally.add(record));
        let finished = outbox.look(|sender| sender.finished().cloned()).unwrap();
        assert_eq!((finished.digest, finished.counts), (tally.digest(), tally.counts()));
    }

    #[tokio::test]
    async fn a_prompt_that_begins_like_a_secret_shows_after_a_moment() {
        let (mut stdout, out) = tokio::net::unix::pipe::pipe().unwrap();
        let outbox = Arc::new(Outbox::new(8 << 20));
        let (_waive, waivers) = watch::channel(Waivers::default());
        let mut capture = capture(out, None, &outbox, waivers);
        capture.masking = Some(Masking::new(redactor("password1")));
        let capture = tokio::spawn(capture.run());
        stdout.write_all(b"password").await.unwrap();
        let start = Instant::now();
        tokio::time::timeout(PATIENCE, outbox.filled()).await.unwrap();
        assert!(start.elapsed() >= redact::IDLE);
        drop(stdout);
        assert_eq!(capture.await.unwrap().recorder.tally().counts().stdout.bytes, 8);
    }

    #[tokio::test]
    async fn a_secret_whose_end_waits_in_the_pipe_is_masked_however_late_it_is_read() {
        let (mut stdout, out) = tokio::net::unix::pipe::pipe().unwrap();
        let outbox = Arc::new(Outbox::new(8 << 20));
        let (_waive, waivers) = watch::channel(Waivers::default());
        let mut capture = capture(out, None, &outbox, waivers);
        let mut masking = Masking::new(redactor("hunter22"));
        masking.mask(Stream::Stdout, b"hunt", Instant::now() - 2 * redact::IDLE);
        capture.masking = Some(masking);
        stdout.write_all(b"er22").await.unwrap();
        assert!(capture.poll_masking().await.unwrap() > Instant::now());
        drop(stdout);
        capture.run().await;
        let first = outbox.look(|sender| sender.peek(0, 1));
        assert_eq!(first[0].record.payload, redact::MARKER.as_bytes());
    }

    const PATIENCE: Duration = Duration::from_secs(20);

    fn redactor(value: &str) -> Redactor {
        let values = [value.as_bytes().to_vec().into()];
        Redactor::new(values).unwrap().unwrap()
    }

    /// Of the first two records.
    fn first_streams(outbox: &Outbox) -> Vec<Stream> {
        let first = outbox.look(|sender| sender.peek(0, 2 * MAX_PAYLOAD));
        first.iter().take(2).map(|sealed| sealed.record.stream).collect()
    }

    fn capture(
        stdout: Receiver,
        stderr: Option<Receiver>,
        outbox: &Arc<Outbox>,
        waivers: watch::Receiver<Waivers>,
    ) -> Capture {
        let (last_output, _) = watch::channel(Instant::now());
        let policy =
            Policy { overflow: Overflow::Block, offline_limit: None, on_offline: OnOffline::Continue, ring: 1 << 20 };
        let recorder = Recorder::new(Env::real(), outbox.clone(), policy);
        let sources = Sources { stdout: Source::Pipe(stdout), stderr: stderr.map(Source::Pipe), kept_open: None };
        Capture::new(sources, recorder, None, None, last_output, waivers)
    }
}
