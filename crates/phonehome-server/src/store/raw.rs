//! Random access to the output of one attempt as it lies on the disk: any range of it, of one stream or of both, and
//! where its last lines begin.
//!
//! The raw file is the output in record order, so a position in it is a position in the file. One stream is spread over
//! it, in records between those of the other. Every output record tells how many bytes of *both* streams come before it,
//! as long as nothing of either is missing: its offset is that of its own, its position less its offset that of the
//! other. So the record that holds byte n of a stream is found by bisection. Where bytes are missing, which the counts
//! of the whole attempt show, the index is walked from its beginning: 48 bytes per record, at the speed of memory.

use std::{io, sync::Arc};

use bytes::{Bytes, BytesMut};
use phonehome_env::disk::File;
use phonehome_proto::{
    frame::{Counts, FinishedAck, Stream, UnixMicros},
    id::Digest,
    limits::MAX_PAYLOAD,
};

use super::{
    attempt::{AttemptFiles, Progress},
    index::{ENTRY, Entry},
};

/// The output of an attempt, or one stream of it, as far as it was durable when this was opened.
#[derive(Debug)]
pub(crate) struct Slice {
    log: Box<dyn File>,
    index: Index,
    stream: Option<Stream>,
    len: u64,
    /// Names these bytes and no others.
    tag: String,
    digest: Option<Digest>,
    /// The number behind the last record.
    next: u64,
    /// Whether every record tells how much of the stream comes before it.
    can_bisect: bool,
    place: Place,
}

/// Where reading goes on in one stream.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    entry: u64,
    /// Bytes of the stream before that entry.
    before: u64,
    /// Bytes of the stream before what is read next.
    at: u64,
}

/// A byte of the log as a reader of records finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Spot {
    /// The record it is in.
    pub(crate) seq: u64,
    /// Bytes of the record before it.
    pub(crate) skip: usize,
}

/// Bytes handed out at once.
pub(crate) const BLOCK: usize = 256 * 1024;

impl Slice {
    /// # Errors
    ///
    /// When the files cannot be read.
    pub(crate) fn open(files: &Arc<AttemptFiles>, stream: Option<Stream>) -> io::Result<Self> {
        let progress = files.progress.borrow().clone();
        let log = files.open("log")?;
        let mut index = Index::new(files.open("index")?, progress.entries);
        let last = index.output_before(progress.entries)?.map(|(_, last)| last);
        let whole = last.map_or(0, |last| last.position + last.len);
        let next = progress.next;
        let digest = digest(&progress);
        let tag = tag(digest, next, whole, stream);
        let digest = digest.filter(|_| stream.is_none());
        let place = Place::default();
        let mut slice = Self { log, index, stream, len: whole, tag, digest, next, can_bisect: true, place };
        if let Some(stream) = stream {
            slice.measure(stream, whole, counts(&progress, whole))?;
        }
        Ok(slice)
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Names these bytes and no others; letters, digits and `-`.
    pub(crate) fn tag(&self) -> &str {
        &self.tag
    }

    /// BLAKE3 of all of it, when that is known.
    pub(crate) fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// At most `max` bytes from `at` on, and at least one before the end.
    ///
    /// # Errors
    ///
    /// When the files cannot be read, or were cut since: a part of the log was taken back, to be sent again.
    pub(crate) fn read(&mut self, at: u64, max: usize) -> io::Result<Bytes> {
        let max = usize::try_from(self.len.saturating_sub(at)).unwrap_or(max).min(max).min(BLOCK);
        if max == 0 {
            return Ok(Bytes::new());
        }
        if self.stream.is_some() {
            return self.read_stream(at, max);
        }
        let mut block = BytesMut::zeroed(max);
        self.log.read_exact_at(&mut block, at)?;
        Ok(block.freeze())
    }

    /// Where a reader of records finds a byte; the end is behind the last record.
    ///
    /// # Errors
    ///
    /// When the files cannot be read.
    pub(crate) fn locate(&mut self, at: u64) -> io::Result<Spot> {
        if at >= self.len {
            return Ok(Spot { seq: self.next, skip: 0 });
        }
        let (entry, before) = if self.can_bisect {
            let found = self.bisect(at)?.ok_or(io::ErrorKind::InvalidData)?;
            (found.1, found.1.carried(self.stream))
        } else {
            self.seek(at)?;
            let Place { entry, before, .. } = self.place;
            (self.index.output_from(entry, entry + 1)?.ok_or(io::ErrorKind::InvalidData)?.1, before)
        };
        Ok(Spot { seq: entry.seq, skip: (at - before) as usize })
    }

    /// Finds out how long a stream is, and whether bisection can be trusted.
    fn measure(&mut self, stream: Stream, whole: u64, counts: Option<Counts>) -> io::Result<()> {
        if let Some(counts) = counts
            && self.is_gapless(&counts)?
        {
            self.len = counts.of(stream).bytes;
            return Ok(());
        }
        (self.can_bisect, self.len) = (false, whole);
        self.seek(u64::MAX)?;
        self.len = self.place.before;
        self.place = Place::default();
        Ok(())
    }

    /// Whether nothing of either stream is missing. The last record shows it for its own stream. For the other one, the
    /// bisection is tried: only when it leads to a record that ends at the stream's end, right before a record of the
    /// stream that is known to be whole, which tells the same, was its assumption true.
    fn is_gapless(&mut self, counts: &Counts) -> io::Result<bool> {
        let Some((_, last)) = self.index.output_before(self.index.entries)? else { return Ok(true) };
        let other = if last.stream == Stream::Stdout { Stream::Stderr } else { Stream::Stdout };
        let (own_bytes, other_bytes) = (counts.of(last.stream).bytes, counts.of(other).bytes);
        if last.offset + last.len != own_bytes {
            return Ok(false);
        }
        if other_bytes == 0 {
            return Ok(true);
        }
        let wanted = self.stream.replace(other);
        let found = self.bisect(other_bytes - 1)?;
        self.stream = wanted;
        let Some((entry, found)) = found else { return Ok(false) };
        let behind = self.index.output_from(entry + 1, self.index.entries)?;
        let agrees = behind
            .is_some_and(|(_, behind)| behind.stream == last.stream && behind.carried(Some(other)) == other_bytes);
        Ok(found.stream == other && found.offset + found.len == other_bytes && agrees)
    }

    /// The last output record before which there are at most `at` bytes.
    fn bisect(&mut self, at: u64) -> io::Result<Option<(u64, Output)>> {
        let (mut low, mut high) = (0, self.index.entries);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.index.output_from(middle, high)? {
                Some((entry, output)) if output.carried(self.stream) <= at => low = entry + 1,
                Some(_) | None => high = middle,
            }
        }
        self.index.output_before(low)
    }

    /// Goes to a byte of the stream.
    fn seek(&mut self, at: u64) -> io::Result<()> {
        if self.can_bisect {
            let (entry, found) = self.bisect(at)?.ok_or(io::ErrorKind::InvalidData)?;
            self.place = Place { entry, before: found.carried(self.stream), at };
            return Ok(());
        }
        let mut place = if at >= self.place.before { self.place } else { Place::default() };
        while let Some((entry, output)) = self.index.output_from(place.entry, self.index.entries)? {
            place.entry = entry;
            let len = if Some(output.stream) == self.stream { output.len } else { 0 };
            if at < place.before + len {
                break;
            }
            place.before += len;
            place.entry += 1;
        }
        self.place = Place { at, ..place };
        Ok(())
    }

    fn read_stream(&mut self, at: u64, max: usize) -> io::Result<Bytes> {
        if self.place.at != at || at == 0 {
            self.seek(at)?;
        }
        let mut out = BytesMut::with_capacity(max);
        let mut run = Run::default();
        let mut passed = 0;
        while out.len() + run.len < max && passed < WALK {
            let Some((entry, output)) = self.index.output_from(self.place.entry, self.index.entries)? else { break };
            self.place.entry = entry;
            if Some(output.stream) == self.stream {
                let skip = self.place.at - self.place.before;
                let len = ((output.len - skip) as usize).min(max - out.len() - run.len);
                if run.end() != output.position + skip {
                    run.flush(&*self.log, &mut out)?;
                    run.position = output.position + skip;
                }
                run.len += len;
                self.place.at += len as u64;
                if self.place.at < self.place.before + output.len {
                    break; // the rest of it is for the next block
                }
                self.place.before += output.len;
            } else {
                passed += 1;
            }
            self.place.entry += 1;
        }
        run.flush(&*self.log, &mut out)?;
        if out.is_empty() && passed == WALK {
            self.place.at = u64::MAX; // far behind others: found again by bisection, or where the walk has got to
            self.seek(at)?;
            return self.read_stream(at, max);
        }
        if out.is_empty() { Err(io::ErrorKind::InvalidData.into()) } else { Ok(out.freeze()) }
    }
}

/// Records of the other stream that are passed over before bisection is the shorter way.
const WALK: usize = 1024;

/// Bytes that lie together.
#[derive(Debug, Default)]
struct Run {
    position: u64,
    len: usize,
}

impl Run {
    fn end(&self) -> u64 {
        self.position + self.len as u64
    }

    fn flush(&mut self, log: &dyn File, out: &mut BytesMut) -> io::Result<()> {
        let start = out.len();
        out.resize(start + self.len, 0);
        log.read_exact_at(&mut out[start..], self.position)?;
        *self = Self::default();
        Ok(())
    }
}

/// Records and bytes of each stream, when they are known and agree with the file.
fn counts(progress: &Progress, whole: u64) -> Option<Counts> {
    let counted = (progress.tally.next() == progress.next).then(|| progress.tally.counts());
    let told = progress.finished.as_ref().map(|(finished, _)| finished.counts);
    counted.or(told).filter(|counts| counts.output_bytes() == whole)
}

/// The digest of both streams, told by the agent and found to be true, or counted here.
fn digest(progress: &Progress) -> Option<Digest> {
    let told = match &progress.finished {
        Some((finished, FinishedAck::Complete)) => Some(finished.digest),
        Some(_) | None => None,
    };
    told.or_else(|| (progress.tally.next() == progress.next).then(|| progress.tally.digest()))
}

fn tag(digest: Option<Digest>, next: u64, whole: u64, stream: Option<Stream>) -> String {
    let stream = stream.map_or("log", Stream::name);
    match digest {
        Some(digest) => format!("{stream}-{digest}"),
        None => format!("{stream}-{next}-{whole}"), // nobody writes there any more
    }
}

/// Entries of an index, read in blocks.
#[derive(Debug)]
struct Index {
    file: Box<dyn File>,
    entries: u64,
    first: u64,
    block: Vec<Entry>,
}

/// What the index says of a record of output.
#[derive(Debug, Clone, Copy)]
struct Output {
    seq: u64,
    time: UnixMicros,
    stream: Stream,
    offset: u64,
    position: u64,
    len: u64,
}

impl Output {
    /// Bytes before it: of a stream, when nothing is missing, or of both.
    fn carried(&self, stream: Option<Stream>) -> u64 {
        match stream {
            None => self.position,
            Some(stream) if stream == self.stream => self.offset,
            Some(_) => self.position.saturating_sub(self.offset),
        }
    }
}

/// Entries in a block: 3 KiB of them.
const ENTRIES: u64 = 64;

impl Index {
    fn new(file: Box<dyn File>, entries: u64) -> Self {
        Self { file, entries, first: 0, block: Vec::new() }
    }

    fn get(&mut self, entry: u64) -> io::Result<Entry> {
        let first = entry - entry % ENTRIES;
        if self.first != first || self.block.is_empty() {
            self.load(first)?;
        }
        self.block.get((entry - first) as usize).copied().ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn load(&mut self, first: u64) -> io::Result<()> {
        let mut wire = vec![0; ENTRIES.min(self.entries - first) as usize * ENTRY];
        self.block.clear();
        self.file.read_exact_at(&mut wire, first * ENTRY as u64)?;
        let (entries, _) = wire.as_chunks::<ENTRY>();
        let decoded: Option<Vec<_>> = entries.iter().map(Entry::decode).collect();
        (self.first, self.block) = (first, decoded.ok_or(io::ErrorKind::InvalidData)?);
        Ok(())
    }

    /// The first record of output from an entry on, before another.
    fn output_from(&mut self, entry: u64, end: u64) -> io::Result<Option<(u64, Output)>> {
        for entry in entry..end.min(self.entries) {
            if let Some(output) = output(self.get(entry)?) {
                return Ok(Some((entry, output)));
            }
        }
        Ok(None)
    }

    /// The last record of output before an entry.
    fn output_before(&mut self, entry: u64) -> io::Result<Option<(u64, Output)>> {
        for entry in (0..entry).rev() {
            if let Some(output) = output(self.get(entry)?) {
                return Ok(Some((entry, output)));
            }
        }
        Ok(None)
    }
}

/// An empty record is none: nothing of it is looked for, and where it says to stand may be behind a gap that no other
/// record of its stream tells of.
fn output(entry: Entry) -> Option<Output> {
    match entry {
        Entry::Record { seq, time, stream, offset, position, len, .. } if stream.is_output() && len > 0 => {
            Some(Output { seq, time, stream, offset, position, len: len.into() })
        }
        Entry::Record { .. } | Entry::Hole { .. } => None,
    }
}

/// Looks for the last lines of one attempt or of several that are read as one log by time: from the end backwards, in
/// parts, so that nobody has to wait for a long line who does not want to.
#[derive(Debug)]
pub(crate) struct Tail {
    walks: Vec<Walk>,
    /// Lines that are still looked for.
    lines: u64,
}

/// Goes back in one attempt.
#[derive(Debug)]
struct Walk {
    log: Box<dyn File>,
    index: Index,
    stream: Option<Stream>,
    /// Entries before this one have not been looked at.
    entry: u64,
    /// Bytes that were.
    walked: u64,
    start: Start,
    window: Window,
}

/// Where the last lines of an attempt begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Start {
    pub(crate) spot: Spot,
    /// Bytes from there to the end.
    pub(crate) from_end: u64,
}

/// The last part of the file that was read.
#[derive(Debug, Default)]
struct Window {
    start: u64,
    bytes: Vec<u8>,
}

/// Bytes and records that are looked at in one part.
const PART_BYTES: u64 = 4 * 1024 * 1024;
const PART_RECORDS: usize = 16 * 1024;

impl Tail {
    /// # Errors
    ///
    /// When the files cannot be read.
    pub(crate) fn new(attempts: &[Arc<AttemptFiles>], stream: Option<Stream>, lines: u64) -> io::Result<Self> {
        let walks = attempts.iter().map(|files| Walk::new(files, stream)).collect::<io::Result<_>>()?;
        Ok(Self { walks, lines })
    }

    /// Looks at the next part. `None` when it has to be called again; else where each attempt's share begins.
    ///
    /// # Errors
    ///
    /// When the files cannot be read.
    pub(crate) fn advance(&mut self) -> io::Result<Option<Vec<Start>>> {
        let mut bytes = 0;
        for _ in 0..PART_RECORDS {
            let wanted = self.lines;
            if wanted == 0 || bytes >= PART_BYTES {
                break;
            }
            let Some(walk) = self.latest()? else {
                self.lines = 0;
                break;
            };
            let (found, passed) = walk.step(wanted)?;
            self.lines -= found;
            bytes += passed;
        }
        Ok((self.lines == 0).then(|| self.walks.iter().map(|walk| walk.start).collect()))
    }

    /// The attempt whose last record, of those not looked at, is the latest.
    fn latest(&mut self) -> io::Result<Option<&mut Walk>> {
        let mut latest: Option<(UnixMicros, &mut Walk)> = None;
        for walk in &mut self.walks {
            if let Some((_, output)) = walk.peek()?
                && latest.as_ref().is_none_or(|(time, _)| output.time >= *time)
            {
                latest = Some((output.time, walk));
            }
        }
        Ok(latest.map(|(_, walk)| walk))
    }
}

impl Walk {
    fn new(files: &Arc<AttemptFiles>, stream: Option<Stream>) -> io::Result<Self> {
        let (entries, next) = {
            let progress = files.progress.borrow();
            (progress.entries, progress.next)
        };
        let index = Index::new(files.open("index")?, entries);
        let start = Start { spot: Spot { seq: next, skip: 0 }, from_end: 0 };
        let window = Window::default();
        Ok(Self { log: files.open("log")?, index, stream, entry: entries, walked: 0, start, window })
    }

    /// The last record that was not looked at.
    fn peek(&mut self) -> io::Result<Option<(u64, Output)>> {
        while let Some((entry, output)) = self.index.output_before(self.entry)? {
            if self.stream.is_none_or(|stream| stream == output.stream) {
                return Ok(Some((entry, output)));
            }
            self.entry = entry;
        }
        self.entry = 0;
        Ok(None)
    }

    /// Looks at one record for the starts of at most `wanted` lines. Says how many it found, and the record's length.
    fn step(&mut self, wanted: u64) -> io::Result<(u64, u64)> {
        let Some((entry, output)) = self.peek()? else { return Ok((0, 0)) };
        let mut found = 0;
        let payload = self.window.read(&*self.log, output.position, output.len)?;
        for at in (0..payload.len()).rev().filter(|&at| payload[at] == b'\n') {
            let behind = self.walked + (payload.len() - at - 1) as u64;
            if behind > 0 && found < wanted {
                self.start = Start { spot: Spot { seq: output.seq, skip: at + 1 }, from_end: behind };
                found += 1;
            }
        }
        self.walked += output.len;
        self.entry = entry;
        if found < wanted && self.walked > self.start.from_end && self.peek()?.is_none() {
            self.start = Start { spot: Spot { seq: output.seq, skip: 0 }, from_end: self.walked };
            found += 1; // the first line of all
        }
        Ok((found, output.len))
    }
}

impl Window {
    /// A part of the file, read with what comes before it.
    fn read(&mut self, log: &dyn File, position: u64, len: u64) -> io::Result<&[u8]> {
        if len > MAX_PAYLOAD as u64 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let end = position + len;
        if position < self.start || end > self.start + self.bytes.len() as u64 {
            self.start = end.saturating_sub(MAX_PAYLOAD as u64);
            self.bytes.resize((end - self.start) as usize, 0);
            log.read_exact_at(&mut self.bytes, self.start).inspect_err(|_| self.bytes.clear())?;
        }
        let from = (position - self.start) as usize;
        Ok(&self.bytes[from..from + len as usize])
    }
}

#[cfg(test)]
mod tests {
    use phonehome_env::disk::RealDisk;
    use phonehome_proto::{
        event::{Event, Gap},
        frame::Record,
        id::StepName,
        tally::Tally,
    };
    use proptest::prelude::*;

    use super::*;
    use crate::store::{
        Durability,
        faulty::{Agent, tempdir},
        log::{AttemptLog, Batch},
    };

    /// What an agent does.
    #[derive(Debug, Clone)]
    enum Act {
        Write(Stream, String),
        Gap(Stream, u64),
    }

    fn act() -> impl Strategy<Value = Act> {
        let stream = || prop_oneof![8 => Just(Stream::Stdout), 1 => Just(Stream::Stderr)];
        prop_oneof![
            20 => (stream(), "[a-c\n]{0,12}").prop_map(|(stream, text)| Act::Write(stream, text)),
            1 => Just(Act::Write(Stream::Event, "{}".into())),
            1 => (stream(), 1..9_u64).prop_map(|(stream, bytes)| Act::Gap(stream, bytes)),
        ]
    }

    struct Scene {
        files: Arc<AttemptFiles>,
        records: Vec<Record>,
        _dir: tempfile::TempDir,
    }

    impl Scene {
        /// An attempt, as the worker has it or, `archived`, as it is found on the disk.
        fn new(acts: &[Act], archived: bool) -> Self {
            let (dir, mut agent) = (tempdir(), Agent::new(1));
            let mut log = AttemptLog::create(Arc::new(RealDisk), dir.path(), &agent.owner(), Durability::Os).unwrap();
            for act in acts {
                match act {
                    Act::Write(stream, text) => drop(agent.write(*stream, text)),
                    Act::Gap(stream, bytes) => {
                        let gap = Event::Gap(Gap { stream: *stream, bytes: *bytes, cause: "test".into() });
                        agent.write(Stream::Event, &String::from_utf8(gap.payload()).unwrap());
                    }
                }
            }
            let (records, tally) = (agent.records.clone(), agent.tally.clone());
            log.append(&[Batch { records: records.clone(), tally: tally.clone() }]).unwrap();
            log.sync().unwrap();
            let path = dir.path().to_owned();
            let files = AttemptFiles::new(Arc::new(RealDisk), "b".parse().unwrap(), StepName::default(), 1, path);
            let known = if archived { Tally::default() } else { tally };
            let finished = archived.then(|| (agent.finished(), FinishedAck::Complete));
            let (entries, next) = (records.len() as u64, agent.tally.next());
            files.progress.send_modify(|progress| {
                (progress.entries, progress.next, progress.finished) = (entries, next, finished);
                progress.tally = known;
            });
            Self { files, records, _dir: dir }
        }

        fn output(&self, stream: Option<Stream>) -> Vec<u8> {
            let is_wanted =
                |record: &&Record| record.stream.is_output() && stream.is_none_or(|stream| stream == record.stream);
            self.records.iter().filter(is_wanted).flat_map(|record| record.payload.to_vec()).collect()
        }

        /// What is behind a spot.
        fn behind(&self, stream: Option<Stream>, spot: Spot) -> Vec<u8> {
            let mut behind = Vec::new();
            for record in self.records.iter().filter(|record| record.seq >= spot.seq && record.stream.is_output()) {
                let skip = if record.seq == spot.seq { spot.skip } else { 0 };
                if stream.is_none_or(|stream| stream == record.stream) {
                    behind.extend_from_slice(&record.payload[skip..]);
                }
            }
            behind
        }
    }

    const PARTS: [Option<Stream>; 3] = [None, Some(Stream::Stdout), Some(Stream::Stderr)];

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

        #[test]
        fn any_range_of_any_stream_is_read_and_found(
            acts in prop::collection::vec(act(), 0..150),
            archived: bool,
            places in prop::collection::vec((0.0..=1.0, 1..40_usize), 1..8),
        ) {
            let scene = Scene::new(&acts, archived);
            for stream in PARTS {
                let expected = scene.output(stream);
                let mut slice = Slice::open(&scene.files, stream).unwrap();
                prop_assert_eq!(slice.len(), expected.len() as u64, "{:?}", stream);
                for (part, max) in &places {
                    let at = (expected.len() as f64 * part) as usize;
                    let spot = slice.locate(at as u64).unwrap();
                    prop_assert_eq!(scene.behind(stream, spot), &expected[at..], "{:?} {}", stream, at);
                    let mut read = Vec::new();
                    while at + read.len() < expected.len() && read.len() < 100 {
                        let block = slice.read((at + read.len()) as u64, *max).unwrap();
                        prop_assert!(!block.is_empty() && block.len() <= *max);
                        read.extend_from_slice(&block);
                    }
                    prop_assert_eq!(&read, &expected[at..at + read.len()], "{:?} {}", stream, at);
                }
            }
        }

        #[test]
        fn the_last_lines_are_found(acts in prop::collection::vec(act(), 0..60), lines in 0..9_u64) {
            let scene = Scene::new(&acts, false);
            for stream in PARTS {
                let output = scene.output(stream);
                let all: Vec<_> = output.split_inclusive(|&byte| byte == b'\n').collect();
                let expected = all[all.len().saturating_sub(lines as usize)..].concat();
                let start = tail(&scene.files, stream, lines);
                prop_assert_eq!(start.from_end, expected.len() as u64, "{:?} of {:?}", stream, output);
                prop_assert_eq!(scene.behind(stream, start.spot), expected);
            }
        }
    }

    #[test]
    fn a_stream_with_nothing_missing_is_found_by_bisection_and_any_other_is_not() {
        let plain: Vec<_> = (0..500)
            .map(|at| Act::Write(if at % 50 == 7 { Stream::Stderr } else { Stream::Stdout }, "x".into()))
            .collect();
        for archived in [false, true] {
            for gap in [None, Some(Stream::Stdout), Some(Stream::Stderr)] {
                let mut acts = plain.clone();
                gap.into_iter().for_each(|stream| acts.insert(100, Act::Gap(stream, 3)));
                let scene = Scene::new(&acts, archived);
                for stream in [Stream::Stdout, Stream::Stderr] {
                    let slice = Slice::open(&scene.files, Some(stream)).unwrap();
                    assert_eq!(slice.can_bisect, gap.is_none(), "{stream:?}, {gap:?} missing, {archived}");
                }
            }
        }
    }

    /// Nothing of the other stream is stored, and it has a gap all the same.
    #[test]
    fn an_empty_record_behind_a_gap_moves_nothing() {
        let write = |stream, text: &str| Act::Write(stream, text.into());
        let acts = [
            write(Stream::Stdout, "one"),
            Act::Gap(Stream::Stderr, 1),
            write(Stream::Stdout, "two"),
            write(Stream::Stderr, ""),
            write(Stream::Stdout, "three"),
        ];
        for archived in [false, true] {
            let scene = Scene::new(&acts, archived);
            let mut slice = Slice::open(&scene.files, Some(Stream::Stdout)).unwrap();
            for at in 0..=11 {
                let spot = slice.locate(at as u64).unwrap();
                assert_eq!(scene.behind(Some(Stream::Stdout), spot), &b"onetwothree"[at..], "{at}");
            }
        }
    }

    #[test]
    fn a_rare_stream_is_read_past_everything_between() {
        let mut acts = vec![Act::Write(Stream::Stderr, "first".into())];
        acts.extend((0..WALK * 2 + 9).map(|_| Act::Write(Stream::Stdout, "x".into())));
        acts.push(Act::Write(Stream::Stderr, "last".into()));
        for gap in [None, Some(Act::Gap(Stream::Stdout, 1))] {
            acts.extend(gap);
            let scene = Scene::new(&acts, false);
            let mut slice = Slice::open(&scene.files, Some(Stream::Stderr)).unwrap();
            let mut read = Vec::new();
            while (read.len() as u64) < slice.len() {
                read.extend_from_slice(&slice.read(read.len() as u64, 100).unwrap());
            }
            assert_eq!(read, b"firstlast");
        }
    }

    #[test]
    fn the_tag_is_another_when_the_bytes_are() {
        let acts = |text: &str| [Act::Write(Stream::Stdout, text.into())];
        let tag = |text: &str, stream, archived| {
            let scene = Scene::new(&acts(text), archived);
            Slice::open(&scene.files, stream).unwrap().tag().to_owned()
        };
        assert_eq!(tag("a", None, false), tag("a", None, true), "it outlives a restart");
        assert_ne!(tag("a", None, false), tag("b", None, false));
        assert_ne!(tag("a", None, false), tag("a", Some(Stream::Stdout), false));
    }

    #[test]
    fn the_last_lines_of_several_attempts_are_the_latest() {
        let write = |text: &str| Act::Write(Stream::Stdout, text.into());
        let (a, b) = (Scene::new(&[write("a1\na2\n"), write("a3\n")], false), Scene::new(&[write("b1\n")], false));
        let attempts = [a.files.clone(), b.files.clone()];
        let mut tail = Tail::new(&attempts, None, 3).unwrap();
        let starts = tail.advance().unwrap().unwrap();
        assert_eq!(a.behind(None, starts[0].spot), b"a2\na3\n");
        assert_eq!(b.behind(None, starts[1].spot), b"b1\n");
    }

    fn tail(files: &Arc<AttemptFiles>, stream: Option<Stream>, lines: u64) -> Start {
        let mut tail = Tail::new(std::slice::from_ref(files), stream, lines).unwrap();
        loop {
            if let Some(starts) = tail.advance().unwrap() {
                return starts[0];
            }
        }
    }
}
