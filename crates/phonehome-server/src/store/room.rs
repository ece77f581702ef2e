//! Room on the disk: whether there is any, and a reserve for what must be written when there is not.

use std::{
    io::{self, IoSlice},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use phonehome_env::disk::{Disk, Open, is_full};
use tokio::time::Instant;
use tracing::{debug, error, info};

/// The state of the disk that all attempts share.
#[derive(Debug)]
pub(super) struct Room {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    /// When to look again, while there is none.
    retry_at: Option<Instant>,
    /// Whether there is none, for others.
    is_full: Arc<AtomicBool>,
    low_water: LowWater,
}

/// Room that output leaves to others, and when it was asked for last.
#[derive(Debug, Default)]
struct LowWater {
    min_free: u64,
    asked_at: Option<Instant>,
    /// Bytes let through since then.
    admitted: u64,
    is_low: bool,
}

/// How often the free room is asked for, at most; and after how many bytes at the latest.
const ASK: (Duration, u64) = (Duration::from_secs(1), 64 * 1024 * 1024);

/// Bytes set aside. Ends and verdicts have a few KiB each.
const RESERVE: u64 = 1024 * 1024;

/// How often a full disk is tried again.
const RETRY: Duration = Duration::from_secs(1);

impl Room {
    pub(super) fn new(disk: Arc<dyn Disk>, dir: &Path) -> Self {
        Self { disk, dir: dir.to_owned(), retry_at: None, is_full: Arc::default(), low_water: LowWater::default() }
    }

    /// Tells whether output waits for room, at any time.
    pub(super) fn is_full(&self) -> Arc<AtomicBool> {
        self.is_full.clone()
    }

    /// So much stays free of output.
    pub(super) fn keep_free(&mut self, min_free: u64) {
        self.low_water.min_free = min_free;
    }

    /// Whether so much output may be written: not when it would take what is to stay free. What must be stored is
    /// written without asking.
    pub(super) fn admits(&mut self, bytes: u64) -> bool {
        let Self { disk, dir, low_water, .. } = self;
        if bytes == 0 || low_water.min_free == 0 {
            return true;
        }
        let now = Instant::now();
        low_water.admitted += bytes;
        if low_water.admitted >= ASK.1 || low_water.asked_at.is_none_or(|at| now >= at + ASK.0) {
            low_water.is_low = disk.free(dir).is_ok_and(|free| free < low_water.min_free.saturating_add(bytes));
            (low_water.asked_at, low_water.admitted) = (Some(now), 0);
        }
        !low_water.is_low
    }

    fn reserve(&self) -> PathBuf {
        self.dir.join("reserve")
    }

    /// Sets the reserve aside unless there is one. Best effort: a disk too small for it can have logs still.
    pub(super) fn prepare(&self) {
        let there = self.disk.open(&self.reserve(), Open::Read).and_then(|file| file.len());
        if there.is_ok_and(|len| len == RESERVE) {
            return;
        }
        if let Err(error) = self.set_aside() {
            debug!("no reserve: {error}");
        }
    }

    /// Writes a new reserve in place of what is there of the old.
    fn set_aside(&self) -> io::Result<()> {
        let temporary = self.reserve().with_extension("tmp");
        let written = (|| {
            let file = self.disk.open(&temporary, Open::Write)?;
            file.set_len(0)?;
            // Bytes that no file system can leave out or compress.
            let mut noise = blake3::Hasher::new().finalize_xof();
            let mut block = vec![0; BLOCK];
            for position in (0..RESERVE).step_by(BLOCK) {
                noise.fill(&mut block);
                file.write_all_at(&mut [IoSlice::new(&block)], position)?;
            }
            file.sync() // only now the blocks are there for certain
        })();
        if written.is_err() {
            drop(self.disk.remove_file(&temporary)); // it may not even be there
        }
        written?;
        self.disk.rename(&temporary, &self.reserve())
    }

    /// Writes something small that must be stored; when there is no room, at the cost of the reserve.
    pub(super) fn spend<T>(&mut self, mut write: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        loop {
            match write() {
                Err(error) if is_full(&error) => {
                    self.note_full();
                    self.give_up_a_piece().map_err(|_| error)?;
                }
                result => return result,
            }
        }
    }

    /// Writes something small that whoever asked for it may ask for again: the reserve is not for this.
    pub(super) fn try_to<T>(&mut self, write: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        write().inspect_err(|error| {
            if is_full(error) {
                self.note_full();
            }
        })
    }

    /// Makes room for one small file. Not for more at a time: the logs that wait would take it.
    fn give_up_a_piece(&self) -> io::Result<()> {
        if !self.disk.exists(&self.reserve())? {
            return Err(io::ErrorKind::NotFound.into());
        }
        let reserve = self.disk.open(&self.reserve(), Open::Write)?;
        let rest = reserve.len()?.checked_sub(BLOCK as u64).ok_or(io::ErrorKind::UnexpectedEof)?;
        reserve.set_len(rest)?;
        reserve.sync() // some file systems give room back only then
    }

    /// Something had no room.
    pub(super) fn note_full(&mut self) {
        if self.retry_at.is_none() {
            error!(
                "no room left in {}: nothing more is acknowledged, agents wait; free some space or raise the quota",
                self.dir.display()
            );
            self.retry_at = Some(Instant::now() + RETRY);
            self.is_full.store(true, Ordering::Relaxed);
        }
    }

    /// When to try again.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Makes the next try due.
    #[cfg(test)]
    pub(super) fn be_due(&mut self) {
        self.retry_at = self.retry_at.map(|_| Instant::now());
        self.low_water.asked_at = None;
    }

    /// What waited was tried again, and `waits` or not. There is room again when there is enough for a whole reserve.
    pub(super) fn handle_retry(&mut self, waits: bool) {
        if !waits && self.set_aside().is_ok() {
            info!("there is room again in {}", self.dir.display());
            self.retry_at = None;
            self.is_full.store(false, Ordering::Relaxed);
        } else {
            self.retry_at = Some(Instant::now() + RETRY);
        }
    }
}

/// Bytes written, and given up, at a time.
const BLOCK: usize = 64 * 1024;
