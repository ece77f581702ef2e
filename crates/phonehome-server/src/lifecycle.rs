//! The lifecycle log: one JSON line for each change in the life of every step, in the shape of pod-status-logger.
//!
//! [`machine`] decides what a change is and what its lines say; it knows no clock, file or task. [`writer`] is the thread
//! that writes them, which nobody ever waits for. Between them, [`Lifecycle`] holds back what agents tell until it is
//! stored: a line about something that a crash makes unhappen would never be taken back.

mod line;
mod machine;
mod writer;

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use phonehome_env::Env;
use phonehome_proto::{
    event::Event,
    frame::{Finished, Record, Stream, UnixMicros},
    id::{BuildId, StepName},
};

pub(crate) use self::{
    line::LabelForm,
    machine::{BuildEnd, Told},
    writer::Destination,
};
use self::{
    machine::{Change, Machine},
    writer::Writer,
};
use crate::store::AttemptFiles;

/// What is told of all builds.
#[derive(Debug)]
pub(crate) struct Lifecycle {
    env: Env,
    form: LabelForm,
    inner: Mutex<Inner>,
    writer: Writer,
}

#[derive(Debug, Default)]
struct Inner {
    machine: Machine,
    pending: BTreeMap<(BuildId, StepName), Pending>,
}

/// Events of an attempt that are not durable yet. What an agent has under way has a limit, and so has this.
#[derive(Debug)]
struct Pending {
    files: Arc<AttemptFiles>,
    events: VecDeque<(u64, UnixMicros, Event)>,
}

impl Lifecycle {
    /// Opens the log and starts its thread, which ends with the last handle.
    ///
    /// # Errors
    ///
    /// When the file cannot be opened or there are no threads left.
    pub(crate) fn open(env: &Env, destination: Destination, form: LabelForm) -> io::Result<Self> {
        let writer = Writer::start(env.nature.clone(), destination)?;
        Ok(Self { env: env.clone(), form, inner: Mutex::default(), writer })
    }

    /// An agent has said hello and has its attempt. One whose end is accepted already only asks for the answer again.
    pub(crate) fn handle_hello(&self, files: &Arc<AttemptFiles>, labels: &BTreeMap<String, String>) {
        if files.progress.borrow().finished.is_some() {
            return;
        }
        let mut inner = self.lock();
        self.settle(&mut inner, &files.build, &files.step); // of an earlier attempt, or an earlier connection
        let pending = inner.pending.entry(key(files)).or_insert_with(|| Pending::new(files));
        if pending.files.attempt > files.attempt {
            return; // of an agent that lost its place to a newer one meanwhile
        }
        if pending.files.attempt != files.attempt {
            *pending = Pending::new(files);
        }
        pending.events.clear(); // what is not stored by now is sent again
        self.tell(&mut inner, files, self.env.nature.now(), Change::Hello { labels });
    }

    /// Records have come, that are new and not stored yet.
    pub(crate) fn handle_records(&self, files: &AttemptFiles, records: &[Record]) {
        if !records.iter().any(|record| record.stream == Stream::Event) {
            return; // nearly all of them
        }
        let mut inner = self.lock();
        let Some(pending) = inner.pending.get_mut(&key(files)).filter(|known| known.files.attempt == files.attempt)
        else {
            return;
        };
        for record in records.iter().filter(|record| record.stream == Stream::Event) {
            if let Some(event) = Event::parse(&record.payload) {
                pending.events.push_back((record.seq, record.time, event));
            }
        }
    }

    /// More of an attempt is stored.
    pub(crate) fn handle_progress(&self, files: &AttemptFiles) {
        self.settle(&mut self.lock(), &files.build, &files.step);
    }

    /// Records beyond `next` were taken back and come again.
    pub(crate) fn handle_rewound(&self, files: &AttemptFiles, next: u64) {
        if let Some(pending) = self.lock().pending.get_mut(&key(files)) {
            pending.events.retain(|(seq, ..)| *seq < next);
        }
    }

    /// A connection has ended, and no newer one has taken its place.
    pub(crate) fn handle_disconnected(&self, files: &AttemptFiles) {
        let mut inner = self.lock();
        self.settle(&mut inner, &files.build, &files.step);
        self.tell(&mut inner, files, self.env.nature.now(), Change::Disconnected);
    }

    /// The end of an attempt was accepted.
    pub(crate) fn handle_finished(&self, files: &AttemptFiles, finished: &Finished) {
        let mut inner = self.lock();
        self.settle(&mut inner, &files.build, &files.step);
        let time = if finished.time == 0 { self.env.nature.now() } else { finished.time };
        self.tell(&mut inner, files, time, Change::Finished { end: &finished.end });
        inner.pending.remove(&key(files));
    }

    /// Somebody beside the build has told something about it. `is_over` says whether the build has its verdict, behind
    /// which there is no line: whoever tells the verdict does so after that can be known, and waits for this lock.
    pub(crate) fn handle_report(
        &self,
        build: &BuildId,
        labels: &BTreeMap<String, String>,
        told: &Told<'_>,
        is_over: impl FnOnce() -> bool,
    ) {
        let mut inner = self.lock();
        if is_over() {
            return;
        }
        let lines = inner.machine.handle_report(build, labels, self.env.nature.now(), told);
        self.write(&lines);
    }

    /// A build has its verdict.
    pub(crate) fn handle_verdict(&self, build: &BuildId, labels: &BTreeMap<String, String>, end: &BuildEnd) {
        let mut inner = self.lock();
        let steps: Vec<_> = inner.pending.keys().filter(|(of, _)| of == build).map(|(_, step)| step.clone()).collect();
        for step in steps {
            self.settle(&mut inner, build, &step);
            inner.pending.remove(&(build.clone(), step));
        }
        let lines = inner.machine.handle_verdict(build, labels, self.env.nature.now(), end);
        self.write(&lines);
    }

    /// Lines that were not written, so far.
    pub(crate) fn dropped(&self) -> u64 {
        self.writer.dropped()
    }

    /// Waits until what was told is written, at most for `patience`.
    pub(crate) async fn flush(&self, patience: Duration) {
        self.writer.flush(patience).await;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells of everything that has become durable.
    fn settle(&self, inner: &mut Inner, build: &BuildId, step: &StepName) {
        let Some(pending) = inner.pending.get_mut(&(build.clone(), step.clone())) else { return };
        if pending.events.is_empty() {
            return;
        }
        let (files, next) = (pending.files.clone(), pending.files.progress.borrow().next);
        let count = pending.events.iter().take_while(|(seq, ..)| *seq < next).count();
        let durable: Vec<_> = pending.events.drain(..count).collect();
        for (_, time, event) in durable {
            self.tell(inner, &files, time, Change::Event(&event));
        }
    }

    fn tell(&self, inner: &mut Inner, files: &AttemptFiles, time: UnixMicros, change: Change<'_>) {
        let lines = inner.machine.handle(&files.build, &files.step, files.attempt, time, change);
        self.write(&lines);
    }

    fn write(&self, lines: &[line::Line]) {
        for line in lines {
            self.writer.write(line.to_json(self.form));
        }
    }
}

impl Pending {
    fn new(files: &Arc<AttemptFiles>) -> Self {
        Self { files: files.clone(), events: VecDeque::new() }
    }
}

fn key(files: &AttemptFiles) -> (BuildId, StepName) {
    (files.build.clone(), files.step.clone())
}
