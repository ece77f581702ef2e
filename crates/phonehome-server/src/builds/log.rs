//! The log of a whole build, read from the store.

use std::{collections::VecDeque, io, sync::Arc};

use phonehome_proto::{
    frame::Record,
    id::{Attempt, StepName},
};
use tokio::sync::watch;

use super::Build;
use crate::store::{AttemptFiles, AttemptReader, Found};

/// A record and the attempt it belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogRecord {
    /// The step.
    pub step: StepName,
    /// Which life of the step's agent.
    pub attempt: Attempt,
    /// The record.
    pub record: Record,
}

/// What a reader of a build's log comes upon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogItem {
    /// Records were acknowledged once and are gone: how many.
    Lost {
        /// The step.
        step: StepName,
        /// Which life of its agent.
        attempt: Attempt,
        /// How many.
        records: u64,
    },
    /// A record.
    Record(LogRecord),
}

/// A cursor over all attempts of a build. It reads what is stored, at its own pace, and holds nobody up.
#[derive(Debug)]
pub struct BuildLog {
    build: Arc<Build>,
    changed: watch::Receiver<u64>,
    /// How many of the build's attempts were taken up.
    known: usize,
    steps: Vec<StepReader>,
    /// The step that is read.
    at: usize,
    turn: Turn,
}

/// Reads the attempts of one step, one after the other.
#[derive(Debug)]
struct StepReader {
    step: StepName,
    /// Never empty. All but the last can store nothing more.
    attempts: VecDeque<AttemptReader>,
}

/// What is left of a step's turn: a step that writes much must not keep the others from being read.
#[derive(Debug)]
struct Turn {
    records: usize,
    bytes: usize,
}

impl BuildLog {
    /// A cursor at the beginning.
    pub(super) fn new(build: Arc<Build>) -> Self {
        let changed = build.changed.subscribe();
        Self { changed, build, known: 0, steps: Vec::new(), at: 0, turn: Turn::NEW }
    }

    /// The next item: each step's in order, one attempt after the other, and the steps in turns. `None` when the build
    /// has its verdict and everything stored was read. Cancel safe.
    ///
    /// # Errors
    ///
    /// When the store's files cannot be read.
    pub async fn next(&mut self) -> io::Result<Option<LogItem>> {
        loop {
            self.changed.mark_unchanged();
            let ended = self.build.verdict.borrow().is_some();
            if let Some(item) = self.try_next()? {
                return Ok(Some(item));
            }
            if ended || self.changed.changed().await.is_err() {
                return Ok(None);
            }
        }
    }

    /// The next item, if there is one at this moment.
    ///
    /// # Errors
    ///
    /// When the store's files cannot be read.
    pub fn try_next(&mut self) -> io::Result<Option<LogItem>> {
        self.open_new_attempts()?;
        // Once around, and back to a step that has had its turn and may be the only one.
        for _ in 0..=self.steps.len() {
            let Some(step) = self.steps.get_mut(self.at) else { break };
            if !self.turn.is_over()
                && let Some(item) = step.next()?
            {
                self.turn.take(&item);
                return Ok(Some(item));
            }
            self.at = (self.at + 1) % self.steps.len();
            self.turn = Turn::NEW;
        }
        Ok(None)
    }

    fn open_new_attempts(&mut self) -> io::Result<()> {
        let inner = self.build.lock();
        for files in inner.attempts.iter().skip(self.known) {
            let reader = AttemptReader::open(files.clone())?;
            match self.steps.iter_mut().find(|known| known.step == files.step) {
                Some(known) => known.attempts.push_back(reader),
                None => self.steps.push(StepReader { step: files.step.clone(), attempts: VecDeque::from([reader]) }),
            }
            self.known += 1;
        }
        Ok(())
    }
}

impl StepReader {
    fn next(&mut self) -> io::Result<Option<LogItem>> {
        while let Some(reader) = self.attempts.front_mut() {
            if let Some(found) = reader.next()? {
                return Ok(Some(item(&reader.files, found)));
            }
            if self.attempts.len() == 1 {
                break;
            }
            self.attempts.pop_front(); // nothing was added to it since its successor was made
        }
        Ok(None)
    }
}

impl Turn {
    const NEW: Self = Self { records: 64, bytes: 256 * 1024 };

    fn is_over(&self) -> bool {
        self.records == 0 || self.bytes == 0
    }

    fn take(&mut self, item: &LogItem) {
        let bytes = match item {
            LogItem::Lost { .. } => 0,
            LogItem::Record(found) => found.record.payload.len(),
        };
        self.records = self.records.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

fn item(files: &AttemptFiles, found: Found) -> LogItem {
    let (step, attempt) = (files.step.clone(), files.attempt);
    match found {
        Found::Record(record) => LogItem::Record(LogRecord { step, attempt, record }),
        Found::Lost(records) => LogItem::Lost { step, attempt, records },
    }
}
