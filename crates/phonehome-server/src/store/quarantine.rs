//! Setting damaged files aside and putting new ones in their place, so that a crash at any point does no harm.
//!
//! 1. New files are written as `NAME.new` and synced. Until the next step nothing has happened: they are leftovers.
//! 2. `repair.json` is written: from here on the change is completed by whoever opens the attempt next.
//! 3. The originals are moved to `quarantine/NUMBER/`. Nothing in there is ever touched again.
//! 4. The new files get their names.
//! 5. `repair.json` is removed.
//!
//! Each step is durable before the next one begins, and each does only what is left of it to do.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use phonehome_env::disk::{Disk, Open, write_whole};
use phonehome_proto::frame::Record;
use serde::{Deserialize, Serialize};
use tracing::error;

use super::{
    attempt::{Ended, Owner, is_missing, read_optional},
    log::{AttemptLog, Batch, NAMES, Point, fresh, open_fresh},
    seal::sealed_path,
};

/// `repair.json`: a change that was decided.
#[derive(Debug, Serialize, Deserialize)]
struct Repair {
    /// Where in `quarantine` the originals go.
    number: u64,
    /// Whether `finished.json` goes there as well, also without a new one.
    finished: bool,
}

/// New files for an attempt, while they are written.
pub(super) struct Rewrite {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    log: AttemptLog,
    /// Not written yet.
    gathered: Vec<Record>,
    bytes: usize,
    at: Point,
}

/// Payload bytes and records written at a time.
const GATHER: (usize, usize) = (256 * 1024, 1024);

pub(super) const REPAIR: &str = "repair.json";
const FINISHED: &str = "finished.json";
const OWNER: &str = "attempt.json";

impl Rewrite {
    pub(super) fn begin(disk: &Arc<dyn Disk>, dir: &Path) -> io::Result<Self> {
        let [log, events, index] = NAMES.map(|name| open_fresh(&**disk, &dir.join(name)));
        let files = [log?, events?, index?];
        Ok(Self {
            disk: disk.clone(),
            dir: dir.to_owned(),
            log: AttemptLog::nameless(disk.clone(), dir, files),
            gathered: Vec::new(),
            bytes: 0,
            at: Point::default(),
        })
    }

    /// Adds a record, after which the account is `at`. What is missing before it becomes a hole.
    pub(super) fn push(&mut self, record: Record, at: &Point) -> io::Result<()> {
        if record.seq > self.at.tally.next() {
            self.hole(record.seq)?;
        }
        self.bytes += record.payload.len();
        self.gathered.push(record);
        self.at.clone_from(at);
        if self.bytes >= GATHER.0 || self.gathered.len() >= GATHER.1 { self.flush() } else { Ok(()) }
    }

    /// Adds a hole, after which the account is `at`.
    pub(super) fn skip_to(&mut self, at: &Point) -> io::Result<()> {
        self.hole(at.tally.next())?;
        self.at.clone_from(at);
        Ok(())
    }

    fn hole(&mut self, to: u64) -> io::Result<()> {
        self.flush()?;
        self.log.hole(to)
    }

    fn flush(&mut self) -> io::Result<()> {
        let records = std::mem::take(&mut self.gathered);
        self.bytes = 0;
        if records.is_empty() {
            return Ok(());
        }
        self.log.append(&[Batch { records, tally: self.at.tally.clone() }])
    }

    /// Everything is written, and what is missing up to `next` is a hole too. Makes it durable and tells what it is.
    pub(super) fn end_at(&mut self, next: u64) -> io::Result<Point> {
        self.flush()?;
        if next > self.at.tally.next() {
            self.hole(next)?;
        }
        self.log.sync()?;
        Ok(self.log.durable().clone())
    }

    /// Puts the new files, and the new end if there is one, in the place of the old. Tells where those are.
    pub(super) fn replace(self, ended: Option<&Ended>, finished: bool) -> io::Result<u64> {
        let (disk, dir) = (&*self.disk, &*self.dir);
        if let Some(ended) = ended {
            write_whole(disk, &fresh(&dir.join(FINISHED)), &serde_json::to_vec_pretty(ended)?, true)?;
        }
        disk.sync_dir(dir)?;
        let number = free_number(disk, dir)?;
        write_whole(disk, &dir.join(REPAIR), &serde_json::to_vec(&Repair { number, finished })?, true)?;
        complete(disk, dir)?;
        Ok(number)
    }
}

/// Completes a change that was decided, if there is one, and removes what is left of one that was not.
pub(super) fn complete(disk: &dyn Disk, dir: &Path) -> io::Result<()> {
    let names = || NAMES.into_iter().chain([FINISHED]).map(|name| dir.join(name));
    let Some(repair) = read_optional(disk, &dir.join(REPAIR))? else {
        for leftover in names().map(|path| fresh(&path)) {
            if disk.exists(&leftover)? {
                disk.remove_file(&leftover)?;
            }
        }
        return Ok(());
    };
    let Repair { number, finished } = serde_json::from_slice(&repair)?;
    let aside = aside(dir, number);
    disk.create_dirs(&aside)?;
    for (original, name) in names().zip(NAMES.into_iter().chain([FINISHED])) {
        let kept = aside.join(name);
        let is_original = disk.exists(&fresh(&original))? || name == FINISHED && finished;
        if is_original && !disk.exists(&kept)? && disk.exists(&original)? {
            disk.rename(&original, &kept)?;
        }
    }
    [&aside, &dir.join("quarantine"), dir].into_iter().try_for_each(|changed: &Path| disk.sync_dir(changed))?;
    for original in names() {
        if disk.exists(&fresh(&original))? {
            disk.rename(&fresh(&original), &original)?;
        }
    }
    disk.sync_dir(dir)?;
    disk.remove_file(&dir.join(REPAIR))?;
    disk.sync_dir(dir)
}

/// Whose attempt it is; `None` when there is no such attempt. When that cannot be known any more, it is nobody's: its log
/// can be read, and its agent, should it come back, makes another.
pub(super) fn owner(disk: &dyn Disk, dir: &Path) -> io::Result<Option<Owner>> {
    let path = dir.join(OWNER);
    let text = read_optional(disk, &path)?;
    let owner = text.as_ref().and_then(|text| serde_json::from_slice(text).ok());
    let is_attempt = text.is_some() || has_records(disk, dir)?;
    if owner.is_some() || !is_attempt {
        return Ok(owner);
    }
    if let Some(text) = text {
        let aside = aside(dir, free_number(disk, dir)?);
        disk.create_dirs(&aside)?;
        write_whole(disk, &aside.join(OWNER), &text, true)?;
        [&dir.join("quarantine"), dir].into_iter().try_for_each(|changed: &Path| disk.sync_dir(changed))?;
    }
    error!(attempt = %dir.display(), "{OWNER} is damaged or gone: nobody can go on with this attempt");
    let nobody = Owner::nobody();
    write_whole(disk, &path, &serde_json::to_vec_pretty(&nobody)?, true)?;
    Ok(Some(nobody))
}

fn has_records(disk: &dyn Disk, dir: &Path) -> io::Result<bool> {
    let index = dir.join("index");
    match disk.open(&index, Open::Read) {
        Ok(index) => Ok(!index.is_empty()?),
        Err(error) if is_missing(&error) => Ok(disk.open(&sealed_path(&index), Open::Read).is_ok()),
        Err(error) => Err(error),
    }
}

/// The first number under which nothing was set aside.
fn free_number(disk: &dyn Disk, dir: &Path) -> io::Result<u64> {
    let mut number = 1;
    while disk.exists(&aside(dir, number))? {
        number += 1;
    }
    Ok(number)
}

fn aside(dir: &Path, number: u64) -> PathBuf {
    dir.join("quarantine").join(number.to_string())
}
