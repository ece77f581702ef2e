//! What everybody may know of an attempt, and the small files that say whose it is and how it ended.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use phonehome_env::disk::{Disk, File, Open};
use phonehome_proto::{
    frame::{Finished, FinishedAck, Hello},
    id::{Attempt, BuildId, ProducerId, StepName},
    tally::Tally,
};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::{
    index::{ENTRY, Entry},
    quota::Quota,
    seal::{is_sealed, sealed_path},
    sealed::SealedFile,
};

/// Whose an attempt is, where it lies, how far it has got.
#[derive(Debug)]
pub(crate) struct AttemptFiles {
    pub(crate) build: BuildId,
    pub(crate) step: StepName,
    pub(crate) attempt: Attempt,
    pub(crate) dir: PathBuf,
    pub(crate) progress: watch::Sender<Progress>,
    /// What its build may store, once somebody has limited it.
    pub(super) quota: OnceLock<Arc<Quota>>,
    disk: Arc<dyn Disk>,
}

/// What is durable.
#[derive(Debug, Clone, Default)]
pub(crate) struct Progress {
    /// Everything below this sequence number.
    pub(crate) next: u64,
    /// Payload bytes, events included.
    pub(crate) bytes: u64,
    /// The account of these records.
    pub(crate) tally: Tally,
    /// Entries in the index.
    pub(crate) entries: u64,
    /// How often records were taken back, to be sent again.
    pub(crate) rewinds: u64,
    /// The end and what to answer, once stored.
    pub(crate) finished: Option<(Finished, FinishedAck)>,
    /// The files can no longer be written; the next hello takes them up again.
    pub(crate) failed: bool,
    /// What was handed over waits until there is room. Said again about once a second while it lasts.
    pub(crate) full: bool,
    /// Counts how often the files were replaced by copies: who has them open opens them anew.
    pub(crate) generation: u64,
}

impl AttemptFiles {
    pub(super) fn new(
        disk: Arc<dyn Disk>,
        build: BuildId,
        step: StepName,
        attempt: Attempt,
        dir: PathBuf,
    ) -> Arc<Self> {
        let progress = watch::Sender::new(Progress::default());
        let quota = OnceLock::new();
        Arc::new(Self { build, step, attempt, dir, progress, quota, disk })
    }

    /// Opens one of the files to read it, plain or sealed.
    pub(super) fn open(&self, name: &str) -> io::Result<Box<dyn File>> {
        let plain = self.dir.join(name);
        match self.disk.open(&plain, Open::Read) {
            Err(error) if is_missing(&error) => match self.disk.open(&sealed_path(&plain), Open::Read) {
                Ok(sealed) => Ok(Box::new(SealedFile::open(sealed)?)),
                Err(_) => Err(error),
            },
            opened => opened,
        }
    }

    /// What its agent said about itself when it came.
    ///
    /// # Errors
    ///
    /// When the file cannot be read. One that is missing or damaged says nothing.
    pub(crate) fn labels(&self) -> io::Result<(String, BTreeMap<String, String>)> {
        let text = read_optional(&*self.disk, &self.dir.join("attempt.json"))?.unwrap_or_default();
        Ok(serde_json::from_slice::<Owner>(&text)
            .map_or_else(|_| Default::default(), |owner| (owner.agent, owner.labels)))
    }

    /// Whether its logs are compressed.
    ///
    /// # Errors
    ///
    /// When the directory cannot be looked at.
    pub(crate) fn is_sealed(&self) -> io::Result<bool> {
        is_sealed(&*self.disk, &self.dir)
    }

    /// Bytes of output that are stored.
    ///
    /// # Errors
    ///
    /// When the file cannot be looked at.
    pub(crate) fn output_bytes(&self) -> io::Result<u64> {
        let progress = self.progress.borrow().clone();
        if progress.finished.is_none() && progress.tally.next() > 0 {
            return Ok(progress.tally.counts().output_bytes());
        }
        self.open("log")?.len() // what a quota has left out is counted and not there
    }

    /// The checksums of those of these records that are stored, whether synced or not. Reads the index, which waits for the
    /// disk.
    pub(crate) fn checksums(&self, seqs: impl IntoIterator<Item = u64>) -> BTreeMap<u64, u32> {
        let Ok(index) = self.open("index") else { return BTreeMap::new() };
        seqs.into_iter().filter_map(|seq| Some((seq, checksum(&*index, seq)?))).collect()
    }
}

/// The checksum of one record; `None` when it is not stored.
fn checksum(index: &dyn File, seq: u64) -> Option<u32> {
    let mut wire = [0; ENTRY];
    let (mut low, mut high) = (0, index.len().ok()? / ENTRY as u64);
    while low < high {
        let middle = low + (high - low) / 2;
        index.read_exact_at(&mut wire, middle * ENTRY as u64).ok()?;
        match Entry::decode(&wire)? {
            Entry::Record { seq: found, crc, .. } if found == seq => return Some(crc),
            Entry::Record { seq: found, .. } if found > seq => high = middle,
            Entry::Hole { from, .. } if from > seq => high = middle,
            Entry::Record { .. } | Entry::Hole { .. } => low = middle + 1,
        }
    }
    None
}

/// Who made an attempt; `attempt.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Owner {
    pub(super) producer: ProducerId,
    pub(super) agent: String,
    pub(super) labels: BTreeMap<String, String>,
}

impl Owner {
    /// Of an attempt that has lost its owner. No agent draws such a number.
    pub(super) fn nobody() -> Self {
        Self { producer: ProducerId([0; 16]), agent: String::new(), labels: BTreeMap::new() }
    }
}

impl From<&Hello> for Owner {
    fn from(hello: &Hello) -> Self {
        Self { producer: hello.producer, agent: hello.agent.clone(), labels: hello.labels.clone() }
    }
}

/// How it ended and what was answered, in `finished.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Ended {
    pub(super) finished: Finished,
    pub(super) answer: FinishedAck,
}

/// What `finished.json` says.
pub(super) enum End {
    /// There is one that cannot be understood.
    Damaged,
    Known(Ended),
    None,
}

impl End {
    pub(super) fn read(disk: &dyn Disk, dir: &Path) -> io::Result<Self> {
        let Some(text) = read_optional(disk, &dir.join("finished.json"))? else { return Ok(Self::None) };
        Ok(serde_json::from_slice(&text).map_or(Self::Damaged, Self::Known))
    }

    pub(super) fn known(&self) -> Option<&Ended> {
        match self {
            Self::Known(ended) => Some(ended),
            Self::Damaged | Self::None => None,
        }
    }
}

/// The contents of a file that need not be there.
pub(super) fn read_optional(disk: &dyn Disk, path: &Path) -> io::Result<Option<Vec<u8>>> {
    match disk.read(path) {
        Ok(contents) => Ok(Some(contents)),
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether an error says that there is no file of that name.
pub(super) fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests {
    use phonehome_env::disk::RealDisk;
    use phonehome_proto::frame::Stream;

    use super::*;
    use crate::store::{
        Durability,
        faulty::{Agent, tempdir},
        log::{AttemptLog, Batch},
    };

    #[test]
    fn the_checksum_of_every_stored_record_is_found() {
        let (dir, mut agent) = (tempdir(), Agent::new(1));
        let mut log = AttemptLog::create(Arc::new(RealDisk), dir.path(), &agent.owner(), Durability::Os).unwrap();
        log.hole(3).unwrap();
        agent.tally.skip_to(3);
        let records: Vec<_> = (0..9).map(|_| agent.write(Stream::Stdout, "x")).collect();
        log.append(&[Batch { records: records.clone(), tally: agent.tally.clone() }]).unwrap();
        let (build, step) = ("b".parse().unwrap(), StepName::default());
        let files = AttemptFiles::new(Arc::new(RealDisk), build, step, 1, dir.path().to_owned());
        let expected: BTreeMap<_, _> = records.iter().map(|record| (record.seq, record.crc)).collect();
        assert_eq!(files.checksums(0..20), expected, "not of the hole, and not of what is to come");
        std::fs::remove_file(dir.path().join("index")).unwrap();
        assert!(files.checksums(0..20).is_empty());
    }
}
