//! The writing side of an attempt's files. Only the store's worker has one.

use std::{
    io::{self, IoSlice},
    path::{Path, PathBuf},
    sync::Arc,
};

use phonehome_env::disk::{Disk, File, Open, is_full, name_whole, stage_whole, write_whole};
use phonehome_proto::{
    frame::{Finished, FinishedAck, Record, Stream},
    tally::Tally,
};

use super::{
    Durability,
    attempt::{Ended, Owner},
    index::{ENTRY, Entry},
    seal::sealed_path,
};

/// One attempt's files and how far they have got.
///
/// What is appended is written, payloads and index entries alike, and [`Self::sync`] makes all of it durable at once.
/// Nothing orders payloads before entries on their way to the disk, and nothing has to: an entry is believed only when
/// its payload's checksum agrees, and neither is acknowledged before both are synced.
#[derive(Debug)]
pub(super) struct AttemptLog {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    durability: Durability,
    /// In the order of [`NAMES`]; each is opened when it is needed, and closed while nobody writes.
    open: [Option<Box<dyn File>>; 3],
    /// Files written to since they were synced.
    touched: [bool; 3],
    /// Files whose sync failed. They are not written to, synced or believed any more.
    broken: [bool; 3],
    /// Whether the files get their names only when all of it is durable.
    nameless: bool,
    written: Point,
    durable: Point,
    finished: Option<(Finished, FinishedAck)>,
}

/// How far a log has got.
#[derive(Debug, Clone, Default)]
pub(super) struct Point {
    /// Where the next payload goes in `log` and in `events`.
    pub(super) positions: [u64; 2],
    pub(super) entries: u64,
    /// The number after the last entry. What lies between it and the tally's was left out, see [`AttemptLog::append`],
    /// and nothing in the index says so yet.
    pub(super) indexed: u64,
    pub(super) tally: Tally,
    /// Records that were acknowledged once and are gone.
    pub(super) lost: u64,
}

impl Point {
    /// How long each file is.
    pub(super) fn ends(&self) -> [u64; 3] {
        [self.positions[0], self.positions[1], self.entries * ENTRY as u64]
    }
}

/// Records of one message, and the account after them.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) records: Vec<Record>,
    pub(super) tally: Tally,
}

/// The files that grow.
pub(super) const NAMES: [&str; 3] = ["log", "events", "index"];

impl AttemptLog {
    /// Makes an attempt, durably: before anybody hears of it, its directory says whose it is.
    pub(super) fn create(disk: Arc<dyn Disk>, dir: &Path, owner: &Owner, durability: Durability) -> io::Result<Self> {
        let log = Self::empty(disk, dir, durability)?;
        let durable = durability == Durability::Fsync;
        write_whole(&*log.disk, &dir.join("attempt.json"), &serde_json::to_vec_pretty(owner)?, durable)?;
        if durable {
            dir.ancestors().skip(1).take(3).try_for_each(|above| log.disk.sync_dir(above))?;
        }
        Ok(log)
    }

    /// The first half of [`Self::create`] for many attempts at once: [`Self::name`] is the second, when the file system
    /// was synced. Once it was synced again, it is as durable as if it had been created alone.
    pub(super) fn stage(disk: Arc<dyn Disk>, dir: &Path, owner: &Owner) -> io::Result<Self> {
        let mut log = Self::empty(disk, dir, Durability::Fsync)?;
        let file = log.disk.open(&dir.join("attempt.tmp"), Open::Write)?;
        file.set_len(0)?;
        file.write_all_at(&mut [IoSlice::new(&serde_json::to_vec_pretty(owner)?)], 0)?;
        log.close();
        Ok(log)
    }

    /// Makes it an attempt.
    pub(super) fn name(&self) -> io::Result<()> {
        self.disk.rename(&self.dir.join("attempt.tmp"), &self.dir.join("attempt.json"))
    }

    fn empty(disk: Arc<dyn Disk>, dir: &Path, durability: Durability) -> io::Result<Self> {
        disk.create_dirs(dir)?;
        let mut log = Self::resume(disk, dir, durability, Point::default(), None);
        for (at, name) in NAMES.into_iter().enumerate() {
            if !log.file(at)?.is_empty()? {
                let told = format!("{} has no owner: move {} aside", dir.join(name).display(), dir.display());
                return Err(io::Error::new(io::ErrorKind::InvalidData, told));
            }
        }
        Ok(log)
    }

    /// Goes on at a point up to which everything is durable.
    pub(super) fn resume(
        disk: Arc<dyn Disk>,
        dir: &Path,
        durability: Durability,
        mut at: Point,
        finished: Option<(Finished, FinishedAck)>,
    ) -> Self {
        at.indexed = at.tally.next();
        Self {
            disk,
            dir: dir.to_owned(),
            durability,
            open: [None, None, None],
            touched: [false; 3],
            broken: [false; 3],
            nameless: false,
            written: at.clone(),
            durable: at,
            finished,
        }
    }

    /// Starts in empty files that get their names later.
    pub(super) fn nameless(disk: Arc<dyn Disk>, dir: &Path, files: [Box<dyn File>; 3]) -> Self {
        let log = Self::resume(disk, dir, Durability::Fsync, Point::default(), None);
        Self { open: files.map(Some), touched: [true; 3], nameless: true, ..log }
    }

    /// Makes durable what is there: an earlier process may have written it and not lived to sync it.
    pub(super) fn confirm(&mut self) -> io::Result<()> {
        if self.durability == Durability::Os {
            return Ok(());
        }
        self.dir.ancestors().take(4).try_for_each(|dir| self.disk.sync_dir(dir))?;
        if self.finished.is_some() {
            return Ok(()); // everything else was synced before
        }
        self.touched = [true; 3];
        let mut synced = self.sync();
        for _ in NAMES {
            if synced.is_err() {
                synced = self.revive().map(drop); // a copy of what was just read and found good
            }
        }
        synced
    }

    /// Whether the entry at a place is the first of its round.
    fn is_first(&self, entry: u64) -> bool {
        entry == self.durable.entries || self.nameless
    }

    pub(super) fn durable(&self) -> &Point {
        &self.durable
    }

    /// How far it will be durable with the next [`Self::sync`].
    pub(super) fn written(&self) -> &Point {
        &self.written
    }

    pub(super) fn finished(&self) -> Option<&(Finished, FinishedAck)> {
        self.finished.as_ref()
    }

    fn file(&mut self, at: usize) -> io::Result<&dyn File> {
        if self.open[at].is_none() {
            self.open[at] = Some(open(&*self.disk, &self.dir, NAMES[at])?);
        }
        Ok(&**self.open[at].as_ref().expect("it was opened above"))
    }

    /// Closes the files until somebody writes again.
    pub(super) fn close(&mut self) {
        if self.touched == [false; 3] {
            self.close_unsynced(); // the next to open them need not know of errors between
        }
    }

    /// Closes the files before they are synced: only for one who is going to sync the whole file system, and says how
    /// that went with [`Self::note_synced`] or [`Self::distrust`].
    pub(super) fn close_unsynced(&mut self) {
        self.open = [None, None, None];
    }

    pub(super) fn is_open(&self) -> bool {
        self.open.iter().any(Option::is_some)
    }

    /// Files that [`Self::sync`] would sync.
    pub(super) fn unsynced(&self) -> usize {
        match self.durability {
            Durability::Fsync => self.touched.into_iter().filter(|&touched| touched).count(),
            Durability::Os => 0,
        }
    }

    /// Everything appended was made durable, with all else on the file system.
    pub(super) fn note_synced(&mut self) {
        self.touched = [false; 3];
        self.durable.clone_from(&self.written);
    }

    /// The file system could not be synced, and nobody knows what of it: every file that was written to may have been
    /// hit. Tells whether there is one.
    pub(super) fn distrust(&mut self) -> bool {
        for (broken, touched) in self.broken.iter_mut().zip(self.touched) {
            *broken |= touched;
        }
        self.unsynced() > 0
    }

    /// Writes records behind what is there. When there is no room for all of them, none are there. Records that the
    /// batches' tallies know of and that are not in them are left out: a hole goes before the next one that is.
    pub(super) fn append(&mut self, batches: &[Batch]) -> io::Result<()> {
        let Some(last) = batches.last() else { return Ok(()) };
        let mut after = self.written.clone();
        let mut payloads = [Vec::new(), Vec::new()];
        let mut entries = Vec::new();
        for record in batches.iter().flat_map(|batch| &batch.records) {
            let file = usize::from(!record.stream.is_output());
            let mut first = self.is_first(after.entries);
            if record.seq > after.indexed {
                let hole = Entry::Hole { from: after.indexed, to: record.seq };
                entries.extend_from_slice(&hole.encode(std::mem::take(&mut first)));
                after.entries += 1;
            }
            entries.extend_from_slice(&Entry::of(record, after.positions[file]).encode(first));
            payloads[file].push(IoSlice::new(&record.payload));
            if !record.stream.is_output() {
                payloads[file].push(IoSlice::new(b"\n"));
            }
            after.positions[file] += stored_len(record.stream, record.payload.len() as u32);
            after.entries += 1;
            after.indexed = record.seq + 1;
        }
        after.tally.clone_from(&last.tally);
        if entries.is_empty() {
            self.written = after;
            return Ok(());
        }
        let [mut log, mut events] = payloads;
        self.write([&mut log, &mut events, &mut vec![IoSlice::new(&entries)]], after)
    }

    /// Notes that the records up to `to` are gone.
    pub(super) fn hole(&mut self, to: u64) -> io::Result<()> {
        let mut after = self.written.clone();
        after.lost += to - after.tally.next();
        after.tally.skip_to(to);
        self.write_hole(after)
    }

    /// Whether something was left out and the index does not say so yet.
    pub(super) fn has_gap(&self) -> bool {
        self.written.indexed < self.written.tally.next()
    }

    /// Writes down that everything was left out since the last entry.
    pub(super) fn close_gap(&mut self) -> io::Result<()> {
        if self.has_gap() { self.write_hole(self.written.clone()) } else { Ok(()) }
    }

    fn write_hole(&mut self, mut after: Point) -> io::Result<()> {
        let (from, to) = (after.indexed, after.tally.next());
        let entry = Entry::Hole { from, to }.encode(self.is_first(after.entries));
        after.entries += 1;
        after.indexed = to;
        self.write([&mut Vec::new(), &mut Vec::new(), &mut vec![IoSlice::new(&entry)]], after)
    }

    /// Writes to each file what belongs there, and takes all of it back when there is no room for a part.
    fn write(&mut self, contents: [&mut Vec<IoSlice<'_>>; 3], after: Point) -> io::Result<()> {
        let ends = self.written.ends();
        for (at, slices) in contents.into_iter().enumerate().filter(|(_, slices)| !slices.is_empty()) {
            self.touched[at] = true;
            if let Err(error) = self.file(at)?.write_all_at(slices, ends[at]) {
                if is_full(&error) {
                    (0..=at).try_for_each(|at| self.file(at)?.set_len(ends[at]))?;
                }
                return Err(error);
            }
        }
        self.written = after;
        Ok(())
    }

    /// Makes everything appended durable.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        if self.durability == Durability::Fsync && self.touched != [false; 3] {
            let touched = self.touched;
            for at in (0..NAMES.len()).filter(|&at| touched[at]) {
                let synced = self.file(at)?.sync();
                self.broken[at] |= synced.is_err();
                synced?;
                self.touched[at] = false;
            }
        }
        self.note_synced();
        Ok(())
    }

    /// Goes back to where `tally` had got to, for the time being without touching what is on disk: [`Self::cut`] does.
    pub(super) fn step_back(&mut self, tally: Tally) -> io::Result<()> {
        let mut back = self.written.clone();
        let mut wire = [0; ENTRY];
        while let Some(last) = back.entries.checked_sub(1) {
            self.file(2)?.read_exact_at(&mut wire, last * ENTRY as u64)?;
            match Entry::decode(&wire) {
                Some(Entry::Record { seq, stream, position, .. }) if seq >= tally.next() => {
                    back.positions[usize::from(!stream.is_output())] = position;
                }
                // Of records that were left out: what remains of it is written when the next one is.
                Some(Entry::Hole { to, .. }) if to > tally.next() => {}
                Some(entry) => {
                    back.indexed = entry.end();
                    break;
                }
                None => return Err(io::ErrorKind::InvalidData.into()),
            }
            back.entries = last;
        }
        if back.entries == 0 {
            back.indexed = 0;
        }
        back.tally = tally;
        self.durable = back.clone();
        self.written = back;
        Ok(())
    }

    /// Removes from the files what lies beyond the current position, durably. The index first: after a crash, entries
    /// without their payloads would look like damage.
    pub(super) fn cut(&mut self) -> io::Result<()> {
        let ends = self.written.ends();
        let durable = self.durability == Durability::Fsync;
        for at in [2, 0, 1] {
            let file = self.file(at)?;
            file.set_len(ends[at])?;
            let synced = if durable { file.sync() } else { Ok(()) };
            self.broken[at] |= synced.is_err();
            synced?;
        }
        self.touched = [false; 3];
        Ok(())
    }

    /// The first half of [`Self::finish`] for many attempts at once: [`Self::name_end`] is the second, when the file
    /// system was synced. Once it was synced again, [`Self::note_end`] lets it be known.
    pub(super) fn stage_end(&self, finished: Finished, answer: FinishedAck) -> io::Result<()> {
        stage_whole(&*self.disk, &self.end_path(), &serde_json::to_vec_pretty(&Ended { finished, answer })?)
    }

    /// Makes what was staged the end.
    pub(super) fn name_end(&self) -> io::Result<()> {
        name_whole(&*self.disk, &self.end_path())
    }

    /// The end is durable.
    pub(super) fn note_end(&mut self, finished: Finished, answer: FinishedAck) {
        self.finished = Some((finished, answer));
    }

    fn end_path(&self) -> PathBuf {
        self.dir.join("finished.json")
    }

    /// Writes the end, whole or not at all.
    pub(super) fn finish(&mut self, finished: Finished, answer: FinishedAck) -> io::Result<()> {
        let ended = Ended { finished, answer };
        let contents = serde_json::to_vec_pretty(&ended)?;
        write_whole(&*self.disk, &self.end_path(), &contents, self.durability == Durability::Fsync)?;
        self.finished = Some((ended.finished, ended.answer));
        Ok(())
    }

    /// Goes back to what is durable, after an error. What is known of it in memory is right still, so that nothing is
    /// read again, with one exception: a file whose sync failed is given up, and a copy of what was durable before takes
    /// its place. Tells whether there is such a copy.
    pub(super) fn revive(&mut self) -> io::Result<bool> {
        self.close_unsynced();
        let ends = self.durable.ends();
        let copied = self.broken != [false; 3];
        for at in (0..NAMES.len()).filter(|&at| self.broken[at]) {
            copy(&*self.disk, &self.dir.join(NAMES[at]), ends[at])?;
        }
        if copied {
            self.disk.sync_dir(&self.dir)?;
        }
        let files = open_all(&*self.disk, &self.dir)?;
        for (file, end) in files.iter().zip(ends) {
            if file.len()? < end {
                let told = format!("{} has lost what was synced", self.dir.display());
                return Err(io::Error::new(io::ErrorKind::InvalidData, told));
            }
        }
        self.open = files.map(Some);
        self.broken = [false; 3];
        self.written.clone_from(&self.durable);
        self.cut()?;
        Ok(copied)
    }
}

/// Opens the files to write them, unless they are sealed: a new plain file would hide the sealed one.
pub(super) fn open_all(disk: &dyn Disk, dir: &Path) -> io::Result<[Box<dyn File>; 3]> {
    let [log, events, index] = NAMES.map(|name| open(disk, dir, name));
    Ok([log?, events?, index?])
}

fn open(disk: &dyn Disk, dir: &Path, name: &str) -> io::Result<Box<dyn File>> {
    let path = dir.join(name);
    if disk.exists(&sealed_path(&path))? && !disk.exists(&path)? {
        let told = format!("{} is sealed: its build has ended", dir.display());
        return Err(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, told));
    }
    disk.open(&path, Open::Write)
}

/// Replaces a file by a copy of its first bytes. Its directory is the caller's to sync.
fn copy(disk: &dyn Disk, path: &Path, len: u64) -> io::Result<()> {
    let (source, target) = (disk.open(path, Open::Read)?, open_fresh(disk, path)?);
    let mut block = vec![0; COPY_BLOCK];
    let mut position = 0;
    while position < len {
        let count = COPY_BLOCK.min(usize::try_from(len - position).unwrap_or(COPY_BLOCK));
        source.read_exact_at(&mut block[..count], position)?;
        target.write_all_at(&mut [IoSlice::new(&block[..count])], position)?;
        position += count as u64;
    }
    target.sync()?;
    disk.rename(&fresh(path), path)
}

/// Bytes copied at a time.
const COPY_BLOCK: usize = 1024 * 1024;

/// Where a file's successor is written.
pub(super) fn fresh(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

/// Makes a file's successor, empty.
pub(super) fn open_fresh(disk: &dyn Disk, path: &Path) -> io::Result<Box<dyn File>> {
    let fresh = fresh(path);
    if disk.exists(&fresh)? {
        disk.remove_file(&fresh)?; // its sync may have failed: then it is no file to write to again
    }
    disk.open(&fresh, Open::Write)
}

/// What a payload takes in its file: an event is followed by a newline.
pub(super) fn stored_len(stream: Stream, len: u32) -> u64 {
    u64::from(len) + u64::from(!stream.is_output())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::faulty::{Agent, FaultyDisk, tempdir};

    #[test]
    fn only_files_that_were_written_to_are_synced() {
        let mut scene = Scene::new();
        scene.disk.seen();
        scene.append(Stream::Stdout, "one\n").unwrap();
        assert_eq!(scene.synced(), ["sync log", "sync index"]);
        scene.append(Stream::Event, "{}").unwrap();
        assert_eq!(scene.synced(), ["sync events", "sync index"]);
        scene.log.sync().unwrap();
        assert!(scene.synced().is_empty());
    }

    #[test]
    fn what_has_no_room_leaves_nothing_behind() {
        for operation in ["write log", "write events", "write index"] {
            let mut scene = Scene::new();
            scene.append(Stream::Stdout, "one\n").unwrap();
            let before = scene.lens();
            scene.disk.fail_always(operation, io::ErrorKind::StorageFull);
            let records = vec![scene.agent.write(Stream::Stderr, "two\n"), scene.agent.write(Stream::Event, "{}")];
            let batch = [Batch { records, tally: scene.agent.tally.clone() }];
            assert!(is_full(&scene.log.append(&batch).unwrap_err()), "{operation}");
            assert_eq!(scene.lens(), before, "{operation}");
            scene.disk.heal();
            scene.log.append(&batch).and_then(|()| scene.log.sync()).unwrap();
            assert_eq!((scene.log.durable().entries, scene.contents("log")), (3, "one\ntwo\n".to_owned()));
        }
    }

    #[test]
    fn after_a_failed_write_the_log_goes_on_where_it_is_durable() {
        for operation in ["write log", "write index"] {
            let mut scene = Scene::new();
            scene.append(Stream::Stdout, "one\n").unwrap();
            let record = scene.fail_once(operation, "two\n");
            scene.disk.seen();
            assert!(!scene.log.revive().unwrap());
            assert!(scene.disk.seen().iter().all(|seen| !seen.starts_with("write")), "nothing is copied");
            scene.store(record).unwrap();
            assert_eq!((scene.log.durable().entries, scene.contents("log")), (2, "one\ntwo\n".to_owned()));
        }
    }

    #[test]
    fn a_file_whose_sync_failed_is_replaced_by_what_was_durable() {
        for file in NAMES {
            let mut scene = Scene::new();
            scene.append(Stream::Stdout, "one\n").unwrap();
            scene.append(Stream::Event, "{}").unwrap();
            let old = [0, 1, 2].map(|at| scene.log.file(at).unwrap().len().unwrap());
            scene.disk.fail(move |seen| (seen == format!("sync {file}")).then_some(io::ErrorKind::Other));
            let records = vec![scene.agent.write(Stream::Stdout, "two\n"), scene.agent.write(Stream::Event, "{}")];
            let batch = [Batch { records, tally: scene.agent.tally.clone() }];
            scene.log.append(&batch).and_then(|()| scene.log.sync()).unwrap_err();
            assert_eq!(scene.log.durable().entries, 2, "{file}");
            scene.disk.heal();
            scene.disk.seen();
            assert!(scene.log.revive().unwrap());
            let seen = scene.disk.seen();
            let steps = [format!("write {file}.new"), format!("sync {file}.new"), format!("rename {file}")];
            let places = steps.map(|step| seen.iter().position(|seen| *seen == step).expect("the file is copied"));
            assert!(places.is_sorted() && seen.contains(&"syncdir 1".to_owned()), "{seen:?}");
            assert!(!seen[..places[2]].contains(&format!("sync {file}")), "{seen:?}");
            assert_eq!(scene.lens(), old, "{file}");
            scene.log.append(&batch).and_then(|()| scene.log.sync()).unwrap();
            assert_eq!((scene.log.durable().entries, scene.contents("log")), (4, "one\ntwo\n".to_owned()));
        }
    }

    #[test]
    fn an_index_is_cut_before_what_it_points_to() {
        let mut scene = Scene::new();
        scene.append(Stream::Stdout, "one\n").unwrap();
        let tally = scene.agent.tally.clone();
        scene.append(Stream::Stdout, "two\n").unwrap();
        scene.disk.seen();
        scene.log.step_back(tally).and_then(|()| scene.log.cut()).unwrap();
        assert_eq!(scene.disk.seen()[..3], ["truncate index", "sync index", "truncate log"]);
        assert_eq!((scene.log.durable().entries, scene.contents("log")), (1, "one\n".to_owned()));
    }

    #[test]
    fn a_directory_with_a_log_and_no_owner_is_not_taken() {
        let mut scene = Scene::new();
        scene.append(Stream::Stdout, "precious").unwrap();
        std::fs::remove_file(scene.path("attempt.json")).unwrap();
        let disk = Arc::new(scene.disk.clone());
        let refused = AttemptLog::create(disk, &scene.path(""), &scene.agent.owner(), Durability::Os).unwrap_err();
        assert!(refused.to_string().contains("move"), "{refused}");
        assert_eq!(scene.contents("log"), "precious");
    }

    struct Scene {
        dir: tempfile::TempDir,
        disk: FaultyDisk,
        log: AttemptLog,
        agent: Agent,
    }

    impl Scene {
        fn new() -> Self {
            let (dir, disk, agent) = (tempdir(), FaultyDisk::new(), Agent::new(1));
            let attempt = dir.path().join("1");
            let log = AttemptLog::create(Arc::new(disk.clone()), &attempt, &agent.owner(), Durability::Fsync).unwrap();
            Self { dir, disk, log, agent }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join("1").join(name)
        }

        fn contents(&self, name: &str) -> String {
            std::fs::read_to_string(self.path(name)).unwrap()
        }

        fn lens(&self) -> Vec<u64> {
            NAMES.map(|name| std::fs::metadata(self.path(name)).unwrap().len()).into()
        }

        fn append(&mut self, stream: Stream, text: &str) -> io::Result<()> {
            let record = self.agent.write(stream, text);
            self.store(record)
        }

        fn store(&mut self, record: Record) -> io::Result<()> {
            let batch = Batch { records: vec![record], tally: self.agent.tally.clone() };
            self.log.append(&[batch])?;
            self.log.sync()
        }

        /// A record that is not stored.
        fn fail_once(&mut self, operation: &'static str, text: &str) -> Record {
            self.disk.fail_always(operation, io::ErrorKind::Other);
            let record = self.agent.write(Stream::Stdout, text);
            self.store(record.clone()).unwrap_err();
            self.disk.heal();
            record
        }

        fn synced(&self) -> Vec<String> {
            self.disk.seen().into_iter().filter(|seen| seen.starts_with("sync ")).collect()
        }
    }
}
