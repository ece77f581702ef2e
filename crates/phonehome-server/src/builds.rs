//! Which builds are known, who waits for them, and the log of each as one stream.

pub(crate) mod state;

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use phonehome_proto::{
    attempts::Lease,
    close::CloseCode,
    frame::{Cancel, End, FinishedAck, Hello, Record},
    id::{Attempt, BuildId, StepName},
};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use self::state::{Action, Life};
pub use self::state::{Clock, Clocks, Outcome, Verdict};
use crate::store::{AttemptFiles, AttemptReader, Found, OpenError, Opened, Store};

/// SHA-256 of a token: all that is kept of it.
pub(crate) type TokenHash = [u8; 32];

pub(crate) fn hash_token(token: &str) -> TokenHash {
    Sha256::digest(token.as_bytes()).into()
}

/// Every build this server expects.
#[derive(Debug, Default)]
pub(crate) struct Builds(Mutex<HashMap<BuildId, Arc<Build>>>);

impl Builds {
    fn lock(&self) -> MutexGuard<'_, HashMap<BuildId, Arc<Build>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a build; `false` when there is one of that name.
    pub(crate) fn insert(&self, build: Arc<Build>) -> bool {
        let mut builds = self.lock();
        if builds.contains_key(&build.id) {
            return false;
        }
        builds.insert(build.id.clone(), build);
        true
    }

    /// The build that a token is for. Hashes are compared in constant time, and all of them.
    pub(crate) fn by_token(&self, token: &str) -> Option<Arc<Build>> {
        let hash = hash_token(token);
        let builds = self.lock();
        builds
            .values()
            .fold(None, |found, build| if bool::from(build.token.ct_eq(&hash)) { Some(build) } else { found })
            .cloned()
    }

    pub(crate) fn all(&self) -> Vec<Arc<Build>> {
        self.lock().values().cloned().collect()
    }
}

/// One build, shared by its connections, its clock and whoever waits for it.
#[derive(Debug)]
pub(crate) struct Build {
    pub(crate) id: BuildId,
    token: TokenHash,
    store: Store,
    inner: Mutex<Inner>,
    /// Counts changes of the log; readers wait on it.
    changed: watch::Sender<u64>,
    verdict: watch::Sender<Option<Verdict>>,
    cancel: watch::Sender<Option<Cancel>>,
    /// Wakes the clock when a deadline may have moved.
    touched: Notify,
}

#[derive(Debug)]
struct Inner {
    life: Life,
    attempts: Vec<Arc<AttemptFiles>>,
    /// The connection of each step, to be told when a newer one takes over.
    connections: HashMap<StepName, (Lease, CancellationToken)>,
    /// Since when nothing could be stored.
    storage_failing: Option<Instant>,
}

/// A connection's place in its build.
#[derive(Debug)]
pub(crate) struct Seat {
    pub(crate) opened: Opened,
    /// Fires when a newer connection of the step takes over.
    pub(crate) superseded: CancellationToken,
    pub(crate) cancel: watch::Receiver<Option<Cancel>>,
}

/// Why an agent does not get a seat.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) code: CloseCode,
    pub(crate) reason: String,
}

impl Build {
    pub(crate) fn new(id: BuildId, token: &str, steps: Vec<StepName>, clocks: Clocks, store: Store) -> Self {
        let life = Life::new(steps, clocks, Instant::now());
        Self {
            id,
            token: hash_token(token),
            store,
            inner: Mutex::new(Inner { life, attempts: Vec::new(), connections: HashMap::new(), storage_failing: None }),
            changed: watch::Sender::new(0),
            verdict: watch::Sender::new(None),
            cancel: watch::Sender::new(None),
            touched: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives an agent its attempt, unless it has no business here.
    pub(crate) async fn seat(&self, hello: Hello) -> Result<Seat, Refusal> {
        let refuse = |code, reason| Err(Refusal { code, reason });
        if hello.build != self.id {
            return refuse(CloseCode::Auth, "the token is not for this build".into());
        }
        if !self.lock().life.expects(&hello.step) {
            let expected = self.lock().life.step_list();
            return refuse(CloseCode::UnknownBuild, format!("step {} is not expected, only: {expected}", hello.step));
        }
        let step = hello.step.clone();
        let opened = match self.store.open_attempt(hello, self.changed.clone()).await {
            Ok(opened) => opened,
            Err(OpenError::Refused(code, reason)) => return refuse(code, reason.into()),
            Err(OpenError::Contradiction(violation)) => return refuse(violation.close_code(), violation.to_string()),
            Err(OpenError::Storage(cause)) => {
                error!(build = %self.id, "cannot open an attempt: {cause}");
                self.handle_storage(false);
                return refuse(CloseCode::StorageUnavailable, "storage is not available".into());
            }
        };
        let finished = opened.progress.borrow().finished.is_some();
        if self.verdict.borrow().is_some() && !finished {
            return refuse(CloseCode::AlreadyFinished, "the build has its verdict already".into());
        }
        Ok(self.take_seat(&step, opened))
    }

    fn take_seat(&self, step: &StepName, opened: Opened) -> Seat {
        let superseded = CancellationToken::new();
        let mut inner = self.lock();
        let lease = opened.writer.lease;
        // Leases are given in one order and may get here in another: the newer one has the seat.
        match inner.connections.get(step) {
            Some((seated, _)) if seated.is_newer_than(lease) => superseded.cancel(),
            Some(_) | None => {
                if let Some((_, older)) = inner.connections.insert(step.clone(), (lease, superseded.clone())) {
                    older.cancel();
                }
            }
        }
        let files = &opened.writer.files;
        let known = inner.attempts.iter().position(|known| known.step == files.step && known.attempt == files.attempt);
        if known.is_none() {
            info!(build = %self.id, %step, attempt = files.attempt, "connected");
            inner.attempts.push(files.clone());
        }
        inner.life.handle_connected(step, Instant::now());
        drop(inner);
        self.touch();
        Seat { opened, superseded, cancel: self.cancel.subscribe() }
    }

    /// A connection has ended.
    pub(crate) fn leave(&self, step: &StepName, seat: &CancellationToken) {
        let mut inner = self.lock();
        if !seat.is_cancelled() {
            inner.life.handle_disconnected(step, Instant::now());
        }
        drop(inner);
        self.touch();
    }

    /// Storage works, or does not. It gets as long as a lost agent to work again.
    pub(crate) fn handle_storage(&self, works: bool) {
        let mut inner = self.lock();
        if works {
            inner.storage_failing = None;
            return;
        }
        let now = Instant::now();
        let since = *inner.storage_failing.get_or_insert(now);
        let patience = inner.life.lost_limit();
        drop(inner);
        if patience.is_some_and(|patience| now.duration_since(since) >= patience) {
            self.fail(NOT_STORED);
        }
    }

    /// New output has arrived.
    pub(crate) fn handle_output(&self) {
        self.lock().life.handle_output(Instant::now());
    }

    pub(crate) fn handle_finished(&self, step: &StepName, end: End, answer: FinishedAck) {
        self.act(|life| life.handle_finished(step, end, answer, Instant::now()));
    }

    pub(crate) fn handle_confirmed(&self, step: &StepName) {
        self.lock().life.handle_confirmed(step);
        self.touch();
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancel.borrow().is_some() || self.verdict.borrow().is_some()
    }

    pub(crate) fn cancel(&self, reason: &str) {
        self.act(|life| life.handle_cancel(reason.to_owned(), Instant::now()));
    }

    pub(crate) fn fail(&self, reason: &str) {
        self.act(|life| life.handle_error(reason.to_owned(), Instant::now()));
    }

    fn act(&self, change: impl FnOnce(&mut Life) -> Action) {
        let mut inner = self.lock();
        match change(&mut inner.life) {
            Action::Cancel(cancel) => drop(self.cancel.send_replace(Some(cancel))),
            Action::End => self.settle(&inner.life),
            Action::Nothing => {}
        }
        drop(inner);
        self.touch();
    }

    /// Writes the verdict down, then lets it be known.
    fn settle(&self, life: &Life) {
        let Some(verdict) = life.verdict() else { return };
        let stored = serde_json::to_vec_pretty(verdict)
            .map_err(io::Error::from)
            .and_then(|text| self.store.record_verdict(self.id.as_str(), &text));
        if let Err(cause) = stored {
            error!(build = %self.id, "cannot store the verdict: {cause}");
        }
        info!(build = %self.id, complete = verdict.is_complete(), "{}", verdict.outcome);
        self.verdict.send_replace(Some(verdict.clone()));
        self.changed.send_modify(|version| *version += 1);
    }

    fn touch(&self) {
        self.touched.notify_one();
        self.changed.send_modify(|version| *version += 1);
    }

    /// Watches the clocks until the verdict is known.
    pub(crate) async fn watch_clocks(&self) {
        while self.verdict.borrow().is_none() {
            let deadline = self.lock().life.poll_timeout();
            tokio::select! {
                biased; // what has changed may have moved the deadline
                () = self.touched.notified() => {}
                () = expiry(deadline) => self.handle_timeout(),
            }
        }
    }

    /// A clock has run out. While nothing can be stored that is the reason, whatever it did to the agents.
    fn handle_timeout(&self) {
        if self.lock().storage_failing.is_some() {
            self.fail(NOT_STORED);
        }
        self.act(|life| life.handle_timeout(Instant::now()));
    }

    /// Waits for the verdict, which anybody may do, at any time.
    pub(crate) async fn verdict(&self) -> Verdict {
        let mut verdict = self.verdict.subscribe();
        loop {
            if let Some(verdict) = verdict.borrow_and_update().clone() {
                return verdict;
            }
            if verdict.changed().await.is_err() {
                std::future::pending::<()>().await; // `self` holds the sender
            }
        }
    }

    /// Waits until every finished agent has seen that it may go.
    pub(crate) async fn confirmed(&self) {
        let mut changed = self.changed.subscribe();
        while !self.lock().life.is_confirmed() {
            if changed.changed().await.is_err() {
                return;
            }
        }
    }

    pub(crate) fn was_connected(&self) -> bool {
        self.lock().life.was_connected()
    }

    /// The log of the whole build from its beginning.
    pub(crate) fn log(self: &Arc<Self>) -> BuildLog {
        BuildLog { changed: self.changed.subscribe(), build: self.clone(), readers: Vec::new(), turn: 0 }
    }
}

/// Why a build ends whose log has no place.
const NOT_STORED: &str = "the log cannot be stored; is the data directory full or read-only?";

/// Never completes without a deadline.
pub(crate) async fn expiry(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

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
    readers: Vec<AttemptReader>,
    turn: usize,
}

impl BuildLog {
    /// The next item: each attempt's in order, attempts as their records come. `None` when the build has its verdict
    /// and everything stored was read. Cancel safe.
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
        for _ in 0..self.readers.len() {
            let reader = &mut self.readers[self.turn];
            if let Some(found) = reader.next()? {
                return Ok(Some(item(&reader.files, found)));
            }
            self.turn = (self.turn + 1) % self.readers.len();
        }
        Ok(None)
    }

    fn open_new_attempts(&mut self) -> io::Result<()> {
        let inner = self.build.lock();
        for files in inner.attempts.iter().skip(self.readers.len()) {
            self.readers.push(AttemptReader::open(files.clone())?);
        }
        Ok(())
    }
}

fn item(files: &AttemptFiles, found: Found) -> LogItem {
    let (step, attempt) = (files.step.clone(), files.attempt);
    match found {
        Found::Record(record) => LogItem::Record(LogRecord { step, attempt, record }),
        Found::Lost(records) => LogItem::Lost { step, attempt, records },
    }
}
