//! The other containers of a pod: who has to be there first, whose death ends this command, and what they learn of it.
//!
//! Siblings share a directory, the graveyard, in which each has a tombstone in the form of kubexit. Nobody asks an
//! orchestrator anything. With no option of this kind given, nothing here reads, writes or runs.
//!
//! | part | work |
//! |---|---|
//! | [`tombstone`] | the form (pure) |
//! | [`graveyard`] | files: whole or not at all, read with care |
//! | [`lookout`] | the task that sees what others carve |
//! | [`scribe`] | the task that carves ours |
//! | [`dependencies`] | births and deaths, from what is seen (pure) |
//! | [`expected`] | which ends count as success after a sibling's death (pure) |

pub(crate) mod dependencies;
pub(crate) mod expected;
mod graveyard;
mod lookout;
mod scribe;
mod tombstone;

use std::{
    ffi::OsString,
    ops::ControlFlow,
    time::{Duration, UNIX_EPOCH},
};

use phonehome_env::Env;
use phonehome_proto::{
    event::{Event, Ready, Waiting},
    frame::End,
    signal,
};
use tokio::{
    sync::{oneshot, watch},
    task::JoinSet,
    time::Instant,
};
use tracing::{info, warn};

use self::{
    dependencies::{Death, Missing, first_death, missing_births},
    graveyard::{Graveyard, list},
    lookout::{Lookout, View},
    scribe::Scribe,
    tombstone::Tombstone,
};
use crate::{
    config::{SiblingName, SiblingsConfig, User},
    failure::{EXIT_FAILURE, EXIT_TERMINATED},
    herald::Herald,
    outbox::expiry,
    probe::{Probe, ReadyWhen, SharedRunner, notify, notify::NotifySocket, output::OutputWatch},
};

/// This command among its siblings. Its tasks end with it.
pub(crate) struct Siblings {
    config: SiblingsConfig,
    env: Env,
    herald: Option<Herald>,
    runner: SharedRunner,
    scribe: Option<Scribe>,
    view: watch::Receiver<View>,
    /// As many as there are in the configuration, in that order.
    probes: watch::Receiver<Vec<Probing>>,
    output: Option<OutputWatch>,
    readiness: Option<Readiness>,
    notify: Option<OsString>,
    waiting: Option<Wait>,
    /// Those that look out and carve, kept to end with it.
    _tasks: JoinSet<()>,
    /// Those that probe.
    questions: JoinSet<()>,
}

/// How far a probe of [`SiblingsConfig::wait_for`] has come.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Probing {
    Untried,
    Failing(String),
    Passed,
}

/// A wait for births.
#[derive(Debug)]
struct Wait {
    begun: Instant,
    /// What was told to be missing.
    told: Vec<String>,
}

/// Why a command is not started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Unborn {
    /// A sibling that has to stay is dead already.
    Death(Death),
    /// Somebody who has to be there first is not; says who, and why.
    TimedOut(String),
}

impl Unborn {
    /// The end of a command that was never started for this reason.
    pub(crate) fn end(&self) -> End {
        match self {
            Self::Death(death) => End::NotStarted { code: EXIT_TERMINATED, reason: format!("not started: {death}") },
            Self::TimedOut(reason) => End::NotStarted { code: EXIT_FAILURE, reason: format!("not started: {reason}") },
        }
    }
}

/// Waits for the first of some deaths.
#[derive(Debug)]
pub(crate) struct Deaths {
    deps: Vec<SiblingName>,
    view: watch::Receiver<View>,
}

impl Deaths {
    /// Completes once, when a sibling that has to stay is dead; otherwise never. Cancel safe.
    pub(crate) async fn next(&mut self) -> Death {
        while !self.deps.is_empty() {
            let death = first_death(&self.deps, &self.view.borrow_and_update());
            if let Some(death) = death {
                self.deps.clear();
                return death;
            }
            changed(&mut self.view).await;
        }
        std::future::pending().await
    }
}

/// What shows that the command is ready.
enum Readiness {
    Probe(Probe),
    Output(oneshot::Receiver<()>),
    Notify(NotifySocket),
}

/// How long a graveyard that does not answer may hold up a start that need not wait for a birth.
const FIRST_LOOK: Duration = Duration::from_secs(2);

impl Siblings {
    /// Begins to look around and to probe. Never fails: what does not work is told to the `herald`, and in the agent's own
    /// log. `runner` is for probes that are commands.
    pub(crate) fn open(config: SiblingsConfig, env: &Env, herald: Option<Herald>, runner: SharedRunner) -> Self {
        let (mut tasks, mut questions) = (JoinSet::new(), JoinSet::new());
        let graveyard = Graveyard::new(config.graveyard.clone());
        let scribe = config.name.clone().map(|name| {
            let (generation, herald) = (config.generation.clone(), herald.clone());
            let (scribe, carver) = Scribe::new(env.clone(), graveyard.clone(), name, generation, herald);
            tasks.spawn(carver.run());
            scribe
        });
        let view = look_out(&config, env, graveyard, &mut tasks);
        let probes = probe_all(&config, &runner, &mut questions);
        let mut siblings = Self {
            config,
            env: env.clone(),
            herald,
            runner,
            scribe,
            view,
            probes,
            output: None,
            readiness: None,
            notify: None,
            waiting: None,
            _tasks: tasks,
            questions,
        };
        siblings.prepare_readiness();
        siblings
    }

    fn prepare_readiness(&mut self) {
        self.readiness = match self.config.ready_when.clone() {
            None => None,
            Some(ReadyWhen::Probe(probe)) => Some(Readiness::Probe(probe)),
            Some(ReadyWhen::Output(pattern)) => {
                let (watch, matched) = OutputWatch::new(pattern);
                self.output = Some(watch);
                Some(Readiness::Output(matched))
            }
            Some(ReadyWhen::Notify) => match NotifySocket::bind(&*self.env.nature) {
                Ok(socket) => {
                    self.notify = Some(socket.value());
                    Some(Readiness::Notify(socket))
                }
                Err(error) => {
                    self.tell_fault(format!("cannot make a socket for --ready-when notify: {error}"));
                    None
                }
            },
        };
    }

    /// Variables that the command needs besides its own.
    pub(crate) fn variables(&self) -> impl Iterator<Item = (&'static str, OsString)> + use<> {
        self.notify.clone().map(|value| (notify::VARIABLE, value)).into_iter()
    }

    /// What has to see the command's output; `None` when nothing does. Once.
    pub(crate) fn take_output_watch(&mut self) -> Option<OutputWatch> {
        self.output.take()
    }

    /// Waits until the command may be started, and tells what for whenever that changes. Cancel safe; the time limit runs
    /// from the first call.
    ///
    /// # Errors
    ///
    /// When it shall not be started at all.
    pub(crate) async fn births(&mut self) -> Result<(), Unborn> {
        self.waiting.get_or_insert_with(|| Wait { begun: Instant::now(), told: Vec::new() });
        loop {
            let next = match self.judge(Instant::now()) {
                ControlFlow::Break(admission) => return admission,
                ControlFlow::Continue(next) => next,
            };
            tokio::select! {
                () = changed(&mut self.view) => {}
                () = changed(&mut self.probes) => {}
                () = expiry(next) => {}
            }
        }
    }

    /// Whether the command may be started, or when to ask again at the latest.
    fn judge(&mut self, now: Instant) -> ControlFlow<Result<(), Unborn>, Option<Instant>> {
        let view = self.view.borrow_and_update().clone();
        if let Some(death) = first_death(&self.config.death_deps, &view) {
            return ControlFlow::Break(Err(Unborn::Death(death)));
        }
        let begun = self.waiting.as_ref().map_or(now, |waiting| waiting.begun);
        let first_look = begun + FIRST_LOOK;
        let is_known = view.is_real && !self.probes.borrow().contains(&Probing::Untried) || now >= first_look;
        let missing = self.missing(&view);
        if missing.is_empty() {
            return if is_known { ControlFlow::Break(Ok(())) } else { ControlFlow::Continue(Some(first_look)) };
        }
        let deadline = self.config.birth_timeout.map(|limit| begun + limit);
        if deadline.is_some_and(|deadline| now >= deadline) {
            return ControlFlow::Break(Err(Unborn::TimedOut(self.timed_out(&missing))));
        }
        if is_known {
            self.tell_waiting(&missing);
        }
        ControlFlow::Continue(deadline.into_iter().chain((!is_known).then_some(first_look)).min())
    }

    fn missing(&self, view: &View) -> Vec<Missing> {
        let probes = self.probes.borrow();
        let failing = self.config.wait_for.iter().zip(probes.iter()).filter_map(|(wait, probing)| {
            let why = match probing {
                Probing::Untried => "no answer yet".into(),
                Probing::Failing(why) => why.clone(),
                Probing::Passed => return None,
            };
            Some(Missing { what: format!("{} to pass {}", wait.name, wait.probe), why })
        });
        missing_births(&self.config.birth_deps, view).into_iter().chain(failing).collect()
    }

    fn tell_waiting(&mut self, missing: &[Missing]) {
        let what: Vec<_> = missing.iter().map(|missing| missing.what.clone()).collect();
        let Some(waiting) = &mut self.waiting else { return };
        if waiting.told != what {
            waiting.told.clone_from(&what);
            info!("waiting for {}", list(&what));
            self.tell(Event::Waiting(Waiting { r#for: what }));
        }
    }

    fn timed_out(&self, missing: &[Missing]) -> String {
        let limit = humantime::format_duration(self.config.birth_timeout.unwrap_or_default());
        let missing = list(missing.iter().map(|Missing { what, why }| format!("{what} ({why})")));
        format!("waited {limit} for: {missing}; the graveyard is {}", self.config.graveyard.display())
    }

    /// The deaths that end the command, from any time on and for as long as it runs.
    pub(crate) fn deaths(&self) -> Deaths {
        Deaths { deps: self.config.death_deps.clone(), view: self.view.clone() }
    }

    /// Tells the siblings that the command has been started, and begins to find out when it is ready.
    pub(crate) fn born(&mut self) {
        let now = self.now();
        if let Some(scribe) = &self.scribe {
            scribe.carve(|stone| stone.born = Some(now));
        }
        if let Some(mut readiness) = self.readiness.take() {
            let news = Announcement { scribe: self.scribe.clone(), herald: self.herald.clone(), env: self.env.clone() };
            let by = self.config.ready_when.as_ref().map(ToString::to_string).unwrap_or_default();
            let (runner, user) = (self.runner.clone(), self.config.probe_user);
            self.questions.spawn(async move {
                if readiness.reached(runner, user).await {
                    news.ready(by);
                    readiness.outlive().await;
                }
            });
        }
    }

    /// Tells the siblings that the command has ended, or will never be started, and waits until that is carved; for at most
    /// two seconds, should the graveyard be hung.
    pub(crate) async fn died(&mut self, end: &End, reason: Option<&str>) {
        self.questions.abort_all(); // nobody is left who could become ready, or be started
        let now = self.now();
        let Some(scribe) = &mut self.scribe else { return };
        scribe.carve(|stone| {
            stone.died = Some(now);
            stone.exit_code = Some(end.code().into());
            stone.signal = signal_of(end);
            stone.reason = reason.or(reason_of(end)).map(Into::into);
        });
        scribe.finish().await;
    }

    fn now(&self) -> String {
        timestamp(&self.env)
    }

    fn tell(&self, event: Event) {
        if let Some(herald) = &self.herald {
            herald.tell(event);
        }
    }

    fn tell_fault(&self, reason: String) {
        warn!("{reason}");
        if let Some(herald) = &self.herald {
            herald.fault(reason);
        }
    }
}

impl Readiness {
    /// Completes when it is; false when that can never be known.
    async fn reached(&mut self, runner: SharedRunner, user: Option<User>) -> bool {
        match self {
            Self::Probe(probe) => {
                probe.pass(&*runner, user, drop).await;
                true
            }
            Self::Output(matched) => matched.await.is_ok(),
            Self::Notify(socket) => match socket.ready().await {
                Ok(()) => true,
                Err(error) => {
                    warn!("--ready-when notify: cannot read from its socket: {error}");
                    false
                }
            },
        }
    }

    /// What is left to do for a command that is ready.
    async fn outlive(self) {
        match self {
            Self::Probe(_) | Self::Output(_) => {}
            Self::Notify(socket) => socket.drain().await,
        }
    }
}

/// Tells everybody that the command is ready.
struct Announcement {
    scribe: Option<Scribe>,
    herald: Option<Herald>,
    env: Env,
}

impl Announcement {
    fn ready(self, by: String) {
        let now = timestamp(&self.env);
        info!("the command is ready: {by} has passed");
        if let Some(scribe) = self.scribe {
            scribe.carve(|stone| stone.ready = Some(now));
        }
        if let Some(herald) = self.herald {
            herald.tell(Event::Ready(Ready { by }));
        }
    }
}

/// Tells the siblings of a command that will never be started, because the agent cannot even begin its work.
pub fn carve_failure(config: &SiblingsConfig, code: u8, reason: &str) {
    let Some(name) = config.name.clone() else { return };
    let env = Env::real();
    let stone = Tombstone {
        died: Some(timestamp(&env)),
        exit_code: Some(code.into()),
        reason: Some(reason.to_owned()),
        generation: config.generation.clone(),
        ..Tombstone::default()
    };
    scribe::carve_at_once(&env, Graveyard::new(config.graveyard.clone()), name, stone);
}

/// What there is to see of the siblings that matter; nothing when none does.
fn look_out(
    config: &SiblingsConfig,
    env: &Env,
    graveyard: Graveyard,
    tasks: &mut JoinSet<()>,
) -> watch::Receiver<View> {
    let births = config.birth_deps.iter().map(|dep| &dep.name);
    let mut names: Vec<_> = births.chain(&config.death_deps).cloned().collect();
    names.sort_unstable();
    names.dedup();
    if names.is_empty() {
        return watch::channel(View { is_real: true, ..View::default() }).1;
    }
    let (lookout, view) = Lookout::new(env.clone(), graveyard, names, config.generation.clone());
    tasks.spawn(lookout.run());
    view
}

/// Asks all that has to be there first.
fn probe_all(
    config: &SiblingsConfig,
    runner: &SharedRunner,
    questions: &mut JoinSet<()>,
) -> watch::Receiver<Vec<Probing>> {
    let (probing, probes) = watch::channel(vec![Probing::Untried; config.wait_for.len()]);
    let user = config.probe_user;
    for (at, wait) in config.wait_for.iter().enumerate() {
        let (probe, runner, probing) = (wait.probe.clone(), runner.clone(), probing.clone());
        questions.spawn(async move {
            let tell = |now: Probing| {
                probing.send_if_modified(|all| {
                    let is_new = all[at] != now;
                    all[at] = now;
                    is_new
                });
            };
            probe.pass(&*runner, user, |why| tell(Probing::Failing(why))).await;
            tell(Probing::Passed);
        });
    }
    probes
}

/// Never completes when nothing can change any more.
async fn changed<T>(seen: &mut watch::Receiver<T>) {
    if seen.changed().await.is_err() {
        std::future::pending().await
    }
}

fn timestamp(env: &Env) -> String {
    humantime::format_rfc3339_micros(UNIX_EPOCH + Duration::from_micros(env.nature.now())).to_string()
}

fn signal_of(end: &End) -> Option<String> {
    match end {
        End::Signalled { signal, .. } => Some(signal::name(*signal).into_owned()),
        End::Exited(_) | End::NotStarted { .. } => None,
    }
}

fn reason_of(end: &End) -> Option<&str> {
    match end {
        End::NotStarted { reason, .. } => Some(reason),
        End::Exited(_) | End::Signalled { .. } => None,
    }
}

#[cfg(test)]
mod tests;
