//! What the programs in `tests/fuzz` may see of a spool. It exists only under `--cfg fuzzing` and is no part of the
//! library.

use std::{io, path::Path, sync::Arc};

use phonehome_env::disk::Disk;
use phonehome_proto::{
    codec::binary::Sealed,
    frame::{Finished, Hello},
};

use super::journal::{Found, Journal};

/// Writes a journal as an agent does, piece by piece.
///
/// # Errors
///
/// When the disk does not take it.
pub fn write(
    disk: Arc<dyn Disk>,
    dir: &Path,
    hello: &Hello,
    segment_size: u64,
    pieces: &[Vec<Sealed>],
    finished: Option<&Finished>,
) -> io::Result<()> {
    let above: Vec<_> = dir.parent().map(Path::to_owned).into_iter().collect();
    let mut journal = Journal::create(disk, &above, dir.to_owned(), hello, segment_size)?;
    pieces.iter().try_for_each(|records| journal.append(records))?;
    finished.map_or(Ok(()), |finished| journal.finish(finished))
}

/// What is found of an attempt whose agent is gone.
#[derive(Debug)]
pub struct Left(Found);

impl Left {
    /// `None` when nothing can be made of it.
    ///
    /// # Errors
    ///
    /// When the disk does not give it back.
    pub fn take_up(disk: Arc<dyn Disk>, dir: &Path, segment_size: u64) -> io::Result<Option<Self>> {
        Ok(Journal::take_up(disk, dir, segment_size)?.map(Self))
    }

    /// Its end, if it has one.
    #[must_use]
    pub fn finished(&self) -> Option<&Finished> {
        self.0.finished.as_ref()
    }

    /// The first record that is there, and one more than the last.
    #[must_use]
    pub fn range(&self) -> (u64, u64) {
        (self.0.first, self.0.next)
    }

    /// Bytes on disk.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.journal.bytes()
    }

    /// Records from this one on, up to about a cost.
    ///
    /// # Errors
    ///
    /// When the next is not there as it was written.
    pub fn read(&mut self, first: u64, most: u64) -> io::Result<Vec<Sealed>> {
        self.0.journal.read(first, most)
    }

    /// Where reading goes on behind a record that cannot be read.
    #[must_use]
    pub fn resumes_at(&self, seq: u64) -> u64 {
        self.0.journal.resumes_at(seq)
    }

    /// Everything below is delivered.
    pub fn forget(&mut self, next: u64) {
        self.0.journal.forget(next);
    }

    /// Everything is delivered.
    ///
    /// # Errors
    ///
    /// When the disk does not let go of it.
    pub fn remove(self) -> io::Result<()> {
        self.0.journal.remove()
    }
}
