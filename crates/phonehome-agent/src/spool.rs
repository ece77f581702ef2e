//! Records on disk: more of them than memory holds, and still there after a restart of the container.
//!
//! What the server confirms within [`PATIENCE`] never gets here. What it does not is written to a journal, also while
//! memory has room for it: so what an agent leaves that is killed is what the command wrote last, not all that memory
//! held. When memory gets scarce, records that are in the journal leave it and come back when it is their turn.
//!
//! A journal that cannot be used, for want of room or of permission, is never a reason to fail: the agent goes on with
//! memory alone and says so.

mod journal;
mod place;

use std::{
    io,
    path::PathBuf,
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
pub(crate) use self::{
    journal::Found,
    place::{Left, Place},
};
use crate::outbox::{Outbox, expiry};

/// How long the server may take to confirm a record before it is written down.
const PATIENCE: Duration = Duration::from_millis(200);

/// How long after a full disk the next write is tried.
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
    /// Where a journal goes once one is needed.
    home: Option<(PathBuf, Box<Hello>)>,
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
    leave: watch::Receiver<bool>,
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
    pub(crate) async fn leave(mut self) {
        self.leave.send_replace(true);
        if timeout(LEAVE, &mut self.task).await.is_err() {
            warn!("the spool could not be written in time");
        }
    }
}

impl Drop for Spooling {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// How long the last write may take.
const LEAVE: Duration = Duration::from_secs(2);

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
    pub(crate) fn start(env: Env, outbox: Arc<Outbox>, dir: PathBuf, hello: Hello, usage: Usage) -> Spooling {
        Self::spawn(env, outbox, None, Some((dir, Box::new(hello))), usage)
    }

    /// Starts to bring back what an earlier agent left.
    fn go_on(env: Env, outbox: Arc<Outbox>, journal: Journal, usage: Usage) -> Spooling {
        Self::spawn(env, outbox, Some(journal), None, usage)
    }

    fn spawn(
        env: Env,
        outbox: Arc<Outbox>,
        journal: Option<Journal>,
        home: Option<(PathBuf, Box<Hello>)>,
        usage: Usage,
    ) -> Spooling {
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
            if *self.leave.borrow() {
                return self.save().await;
            }
            let work = self.next_work();
            self.work(work).await;
        }
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
        while self.retry.is_none() {
            match outbox.look(|sender| self.next_write(sender, Instant::now())) {
                Work::End(finished) => self.end(*finished).await,
                Work::Write(records) => self.write(records).await,
                Work::Bring(..) | Work::Forget(_) | Work::Wait(_) => return,
            }
        }
    }

    async fn wait(&mut self, until: Option<Instant>) {
        let is_idle = until.is_none();
        tokio::select! {
            biased; // what presses first
            _ = self.leave.changed() => {}
            () = self.outbox.pressed() => {}
            () = self.outbox.stirred(), if is_idle => {}
            () = expiry(until) => {}
        }
    }

    fn next_work(&mut self) -> Work {
        let now = Instant::now();
        let outbox = self.outbox.clone();
        outbox.spill(self.written.next);
        outbox.look(|sender| {
            let room = outbox.keep().saturating_sub(sender.held_cost());
            match sender.spilled() {
                Some(first) if sender.held_cost() == 0 || room >= MAX_PAYLOAD as u64 + RECORD_COST => {
                    return Work::Bring(first, room.min(BATCH as u64));
                }
                Some(_) | None => {}
            }
            if self.journal.as_ref().is_some_and(|journal| journal.has_delivered(sender.oldest())) {
                return Work::Forget(sender.oldest());
            }
            self.next_write(sender, now)
        })
    }

    /// What is to be written now, or when to look again.
    fn next_write(&mut self, sender: &Sender, now: Instant) -> Work {
        self.written.next = self.written.next.max(sender.oldest());
        let pending = pending(sender);
        if self.written == pending || !self.is_writable {
            self.due = None;
            return Work::Wait(None);
        }
        if let Some(at) = self.retry.filter(|at| *at > now) {
            return Work::Wait(Some(at));
        }
        let presses = sender.spilled().is_some() || self.outbox.is_tight(sender.cost());
        if self.written >= self.goal && !presses {
            return Work::Wait(Some(self.next_goal(pending, sender.oldest(), now)));
        }
        match sender.finished().filter(|_| self.written.next == pending.next) {
            Some(finished) => Work::End(Box::new(finished.clone())),
            None => self.fitting(sender.peek(self.written.next, BATCH)),
        }
    }

    /// Sets the goal when its time has come: the server has not confirmed in time what waited then.
    fn next_goal(&mut self, pending: Mark, oldest: u64, now: Instant) -> Instant {
        let (at, mark) = *self.due.get_or_insert((now + PATIENCE, pending));
        if at > now {
            return at;
        }
        self.due = None;
        if (Mark { next: oldest, end: false }) < mark {
            self.goal = pending;
        }
        now
    }

    /// As many as the limit has room for.
    fn fitting(&mut self, mut records: Vec<Sealed>) -> Work {
        while !records.is_empty() && Journal::size_of(&records) > self.usage.rest() {
            records.truncate(records.len() / 2);
        }
        if records.is_empty() { Work::Wait(None) } else { Work::Write(records) }
    }

    async fn write(&mut self, records: Vec<Sealed>) {
        let next = records.last().map_or(0, |sealed| sealed.record.seq + 1);
        match self.on_disk(move |journal| journal.append(&records)).await {
            Ok(()) => {
                self.written.next = next;
                self.warned = false;
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
        match self.on_disk(move |journal| journal.read(first, most)).await {
            Ok(records) => self.outbox.restore(records),
            Err(error) => self.handle_loss(first, &error).await,
        }
    }

    /// What cannot be read is lost, and the server is told so, once it has everything before that.
    async fn handle_loss(&mut self, first: u64, error: &io::Error) {
        let next = self.journal.as_ref().map_or(first + 1, |journal| journal.end_of_segment(first));
        if self.outbox.lose(next) {
            warn!(records = next - first, "the spool is damaged, output is lost: {error}");
        } else {
            self.wait(Some(Instant::now() + PATIENCE)).await;
        }
    }

    /// The journal is not to be had: memory has to do.
    fn handle_error(&mut self, error: &io::Error) {
        self.is_writable = is_full(error);
        self.retry = Some(Instant::now() + RETRY);
        self.goal = Mark::default();
        if !std::mem::replace(&mut self.warned, true) {
            warn!("the spool cannot be written, memory has to do: {error}");
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
                (None, Some((dir, hello))) => match Journal::create(disk, dir, &hello, segment) {
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
