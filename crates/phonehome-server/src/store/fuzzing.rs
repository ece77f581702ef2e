//! The store without its worker: an attempt is stored, taken up again and read.

use std::{io, path::Path, sync::Arc};

use phonehome_env::disk::Disk;
use phonehome_proto::{
    frame::{Finished, FinishedAck, Hello, Record},
    id::{Attempt, BuildId},
    receiver::Ending,
    tally::Tally,
};
use tokio::sync::{oneshot, watch};

use super::{
    AttemptReader, Durability, Found,
    index::{self, Entry},
    steps::Steps,
};

/// Size of an index entry, bytes.
pub const ENTRY: usize = index::ENTRY;

/// An attempt as its readers see it.
#[derive(Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its number.
    pub attempt: Attempt,
    /// One more than its last record.
    pub next: u64,
    /// What it holds, in order.
    pub items: Vec<StoredItem>,
    /// Its end, and what was answered.
    pub finished: Option<(Finished, FinishedAck)>,
}

/// A piece of a log.
#[derive(Debug, PartialEq, Eq)]
pub enum StoredItem {
    /// So many records are gone.
    Lost(u64),
    /// This one is there.
    Record(Record),
}

/// An agent says hello and sends what is not stored yet: each element of `rounds` is synced by itself. Then comes the
/// end. Says where the agent had to go on.
///
/// # Errors
///
/// When the agent is turned away, and why.
pub fn store(
    disk: &Arc<dyn Disk>,
    data: &Path,
    hello: &Hello,
    rounds: &[Vec<Record>],
    finished: Option<&Finished>,
) -> Result<u64, String> {
    let mut steps = Steps::new(disk.clone(), data, Durability::Fsync);
    let (reply, mut opened) = oneshot::channel();
    steps.open(hello.clone(), watch::Sender::new(0), reply);
    steps.commit();
    let opened = opened.try_recv().map_err(|_| "no answer")?.map_err(|error| error.to_string())?;
    let (writer, mut receiver) = (opened.writer, opened.receiver);
    let next = receiver.next();
    for round in rounds {
        let mut records = round.clone();
        let stored = writer.files.checksums(records.iter().map(|record| record.seq));
        receiver.handle_records(&mut records, |seq| stored.get(&seq).copied()).map_err(|error| error.to_string())?;
        steps.append(&writer, records, receiver.tally().clone());
        steps.commit();
    }
    if let Some(finished) = finished
        && let Ending::Accept(answer) = receiver.handle_finished(finished.clone()).map_err(|error| error.to_string())?
    {
        steps.finish(&writer, finished.clone(), answer);
        steps.commit();
    }
    Ok(next)
}

/// Everything of a build, as a process finds it that has just started.
///
/// # Errors
///
/// When the store says so.
///
/// # Panics
///
/// When what is read is not what the store says there is.
pub fn survey(disk: &Arc<dyn Disk>, data: &Path, build: &BuildId) -> io::Result<Vec<Stored>> {
    let found = Steps::new(disk.clone(), data, Durability::Fsync).survey(build, &watch::Sender::new(0))?;
    let read = found.into_iter().map(|surveyed| {
        let (attempt, finished) = (surveyed.files.attempt, surveyed.finished);
        let progress = surveyed.files.progress.borrow().clone();
        let mut reader = AttemptReader::open(surveyed.files)?;
        let (mut items, mut tally) = (Vec::new(), Tally::default());
        while let Some(found) = reader.next()? {
            items.push(match found {
                Found::Lost(count) => {
                    tally.skip_to(tally.next() + count);
                    StoredItem::Lost(count)
                }
                Found::Record(record) => {
                    assert!(tally.expects(&record), "record {} is not expected", record.seq);
                    tally.add(&record);
                    StoredItem::Record(record)
                }
            });
        }
        assert_eq!(items.len() as u64, progress.entries);
        assert_eq!(tally.next(), progress.next);
        assert_eq!((tally.counts(), tally.digest()), (progress.tally.counts(), progress.tally.digest()));
        Ok(Stored { attempt, next: progress.next, items, finished })
    });
    read.collect()
}

/// Whether bytes are an entry of an index; and whether one that begins a round, with its number.
#[must_use]
pub fn decode_entry(wire: &[u8; ENTRY]) -> Option<(u64, bool)> {
    Entry::decode(wire).map(|entry| (entry.seq(), index::is_first(wire)))
}

/// An entry that says so of a record, true or not.
#[must_use]
pub fn entry_of(record: &Record, position: u64, first: bool) -> [u8; ENTRY] {
    Entry::of(record, position).encode(first)
}

/// An entry for lost records.
#[must_use]
pub fn entry_of_lost(from: u64, to: u64, first: bool) -> [u8; ENTRY] {
    Entry::Hole { from, to }.encode(first)
}
