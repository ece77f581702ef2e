//! A disk that fails when told to, for tests; and what they write on it.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io::{self, IoSlice},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use phonehome_env::disk::{Disk, File, Open, RealDisk, Volume};
use phonehome_proto::{
    frame::{End, Finished, Hello, Record, Stream},
    id::{ProducerId, StepName},
    tally::Tally,
};

use super::attempt::Owner;

/// The real disk, with faults. A rule sees every operation before it is done. Syncing does
/// nothing else: no test crashes the machine.
#[derive(Debug, Clone, Default)]
pub(super) struct FaultyDisk(Arc<Mutex<Faults>>);

#[derive(Default)]
struct Faults {
    rule: Option<Rule>,
    seen: Vec<String>,
    /// What is said to be free; everything when it is `None`.
    free: Option<u64>,
}

/// Gets `OPERATION NAME`, where NAME is the last component of the path; half of a write that fails is written.
type Rule = Box<dyn FnMut(&str) -> Option<io::ErrorKind> + Send>;

impl std::fmt::Debug for Faults {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Faults").field("seen", &self.seen).finish_non_exhaustive()
    }
}

impl FaultyDisk {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// What fails from now on.
    pub(super) fn fail(&self, rule: impl FnMut(&str) -> Option<io::ErrorKind> + Send + 'static) {
        self.0.lock().unwrap().rule = Some(Box::new(rule));
    }

    /// One operation fails always.
    pub(super) fn fail_always(&self, operation: &'static str, kind: io::ErrorKind) {
        self.fail(move |seen| (seen == operation).then_some(kind));
    }

    /// Only the first `count` operations from now on are done, as before a crash.
    pub(super) fn crash_after(&self, count: usize) {
        let mut left = count;
        self.fail(move |_| {
            let is_down = left == 0;
            left = left.saturating_sub(1);
            is_down.then_some(io::ErrorKind::Other)
        });
    }

    /// How much room the disk says it has.
    pub(super) fn say_free(&self, bytes: u64) {
        self.0.lock().unwrap().free = Some(bytes);
    }

    pub(super) fn heal(&self) {
        self.0.lock().unwrap().rule = None;
    }

    /// What was done since the last call, reading aside.
    pub(super) fn seen(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().seen)
    }

    fn check(&self, operation: &str, path: &Path) -> io::Result<()> {
        let mut faults = self.0.lock().unwrap();
        let seen = format!("{operation} {}", path.file_name().unwrap_or_default().to_string_lossy());
        let fault = faults.rule.as_mut().and_then(|rule| rule(&seen));
        if operation != "read" {
            faults.seen.push(seen);
        }
        fault.map_or(Ok(()), |kind| Err(kind.into()))
    }
}

impl Disk for FaultyDisk {
    fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn File>> {
        if how != Open::Read {
            self.check("open", path)?;
        }
        let file = RealDisk.open(path, how)?;
        Ok(Box::new(FaultyFile { file, path: path.to_owned(), disk: self.clone() }))
    }

    fn create_dirs(&self, path: &Path) -> io::Result<()> {
        self.check("mkdir", path)?;
        RealDisk.create_dirs(path)
    }

    fn private_dir(&self, path: &Path) -> io::Result<()> {
        self.check("mkdir", path)?;
        RealDisk.private_dir(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<OsString>> {
        RealDisk.list(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.check("rename", to)?;
        RealDisk.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.check("remove", path)?;
        RealDisk.remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.check("remove", path)?;
        RealDisk.remove_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.check("syncdir", path)
    }

    fn free(&self, dir: &Path) -> io::Result<u64> {
        self.check("free", dir)?;
        Ok(self.0.lock().unwrap().free.unwrap_or(u64::MAX))
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        RealDisk.exists(path)
    }

    fn volume(&self, dir: &Path) -> io::Result<Option<Box<dyn Volume>>> {
        Ok(Some(Box::new(FaultyVolume { dir: dir.to_owned(), disk: self.clone() })))
    }
}

/// Files that are synced one by one.
pub(super) const WORTH: usize = 16;

#[derive(Debug)]
struct FaultyVolume {
    dir: PathBuf,
    disk: FaultyDisk,
}

impl Volume for FaultyVolume {
    fn sync(&self) -> io::Result<()> {
        self.disk.check("syncfs", &self.dir)
    }

    fn worth(&self) -> usize {
        WORTH
    }
}

#[derive(Debug)]
struct FaultyFile {
    file: Box<dyn File>,
    path: PathBuf,
    disk: FaultyDisk,
}

impl File for FaultyFile {
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        self.disk.check("read", &self.path)?;
        self.file.read_at(buffer, position)
    }

    fn write_at(&self, slices: &[IoSlice<'_>], position: u64) -> io::Result<usize> {
        if let Err(error) = self.disk.check("write", &self.path) {
            let half = slices.first().map_or(&[][..], |slice| &slice[..slice.len() / 2]);
            self.file.write_at(&[IoSlice::new(half)], position)?;
            return Err(error);
        }
        self.file.write_at(slices, position)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.check("truncate", &self.path)?;
        self.file.set_len(len)
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.check("sync", &self.path)
    }

    fn lock(&self) -> io::Result<bool> {
        self.file.lock()
    }
}

/// A directory in memory, where the system has that: a thousand scenes take a second there.
pub(super) fn tempdir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// An agent, as far as the store knows one: what it writes and the account it keeps.
#[derive(Debug, Clone)]
pub(super) struct Agent {
    producer: ProducerId,
    pub(super) records: Vec<Record>,
    pub(super) tally: Tally,
}

impl Agent {
    pub(super) fn new(producer: u8) -> Self {
        Self { producer: ProducerId([producer; 16]), records: Vec::new(), tally: Tally::default() }
    }

    /// Writes a record.
    pub(super) fn write(&mut self, stream: Stream, text: &str) -> Record {
        let record = Record::new(self.tally.next(), 0, stream, self.tally.offset(stream), text.to_owned().into());
        self.tally.add(&record);
        self.records.push(record.clone());
        record
    }

    /// Says hello to step `main` of build `b`, holding everything from `oldest` on.
    pub(super) fn hello(&self, oldest: u64) -> Hello {
        Hello {
            build: "b".parse().unwrap(),
            step: StepName::default(),
            producer: self.producer,
            oldest,
            next: self.tally.next(),
            labels: BTreeMap::new(),
            agent: "test".into(),
            capabilities: Vec::new(),
        }
    }

    pub(super) fn owner(&self) -> Owner {
        Owner::from(&self.hello(0))
    }

    pub(super) fn finished(&self) -> Finished {
        let (next, counts, digest) = (self.tally.next(), self.tally.counts(), self.tally.digest());
        Finished { next, counts, digest, end: End::Exited(0), time: 1, usage: None }
    }
}
