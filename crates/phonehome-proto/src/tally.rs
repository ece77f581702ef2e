//! The running account of an attempt, kept alike at both ends: numbers, offsets, counts and the digest.

use std::{mem, sync::Arc};

use crate::{
    event::{Event, Gap},
    frame::{Counts, Record, Stream},
    id::Digest,
};

/// Everything FINISHED says about the records, up to some sequence number.
///
/// Clones share one account until one of them goes on: the state of the digest alone takes 2 KB, and a server keeps
/// half a dozen tallies of every attempt, which are the same while its build is silent.
#[derive(Debug, Clone, Default)]
pub struct Tally(Arc<Account>);

#[derive(Debug, Clone, Default)]
struct Account {
    next: u64,
    counts: Counts,
    missing: Counts,
    /// Streams whose position is unknown since [`Tally::skip_to`]: their next record tells it.
    adrift: [bool; 3],
    hasher: blake3::Hasher,
}

impl Tally {
    /// The sequence number of the next record.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.0.next
    }

    /// Records and bytes carried so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.0.counts
    }

    /// Where in `stream` the next record starts: bytes carried and bytes that gaps left out.
    #[must_use]
    pub fn offset(&self, stream: Stream) -> u64 {
        self.0.counts.of(stream).bytes.saturating_add(self.0.missing.of(stream).bytes)
    }

    /// Bytes that gap records left out, over all streams.
    #[must_use]
    pub fn missing_bytes(&self) -> u64 {
        Stream::ALL.iter().fold(0, |sum, &stream| sum.saturating_add(self.0.missing.of(stream).bytes))
    }

    /// Digest of the output bytes so far.
    #[must_use]
    pub fn digest(&self) -> Digest {
        Digest(*self.0.hasher.finalize().as_bytes())
    }

    /// Bytes carried, events included.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.counts.output_bytes() + self.0.counts.event.bytes
    }

    /// Whether `record` is the next one and starts where its stream has got to.
    #[must_use]
    pub fn expects(&self, record: &Record) -> bool {
        let offset = self.offset(record.stream);
        let adrift = self.0.adrift[usize::from(record.stream.number())];
        record.seq == self.0.next && (record.offset == offset || adrift && record.offset > offset)
    }

    /// Goes on at `next` without the records before it: nobody has them any more.
    pub fn skip_to(&mut self, next: u64) {
        let account = Arc::make_mut(&mut self.0);
        account.next = account.next.max(next);
        account.adrift = [true; 3];
    }

    /// Takes the next record into account.
    pub fn add(&mut self, record: &Record) {
        let missing = record.offset.saturating_sub(self.offset(record.stream));
        Arc::make_mut(&mut self.0).add(record, missing);
    }
}

impl Account {
    /// Counts a record, and what a skip left out before it if it is the first since then.
    fn add(&mut self, record: &Record, missing: u64) {
        self.next = record.seq + 1;
        if mem::take(&mut self.adrift[usize::from(record.stream.number())]) {
            self.missing.of_mut(record.stream).bytes += missing;
        }
        let count = self.counts.of_mut(record.stream);
        count.records += 1;
        count.bytes += record.payload.len() as u64;
        if record.stream.is_output() {
            self.hasher.update(&record.payload);
        } else if let Some(Event::Gap(gap)) = Event::parse(&record.payload) {
            self.skip(&gap);
        }
    }

    fn skip(&mut self, gap: &Gap) {
        let missing = self.missing.of_mut(gap.stream);
        missing.records = missing.records.saturating_add(1);
        missing.bytes = missing.bytes.saturating_add(gap.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_counted_but_are_not_output() {
        let mut tally = Tally::default();
        tally.add(&Record::new(0, 1, Stream::Stdout, 0, "abc".into()));
        tally.add(&Record::new(1, 2, Stream::Event, 0, r#"{"event":"born"}"#.into()));
        tally.add(&Record::new(2, 3, Stream::Stderr, 0, "de".into()));
        assert_eq!((tally.next(), tally.counts().output_bytes(), tally.counts().event.bytes), (3, 5, 16));
        assert_eq!(tally.digest().0, *blake3::hash(b"abcde").as_bytes());
    }

    #[test]
    fn a_gap_moves_the_stream_on_and_is_remembered() {
        let mut tally = Tally::default();
        tally.add(&Record::new(0, 1, Stream::Stdout, 0, "abc".into()));
        let gap = Event::Gap(Gap { stream: Stream::Stdout, bytes: 10, cause: "spool-full".into() });
        tally.add(&Record::new(1, 1, Stream::Event, 0, gap.payload().into()));
        assert_eq!((tally.offset(Stream::Stdout), tally.missing_bytes()), (13, 10));
        assert!(tally.expects(&Record::new(2, 1, Stream::Stdout, 13, "x".into())));
        assert!(!tally.expects(&Record::new(2, 1, Stream::Stdout, 3, "x".into())));
    }

    #[test]
    fn clones_are_one_account_until_one_goes_on() {
        let mut tally = Tally::default();
        tally.add(&Record::new(0, 1, Stream::Stdout, 0, "abc".into()));
        let before = tally.clone();
        assert!(Arc::ptr_eq(&before.0, &tally.0));
        tally.add(&Record::new(1, 1, Stream::Stdout, 3, "d".into()));
        assert_eq!((before.next(), tally.next()), (1, 2));
        assert_eq!(before.digest().0, *blake3::hash(b"abc").as_bytes());
    }
}
