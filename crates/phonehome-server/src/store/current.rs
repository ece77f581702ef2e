//! The newest attempt of a step, and what waits to be stored in it.

use std::{io, mem, sync::Arc};

use phonehome_env::disk::is_full;
use phonehome_proto::{
    attempts::Lease,
    frame::{Finished, FinishedAck, Hello, Record},
    receiver::{AgentViolation, Receiver},
    tally::Tally,
};
use tokio::sync::watch;
use tracing::error;

use super::{
    OpenError, Opened, Writer,
    attempt::AttemptFiles,
    log::{AttemptLog, Batch},
    quota::Share,
    room::Room,
};

/// An attempt that may be written to.
#[derive(Debug)]
pub(super) struct Current {
    log: AttemptLog,
    files: Arc<AttemptFiles>,
    changed: watch::Sender<u64>,
    /// Handed over and not written yet, in order. Not more than an agent may have unacknowledged.
    waiting: Vec<Batch>,
    /// The end, handed over and not written yet.
    end: Option<(Finished, FinishedAck)>,
    /// Whether the end is written with others, and does not count yet.
    is_staged: bool,
    state: State,
    share: Share,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Works,
    /// What waits has no room. It is tried again, nothing is wrong with the files.
    Full,
    /// Nothing is written until a hello brings it back to what is durable.
    Failed,
}

impl Current {
    pub(super) fn new(log: AttemptLog, files: Arc<AttemptFiles>, changed: watch::Sender<u64>) -> Self {
        let (waiting, share) = (Vec::new(), Share::default());
        let (end, is_staged, state) = (None, false, State::Works);
        let mut current = Self { log, files, changed, waiting, end, is_staged, state, share };
        current.count();
        current.release();
        current.publish();
        current
    }

    pub(super) fn is_full(&self) -> bool {
        self.state == State::Full
    }

    pub(super) fn is_failed(&self) -> bool {
        self.state == State::Failed
    }

    pub(super) fn is_finished(&self) -> bool {
        self.log.finished().is_some()
    }

    fn receiver(&self) -> Receiver {
        let stored = self.log.durable();
        Receiver::resume(stored.tally.clone(), stored.lost, self.log.finished().cloned())
    }

    /// Whether a hello fits what is stored.
    pub(super) fn check(&self, hello: &Hello) -> Result<(), AgentViolation> {
        let lost = self.receiver().handle_hello(hello)?;
        if lost.is_some() && self.is_finished() { Err(AgentViolation::OtherEnd) } else { Ok(()) }
    }

    /// Gives an agent what is stored to go on with. What an earlier connection handed over and is not stored by now, it
    /// will send again.
    pub(super) fn greet(&mut self, hello: &Hello, lease: Lease) -> Result<Opened, OpenError> {
        self.waiting.clear();
        self.end = None;
        self.revive()?;
        if let Some(oldest) = self.receiver().handle_hello(hello)? {
            let stored = self.log.hole(oldest).and_then(|()| self.log.sync());
            if let Err(error) = stored {
                if !is_full(&error) {
                    self.fail(&error);
                }
                return Err(error.into());
            }
        }
        self.publish();
        let progress = self.files.progress.subscribe();
        Ok(Opened { writer: Writer { files: self.files.clone(), lease }, receiver: self.receiver(), progress })
    }

    fn revive(&mut self) -> Result<(), OpenError> {
        if self.state == State::Failed && self.log.revive()? {
            self.files.progress.send_modify(|progress| progress.generation += 1);
        }
        self.state = State::Works;
        Ok(())
    }

    pub(super) fn append(&mut self, records: Vec<Record>, tally: Tally) {
        if self.state != State::Failed {
            self.waiting.push(Batch { records, tally });
        }
    }

    pub(super) fn finish(&mut self, finished: Finished, answer: FinishedAck) {
        if self.state != State::Failed {
            self.end = Some((finished, answer));
        }
    }

    /// Takes back every record beyond `tally`. Readers hear of it before the files change, and in this order: whoever
    /// knew of more entries than are left, and fails to read one, sees that the count of rewinds is another.
    pub(super) fn rewind(&mut self, tally: Tally) -> io::Result<()> {
        self.waiting.clear(); // the agent sends it again
        if self.state != State::Works {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let rewound = self.log.step_back(tally).and_then(|()| {
            self.publish();
            self.files.progress.send_modify(|progress| progress.rewinds += 1);
            self.log.cut()
        });
        rewound.inspect_err(|error| self.fail(error))
    }

    /// Payload that waits, bytes.
    pub(super) fn waiting_bytes(&self) -> u64 {
        let records = self.waiting.iter().flat_map(|batch| &batch.records);
        records.map(|record| record.payload.len() as u64).sum()
    }

    /// Instead of the first step of a commit: what waits goes on waiting, as if there was no room.
    pub(super) fn hold(&mut self) {
        if self.state == State::Works && !self.waiting.is_empty() {
            self.state = State::Full;
        }
    }

    /// Keeps the build's account of what is stored.
    fn count(&mut self) {
        let [output, events, _] = self.log.written().ends();
        self.share.count(&self.files.quota, output + events);
    }

    /// Writes down what was left out, durably.
    fn close_gap(&mut self) -> io::Result<()> {
        if self.log.has_gap() {
            self.log.close_gap().and_then(|()| self.log.sync())?;
            self.share.note_hole();
        }
        Ok(())
    }

    /// The first step of a commit: writes what waits, as much as there is room for.
    pub(super) fn write(&mut self) {
        self.count();
        self.share.trim(&self.files.quota, &mut self.waiting);
        let mut count = if self.is_full() { 1.min(self.waiting.len()) } else { self.waiting.len() };
        while count > 0 {
            match self.log.append(&self.waiting[..count]) {
                Ok(()) => {
                    self.waiting.drain(..count);
                    count = self.waiting.len();
                    self.state = State::Works;
                }
                Err(error) if is_full(&error) && count > 1 => count /= 2,
                Err(error) => return self.handle_error(&error),
            }
        }
        self.count();
        if self.share.wants_hole()
            && self.waiting.is_empty()
            && let Err(error) = self.close_gap()
        {
            self.handle_error(&error);
        }
    }

    /// The second: makes what was written durable.
    pub(super) fn sync(&mut self) {
        if self.state != State::Failed
            && let Err(error) = self.log.sync()
        {
            self.fail(&error);
        }
    }

    /// Files that have to be synced.
    pub(super) fn unsynced(&self) -> usize {
        if self.state == State::Failed { 0 } else { self.log.unsynced() }
    }

    /// The whole file system was synced: instead of [`Self::sync`].
    pub(super) fn note_synced(&mut self) {
        if self.state != State::Failed {
            self.log.note_synced();
        }
    }

    /// The whole file system could not be synced.
    pub(super) fn distrust(&mut self, error: &io::Error) {
        if self.log.distrust() && self.state != State::Failed {
            self.fail(error);
        }
    }

    /// Whether its end is to be stored, and every record before it is written.
    pub(super) fn wants_end(&self) -> bool {
        self.end.is_some() && self.state != State::Failed && self.waiting.is_empty()
    }

    /// The third: writes the end behind the last record. Tells whether it did.
    pub(super) fn end(&mut self, room: &mut Room) -> bool {
        let stored = self.take_end(room, |log, finished, answer| log.finish(finished, answer));
        self.note_end(stored.is_some())
    }

    /// The same for many at once, before all is synced: writes the end, which does not count before it was named.
    pub(super) fn stage_end(&mut self, room: &mut Room) {
        let staged = self.take_end(room, |log, finished, answer| log.stage_end(finished, answer));
        self.is_staged = staged.is_some();
        self.end = staged.or(self.end.take()); // with the answer that was written
    }

    /// Then, when all is synced. All is to be synced again.
    pub(super) fn name_end(&mut self) {
        if self.is_staged
            && let Err(error) = self.log.name_end()
        {
            self.fail(&error);
        }
    }

    /// At last, when that was done. Tells whether it has its end.
    pub(super) fn confirm_end(&mut self, synced: Result<(), &io::Error>) -> bool {
        if !mem::take(&mut self.is_staged) || self.state == State::Failed {
            return false;
        }
        match (synced, self.end.take()) {
            (Ok(()), Some((finished, answer))) => {
                self.log.note_end(finished, answer);
                self.note_end(true)
            }
            (Ok(()), None) => false,
            (Err(error), _) => {
                self.fail(error);
                false
            }
        }
    }

    /// Writes an end that is due. It waits on when there is no room for it.
    fn take_end(
        &mut self,
        room: &mut Room,
        write: impl Fn(&mut AttemptLog, Finished, FinishedAck) -> io::Result<()>,
    ) -> Option<(Finished, FinishedAck)> {
        let (finished, answer) = self.end.clone().filter(|_| self.wants_end())?;
        let stored = self.log.written().ends()[0];
        let answer = self.share.answer(&self.files.quota, &finished, answer, stored);
        let closed = room.spend(|| self.close_gap());
        match closed.and_then(|()| room.spend(|| write(&mut self.log, finished.clone(), answer.clone()))) {
            Ok(()) => {
                self.state = State::Works;
                Some((finished, answer))
            }
            Err(error) => {
                self.handle_error(&error);
                None
            }
        }
    }

    /// Tells whether the end is stored.
    fn note_end(&mut self, is_stored: bool) -> bool {
        if is_stored {
            self.end = None;
            self.release();
        }
        is_stored
    }

    /// The last: lets it be known.
    pub(super) fn publish(&self) {
        self.files.progress.send_modify(|progress| {
            progress.failed = self.state == State::Failed;
            progress.full = self.state == State::Full;
            if !progress.failed {
                let durable = self.log.durable();
                progress.next = durable.tally.next();
                progress.bytes = durable.tally.bytes();
                progress.tally = durable.tally.clone();
                progress.entries = durable.entries;
                progress.finished = self.log.finished().cloned();
            }
        });
        self.changed.send_modify(|version| *version += 1);
    }

    /// Closes the files of an attempt that has its end.
    fn release(&mut self) {
        if self.is_finished() {
            self.close();
        }
    }

    /// Closes the files until somebody writes again, also before they are synced: the whole file system will be.
    pub(super) fn close_unsynced(&mut self) {
        self.log.close_unsynced();
    }

    pub(super) fn is_open(&self) -> bool {
        self.log.is_open()
    }

    /// Closes the files until somebody writes again.
    pub(super) fn close(&mut self) {
        if self.state != State::Failed && self.log.has_gap() {
            match self.close_gap() {
                Ok(()) => self.publish(),
                Err(error) => self.handle_error(&error), // after a restart it counts as lost all the same
            }
        }
        self.log.close();
    }

    /// Its build has ended: what is not stored by now never will be.
    pub(super) fn stop(&mut self) {
        self.waiting.clear();
        self.end = None;
        if self.state == State::Full {
            self.state = State::Works;
        }
        self.close();
        self.publish();
    }

    fn handle_error(&mut self, error: &io::Error) {
        if is_full(error) {
            self.state = State::Full;
        } else {
            self.fail(error);
        }
    }

    /// Gives up until the next hello.
    fn fail(&mut self, error: &io::Error) {
        error!(attempt = %self.files.dir.display(), "cannot write: {error}");
        self.state = State::Failed;
        drop(mem::take(&mut self.waiting)); // the agent has it still
        self.end = None;
    }
}
