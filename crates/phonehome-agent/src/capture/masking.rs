//! What was read, masked, as blocks for the recorder.

use std::collections::VecDeque;

use bytes::BytesMut;
use phonehome_proto::{codec::binary::HEADROOM, event, event::Event, frame::Stream, limits::MAX_PAYLOAD};
use tokio::time::Instant;

use super::MIN_READ;
use crate::redact::{Masker, Redactor};

/// Both streams on their way past the redactor.
#[derive(Debug)]
pub(super) struct Masking {
    redactor: Redactor,
    maskers: [Masker; 2],
    blocks: Blocks,
}

/// Blocks that wait for the recorder. They are taken before more is masked.
#[derive(Debug, Default)]
struct Blocks {
    /// Headroom and what is masked so far, or the space for it.
    buffer: BytesMut,
    full: VecDeque<(Stream, BytesMut)>,
}

impl Masking {
    pub(super) fn new(redactor: Redactor) -> Self {
        let maskers = [Masker::new(&redactor), Masker::new(&redactor)];
        Self { redactor, maskers, blocks: Blocks::default() }
    }

    /// Takes what was read.
    pub(super) fn mask(&mut self, stream: Stream, bytes: &[u8], now: Instant) {
        let Self { maskers, blocks, .. } = self;
        blocks.prepare(bytes.len());
        masker(maskers, stream).mask(bytes, now, &mut |piece| blocks.add(stream, piece));
        blocks.end(stream);
    }

    /// Says that nothing follows on a stream.
    pub(super) fn finish(&mut self, stream: Stream) {
        let Self { maskers, blocks, .. } = self;
        masker(maskers, stream).finish(&mut |piece| blocks.add(stream, piece));
        blocks.end(stream);
    }

    /// Gives up holding back what has waited for long enough, unless `goes_on` says that more of its stream is at hand.
    pub(super) fn poll(&mut self, now: Instant, goes_on: impl Fn(Stream) -> bool) {
        let Self { maskers, blocks, .. } = self;
        for stream in [Stream::Stdout, Stream::Stderr] {
            masker(maskers, stream).poll(now, goes_on(stream), &mut |piece| blocks.add(stream, piece));
            blocks.end(stream);
        }
    }

    /// When [`Self::poll`] has something to do.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.maskers.iter().filter_map(Masker::deadline).min()
    }

    /// The next block: headroom, then output.
    pub(super) fn next(&mut self) -> Option<(Stream, BytesMut)> {
        self.blocks.full.pop_front()
    }

    /// What there is to tell about it.
    pub(super) fn account(&self) -> Event {
        let replaced = self.maskers.iter().map(Masker::replaced).sum();
        let values = self.redactor.values() as u64;
        Event::Redaction(event::Redaction { values, replaced })
    }
}

fn masker(maskers: &mut [Masker; 2], stream: Stream) -> &mut Masker {
    &mut maskers[usize::from(stream.number()).min(1)]
}

impl Blocks {
    /// Makes room for about `len` bytes, so that one block read becomes one block written.
    fn prepare(&mut self, len: usize) {
        if self.buffer.capacity() < HEADROOM + len.max(MIN_READ) {
            self.buffer = BytesMut::with_capacity(HEADROOM + MAX_PAYLOAD);
        }
        self.buffer.resize(HEADROOM, 0);
    }

    fn add(&mut self, stream: Stream, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.buffer.is_empty() {
                self.prepare(bytes.len().min(MAX_PAYLOAD));
            }
            let room = self.buffer.capacity().min(HEADROOM + MAX_PAYLOAD) - self.buffer.len();
            let (fitting, rest) = bytes.split_at(room.min(bytes.len()));
            self.buffer.extend_from_slice(fitting);
            if !rest.is_empty() {
                self.end(stream);
            }
            bytes = rest;
        }
    }

    fn end(&mut self, stream: Stream) {
        if self.buffer.len() > HEADROOM {
            self.full.push_back((stream, self.buffer.split()));
        }
    }
}

#[cfg(test)]
mod tests {
    use zeroize::Zeroizing;

    use super::*;

    #[test]
    fn output_that_grows_is_split_into_payloads_and_nothing_is_lost() {
        let mut masking = masking(&["secret"]);
        let text = "secret,".repeat(MAX_PAYLOAD / 7);
        let mut output = Vec::new();
        for _ in 0..3 {
            masking.mask(Stream::Stderr, text.as_bytes(), Instant::now());
            while let Some((stream, block)) = masking.next() {
                assert_eq!(stream, Stream::Stderr);
                assert!((HEADROOM + 1..=HEADROOM + MAX_PAYLOAD).contains(&block.len()));
                output.extend_from_slice(&block[HEADROOM..]);
            }
        }
        assert_eq!(output, text.repeat(3).replace("secret", "[redacted]").as_bytes());
        let account = event::Redaction { values: 1, replaced: 3 * (MAX_PAYLOAD / 7) as u64 };
        assert_eq!(masking.account(), Event::Redaction(account));
    }

    #[test]
    fn the_streams_are_apart() {
        let mut masking = masking(&["secret"]);
        for (stream, text) in [(Stream::Stdout, "sec"), (Stream::Stderr, "sec"), (Stream::Stdout, "ret.")] {
            masking.mask(stream, text.as_bytes(), Instant::now());
        }
        assert_eq!(&masking.next().unwrap().1[HEADROOM..], b"[redacted].");
        masking.poll(masking.deadline().unwrap(), |_| false);
        let (stream, block) = masking.next().unwrap();
        assert_eq!((stream, &block[HEADROOM..]), (Stream::Stderr, &b"sec"[..]));
        assert_eq!((masking.next(), masking.deadline()), (None, None));
    }

    fn masking(values: &[&str]) -> Masking {
        let values = values.iter().map(|value| Zeroizing::new(value.as_bytes().to_vec()));
        Masking::new(Redactor::new(values).unwrap().unwrap())
    }
}
