//! Records on disk: more of them than memory holds, and still there after a restart of the container.
//!
//! What the server confirms within [`PATIENCE`] never gets here. What it does not is written to a journal, also while
//! memory has room for it: so what an agent leaves that is killed is what the command wrote last, not all that memory
//! held. When memory gets scarce, records that are in the journal leave it and come back when it is their turn.
//!
//! A journal that cannot be used, for want of room or of permission, is never a reason to fail: the agent goes on with
//! memory alone and says so.

#[cfg(fuzzing)]
pub mod fuzzing;
mod journal;
mod place;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use phonehome_env::{Env, disk::is_full};
use phonehome_proto::{
    codec::binary::Sealed,
    frame::{Finished, Hello},
    limits::{MAX_PAYLOAD, RECORD_COST},
    sender::Sender,
};
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};
use tracing::{debug, warn};

use self::journal::Journal;
pub(crate) use self::place::{Left, Place, Remains};
use crate::outbox::{Outbox, expiry};

/// How long the server may take to confirm a record before it is written down.
const PATIENCE: Duration = Duration::from_millis(200);

/// How long after the disk failed, or it or the limit was full, the same is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// Records moved at once, bytes.
const BATCH: usize = 1024 * 1024;

/// Largest file of records, bytes; with a small limit an eighth of it, so that delivered records free their place.
const SEGMENT: u64 = 4 * 1024 * 1024;

/// An attempt's task between memory and disk.
#[derive(Debug)]
pub(crate) struct Spool {
    env: Env,
    outbox: Arc<Outbox>,
    journal: Option<Journal>,
    /// Where a journal goes once one is needed. Without it there is one, which is only read.
    home: Option<Home>,
    usage: Usage,
    is_writable: bool,
    written: Mark,
    /// What is to be written without further delay.
    goal: Mark,
    /// When what waits by then becomes the goal.
    due: Option<(Instant, Mark)>,
    /// When to try again after the disk was full.
    retry: Option<Instant>,
    warned: bool,
    /// The record that cannot be read, and when to try once more.
    unreadable: Option<(u64, Instant)>,
    /// Whether what was done last was to bring records back.
    has_brought: bool,
    leave: watch::Receiver<bool>,
}

/// Where a journal is made, and what it says first.
#[derive(Debug, Clone)]
pub(crate) struct Home {
    /// The directories above, from the outermost on.
    pub(crate) above: Vec<PathBuf>,
    pub(crate) dir: PathBuf,
    pub(crate) hello: Hello,
}

/// How far into the log: everything below a record's number, and whether the end is included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Mark {
    next: u64,
    end: bool,
}

/// Bytes in all of an agent's journals.
#[derive(Debug, Clone)]
pub(crate) struct Usage {
    bytes: Arc<AtomicU64>,
    limit: u64,
}

impl Usage {
    pub(crate) fn new(limit: u64) -> Self {
        Self { bytes: Arc::default(), limit }
    }

    fn rest(&self) -> u64 {
        self.limit.saturating_sub(self.bytes.load(Ordering::Relaxed))
    }

    fn change(&self, before: u64, after: u64) {
        self.bytes.fetch_add(after.wrapping_sub(before), Ordering::Relaxed);
    }

    fn segment(&self) -> u64 {
        SEGMENT.min(self.limit / 8).max(MAX_PAYLOAD as u64)
    }
}

/// The way to a spool that runs.
#[derive(Debug)]
pub(crate) struct Spooling {
    task: tokio::task::JoinHandle<()>,
    leave: watch::Sender<bool>,
}

impl Spooling {
    /// Lets it write down what is not delivered, for the next agent.
    pub(crate) async fn leave(self) {
        self.leave.send_replace(true);
        if timeout(LEAVE, self.task).await.is_err() {
            warn!("the spool could not be written in time");
        }
    }
}

/// How long the last work on a disk may take.
pub(crate) const LEAVE: Duration = Duration::from_secs(2);

/// What there is to do.
#[derive(Debug)]
enum Work {
    /// Read records from this one on, up to a cost.
    Bring(u64, u64),
    End(Box<Finished>),
    Forget(u64),
    Wait(Option<Instant>),
    Write(Vec<Sealed>),
}

impl Spool {
    /// Starts a spool for a new attempt. Nothing is made on disk before it is needed.
    pub(crate) fn start(env: Env, outbox: Arc<Outbox>, home: Home, usage: Usage) -> Spooling {
        outbox.relieve(true);
        Self::spawn(env, outbox, None, Some(home), usage)
    }

    /// Starts to bring back what an earlier agent left.
    fn go_on(env: Env, outbox: Arc<Outbox>, journal: Journal, usage: Usage) -> Spooling {
        Self::spawn(env, outbox, Some(journal), None, usage)
    }

    fn spawn(env: Env, outbox: Arc<Outbox>, journal: Option<Journal>, home: Option<Home>, usage: Usage) -> Spooling {
        let (leave, leaving) = watch::channel(false);
        let is_writable = home.is_some();
        let written = if is_writable { Mark::default() } else { outbox.look(pending) };
        let spool = Self {
            env,
            outbox,
            journal,
            home,
            usage,
            is_writable,
            written,
            goal: written,
            due: None,
            retry: None,
            warned: false,
            unreadable: None,
            has_brought: false,
            leave: leaving,
        };
        Spooling { task: tokio::spawn(spool.run()), leave }
    }

    /// Works until everything is delivered, or nobody will take it, or it is told to leave.
    async fn run(mut self) {
        loop {
            if self.outbox.look(Sender::is_done) || self.outbox.is_abandoned() {
                return self.remove().await;
            }
            if self.is_leaving() {
                return self.save().await;
            }
            let work = self.next_work(Instant::now());
            self.work(work).await;
        }
    }

    /// Whether it is told to leave, or nobody is left to tell it.
    fn is_leaving(&self) -> bool {
        *self.leave.borrow() || self.leave.has_changed().is_err()
    }

    async fn work(&mut self, work: Work) {
        match work {
            Work::Bring(first, most) => self.bring(first, most).await,
            Work::End(finished) => self.end(*finished).await,
            Work::Forget(below) => self.forget(below).await,
            Work::Wait(until) => self.wait(until).await,
            Work::Write(records) => self.write(records).await,
        }
    }

    /// Writes down everything that is not delivered.
    async fn save(&mut self) {
        self.goal = self.outbox.look(pending);
        self.retry = None;
        let outbox = self.outbox.clone();
        while let Ok(work) = outbox.look(|sender| self.next_write(sender, Instant::now())) {
            self.work(work).await;
        }
        outbox.relieve(false);
        let pending = outbox.look(pending);
        if self.home.is_some() && self.written < pending {
            let records = pending.next - self.written.next;
            warn!(records, "the end of the log is not in the spool, the next agent cannot deliver it");
        }
    }

    async fn wait(&mut self, until: Option<Instant>) {
        let is_idle = until.is_none();
        tokio::select! {
            biased; // what presses first
            _ = self.leave.changed() => {} // or nobody is left to change it, which is looked for
            () = self.outbox.pressed() => {}
            () = self.outbox.stirred(), if is_idle => {}
            () = expiry(until) => {}
        }
    }

    fn next_work(&mut self, now: Instant) -> Work {
        let outbox = self.outbox.clone();
        outbox.spill(self.written.next);
        outbox.look(|sender| {
            if self.journal.as_ref().is_some_and(|journal| journal.has_delivered(sender.oldest())) {
                return Work::Forget(sender.oldest());
            }
            let (bring, again) = match self.next_bring(sender, now) {
                Ok(bring) => (Some(bring), None),
                Err(again) => (None, again),
            };
            match (self.next_write(sender, now), bring) {
                (Ok(write), _) if self.has_brought => write, // in turns: neither waits for the end of the other
                (_, Some((first, most))) => Work::Bring(first, most),
                (Ok(write), None) => write,
                (Err(until), None) => Work::Wait(until.into_iter().chain(again).min()),
            }
        })
    }

    /// Where to bring records back from, and how much: what is sent next may take half of the memory, as far as the newest
    /// leave room for it. Otherwise when to look again, if nothing happens.
    fn next_bring(&self, sender: &Sender, now: Instant) -> Result<(u64, u64), Option<Instant>> {
        let first = sender.spilled().ok_or(None)?;
        let again = self.unreadable.filter(|(seq, _)| *seq == first).map(|(_, at)| at);
        if again.is_some_and(|at| at > now) {
            return Err(again);
        }
        let room = self.outbox.keep().saturating_sub(sender.held_cost()).min(self.outbox.rest(sender.cost()));
        let is_worth_it = room >= MAX_PAYLOAD as u64 + RECORD_COST && again.is_none();
        if sender.held_cost() == 0 || is_worth_it { Ok((first, room.min(BATCH as u64))) } else { Err(None) }
    }

    /// What is to be written now; otherwise when to look again, if nothing happens.
    fn next_write(&mut self, sender: &Sender, now: Instant) -> Result<Work, Option<Instant>> {
        self.written.next = self.written.next.max(sender.oldest());
        let pending = pending(sender);
        if self.written == pending || !self.is_writable {
            self.due = None;
            return Err(None);
        }
        if let Some(at) = self.retry.filter(|at| *at > now) {
            return Err(Some(at));
        }
        if self.written >= self.goal && !self.outbox.is_tight(sender.cost()) {
            self.look_at_goal(pending, sender.oldest(), now)?;
        }
        match sender.finished().filter(|_| self.written.next == pending.next) {
            Some(finished) => Ok(Work::End(Box::new(finished.clone()))),
            None => self.fitting(sender, now),
        }
    }

    /// Sets the goal when its time has come: the server has not confirmed in time what waited then.
    fn look_at_goal(&mut self, pending: Mark, oldest: u64, now: Instant) -> Result<(), Option<Instant>> {
        let (at, mark) = *self.due.get_or_insert((now + PATIENCE, pending));
        if at > now {
            return Err(Some(at));
        }
        if mark <= (Mark { next: oldest, end: false }) {
            self.due = Some((now + PATIENCE, pending));
            return Err(Some(now + PATIENCE));
        }
        self.due = None;
        self.goal = pending;
        Ok(())
    }

    /// As many as the limit has room for.
    fn fitting(&self, sender: &Sender, now: Instant) -> Result<Work, Option<Instant>> {
        let rest = self.usage.rest();
        let most = rest.min(self.usage.segment()).min(BATCH as u64);
        let mut records = if rest == 0 { Vec::new() } else { sender.peek(self.written.next, most as usize) };
        while !records.is_empty() && Journal::size_of(&records) > rest {
            records.truncate(records.len() / 2);
        }
        if records.is_empty() {
            self.outbox.relieve(false);
            return Err(Some(now + RETRY)); // another attempt's records may have gone meanwhile
        }
        Ok(Work::Write(records))
    }

    async fn write(&mut self, records: Vec<Sealed>) {
        self.has_brought = false;
        let next = records.last().map_or(0, |sealed| sealed.record.seq + 1);
        match self.on_disk(move |journal| journal.append(&records)).await {
            Ok(()) => {
                self.written.next = next;
                self.warned = false;
                self.outbox.relieve(true);
            }
            Err(error) => self.handle_error(&error),
        }
    }

    async fn end(&mut self, finished: Finished) {
        match self.on_disk(move |journal| journal.finish(&finished)).await {
            Ok(()) => self.written.end = true,
            Err(error) => self.handle_error(&error),
        }
    }

    async fn forget(&mut self, below: u64) {
        let forgotten = self.on_disk(move |journal| {
            journal.forget(below);
            Ok(())
        });
        drop(forgotten.await); // it cannot fail once there is a journal
    }

    async fn bring(&mut self, first: u64, most: u64) {
        self.has_brought = true;
        match self.on_disk(move |journal| journal.read(first, most)).await {
            Ok(records) => self.outbox.restore(records),
            Err(error) => self.handle_loss(first, &error),
        }
    }

    /// What cannot be read, and not a while later either, is lost. The server is told so once it has everything before.
    fn handle_loss(&mut self, first: u64, error: &io::Error) {
        let next = self.journal.as_ref().map_or(first + 1, |journal| journal.resumes_at(first));
        let is_final = self.unreadable.is_some_and(|(seq, _)| seq == first)
            && self.outbox.look(Sender::spilled) == Some(first)
            && self.outbox.lose(next);
        if is_final {
            warn!(first, next = self.outbox.look(Sender::oldest), "the spool is damaged, records are lost: {error}");
        }
        self.unreadable = Some((first, Instant::now() + RETRY));
    }

    /// The journal is not to be had: memory has to do.
    fn handle_error(&mut self, error: &io::Error) {
        self.is_writable = is_full(error);
        self.retry = Some(Instant::now() + RETRY);
        self.goal = Mark::default();
        self.outbox.relieve(false);
        if !std::mem::replace(&mut self.warned, true) {
            let dir = self.home.as_ref().map_or(Path::new(""), |home| &home.dir);
            warn!("the spool in {} cannot be written, memory has to do: {error}", dir.display());
        }
    }

    /// Works on the journal where waiting for a disk holds nobody up.
    async fn on_disk<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Journal) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let (journal, home) = (self.journal.take(), self.home.clone());
        let (disk, segment) = (self.env.disk.clone(), self.usage.segment());
        let before = journal.as_ref().map_or(0, Journal::bytes);
        let done = self.env.blocking(move || {
            let mut journal = match (journal, home) {
                (Some(journal), _) => journal,
                (None, Some(Home { above, dir, hello })) => match Journal::create(disk, &above, dir, &hello, segment) {
                    Ok(journal) => journal,
                    Err(error) => return (None, Err(error)),
                },
                (None, None) => return (None, Err(io::ErrorKind::NotFound.into())),
            };
            let result = work(&mut journal);
            (Some(journal), result)
        });
        let (journal, result) = done.await;
        self.usage.change(before, journal.as_ref().map_or(0, Journal::bytes));
        self.journal = journal;
        result
    }

    /// Everything is delivered, or never will be.
    async fn remove(&mut self) {
        self.outbox.relieve(false);
        let Some(journal) = self.journal.take() else { return };
        self.usage.change(journal.bytes(), 0);
        if let Err(error) = self.env.blocking(move || journal.remove()).await {
            debug!("the spool cannot be removed: {error}");
        }
    }
}

/// Everything there is to write.
fn pending(sender: &Sender) -> Mark {
    Mark { next: sender.next(), end: sender.finished().is_some() }
}

#[cfg(test)]
mod tests;
