//! Watches over a command: signals pass through, whoever is told to end and does not is killed after a grace period, and
//! those who outlive the command are waited for, ended or left.

use std::{io, os::fd::OwnedFd, sync::Arc, time::Duration};

use phonehome_proto::{
    event::{Cancelled, Event, Leftovers as Remaining, Process, Stopping},
    frame::{Cancel, End},
    signal,
};
use rustix::process::Signal;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep_until},
};
use tracing::{info, warn};

use crate::{
    capture::{Captured, Waivers},
    command::{self, Caught, Command, Held, Reaper, Signals},
    config::{Leftovers, Notice, OnOffline, SpoolConfig, Supervision},
    failure::Failure,
    herald::Herald,
    outbox::{Outbox, expiry},
    siblings::Deaths,
};

/// The longest grace period that a cancel may ask for.
const MAX_GRACE: Duration = Duration::from_secs(24 * 60 * 60);

/// How long processes that hold the output open after the command's end get to end by themselves: what follows a pipe may
/// have something left to write.
const LEFTOVER_PATIENCE: Duration = Duration::from_secs(5);

/// The same for processes that do not hold it: just long enough to be through with their exit.
const SETTLE: Duration = Duration::from_millis(100);

/// How long a slow reader of the copy of the output is waited for after the command's end when the agent was told to end.
const COPY_PATIENCE: Duration = Duration::from_secs(3);

/// How long output is still awaited once everybody was killed.
const AFTER_KILL: Duration = Duration::from_secs(1);

/// What remains of the stay once TERM says that time is up.
pub(crate) const HURRY: Duration = Duration::from_secs(1);

/// Processes named in an event or a line.
const NAMED: usize = 8;

/// A capture that runs, and the way to end it early.
pub(crate) struct Capturing {
    pub(crate) task: JoinHandle<Captured>,
    pub(crate) waivers: watch::Sender<Waivers>,
    /// What it reads, to find out who holds that open.
    pub(crate) held: Vec<Held>,
    /// What the agent itself holds open as long as the command lives.
    pub(crate) kept_open: Option<OwnedFd>,
}

/// A command and all that can happen to it.
pub(crate) struct Supervisor {
    command: Command,
    signals: Signals,
    reaper: Reaper,
    herald: Herald,
    config: Supervision,
    notice: Notice,
    cancels: Option<mpsc::Receiver<Cancel>>,
    patience: Option<Patience>,
    deaths: Deaths,
    /// What the command then gets.
    death_signal: u8,
    /// The death of a sibling for which the command was told to end.
    death: Option<String>,
    plan: Plan,
    /// Who was told to end is killed by then.
    kill_by: Option<Instant>,
    /// Whether those who outlived the command were looked after, as far as that was to be done.
    settled: bool,
    /// Whether nobody is left who should write.
    give_up: bool,
    /// When to be gone: soon after a TERM or INT that came after the command's end, and by the end of the pod's patience.
    hurry: Option<Instant>,
    /// Whether the agent itself was told to end.
    told_to_end: bool,
    /// Whether the command was.
    is_stopped: bool,
    /// When a reader of the copy has had time enough, should the agent be told to end.
    copy_until: Option<Instant>,
}

/// What happens next, and when.
#[derive(Debug, Clone, Copy)]
enum Plan {
    Nothing,
    /// Look after those who outlived the command.
    Settle(Instant),
    Kill(Instant),
    GiveUp(Instant),
}

impl Plan {
    fn at(self) -> Option<Instant> {
        match self {
            Self::Nothing => None,
            Self::Settle(at) | Self::Kill(at) | Self::GiveUp(at) => Some(at),
        }
    }
}

/// `--on-offline stop`: how long the server may be out of reach.
#[derive(Debug, Clone)]
pub(crate) struct Patience {
    outbox: Arc<Outbox>,
    limit: Duration,
}

impl Patience {
    pub(crate) fn of(config: &SpoolConfig, outbox: &Arc<Outbox>) -> Option<Self> {
        let limit = config.offline_limit.filter(|_| config.on_offline == OnOffline::Stop)?;
        Some(Self { outbox: outbox.clone(), limit })
    }

    /// Never completes without a limit.
    async fn ended(patience: Option<&Self>) {
        match patience {
            Some(Self { outbox, limit }) => outbox.offline(*limit).await,
            None => std::future::pending().await,
        }
    }
}

/// What a supervisor watches over, and with what.
pub(crate) struct Watched {
    pub(crate) command: Command,
    pub(crate) signals: Signals,
    pub(crate) reaper: Reaper,
    pub(crate) herald: Herald,
    pub(crate) cancels: Option<mpsc::Receiver<Cancel>>,
    pub(crate) patience: Option<Patience>,
    pub(crate) deaths: Deaths,
}

impl Supervisor {
    pub(crate) fn new(watched: Watched, config: Supervision, death_signal: u8, linger: Duration) -> Self {
        let Watched { command, signals, reaper, herald, cancels, patience, deaths } = watched;
        let notice = config.fit(linger);
        let (plan, kill_by, settled, give_up, hurry) = (Plan::Nothing, None, false, false, None);
        Self {
            command,
            signals,
            reaper,
            herald,
            config,
            notice,
            cancels,
            patience,
            deaths,
            death_signal,
            death: None,
            plan,
            kill_by,
            settled,
            give_up,
            hurry,
            told_to_end: false,
            is_stopped: false,
            copy_until: None,
        }
    }

    /// The death of a sibling for which the command was told to end, before it did.
    pub(crate) fn death(&self) -> Option<&str> {
        self.death.as_deref()
    }

    pub(crate) fn command(&self) -> &Command {
        &self.command
    }

    /// Waits for the command itself to end. Cancel safe.
    pub(crate) async fn ended(&mut self) -> End {
        loop {
            if let Some(end) = self.command.end() {
                return end.clone();
            }
            self.step().await;
        }
    }

    /// Waits for the end of the output, and until those who outlived the command are looked after. After `deadline` the
    /// capture waits for the server no longer, and in a hurry neither for the reader of the copy nor for writers.
    pub(crate) async fn captured(&mut self, mut capture: Capturing, deadline: Instant) -> Result<Captured, Failure> {
        self.outlive();
        capture.kept_open = None;
        loop {
            let late = self.is_hurried() || deadline <= Instant::now();
            let copy_until = self.copy_until();
            let copied_enough = copy_until.is_some_and(|until| until <= Instant::now());
            capture.waivers.send_replace(Waivers {
                stalled_copy: true,
                copy: self.is_hurried() || copied_enough,
                writers: self.give_up || self.is_hurried(),
                room: late,
            });
            let hurry = self.hurry.filter(|_| !self.is_hurried());
            let next = if late { hurry } else { soonest(Some(deadline), hurry) };
            let next = soonest(next, copy_until.filter(|_| !copied_enough));
            tokio::select! {
                captured = &mut capture.task => {
                    let captured = captured.map_err(io::Error::from)?;
                    self.settle_quietly().await;
                    return Ok(captured);
                }
                () = self.step_with(&capture.held) => {}
                () = expiry(next) => {}
            }
        }
    }

    /// The same when the command writes to the agent's own streams, whose end nobody sees: who holds them open has the same
    /// time.
    pub(crate) async fn outlived(&mut self) {
        self.outlive();
        let own = command::own_streams();
        self.look();
        while matches!(self.plan, Plan::Settle(_)) && !self.is_hurried() && command::is_held(&own) {
            let hurry = self.hurry;
            tokio::select! {
                () = self.step_with(&own) => {}
                () = expiry(hurry) => {}
            }
        }
        self.settle_quietly().await;
    }

    /// The command has ended: what comes now is for those it left behind.
    fn outlive(&mut self) {
        self.patience = None; // there is no command left to end
        let patience = Instant::now() + LEFTOVER_PATIENCE;
        self.copy_until = Some(Instant::now() + COPY_PATIENCE);
        self.plan = match (self.plan, self.config.leftovers) {
            (Plan::Kill(kill), Leftovers::Terminate | Leftovers::Wait) => Plan::Settle(patience.min(kill)),
            (Plan::Nothing, _) => Plan::Settle(patience), // also when all are waited for: then it is said that they are
            (plan @ Plan::Kill(_), Leftovers::Leave) | (plan @ (Plan::Settle(_) | Plan::GiveUp(_)), _) => plan,
        };
    }

    /// Nobody holds the output open any more: only a moment is left for those who are still there.
    async fn settle_quietly(&mut self) {
        let soon = Instant::now() + SETTLE;
        if let Plan::Settle(at) = self.plan {
            self.plan = Plan::Settle(at.min(soon));
        }
        self.reaper.reap();
        while command::has_descendants() && !self.give_up && !self.is_hurried() && (!self.settled || self.waits()) {
            let hurry = self.hurry;
            tokio::select! {
                () = self.step() => {}
                () = expiry(hurry) => {}
            }
        }
    }

    /// Whether the log ends only when everybody has ended.
    fn waits(&self) -> bool {
        self.config.leftovers == Leftovers::Wait && self.kill_by.is_none()
    }

    /// How long the copy of the output may still take, once the agent was told to end.
    pub(crate) fn copy_until(&self) -> Option<Instant> {
        self.copy_until.filter(|_| self.told_to_end)
    }

    /// Waits for `work`, but no longer than until `deadline`, nor when in a hurry.
    pub(crate) async fn until(&mut self, deadline: Option<Instant>, work: impl Future<Output = ()>) {
        let mut work = std::pin::pin!(work);
        loop {
            let limit = soonest(deadline, self.hurry);
            tokio::select! {
                biased;
                () = &mut work => return,
                () = expiry(limit) => return,
                () = self.step() => {}
            }
        }
    }

    /// Stays until those who were told to end are gone, or killed ones should be.
    pub(crate) async fn left(&mut self) {
        while matches!(self.plan, Plan::Kill(_) | Plan::GiveUp(_)) && command::has_descendants() && !self.is_hurried() {
            let hurry = self.hurry;
            tokio::select! {
                () = self.step() => {}
                () = expiry(hurry) => {}
            }
        }
        if self.kill_by.is_some() && self.config.leftovers != Leftovers::Leave && command::has_descendants() {
            self.command.signal_everybody(Signal::KILL); // in a hurry, before the grace period was over
        }
    }

    fn is_hurried(&self) -> bool {
        self.hurry.is_some_and(|at| at <= Instant::now())
    }

    /// Waits until `deadline`, or until anybody wants the end of it all.
    pub(crate) async fn hold(&mut self, deadline: Instant) {
        while !self.is_told_to_end() {
            tokio::select! {
                biased;
                () = sleep_until(deadline) => return,
                () = self.step() => {}
            }
        }
    }

    /// Whether the agent itself was told to end, or the command by whoever has a say in it: nobody wants them to stay.
    pub(crate) fn is_told_to_end(&self) -> bool {
        self.told_to_end || self.is_stopped
    }

    /// Leaves at least this much time for the delivery.
    pub(crate) fn leave(&mut self, least: Duration) {
        let least = Instant::now() + least;
        self.hurry = self.hurry.map(|hurry| hurry.max(least));
    }

    async fn step(&mut self) {
        self.step_with(&[]).await;
    }

    /// Handles whatever happens next. Cancel safe.
    async fn step_with(&mut self, held: &[Held]) {
        tokio::select! {
            biased; // the command can send signals without end: they come last, so that they put nothing off
            () = expiry(self.plan.at()) => self.handle_plan(held),
            cancel = recv(&mut self.cancels) => match cancel {
                Some(cancel) => self.handle_cancel(&cancel),
                None => self.cancels = None,
            },
            death = self.deaths.next() => self.handle_death(&death.to_string()),
            () = Patience::ended(self.patience.as_ref()) => {
                self.patience = None;
                warn!("the server has been out of reach for --offline-limit; ending the command");
                self.stop("the server has been out of reach for too long", self.config.grace);
            }
            caught = self.signals.next() => self.handle_signal(caught),
        }
    }

    fn handle_signal(&mut self, caught: Caught) {
        match caught {
            Caught::Child => self.look(),
            Caught::Other(number) => {
                if caught.ends().is_some() {
                    self.look(); // its end may not have been noticed yet
                    if self.command.end().is_some() {
                        self.hurry_up();
                    }
                }
                if i32::from(number) == Signal::TERM.as_raw() {
                    self.handle_term();
                } else if let Some(number) = self.config.rewrites.apply(number) {
                    self.command.pass_on(number);
                }
            }
        }
    }

    fn look(&mut self) {
        self.reaper.reap();
        self.command.notice();
    }

    fn hurry_up(&mut self) {
        self.told_to_end = true;
        let soon = Instant::now() + HURRY;
        self.hurry = Some(self.hurry.map_or(soon, |hurry| hurry.min(soon)));
    }

    /// TERM: the agent and all it watches over are to end, unless it is rewritten to nothing.
    fn handle_term(&mut self) {
        if self.config.rewrites.apply(Signal::TERM.as_raw() as u8).is_none() {
            return;
        }
        self.told_to_end = true;
        if let Some(total) = self.notice.total {
            let gone = Instant::now() + total;
            self.hurry = Some(self.hurry.map_or(gone, |hurry| hurry.min(gone)));
        }
        self.stop("the agent was told to end", self.notice.grace);
    }

    fn handle_death(&mut self, death: &str) {
        self.look(); // what has ended by itself was not ended for it
        if self.command.end().is_none() {
            self.death = Some(death.to_owned());
            self.stop_with(self.death_signal, death, self.config.grace);
        }
    }

    fn handle_cancel(&mut self, cancel: &Cancel) {
        info!(reason = cancel.reason, "the server cancels the build");
        self.herald.tell(Event::Cancelled(Cancelled { reason: cancel.reason.clone() }));
        self.stop("the server has cancelled the build", Duration::from_millis(cancel.grace).min(MAX_GRACE));
    }

    /// Begins to end the command, or tells it again: TERM now, KILL after `grace` at the latest.
    fn stop(&mut self, reason: &str, grace: Duration) {
        let number = self.config.rewrites.apply(Signal::TERM.as_raw() as u8).unwrap_or(Signal::TERM.as_raw() as u8);
        self.stop_with(number, reason, grace);
    }

    /// The same with another signal than TERM.
    fn stop_with(&mut self, number: u8, reason: &str, grace: Duration) {
        self.look();
        if self.kill_by.is_none() && self.command.end().is_none() {
            info!(reason, "ending the command");
            let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
            let signal = signal::name(number).into_owned();
            self.herald.tell(Event::Stopping(Stopping { reason: reason.into(), signal, grace_ms }));
        }
        self.is_stopped = true;
        self.command.pass_on(number);
        let kill = Instant::now() + grace;
        let kill = self.kill_by.map_or(kill, |at| at.min(kill));
        self.kill_by = Some(kill);
        self.plan = match self.plan {
            Plan::GiveUp(at) => Plan::GiveUp(at),
            Plan::Settle(_) => Plan::Settle(Instant::now()), // those who are left have no more time of their own
            Plan::Kill(_) | Plan::Nothing => Plan::Kill(kill),
        };
        if self.settled && self.config.leftovers != Leftovers::Leave {
            self.command.signal_everybody(Signal::TERM);
        }
    }

    fn handle_plan(&mut self, held: &[Held]) {
        let now = Instant::now();
        self.look();
        self.plan = match self.plan {
            Plan::Nothing => Plan::Nothing,
            Plan::Settle(_) => self.settle(held, now),
            Plan::Kill(_) if self.command.end().is_none() => {
                warn!("the grace period is over; killing the command's processes");
                self.kill();
                Plan::GiveUp(now + AFTER_KILL)
            }
            Plan::GiveUp(_) if self.command.end().is_none() => {
                self.kill(); // nobody gives up a command that lives
                Plan::GiveUp(now + AFTER_KILL)
            }
            Plan::Kill(_) if command::has_descendants() => {
                warn!("the grace period is over; killing what the command has left behind");
                self.kill();
                Plan::GiveUp(now + AFTER_KILL)
            }
            Plan::Kill(_) | Plan::GiveUp(_) => {
                self.give_up = true;
                if command::has_descendants() {
                    self.kill(); // those who were forked meanwhile, or had left the group
                }
                Plan::Nothing
            }
        };
    }

    fn kill(&self) {
        if self.config.leftovers == Leftovers::Leave {
            self.command.signal(Signal::KILL);
        } else {
            self.command.signal_everybody(Signal::KILL);
        }
    }

    /// Those who outlived the command have had their time.
    fn settle(&mut self, held: &[Held], now: Instant) -> Plan {
        let first = !std::mem::replace(&mut self.settled, true);
        let any = command::has_descendants();
        if first && (any || !held.is_empty()) {
            self.report(held);
        }
        match self.config.leftovers {
            _ if !any => {
                self.give_up = true; // a stranger holds the output, if anybody does
                Plan::Nothing
            }
            Leftovers::Leave => {
                self.give_up = true;
                self.kill_by.map_or(Plan::Nothing, Plan::Kill)
            }
            Leftovers::Wait if self.kill_by.is_none() => Plan::Nothing,
            Leftovers::Terminate | Leftovers::Wait => {
                self.command.signal_everybody(Signal::TERM);
                let kill = now + self.config.grace;
                let kill = self.kill_by.map_or(kill, |at| at.min(kill));
                self.kill_by = Some(kill);
                Plan::Kill(kill)
            }
        }
    }

    fn report(&self, held: &[Held]) {
        let found = command::leftovers(held);
        let holders = found.iter().flat_map(|process| process.holds.iter().map(move |stream| (stream, process)));
        for (stream, process) in holders.take(NAMED) {
            warn!("{} held open by {}", stream.name(), shown(process));
        }
        let quiet: Vec<_> = found.iter().filter(|process| process.holds.is_empty()).map(shown).take(NAMED).collect();
        if !quiet.is_empty() {
            warn!("processes of the command are still running after its end: {}", quiet.join(", "));
        } else if found.is_empty() {
            warn!("processes that cannot be seen are still running after the command's end");
        }
        info!(policy = self.config.leftovers.name(), "what the command has left behind is looked after");
        self.herald.tell(Event::Leftovers(Remaining {
            policy: self.config.leftovers.name().into(),
            total: found.len() as u64,
            processes: found.into_iter().take(NAMED).collect(),
        }));
    }
}

fn shown(process: &Process) -> String {
    format!("pid {} ({})", process.pid, process.name)
}

/// Pending for ever without a channel.
pub(crate) async fn recv(cancels: &mut Option<mpsc::Receiver<Cancel>>) -> Option<Cancel> {
    match cancels {
        Some(cancels) => cancels.recv().await,
        None => std::future::pending().await,
    }
}

fn soonest(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    a.into_iter().chain(b).min()
}
