//! The standing server: many builds on one port, kept in one data directory over any number of restarts.
//!
//! What it adds to [`Server`]: builds are declared over HTTP and durably, taken up again at the start, let
//! go of some time after their end, and found again on the disk when somebody asks for them.

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use phonehome_env::{
    Env,
    disk::{Disk, File, Open},
};
use phonehome_proto::{frame::UnixMicros, id::BuildId};
use serde::{Deserialize, Serialize};
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use crate::{
    builds::{Build, Clocks, Noted, TokenHash, Verdict, hash_token},
    catalogue::{Catalogue, Entry},
    declaration::Declaration,
    http::readers::Readers,
    identity::{ClientAuth, Identity, KeySource, Keys, Renewal},
    keeper::{Care, Keeper},
    lifecycle::{BuildEnd, Destination, LabelForm, Told},
    ready::Probe,
    report::{MAX_REPORTS, Report},
    server::{Server, Shared},
    store::{Durability, Store, archive, expire},
    strangers::StrangerLimits,
    summary::{Summary, kind},
    tasks::Tasks,
    tokens::{GivenTokens, NewToken, Scope, Tokens},
};

/// What a standing server is told at its start.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// Clocks of a build that is declared without.
    pub(crate) timeouts: Clocks,
    /// Address that agents are told, `wss://host:port`; `None` derives it from the request.
    pub(crate) advertise: Option<String>,
    /// Whether this port speaks TLS.
    pub(crate) tls: bool,
    /// Builds that may run at once.
    pub(crate) max_builds: usize,
    /// Agents that may be connected at once.
    pub(crate) max_agents: usize,
    /// Bytes per second that a build may send; `None` is no limit.
    pub(crate) build_rate: Option<u64>,
    /// Bytes that a build may store; `None` is no limit.
    pub(crate) build_quota: Option<u64>,
    /// Bytes of the file system that stay free of output.
    pub(crate) min_free: u64,
    /// What becomes of builds after their end.
    pub(crate) care: Care,
    /// Whether metrics are for everybody.
    pub(crate) metrics_public: bool,
}

/// What a standing server has beside its builds, and where that comes from.
#[derive(Debug, Default)]
pub(crate) struct Outfit {
    /// `None` is without TLS.
    pub(crate) key: Option<KeySource>,
    pub(crate) clients: Option<ClientAuth>,
    pub(crate) tokens: GivenTokens,
    pub(crate) strangers: StrangerLimits,
    pub(crate) lifecycle: Option<(Destination, LabelForm)>,
}

/// A standing server that has been started.
#[derive(Debug)]
pub(crate) struct Stood {
    pub(crate) server: Server,
    pub(crate) standing: Arc<Standing>,
    /// Tokens that had to be made, to be shown this once.
    pub(crate) new_tokens: Vec<NewToken>,
    /// Who looks after the key.
    pub(crate) renewal: Option<Renewal>,
}

/// The builds of a data directory, those that run and those that have ended.
#[derive(Debug)]
pub(crate) struct Standing {
    pub(crate) shared: Arc<Shared>,
    pub(crate) catalogue: Catalogue,
    pub(crate) settings: Settings,
    /// Those of people and tools.
    pub(crate) tokens: Tokens,
    /// The key in use, with TLS.
    pub(crate) keys: Option<Arc<Keys>>,
    pub(crate) probe: Probe,
    /// The pin of this server's key.
    pub(crate) pin: Option<String>,
    tasks: Tasks,
    pub(crate) readers: Readers,
    /// Held by who writes in the catalogue what has become of a build, or removes one.
    book: Arc<tokio::sync::Mutex<()>>,
    /// Ended builds that somebody reads.
    archived: Mutex<BTreeMap<BuildId, Weak<Build>>>,
    /// Keeps other processes out of the data directory.
    _lock: Box<dyn File>,
}

/// Who makes a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Access {
    Admin,
    Launch,
    Read,
    /// With the token of this build's agents.
    Build(BuildId),
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Declare {
    pub(crate) id: BuildId,
    pub(crate) steps: Vec<phonehome_proto::id::StepName>,
    pub(crate) labels: BTreeMap<String, String>,
    /// The secret of its agents.
    pub(crate) token: String,
}

/// Why a build is not declared.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeclareError {
    #[error("build {0} is known already")]
    Known(BuildId),
    #[error("another build has this token: every build needs one of its own")]
    SameToken,
    #[error("{0} builds are running, which is the limit; try again when some have ended")]
    TooMany(usize),
    #[error("the declaration cannot be stored")]
    Storage(#[from] io::Error),
}

/// Why a report is not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReportError {
    #[error("the build has {MAX_REPORTS} reports, which is the limit")]
    TooMany,
    #[error("the report cannot be stored")]
    Storage(#[from] io::Error),
}

/// How long finished agents get to hear that their end was accepted, before their build leaves memory.
const CONFIRMATION: Duration = Duration::from_secs(60);

/// How long an ended build stays in memory after that: an agent that has missed the answer asks again.
const LINGER: Duration = Duration::from_secs(120);

impl Standing {
    /// Opens the catalogue and takes up every build that an earlier process left running.
    pub(crate) async fn open(
        shared: Arc<Shared>,
        tasks: Tasks,
        settings: Settings,
        tokens: Tokens,
        identity: Option<&Identity>,
        lock: Box<dyn File>,
    ) -> io::Result<Arc<Self>> {
        let data = shared.store.data().to_owned();
        let catalogue = shared.env.blocking(move || Catalogue::open(&data)).await?;
        let (book, archived) = Default::default();
        let (keys, pin) = identity.map(|identity| (identity.keys.clone(), identity.pin.clone())).unzip();
        let probe = Probe::new(&shared.env, shared.store.data(), settings.min_free);
        let _lock = lock;
        let readers = Readers::default();
        let standing = Arc::new(Self {
            shared,
            catalogue,
            settings,
            tokens,
            keys,
            probe,
            pin,
            tasks,
            readers,
            book,
            archived,
            _lock,
        });
        let (catalogue, store) = (standing.catalogue.clone(), standing.shared.store.clone());
        let running = standing.shared.env.blocking(move || reconcile(&catalogue, &store, &mut |_, _| {})).await?;
        for (id, declaration, reports) in running {
            standing.resume(id, declaration, reports).await?;
        }
        standing.tasks.spawn(Keeper::new(standing.clone()).run());
        Ok(standing)
    }

    /// Goes on with a build of an earlier process.
    async fn resume(self: &Arc<Self>, id: BuildId, declaration: Declaration, reports: Vec<Report>) -> io::Result<()> {
        self.limit(&id).await?;
        let age = self.shared.env.nature.now().saturating_sub(declaration.created);
        info!(build = %id, "taken up again");
        let build = Build::new(id, declaration, Duration::from_micros(age), self.shared.store.clone());
        let build = build.with_rate(self.settings.build_rate);
        build.note_reports(reports);
        if let Some(cancelling) = self.cancelled_before(&build.id).await? {
            build.note_cancelled_before(cancelling.reason);
        }
        let build = Arc::new(build);
        if self.shared.builds.insert(build.clone()) {
            self.attend(build);
        }
        Ok(())
    }

    /// What an earlier process was told about stopping a build.
    async fn cancelled_before(&self, id: &BuildId) -> io::Result<Option<Cancelling>> {
        let (store, of) = (self.shared.store.clone(), id.clone());
        let text = self.shared.env.blocking(move || archive::cancel(&**store.disk(), store.data(), &of)).await?;
        let cancelling = text.map(|text| serde_json::from_slice(&text)).transpose();
        Ok(cancelling.unwrap_or_else(|error| {
            warn!(build = %id, "its cancel.json is damaged, and does not stop it: {error}");
            None
        }))
    }

    /// Stops a build, and forgets that no more than its output. The second time it is not waited for, and nothing is left
    /// to write down. It stops also when that cannot be stored.
    pub(crate) async fn cancel(&self, build: &Build, reason: &str) -> io::Result<()> {
        let is_first = !build.is_cancelled();
        build.cancel(reason);
        if !is_first {
            return Ok(());
        }
        let cancelling = Cancelling { reason: reason.to_owned(), time: self.shared.env.nature.now() };
        let text = serde_json::to_vec_pretty(&cancelling)?;
        timeout(CANCEL_PATIENCE, self.shared.store.record_cancel(&build.id, text)).await??;
        Ok(())
    }

    /// Tells the store what the build may have, before anybody is seated.
    async fn limit(&self, id: &BuildId) -> io::Result<()> {
        match self.settings.build_quota {
            Some(bytes) => self.shared.store.limit(id, bytes).await.map_err(io::Error::other),
            None => Ok(()),
        }
    }

    /// Starts to wait for a new build. Declaring the same build with the same token again changes nothing. What was begun
    /// is done also when whoever asked does not wait for it.
    pub(crate) async fn declare(
        self: &Arc<Self>,
        declare: Declare,
        timeouts: Clocks,
    ) -> Result<Arc<Build>, DeclareError> {
        let standing = self.clone();
        let declared = tokio::spawn(async move { standing.declare_whole(declare, timeouts).await });
        declared.await.map_err(io::Error::other)?
    }

    async fn declare_whole(self: &Arc<Self>, declare: Declare, timeouts: Clocks) -> Result<Arc<Build>, DeclareError> {
        let Declare { id, steps, labels, token } = declare;
        let token = hash_token(&token);
        if let Some(known) = self.find(&id).await? {
            return same(known, token);
        }
        if self.by_token_hash(token).await?.is_some() {
            return Err(DeclareError::SameToken);
        }
        let running = self.shared.builds.count();
        if running >= self.settings.max_builds {
            return Err(DeclareError::TooMany(running));
        }
        let created = self.shared.env.nature.now();
        let mut declaration = Declaration { created, steps, labels, timeouts, token };
        if !self.shared.store.declare(&id, declaration.to_json()).await? {
            declaration = self.declared_before(&id, token).await?;
        }
        self.limit(&id).await?;
        let build = Build::new(id.clone(), declaration, Duration::ZERO, self.shared.store.clone());
        let build = Arc::new(build.with_rate(self.settings.build_rate));
        if self.shared.builds.insert(build.clone()) {
            self.attend(build.clone());
            return Ok(build);
        }
        match self.shared.builds.find(&id) {
            Some(known) => same(known, token), // somebody else declared it at the same time
            None => {
                let store = self.shared.store.clone(); // another build with this token was declared at the same time
                self.shared.env.blocking(move || expire::remove(&**store.disk(), store.data(), &id)).await?;
                Err(DeclareError::SameToken)
            }
        }
    }

    /// What was declared of a build that is on the disk and not in memory: an earlier declaration that came to an end
    /// halfway, after an error say.
    async fn declared_before(&self, id: &BuildId, token: TokenHash) -> Result<Declaration, DeclareError> {
        let (disk, data, wanted) = (self.shared.store.disk().clone(), self.shared.store.data().to_owned(), id.clone());
        let found = self.shared.env.blocking(move || archive::load(&disk, &data, &wanted)).await?;
        let found = found.filter(|found| found.verdict.is_none()).and_then(|found| found.declaration);
        let known = found.and_then(|text| serde_json::from_slice::<Declaration>(&text).ok());
        known.filter(|known| known.token == token).ok_or_else(|| DeclareError::Known(id.clone()))
    }

    /// Watches the clocks of a build, and keeps book of it until it leaves memory. One task does both: there are ten
    /// thousand of them.
    fn attend(self: &Arc<Self>, build: Arc<Build>) {
        let standing = self.clone();
        self.tasks.spawn(async move {
            let shutdown = &standing.shared.shutdown;
            let book = shutdown.run_until_cancelled(standing.keep_book(&build));
            tokio::join!(build.watch_clocks(shutdown), book);
        });
    }

    async fn keep_book(&self, build: &Arc<Build>) {
        loop {
            Box::pin(self.enter_aside(build)).await;
            tokio::select! {
                biased; // the verdict is the last change
                verdict = build.verdict() => break self.tell_verdict(build, &verdict),
                () = build.arrival() => {}
            }
        }
        Box::pin(self.close_book(build)).await;
    }

    async fn close_book(&self, build: &Arc<Build>) {
        self.enter_aside(build).await;
        let linger = async {
            if !build.is_written_down() {
                build.write_down_late().await; // until then nobody would find it outside of memory
                self.enter_aside(build).await;
            }
            drop(timeout(CONFIRMATION, build.confirmed()).await); // an agent that never comes back is not waited for
            sleep(self.settings.care.seal_after.map_or(LINGER, |after| after.min(LINGER))).await;
        };
        if build.removed.run_until_cancelled(linger).await.is_some() {
            self.let_go(build).await;
        }
    }

    /// Drops what is in memory of a build that has ended. Another one of its name is left alone.
    pub(crate) async fn let_go(&self, build: &Arc<Build>) {
        self.drop_archived(build);
        if self.shared.builds.remove(build) && self.shared.store.forget(&build.id).await.is_err() {
            debug!(build = %build.id, "the store is too busy to forget it");
        }
    }

    fn drop_archived(&self, build: &Arc<Build>) {
        let mut archived = self.archived.lock().unwrap_or_else(PoisonError::into_inner);
        if archived.get(&build.id).is_some_and(|known| std::ptr::eq(known.as_ptr(), Arc::as_ptr(build))) {
            archived.remove(&build.id);
        }
    }

    fn tell_verdict(&self, build: &Build, verdict: &Verdict) {
        self.shared.store.meter().verdicts.add(kind(&verdict.outcome));
        if let Some(lifecycle) = self.shared.lifecycle.get() {
            lifecycle.handle_verdict(&build.id, &build.declaration.labels, &BuildEnd::from(verdict));
        }
    }

    /// One at a time: of ten thousand that come at once, each would have a thread that waits for the catalogue.
    async fn enter_aside(&self, build: &Arc<Build>) {
        let (turn, catalogue, entered) = (self.turn().await, self.catalogue.clone(), build.clone());
        let result = self.shared.env.blocking(move || enter(&turn, &catalogue, &entered)).await;
        if let Err(error) = result {
            warn!(build = %build.id, "the catalogue cannot be written: {error}");
        }
    }

    /// The right to write in the catalogue. It goes along with the work, which is done also when nobody waits for it.
    pub(crate) async fn turn(&self) -> Turn {
        self.book.clone().lock_owned().await
    }

    /// A build, whether it runs or has ended.
    pub(crate) async fn find(&self, id: &BuildId) -> io::Result<Option<Arc<Build>>> {
        if let Some(build) = self.shared.builds.find(id).or_else(|| self.archived(id)) {
            return Ok(Some(build));
        }
        let (disk, data, wanted) = (self.shared.store.disk().clone(), self.shared.store.data().to_owned(), id.clone());
        let Some(found) = self.shared.env.blocking(move || archive::load(&disk, &data, &wanted)).await? else {
            return Ok(None);
        };
        if found.verdict.is_none() {
            return Ok(self.shared.builds.find(id)); // just being declared, or damaged
        }
        let Some(build) = restore(&self.shared.store, id, found).map(Arc::new) else { return Ok(None) };
        let mut archived = self.archived.lock().unwrap_or_else(PoisonError::into_inner);
        archived.retain(|_, build| build.strong_count() > 0);
        archived.insert(id.clone(), Arc::downgrade(&build));
        Ok(Some(build))
    }

    fn archived(&self, id: &BuildId) -> Option<Arc<Build>> {
        self.archived.lock().unwrap_or_else(PoisonError::into_inner).get(id)?.upgrade()
    }

    /// The build that an agent's token is for.
    pub(crate) async fn by_token(&self, token: &str) -> io::Result<Option<Arc<Build>>> {
        self.by_token_hash(hash_token(token)).await
    }

    async fn by_token_hash(&self, token: TokenHash) -> io::Result<Option<Arc<Build>>> {
        if let Some(build) = self.shared.builds.by_token_hash(&token) {
            return Ok(Some(build));
        }
        let catalogue = self.catalogue.clone();
        match self.shared.env.blocking(move || catalogue.by_token(&token)).await? {
            Some(id) => self.find(&id).await,
            None => Ok(None),
        }
    }

    /// What a token allows.
    pub(crate) async fn access(&self, token: &str) -> io::Result<Option<Access>> {
        if let Some(known) = self.tokens.check(token, self.shared.env.nature.now()) {
            return Ok(Some(match known.scope {
                Scope::Admin => Access::Admin,
                Scope::Launch => Access::Launch,
                Scope::Read => Access::Read,
            }));
        }
        Ok(self.by_token(token).await?.map(|build| Access::Build(build.id.clone())))
    }

    /// Takes a report, durably. The same thing again is counted, and written whenever it has happened twice as often.
    pub(crate) async fn report(self: &Arc<Self>, build: &Arc<Build>, report: Report) -> Result<(), ReportError> {
        let is_new = match build.noted(&report) {
            Noted::Again { is_worth_writing: false } => {
                build.note_reports([report]);
                return Ok(());
            }
            Noted::Again { is_worth_writing: true } => false,
            Noted::Full => return Err(ReportError::TooMany),
            Noted::New => true,
        };
        self.shared.store.report(&build.id, report.to_line()).await?;
        if let Some(lifecycle) = self.shared.lifecycle.get().filter(|_| is_new) {
            let is_over = || build.known_verdict().is_some();
            lifecycle.handle_report(&build.id, &build.declaration.labels, &Told::from(&report), is_over);
        }
        build.note_reports([report]);
        let (standing, build) = (self.clone(), build.clone());
        self.tasks.spawn(async move { standing.enter_aside(&build).await });
        Ok(())
    }
}

/// A build that is declared once more, with the same token or another.
fn same(known: Arc<Build>, token: TokenHash) -> Result<Arc<Build>, DeclareError> {
    let is_same = known.declaration.token == token && known.known_verdict().is_none();
    if is_same { Ok(known) } else { Err(DeclareError::Known(known.id.clone())) }
}

/// `cancel.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Cancelling {
    reason: String,
    /// When, microseconds since 1970.
    time: UnixMicros,
}

/// How long whoever cancels a build waits for a store that does not answer.
const CANCEL_PATIENCE: Duration = Duration::from_secs(10);

/// A build that has no verdict yet.
type Running = (BuildId, Declaration, Vec<Report>);

/// Makes the catalogue agree with the directories, and returns the builds that have no verdict. `progress` hears how many
/// builds of how many were looked at. A build whose files are damaged is left alone, and the others are none the worse.
fn reconcile(catalogue: &Catalogue, store: &Store, progress: &mut dyn FnMut(usize, usize)) -> io::Result<Vec<Running>> {
    let (disk, data) = (store.disk(), store.data());
    expire::finish_removals(&**disk, data)?;
    let (mut known, mut running) = (catalogue.ids()?, Vec::new());
    let ids = archive::list(&**disk, data)?;
    for (at, id) in ids.iter().enumerate() {
        progress(at, ids.len());
        if known.contains(&(id.as_str().to_owned(), true)) && store.has_verdict(id.as_str()) {
            known.remove(&(id.as_str().to_owned(), true));
            continue;
        }
        let has_row = known.remove(&(id.as_str().to_owned(), true)) | known.remove(&(id.as_str().to_owned(), false));
        match look_at(catalogue, store, id) {
            Ok(found) => running.extend(found),
            Err(error) => {
                warn!(build = %id, "it is left alone, its files cannot be used: {error}");
                if has_row {
                    catalogue.remove(id.as_str())?;
                }
            }
        }
    }
    for (id, _) in known {
        catalogue.remove(&id)?; // its directory is gone
    }
    Ok(running)
}

/// Enters a build that has ended; one that has not is returned.
fn look_at(catalogue: &Catalogue, store: &Store, id: &BuildId) -> io::Result<Option<Running>> {
    let Some(found) = archive::load(store.disk(), store.data(), id)? else { return Ok(None) };
    let has_verdict = found.verdict.is_some();
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "build.json or verdict.json is missing or damaged");
    let build = restore(store, id, found).ok_or_else(damaged)?;
    if has_verdict {
        return catalogue.put(&entry(&build)?).map(|()| None);
    }
    let reports = build.reports().iter().map(|report| (**report).clone()).collect();
    Ok(Some((id.clone(), build.declaration.clone(), reports)))
}

/// Fills the catalogue of a data directory, and says how many builds are in it.
pub(crate) fn rebuild(env: &Env, data: &Path, progress: &mut dyn FnMut(usize, usize)) -> io::Result<usize> {
    let store = Store::open(env, data, Durability::Os, &Tasks::default())?;
    let catalogue = Catalogue::open(data)?;
    for (id, declaration, reports) in reconcile(&catalogue, &store, progress)? {
        let build = Build::new(id, declaration, Duration::ZERO, store.clone());
        build.note_reports(reports);
        catalogue.put(&entry(&build)?)?;
    }
    Ok(catalogue.ids()?.len())
}

/// A build as it lies on the disk. Without a verdict it is good for its declaration and reports only.
fn restore(store: &Store, id: &BuildId, found: archive::Archived) -> Option<Build> {
    let verdict = found.verdict.as_deref().map(serde_json::from_slice::<Verdict>).transpose().ok()?;
    let declaration = match found.declaration.as_deref().map(serde_json::from_slice::<Declaration>) {
        Some(Ok(declaration)) => declaration,
        Some(Err(_)) => return None,
        None => undeclared(id, verdict.as_ref()?), // a hook's
    };
    let build = match verdict {
        Some(verdict) => Build::archived(id.clone(), declaration, verdict, found.attempts, store.clone()),
        None => Build::new(id.clone(), declaration, Duration::ZERO, store.clone()),
    };
    build.note_reports(found.reports.as_deref().map(Report::parse_lines).unwrap_or_default());
    Some(build)
}

/// Takes a data directory for this process until the file is closed; `None` when another process has it.
pub(crate) fn lock(disk: &dyn Disk, data: &Path) -> io::Result<Option<Box<dyn File>>> {
    disk.create_dirs(data)?;
    let file = disk.open(&data.join("lock"), Open::Write)?;
    Ok(file.lock()?.then_some(file))
}

/// The right to write in the catalogue.
pub(crate) type Turn = tokio::sync::OwnedMutexGuard<()>;

/// Writes down what is known of a build, unless it was removed: its name may be another's by now.
pub(crate) fn enter(_turn: &Turn, catalogue: &Catalogue, build: &Build) -> io::Result<()> {
    if build.removed.is_cancelled() { Ok(()) } else { catalogue.put(&entry(build)?) }
}

/// What the catalogue has of a build.
pub(crate) fn entry(build: &Build) -> io::Result<Entry> {
    let (mut labels, mut sealed) = (BTreeMap::new(), true);
    for (files, _) in build.attempts() {
        labels.extend(files.labels()?.1);
        sealed &= files.is_sealed()?;
    }
    let verdict = build.known_verdict();
    let summary = Summary::of(build, labels, sealed && verdict.is_some())?;
    let ended = verdict.filter(|_| build.is_written_down()).map(|verdict| verdict.ended);
    let stored = if ended.is_some() { build.size_on_disk()? } else { 0 };
    Ok(Entry { summary, created: build.declaration.created, ended, token: build.declaration.token, stored })
}

/// The declaration of a build that was not declared: nobody has its token.
fn undeclared(id: &BuildId, verdict: &Verdict) -> Declaration {
    let steps = verdict.steps.iter().map(|log| log.step.clone()).collect();
    let token = hash_token(&format!("nobody's, of {id}"));
    Declaration { created: verdict.ended, steps, labels: BTreeMap::new(), timeouts: Clocks::default(), token }
}
