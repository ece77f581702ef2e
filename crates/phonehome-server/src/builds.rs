//! Which builds are known, who waits for them, and the log of each as one stream.

pub(crate) mod cursor;
mod ends;
mod log;
mod pace;
pub(crate) mod state;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use phonehome_env::disk::is_full;
use phonehome_proto::{
    attempts::Lease,
    close::CloseCode,
    frame::{Cancel, Finished, FinishedAck, Hello, UnixMicros},
    id::{Attempt, BuildId, ProducerId, StepName},
    receiver::AgentViolation,
};
use sha2::{Digest, Sha256};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use self::{
    cursor::{Cursor, CursorError},
    pace::Pace,
    state::{Action, Life, Stored},
};
pub use self::{
    log::{BuildLog, LogItem, LogRecord},
    state::{Clock, Clocks, Outcome, StepLog, Verdict},
};
pub(crate) use self::{
    log::{Order, Streams, View},
    state::{BuildPhase, StepState},
};
use crate::{
    declaration::Declaration,
    report::{MAX_REPORTS, Report},
    store::{AttemptFiles, OpenError, Opened, Store, Surveyed, archive, archive::ArchivedAttempt},
};

/// SHA-256 of a token: all that is kept of it.
pub(crate) type TokenHash = phonehome_proto::id::Digest;

pub(crate) fn hash_token(token: &str) -> TokenHash {
    phonehome_proto::id::Digest(Sha256::digest(token.as_bytes()).into())
}

/// Every build that this server has in memory.
#[derive(Debug, Default)]
pub(crate) struct Builds(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    builds: BTreeMap<BuildId, Arc<Build>>,
    /// Looking a hash up takes a time that depends on the hash: that tells nothing about a token which is not known.
    tokens: BTreeMap<[u8; 32], BuildId>,
}

impl Builds {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a build; `false` when there is one of that name, or with its token.
    pub(crate) fn insert(&self, build: Arc<Build>) -> bool {
        let mut known = self.lock();
        if known.builds.contains_key(&build.id) || known.tokens.contains_key(&build.declaration.token.0) {
            return false;
        }
        known.tokens.insert(build.declaration.token.0, build.id.clone());
        known.builds.insert(build.id.clone(), build);
        true
    }

    /// Lets go of a build, and of no other that has its name by now: says whether it was here. Whoever has it goes on
    /// with it.
    pub(crate) fn remove(&self, build: &Arc<Build>) -> bool {
        let mut known = self.lock();
        let is_here = known.builds.get(&build.id).is_some_and(|known| Arc::ptr_eq(known, build));
        if is_here {
            known.builds.remove(&build.id);
            known.tokens.remove(&build.declaration.token.0);
        }
        is_here
    }

    pub(crate) fn find(&self, id: &BuildId) -> Option<Arc<Build>> {
        self.lock().builds.get(id).cloned()
    }

    /// The build that a token is for.
    pub(crate) fn by_token(&self, token: &str) -> Option<Arc<Build>> {
        self.by_token_hash(&hash_token(token))
    }

    pub(crate) fn by_token_hash(&self, token: &TokenHash) -> Option<Arc<Build>> {
        let known = self.lock();
        known.builds.get(known.tokens.get(&token.0)?).cloned()
    }

    /// Whether nothing is expected so far, so that nothing is known about any token.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().builds.is_empty()
    }

    pub(crate) fn all(&self) -> Vec<Arc<Build>> {
        self.lock().builds.values().cloned().collect()
    }

    pub(crate) fn count(&self) -> usize {
        self.lock().builds.len()
    }
}

/// One build, shared by its connections, its clock and whoever waits for it.
#[derive(Debug)]
pub(crate) struct Build {
    pub(crate) id: BuildId,
    pub(crate) declaration: Declaration,
    store: Store,
    /// It is read from its directory: nothing is written any more.
    is_archived: bool,
    inner: Mutex<Inner>,
    /// How fast it may go, if that is limited.
    pace: Option<Mutex<Pace>>,
    /// Counts changes of the log; readers wait on it.
    changed: watch::Sender<u64>,
    /// The verdict, once it is written down.
    verdict: watch::Sender<Option<Verdict>>,
    /// Whether the verdict is in its file; who did not want to wait knows it without.
    is_written_down: AtomicBool,
    cancel: watch::Sender<Option<Cancel>>,
    /// Wakes the clock when a deadline may have moved.
    touched: Notify,
    /// Fires when what an earlier process left has been taken up; nobody is seated before that.
    taken_up: CancellationToken,
    /// Fires when somebody does not want to wait for a verdict that cannot be written down.
    hurried: CancellationToken,
    /// Wakes whoever keeps book when there is a new attempt.
    arrived: Notify,
    /// Why an earlier process was to stop it. It counts once it is known who is there to be stopped.
    cancelled_before: OnceLock<String>,
    /// Fires when everything of it is removed: from then on its name may be another build's.
    pub(crate) removed: CancellationToken,
    /// What launchers and exporters told.
    reports: Mutex<Vec<Arc<Report>>>,
}

#[derive(Debug)]
struct Inner {
    life: Life,
    attempts: Vec<Arc<AttemptFiles>>,
    /// Whose they are, in a build that is archived.
    owners: Vec<(Arc<AttemptFiles>, ProducerId)>,
    /// The connection of each step, to be told when a newer one takes over.
    connections: Vec<Seated>,
    /// Attempts whose end has made them send a part of their log again.
    rewound: BTreeSet<(StepName, Attempt)>,
    /// Since when nothing could be stored.
    storage_failing: Option<Instant>,
}

/// Who writes a step.
#[derive(Debug)]
struct Seated {
    step: StepName,
    lease: Lease,
    superseded: CancellationToken,
}

impl Inner {
    /// When a clock runs out: the build's own, or that of a storage which does not work.
    fn poll_timeout(&self) -> Option<Instant> {
        let patience = self.life.lost_limit().filter(|_| self.life.is_running());
        let storage = self.storage_failing.zip(patience).map(|(since, patience)| since + patience);
        self.life.poll_timeout().into_iter().chain(storage).min()
    }

    fn new(life: Life) -> Self {
        let (attempts, owners, connections, rewound) = Default::default();
        Self { life, attempts, owners, connections, rewound, storage_failing: None }
    }

    /// Whether the build has ended without the end of this step. When it has one, the store turns everybody but its agent
    /// away without making an attempt.
    fn is_over_for(&self, step: &StepName) -> bool {
        self.life.has_ended() && !self.life.has_finished(step)
    }

    /// Gives a connection the seat of its step, and whoever had it makes room. Leases are given in one order and may get
    /// here in another: the newer one has the seat.
    fn take_seat(&mut self, step: &StepName, lease: Lease, superseded: &CancellationToken) {
        let seated = Seated { step: step.clone(), lease, superseded: superseded.clone() };
        match self.connections.iter_mut().find(|seated| seated.step == *step) {
            Some(newer) if newer.lease.is_newer_than(lease) => superseded.cancel(),
            Some(older) => std::mem::replace(older, seated).superseded.cancel(),
            None => self.connections.push(seated),
        }
    }

    /// Adds an attempt; `false` when it is known.
    fn note_attempt(&mut self, files: &Arc<AttemptFiles>) -> bool {
        let is_new = !self.attempts.iter().any(|known| known.step == files.step && known.attempt == files.attempt);
        if is_new {
            self.attempts.push(files.clone());
        }
        is_new
    }

    /// The newest attempt of a step, when it is this agent's.
    fn owned_by(&self, hello: &Hello) -> Option<Arc<AttemptFiles>> {
        let newest = self.newest(&hello.step)?;
        let is_its =
            |(files, owner): &(Arc<AttemptFiles>, ProducerId)| Arc::ptr_eq(files, newest) && *owner == hello.producer;
        self.owners.iter().any(is_its).then(|| newest.clone())
    }

    fn newest(&self, step: &StepName) -> Option<&Arc<AttemptFiles>> {
        self.attempts.iter().filter(|files| files.step == *step).max_by_key(|files| files.attempt)
    }

    /// The verdict with what is stored at this moment, once it is known.
    fn verdict(&self, now: UnixMicros) -> Option<Verdict> {
        self.life.verdict(|step| self.newest(step).map(|files| stored(files)), now)
    }

    /// Until when it is tried to write the verdict down.
    fn verdict_deadline(&self, now: Instant) -> Instant {
        self.storage_failing.unwrap_or(now) + self.life.lost_limit().unwrap_or(VERDICT_PATIENCE)
    }
}

/// What is stored of an attempt at this moment.
fn stored(files: &AttemptFiles) -> Stored {
    let tally = files.progress.borrow().tally.clone();
    Stored { attempt: files.attempt, counts: tally.counts(), digest: tally.digest() }
}

/// What a report is to a build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Noted {
    /// It is known, and may have happened so much more often, at a power of two, that this should be written down.
    Again {
        is_worth_writing: bool,
    },
    /// There are as many as are kept.
    Full,
    New,
}

/// A connection's place in its build.
#[derive(Debug)]
pub(crate) struct Seat {
    pub(crate) opened: Opened,
    /// Fires when a newer connection of the step takes over.
    pub(crate) superseded: CancellationToken,
    /// Changes also with the verdict.
    pub(crate) cancel: watch::Receiver<Option<Cancel>>,
}

/// Why an agent does not get a seat.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) code: CloseCode,
    pub(crate) reason: String,
}

impl Build {
    /// A build whose clocks start now, but for the total one: that has run for `age` already.
    pub(crate) fn new(id: BuildId, declaration: Declaration, age: Duration, store: Store) -> Self {
        let now = Instant::now();
        let started = now.checked_sub(age).unwrap_or(now); // a machine that was booted since then counts anew
        let life = Life::new(declaration.steps.clone(), declaration.timeouts.clone(), started, now);
        Self {
            id,
            declaration,
            store,
            is_archived: false,
            inner: Mutex::new(Inner::new(life)),
            pace: None,
            changed: watch::Sender::new(0),
            verdict: watch::Sender::new(None),
            is_written_down: AtomicBool::new(false),
            cancel: watch::Sender::new(None),
            touched: Notify::new(),
            taken_up: CancellationToken::new(),
            hurried: CancellationToken::new(),
            arrived: Notify::new(),
            cancelled_before: OnceLock::new(),
            removed: CancellationToken::new(),
            reports: Mutex::new(Vec::new()),
        }
    }

    /// A build that has ended, as it is on the disk.
    pub(crate) fn archived(
        id: BuildId,
        declaration: Declaration,
        verdict: Verdict,
        attempts: Vec<ArchivedAttempt>,
        store: Store,
    ) -> Self {
        let mut build = Self { is_archived: true, ..Self::new(id, declaration, Duration::ZERO, store) };
        let inner = build.inner.get_mut().unwrap_or_else(PoisonError::into_inner);
        inner.life.restore(verdict.clone());
        for attempt in attempts {
            let ArchivedAttempt { files, finished, producer, .. } = attempt;
            let counts = |log: &StepLog| (&log.step, log.attempt) == (&files.step, files.attempt) && log.end.is_some();
            if let Some((finished, answer)) = finished.filter(|_| verdict.steps.iter().any(counts)) {
                inner.life.handle_finished(&files.step, finished, answer, Instant::now());
            }
            inner.owners.extend(producer.map(|producer| (files.clone(), producer)));
            inner.attempts.push(files);
        }
        build.taken_up.cancel();
        *build.is_written_down.get_mut() = true;
        build.verdict.send_replace(Some(verdict));
        build
    }

    /// An earlier process was told to stop it.
    pub(crate) fn note_cancelled_before(&self, reason: String) {
        drop(self.cancelled_before.set(reason)); // the first one counts
    }

    /// Limits it to so many bytes per second, over all of its steps.
    pub(crate) fn with_rate(self, rate: Option<u64>) -> Self {
        Self { pace: rate.map(|rate| Mutex::new(Pace::new(rate, Instant::now()))), ..self }
    }

    fn pace(&self) -> Option<MutexGuard<'_, Pace>> {
        self.pace.as_ref().map(|pace| pace.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Until when an acknowledgement has to wait, if it has to.
    pub(crate) fn acknowledges_at(&self, now: Instant) -> Option<Instant> {
        self.pace().map(|pace| pace.ready_at()).filter(|at| *at > now)
    }

    /// So many bytes are about to be acknowledged.
    pub(crate) fn note_acknowledged(&self, bytes: u64, now: Instant) {
        if let Some(mut pace) = self.pace() {
            pace.spend(bytes, now);
        }
    }

    /// The most that its agents should have under way, bytes.
    pub(crate) fn window(&self) -> u64 {
        self.pace().map_or(u64::MAX, |pace| pace.window())
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
        self.taken_up.cancelled().await;
        if self.lock().is_over_for(&hello.step) {
            return Err(self.too_late());
        }
        if self.is_archived {
            return self.seat_again(&hello);
        }
        let step = hello.step.clone();
        let opened = match self.store.open_attempt(hello, self.changed.clone()).await {
            Ok(opened) => opened,
            Err(OpenError::Refused(code, reason)) => return refuse(code, reason.into()),
            Err(OpenError::Contradiction(violation)) => return refuse(violation.close_code(), violation.to_string()),
            Err(OpenError::Storage(cause)) => {
                let is_known = self.lock().storage_failing.is_some();
                if is_known || is_full(&cause) {
                    debug!(build = %self.id, "cannot open an attempt: {cause}"); // the store says so when it is full
                } else {
                    error!(build = %self.id, "cannot open an attempt: {cause}");
                }
                self.handle_storage(false);
                return refuse(CloseCode::StorageUnavailable, "storage is not available".into());
            }
        };
        let finished = opened.progress.borrow().finished.is_some();
        if self.lock().life.has_ended() && !finished {
            return Err(self.too_late());
        }
        Ok(self.take_seat(&step, opened))
    }

    /// Lets the agent whose end counts hear again what was answered: it may have been cut off, or the server killed, before
    /// it heard.
    fn seat_again(&self, hello: &Hello) -> Result<Seat, Refusal> {
        let opened = self.lock().owned_by(hello).and_then(Opened::again);
        let mut opened = opened.ok_or_else(|| self.too_late())?;
        let lost =
            opened.receiver.handle_hello(hello).and_then(|lost| lost.map_or(Ok(()), |_| Err(AgentViolation::OtherEnd)));
        lost.map_err(|violation| Refusal { code: violation.close_code(), reason: violation.to_string() })?;
        Ok(self.take_seat(&hello.step, opened))
    }

    /// What an agent is told to whom the verdict leaves nothing to say. One whose end counts may hear that it does.
    pub(crate) fn dismissal(&self, step: &StepName) -> Option<Refusal> {
        let is_dismissed = self.has_verdict() && !self.lock().life.has_finished(step);
        is_dismissed.then(|| self.too_late())
    }

    /// Why an agent is turned away whose build has ended. While the verdict may still be forgotten that is not final.
    fn too_late(&self) -> Refusal {
        if self.verdict.borrow().is_some() {
            return Refusal { code: CloseCode::AlreadyFinished, reason: "the build has its verdict already".into() };
        }
        let reason = "the build has ended, its verdict is being stored".into();
        Refusal { code: CloseCode::StorageUnavailable, reason }
    }

    fn take_seat(&self, step: &StepName, mut opened: Opened) -> Seat {
        let superseded = CancellationToken::new();
        let mut inner = self.lock();
        let lease = opened.writer.lease;
        inner.take_seat(step, lease, &superseded);
        let files = &opened.writer.files;
        if inner.note_attempt(files) {
            info!(build = %self.id, %step, attempt = files.attempt, "connected");
            self.arrived.notify_one();
        }
        if inner.rewound.contains(&(step.clone(), files.attempt)) {
            opened.receiver.note_rewound();
        }
        inner.life.handle_connected(step, files.attempt, Instant::now());
        if !opened.progress.borrow().full {
            inner.storage_failing = None; // the attempt could be opened
        }
        drop(inner);
        self.touch();
        Seat { opened, superseded, cancel: self.cancel.subscribe() }
    }

    /// An attempt is about to send a part of its log again, which it does once.
    pub(crate) fn note_rewound(&self, files: &AttemptFiles) {
        self.lock().rewound.insert((files.step.clone(), files.attempt));
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
        inner.storage_failing.get_or_insert(now);
        drop(inner);
        self.touch(); // the clock sees to it
    }

    /// New output has arrived.
    pub(crate) fn handle_output(&self) {
        self.lock().life.handle_output(Instant::now());
    }

    pub(crate) fn handle_finished(&self, step: &StepName, finished: Finished, answer: FinishedAck) {
        self.act(|life| life.handle_finished(step, finished, answer, Instant::now()));
    }

    pub(crate) fn handle_confirmed(&self, step: &StepName) {
        self.lock().life.handle_confirmed(step);
        self.touch();
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.lock().life.has_ended() || self.cancel.borrow().is_some()
    }

    pub(crate) fn cancel(&self, reason: &str) {
        if self.lock().life.has_ended() {
            self.hurried.cancel();
        }
        self.act(|life| life.handle_cancel(reason.to_owned(), Instant::now()));
    }

    pub(crate) fn fail(&self, reason: &str) {
        self.act(|life| life.handle_error(reason.to_owned(), Instant::now()));
    }

    fn act(&self, change: impl FnOnce(&mut Life) -> Action) {
        let mut inner = self.lock();
        match change(&mut inner.life) {
            Action::Cancel(cancel) => drop(self.cancel.send_replace(Some(cancel))),
            Action::End | Action::Nothing => {}
        }
        drop(inner);
        self.touch();
    }

    fn touch(&self) {
        self.touched.notify_one();
        self.changed.send_modify(|version| *version += 1);
    }

    /// Watches the clocks to the end, writes the verdict down, and only then lets it be known.
    pub(crate) async fn watch_clocks(&self, shutdown: &CancellationToken) {
        tokio::select! {
            biased; // a verdict that is due is given
            () = self.ended() => {}
            () = shutdown.cancelled() => return,
        }
        Box::pin(self.stop_storing()).await;
        let Some(verdict) = self.lock().verdict(self.store.time_of_day()) else { return };
        Box::pin(self.write_down(&verdict, shutdown)).await;
        info!(build = %self.id, complete = verdict.is_complete(), "{}", verdict.outcome);
        self.verdict.send_replace(Some(verdict));
        self.cancel.send_modify(|_| {}); // its connections look whether they may stay
        self.touch();
    }

    /// Waits for the end.
    async fn ended(&self) {
        Box::pin(self.take_up()).await; // a box that is gone when it waits for the end, as ten thousand do
        if let Some(reason) = self.cancelled_before.get() {
            self.act(|life| life.handle_cancel(reason.clone(), Instant::now()));
        }
        self.taken_up.cancel();
        while !self.lock().life.has_ended() {
            let deadline = self.lock().poll_timeout();
            tokio::select! {
                biased; // what has changed may have moved the deadline
                () = self.touched.notified() => {}
                () = expiry(deadline) => self.handle_timeout(),
            }
        }
    }

    /// Lets nobody store anything more, so that the verdict's account is that of the files. Where every step has its end
    /// nobody can.
    async fn stop_storing(&self) {
        if self.lock().life.has_all_ends() {
            return;
        }
        tokio::select! {
            biased; // it is asked for in any case
            stopped = timeout(VERDICT_TRY, self.store.stop(&self.id)) => if !matches!(stopped, Ok(Ok(()))) {
                warn!(build = %self.id, "the store does not answer: output may come after the verdict");
            },
            () = self.hurried.cancelled() => {}
        }
        self.take_ends(); // those that were under way
    }

    /// Takes up what an earlier process stored of this build, so that an end that was accepted counts although its agent
    /// is gone. Without it every agent has to come back, so a store that does not work is not waited for without limit.
    async fn take_up(&self) {
        let patience = self.lock().life.lost_limit().unwrap_or(SURVEY_PATIENCE);
        let mut is_known = false;
        let look = async {
            loop {
                match self.store.survey(&self.id, self.changed.clone()).await {
                    Ok(found) => return self.take_up_attempts(&found),
                    Err(_) if is_known => {}
                    Err(cause) => {
                        error!(build = %self.id, "cannot look at what is stored, trying again: {cause}");
                        is_known = true;
                    }
                }
                sleep(SURVEY_RETRY).await;
            }
        };
        tokio::select! {
            biased; // who will not wait first
            () = self.hurried.cancelled() => {}
            looked = timeout(patience, look) => if looked.is_err() {
                error!(build = %self.id, "what is stored was not found out in time; every agent has to come back");
            },
        }
    }

    fn take_up_attempts(&self, found: &[Surveyed]) {
        let mut inner = self.lock();
        for Surveyed { files, .. } in found {
            if inner.note_attempt(files) {
                info!(build = %self.id, step = %files.step, attempt = files.attempt, "found");
            }
            inner.life.handle_found(&files.step, files.attempt, Instant::now());
        }
        drop(inner);
        for Surveyed { files, finished } in found {
            self.take_end(files, finished.clone());
        }
    }

    /// A clock has run out. An end that is stored counts, though the connection may not have lived to tell of it. While
    /// nothing can be stored that is the reason, whatever it did to the agents.
    fn handle_timeout(&self) {
        self.take_ends();
        if self.lock().storage_failing.is_some() {
            self.fail(NOT_STORED);
            if !self.lock().life.has_agents() {
                self.act(|life| life.handle_cancel(NOT_STORED.into(), Instant::now())); // nobody is there to be stopped
            }
        }
        self.act(|life| life.handle_timeout(Instant::now()));
    }

    /// Takes in every end that is stored.
    fn take_ends(&self) {
        let attempts = self.lock().attempts.clone();
        for files in attempts {
            let finished = files.progress.borrow().finished.clone();
            self.take_end(&files, finished);
        }
    }

    /// Takes in the end of an attempt, if it has one and no newer attempt has taken over.
    fn take_end(&self, files: &AttemptFiles, finished: Option<(Finished, FinishedAck)>) {
        let newest = self.lock().newest(&files.step).map(|newest| newest.attempt);
        if let Some((finished, answer)) = finished.filter(|_| newest == Some(files.attempt)) {
            self.handle_finished(&files.step, finished, answer);
        }
    }

    /// Makes the verdict durable. While that fails it is tried again, for as long as a lost agent is waited for, counted
    /// from when storage began to fail: a dead store must not keep the end from anybody.
    async fn write_down(&self, verdict: &Verdict, shutdown: &CancellationToken) {
        let text = serde_json::to_vec_pretty(verdict).expect("a verdict is plain data");
        let deadline = self.lock().verdict_deadline(Instant::now());
        let mut is_known = false;
        while let Err(cause) = self.record_verdict(&text).await {
            if Instant::now() >= deadline || self.hurried.is_cancelled() || shutdown.is_cancelled() {
                return error!(build = %self.id, "the verdict could not be stored: {cause}");
            }
            if !std::mem::replace(&mut is_known, true) {
                error!(build = %self.id, "the verdict cannot be stored yet, trying again: {cause}");
            }
            tokio::select! {
                biased; // who will not wait first
                () = self.hurried.cancelled() => {}
                () = shutdown.cancelled() => {}
                () = sleep(VERDICT_RETRY) => {}
            }
        }
    }

    /// Writes the verdict down once, in limited time. That there is one already is as good.
    async fn record_verdict(&self, text: &[u8]) -> io::Result<()> {
        let stored = self.store.record_verdict(&self.id, text.to_vec());
        let is_first = timeout(VERDICT_TRY, stored).await??;
        if !is_first {
            warn!(build = %self.id, "there is a verdict already, and the first one stays");
        }
        self.is_written_down.store(true, Ordering::Release);
        Ok(())
    }

    /// Whether its verdict will be known to the next process too.
    pub(crate) fn is_written_down(&self) -> bool {
        self.is_written_down.load(Ordering::Acquire)
    }

    /// Writes a verdict down that could not be stored when it was told, as soon as the store works again.
    pub(crate) async fn write_down_late(&self) {
        let Some(verdict) = self.known_verdict().filter(|_| !self.is_written_down()) else { return };
        let text = serde_json::to_vec_pretty(&verdict).expect("a verdict is plain data");
        while let Err(cause) = self.record_verdict(&text).await {
            debug!(build = %self.id, "the verdict cannot be stored still: {cause}");
            sleep(LATE_VERDICT_RETRY).await;
        }
        info!(build = %self.id, "the verdict is stored at last");
    }

    /// Waits for the verdict to be written down, which anybody may do, at any time.
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

    /// Waits for an attempt that was not there before. One waiter only.
    pub(crate) async fn arrival(&self) {
        self.arrived.notified().await;
    }

    /// Everything told so far, the oldest first.
    pub(crate) fn reports(&self) -> Vec<Arc<Report>> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What a report would be to this build.
    pub(crate) fn noted(&self, report: &Report) -> Noted {
        let reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        match reports.iter().find(|known| known.repeats(report)) {
            Some(known) => Noted::Again { is_worth_writing: report.count.max(1).ilog2() > known.count.max(1).ilog2() },
            None if reports.len() >= MAX_REPORTS => Noted::Full,
            None => Noted::New,
        }
    }

    /// Adds to what was told. The same thing again stays in its place, with the higher count.
    pub(crate) fn note_reports(&self, told: impl IntoIterator<Item = Report>) {
        let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        for report in told {
            match reports.iter_mut().find(|known| known.repeats(&report)) {
                Some(known) if known.count < report.count => *known = Arc::new(report),
                Some(_) => {}
                None => reports.push(Arc::new(report)),
            }
        }
        drop(reports);
        self.changed.send_modify(|version| *version += 1);
    }

    /// Bytes of output that are stored, over all attempts.
    pub(crate) fn output_bytes(&self) -> io::Result<u64> {
        let attempts = self.lock().attempts.clone();
        attempts.iter().map(|files| files.output_bytes()).sum()
    }

    /// The verdict, if there is one.
    pub(crate) fn known_verdict(&self) -> Option<Verdict> {
        self.verdict.borrow().clone()
    }

    pub(crate) fn has_verdict(&self) -> bool {
        self.verdict.borrow().is_some()
    }

    /// Fires whenever anything about the build has changed.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Bytes of everything in its directory.
    pub(crate) fn size_on_disk(&self) -> io::Result<u64> {
        archive::bytes(&**self.store.disk(), self.store.data(), &self.id)
    }

    pub(crate) fn was_connected(&self) -> bool {
        self.lock().life.was_connected()
    }

    pub(crate) fn phase(&self) -> BuildPhase {
        self.lock().life.build_phase()
    }

    /// Every attempt so far, and how its step stands.
    pub(crate) fn attempts(&self) -> Vec<(Arc<AttemptFiles>, StepState)> {
        let inner = self.lock();
        let mut newest = BTreeMap::new();
        for files in &inner.attempts {
            let attempt = newest.entry(&files.step).or_insert(files.attempt);
            *attempt = files.attempt.max(*attempt);
        }
        let state = |files: &AttemptFiles| {
            if newest.get(&files.step) == Some(&files.attempt) {
                inner.life.step_state(&files.step)
            } else {
                StepState::Superseded
            }
        };
        inner.attempts.iter().map(|files| (files.clone(), state(files))).collect()
    }

    /// How often the connection of a step's newest attempt was cut.
    pub(crate) fn cuts(&self, step: &StepName) -> u64 {
        self.lock().life.cut_count(step)
    }

    /// The beginning of its log.
    pub(crate) fn start(&self) -> Cursor {
        Cursor::start(&self.id, self.declaration.created)
    }

    /// Reads a cursor of this build.
    pub(crate) fn cursor(&self, text: &str) -> Result<Cursor, CursorError> {
        Cursor::parse(text, &self.id, self.declaration.created)
    }

    /// The log of the whole build from its beginning.
    pub(crate) fn log(self: &Arc<Self>) -> BuildLog {
        BuildLog::new(self.clone())
    }
}

/// Why a build ends whose log has no place.
const NOT_STORED: &str = "the log cannot be stored; is the data directory full or read-only?";

/// How long the store may take to say what an earlier process left when a lost agent would be waited for without limit.
const SURVEY_PATIENCE: Duration = Duration::from_secs(120);

/// Pause before it is asked again.
const SURVEY_RETRY: Duration = Duration::from_secs(1);

/// How long one attempt to write a verdict down may take.
const VERDICT_TRY: Duration = Duration::from_secs(10);

/// Pause before the next.
const VERDICT_RETRY: Duration = Duration::from_secs(1);

/// Pause before it is tried again once the verdict was told.
const LATE_VERDICT_RETRY: Duration = Duration::from_secs(10);

/// How long it is tried when a lost agent would be waited for without limit.
const VERDICT_PATIENCE: Duration = Duration::from_secs(120);

/// Never completes without a deadline.
pub(crate) async fn expiry(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use phonehome_env::{Env, Workers};
    use phonehome_proto::{
        frame::{End, Record, Stream},
        receiver::Receiver,
        tally::Tally,
    };

    use super::*;
    use crate::{store::Durability, tasks::Tasks};

    #[tokio::test]
    async fn a_verdict_that_is_known_is_stored() {
        let scene = Scene::new();
        scene.build.cancel("enough");
        assert_eq!(scene.build.verdict().await.exit_code(), 130);
        let stored: serde_json::Value = serde_json::from_slice(&fs::read(scene.verdict_file()).unwrap()).unwrap();
        assert_eq!(stored["verdict"], "cancelled");
    }

    #[tokio::test]
    async fn another_build_of_the_same_name_is_not_let_go_of() {
        let (old, new) = (Scene::new(), Scene::new());
        let builds = Builds::default();
        assert!(builds.insert(old.build.clone()) && builds.remove(&old.build));
        assert!(builds.insert(new.build.clone()));
        assert!(!builds.remove(&old.build));
        let found = [builds.find(&new.build.id), builds.by_token("token")];
        assert!(found.iter().flatten().filter(|found| Arc::ptr_eq(found, &new.build)).count() == 2);
    }

    // These run in real time: a paused clock does not wait for the store's thread.

    #[tokio::test]
    async fn a_verdict_that_cannot_be_stored_is_tried_again_and_told_when_it_is() {
        let scene = Scene::new();
        fs::write(scene.build_dir(), "in the way").unwrap();
        scene.build.cancel("enough");
        assert!(timeout(Duration::from_millis(300), scene.build.verdict()).await.is_err());
        assert!(scene.build.is_cancelled());
        fs::remove_file(scene.build_dir()).unwrap();
        scene.build.verdict().await;
        assert!(scene.verdict_file().exists());
    }

    #[tokio::test]
    async fn a_dead_store_keeps_the_end_from_nobody() {
        let lost = Some(Duration::from_millis(1500));
        let scene = Scene::with(&["main"], Clocks { lost, ..Clocks::default() });
        fs::write(scene.build_dir(), "in the way").unwrap();
        let begun = Instant::now();
        scene.build.cancel("enough");
        assert_eq!(scene.build.verdict().await.exit_code(), 130);
        assert!(begun.elapsed() >= Duration::from_millis(1500), "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn who_asks_twice_does_not_wait_for_a_dead_store() {
        let scene = Scene::new();
        fs::write(scene.build_dir(), "in the way").unwrap();
        scene.build.cancel("enough");
        assert!(timeout(Duration::from_millis(300), scene.build.verdict()).await.is_err());
        scene.build.cancel("enough, I said");
        timeout(Duration::from_secs(30), scene.build.verdict()).await.expect("it is told");
        assert!(!scene.build.is_written_down());
        fs::remove_file(scene.build_dir()).unwrap();
        scene.build.write_down_late().await;
        assert!(scene.build.is_written_down() && scene.verdict_file().exists());
    }

    /// The agent is gone, and its connection with it, before anybody could say that its end was stored.
    #[tokio::test]
    async fn an_end_that_is_stored_counts_although_its_connection_is_gone() {
        let scene = Scene::new();
        let seat = scene.seat(1, "main").await;
        scene.finish(&seat).await;
        let mut progress = seat.opened.progress.clone();
        progress.wait_for(|progress| progress.finished.is_some()).await.unwrap();
        scene.build.leave(&"main".parse().unwrap(), &seat.superseded);
        scene.build.handle_timeout();
        assert_eq!(scene.build.verdict().await.outcome, Outcome::Succeeded);
    }

    #[tokio::test]
    async fn an_end_from_before_a_restart_gives_the_verdict() {
        let before = Scene::new();
        let seat = before.seat(1, "main").await;
        before.finish(&seat).await;
        let mut progress = seat.opened.progress.clone();
        let finished = progress.wait_for(|progress| progress.finished.is_some()).await.unwrap().finished.clone();
        let after = Scene::new();
        after.build.take_up_attempts(&[Surveyed { files: seat.opened.writer.files.clone(), finished }]);
        assert_eq!(after.build.verdict().await.outcome, Outcome::Succeeded);
    }

    /// What was shown once is not shown again, whatever has become of it.
    #[tokio::test]
    async fn a_reader_keeps_its_place_when_records_are_taken_back_and_come_again() {
        let scene = Scene::new();
        let mut seat = scene.seat(1, "main").await;
        scene.append(&mut seat, &["one", "two"]).await;
        let kept = seat.opened.receiver.tally().clone();
        scene.append(&mut seat, &["bad", "worse"]).await;
        let mut log = scene.build.log();
        let shown: Vec<_> = (0..3).map(|_| text(log.try_next().unwrap())).collect();
        assert_eq!(shown, ["one", "two", "bad"]);

        scene.build.store.rewind(&seat.opened.writer, &kept).await.unwrap();
        assert_eq!(log.try_next().unwrap(), None);
        let (files, lost) = (&seat.opened.writer.files, 0);
        assert_eq!(fs::read(files.dir.join("log")).unwrap(), b"onetwo");
        seat.opened.receiver = Receiver::resume(kept, lost, None);
        scene.append(&mut seat, &["three", "four", "five"]).await;
        let rest: Vec<_> = std::iter::from_fn(|| log.try_next().unwrap()).map(|item| text(Some(item))).collect();
        assert_eq!(rest, ["four", "five"]);
        let mut afresh = scene.build.log();
        let all: Vec<_> = std::iter::from_fn(|| afresh.try_next().unwrap()).map(|item| text(Some(item))).collect();
        assert_eq!(all, ["one", "two", "three", "four", "five"]);
    }

    #[tokio::test]
    async fn a_step_that_writes_much_does_not_keep_another_from_being_read() {
        for (texts, turn) in [(vec!["x".to_owned(); 200], 64), (vec!["x".repeat(60_000); 12], 5)] {
            let scene = Scene::with(&["loud", "calm"], Clocks::default());
            let mut loud = scene.seat(1, "loud").await;
            let mut calm = scene.seat(2, "calm").await;
            scene.append(&mut loud, &texts.iter().map(|text| &**text).collect::<Vec<_>>()).await;
            scene.append(&mut calm, &["calm"]).await;
            let mut log = scene.build.log();
            let all: Vec<_> = std::iter::from_fn(|| log.try_next().unwrap()).map(|item| text(Some(item))).collect();
            assert_eq!(all.len(), texts.len() + 1, "all of both is read");
            assert_eq!(all.iter().position(|text| text == "calm"), Some(turn));
        }
    }

    #[tokio::test]
    async fn an_attempt_is_read_to_its_end_before_the_next_of_its_step() {
        let scene = Scene::new();
        let mut first = scene.seat(1, "main").await;
        scene.append(&mut first, &["first"; 100]).await;
        let mut log = scene.build.log();
        assert_eq!(text(log.try_next().unwrap()), "first");
        let mut second = scene.seat(2, "main").await;
        scene.append(&mut second, &["second"; 100]).await;
        let rest: Vec<_> = std::iter::from_fn(|| log.try_next().unwrap()).map(|item| text(Some(item))).collect();
        assert_eq!(rest, [vec!["first"; 99], vec!["second"; 100]].concat());
    }

    fn text(item: Option<LogItem>) -> String {
        match item {
            Some(LogItem::Record(found)) => String::from_utf8(found.record.payload.to_vec()).unwrap(),
            Some(LogItem::Lost { .. }) | None => panic!("no record: {item:?}"),
        }
    }

    /// Whatever was under way: what the verdict says of the log is true of the file, and stays true.
    #[tokio::test]
    async fn no_output_is_stored_after_the_verdict() {
        let scene = Scene::with(&["main", "other"], Clocks::default());
        let mut seat = scene.seat(1, "main").await;
        let other = scene.seat(2, "other").await;
        scene.append(&mut seat, &["known "]).await;
        scene.hand_over(&mut seat, &["under way "]).await;
        scene.finish(&other).await;
        scene.build.cancel("enough");
        scene.build.cancel("enough, I said");
        let verdict = scene.build.verdict().await;
        scene.hand_over(&mut seat, &["late"]).await;
        scene.finish(&seat).await;
        drop(scene.build.store.survey(&scene.build.id, watch::Sender::new(0)).await.unwrap()); // behind all of that
        let stored = fs::read(scene.build_dir().join("main/1/log")).unwrap();
        assert_eq!(
            (stored.as_slice(), verdict.steps[0].digest.0),
            (&b"known under way "[..], *blake3::hash(&stored).as_bytes())
        );
        assert!(!scene.build_dir().join("main/1/finished.json").exists());
        assert_eq!(verdict.steps[1].end, Some(End::Exited(0)), "its end was under way, and counts");
        let dismissed = |step: &str| scene.build.dismissal(&step.parse().unwrap()).map(|refusal| refusal.code);
        assert_eq!((dismissed("main"), dismissed("other")), (Some(CloseCode::AlreadyFinished), None));
    }

    #[tokio::test]
    async fn who_comes_after_the_verdict_leaves_no_trace() {
        let scene = Scene::with(&["main", "other"], Clocks::default());
        let first = scene.seat(1, "main").await;
        scene.finish(&first).await;
        let mut progress = first.opened.progress.clone();
        progress.wait_for(|progress| progress.finished.is_some()).await.unwrap();
        scene.build.cancel("enough");
        scene.build.cancel("enough, I said");
        scene.build.verdict().await;
        for (producer, step) in [(2, "main"), (2, "other")] {
            let refused = scene.build.seat(hello(producer, step)).await.unwrap_err();
            assert_eq!(refused.code, CloseCode::AlreadyFinished, "{step}");
        }
        assert!(!scene.build_dir().join("main/2").exists() && !scene.build_dir().join("other").exists());
        let seat = scene.seat(1, "main").await;
        assert!(seat.opened.receiver.finished().is_some(), "it may hear that its end was stored");
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_without_room_gets_as_long_as_a_lost_agent() {
        let scene = Scene::new();
        scene.build.lock().life.handle_connected(&"main".parse().unwrap(), 1, Instant::now());
        scene.build.handle_storage(false);
        sleep(Duration::from_secs(119)).await;
        scene.build.handle_storage(false);
        scene.build.handle_storage(true);
        scene.build.handle_storage(false);
        sleep(Duration::from_secs(119)).await;
        scene.build.handle_storage(false);
        assert!(!scene.build.is_cancelled(), "it is counted anew");
        sleep(Duration::from_secs(2)).await;
        let cancel = scene.build.cancel.borrow().clone().expect("the build is stopped");
        assert!(cancel.reason.contains("cannot be stored"), "{}", cancel.reason);
    }

    /// A build and its clock, over a store of its own.
    struct Scene {
        dir: tempfile::TempDir,
        build: Arc<Build>,
        tasks: Tasks,
    }

    impl Scene {
        fn new() -> Self {
            Self::with(&["main"], Clocks::default())
        }

        fn with(steps: &[&str], clocks: Clocks) -> Self {
            let dir = tempfile::tempdir().unwrap();
            // Its worker is a task, so that time stands still for it too.
            let env = Env { workers: Workers::Tasks(Arc::new(|| Duration::ZERO)), ..Env::real() };
            let store = Store::open(&env, dir.path(), Durability::Os, &Tasks::default()).unwrap();
            let steps = steps.iter().map(|step| step.parse().unwrap()).collect();
            let (labels, token) = (BTreeMap::new(), hash_token("token"));
            let declaration = Declaration { created: 0, steps, labels, timeouts: clocks, token };
            let build = Arc::new(Build::new("b".parse().unwrap(), declaration, Duration::ZERO, store));
            let (tasks, watched) = (Tasks::default(), build.clone());
            tasks.spawn(async move { watched.watch_clocks(&CancellationToken::new()).await });
            Self { dir, build, tasks }
        }

        fn build_dir(&self) -> std::path::PathBuf {
            self.dir.path().join("builds/b")
        }

        fn verdict_file(&self) -> std::path::PathBuf {
            self.build_dir().join("verdict.json")
        }

        async fn seat(&self, producer: u8, step: &str) -> Seat {
            self.build.seat(hello(producer, step)).await.unwrap()
        }

        /// Stores one record per text, and waits until they can be read.
        async fn append(&self, seat: &mut Seat, texts: &[&str]) {
            let next = self.hand_over(seat, texts).await;
            seat.opened.progress.wait_for(|progress| progress.next == next).await.unwrap();
        }

        /// Hands one record per text to the store, and says what the next one will be.
        async fn hand_over(&self, seat: &mut Seat, texts: &[&str]) -> u64 {
            let Opened { writer, receiver, .. } = &mut seat.opened;
            let (mut next, mut offset) = (receiver.next(), receiver.tally().offset(Stream::Stdout));
            for text in texts {
                let mut record = vec![Record::new(next, 0, Stream::Stdout, offset, (*text).to_owned().into())];
                receiver.handle_records(&mut record, |_| None).unwrap();
                self.build.store.append(writer, record, receiver.tally()).await.unwrap();
                (next, offset) = (next + 1, offset + text.len() as u64);
            }
            next
        }

        /// An end with code 0 and without a record.
        async fn finish(&self, seat: &Seat) {
            let (tally, end) = (Tally::default(), End::Exited(0));
            let (next, counts, digest) = (tally.next(), tally.counts(), tally.digest());
            let finished = Finished { next, counts, digest, end, time: 0, usage: None };
            self.build.store.finish(&seat.opened.writer, finished, FinishedAck::Complete).await.unwrap();
        }
    }

    impl Drop for Scene {
        fn drop(&mut self) {
            self.tasks.stop();
        }
    }

    fn hello(producer: u8, step: &str) -> Hello {
        Hello {
            build: "b".parse().unwrap(),
            step: step.parse().unwrap(),
            producer: ProducerId([producer; 16]),
            oldest: 0,
            next: 0,
            labels: BTreeMap::new(),
            agent: String::new(),
            capabilities: Vec::new(),
        }
    }
}
