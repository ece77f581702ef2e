//! The agent's whole life on one page.

use std::{io, sync::Arc, time::Duration};

use phonehome_env::Env;
use phonehome_proto::{
    event::{Event, Terminated},
    frame::{Cancel, CommandState, End},
};
use rustix::process::Signal;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::Instant,
};
use tracing::{error, info, warn};

use crate::{
    capture::{Capture, Captured, Waivers},
    command::{self, Caught, Command, Output, Pipes, Signals},
    config::{Config, Home, OnOffline, SpoolConfig, Start},
    console::{Console, Copier},
    failure::{EXIT_TERMINATED, Failure},
    line::Line,
    outbox::{Outbox, expiry},
    recorder::Recorder,
    uplink::Delivery,
};

/// Between TERM and KILL for the command's process group, unless a cancel says otherwise.
const GRACE: Duration = Duration::from_secs(30);

/// The longest grace period that a cancel may ask for.
const MAX_GRACE: Duration = Duration::from_secs(24 * 60 * 60);

/// How long descendants may keep the output open after the command's end before they are told to end.
const LEFTOVER_PATIENCE: Duration = Duration::from_secs(5);

/// How long output is still awaited once everybody was killed.
const AFTER_KILL: Duration = Duration::from_secs(1);

/// What remains of the stay once TERM says that time is up.
const HURRY: Duration = Duration::from_secs(1);

/// Runs the command, delivers its log and returns the exit code.
///
/// # Errors
///
/// When the agent itself cannot do its work. Whatever happens to the command or on the wire is a code, not an error.
pub fn run(config: Config, console: &Console) -> Result<u8, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(live(config, console));
    runtime.shutdown_background(); // a name look-up may still be under way, nobody waits for it
    result
}

async fn live(mut config: Config, console: &Console) -> Result<u8, Failure> {
    let signals = Signals::catch()?;
    command::prepare_process();
    match config.home.take() {
        Some(home) => observed(config, home, signals, console).await,
        None => Ok(unobserved(&config, signals).await),
    }
}

/// The command on the agent's own streams, with nobody told.
async fn unobserved(config: &Config, signals: Signals) -> u8 {
    warn!("no --url (PHONEHOME_URL): the command runs unobserved");
    let (_, cancels) = mpsc::channel(1);
    match Command::spawn(&config.command, Output::Inherited) {
        Ok(command) => Supervisor::new(command, signals, cancels).ended().await.code(),
        Err(end) => tell_not_started(&end),
    }
}

async fn observed(config: Config, home: Home, mut signals: Signals, console: &Console) -> Result<u8, Failure> {
    let (output, pipes) = command::pipes(config.merge)?;
    let (mut line, recorder) = Line::open(&Env::real(), home, &config.spool).await?;
    let herald = recorder.herald();
    let admission = match config.start {
        Start::Now => Admission::Granted,
        Start::Connected => wait_for_welcome(&mut line, &mut signals).await?,
    };
    let command = match admission {
        Admission::Granted => Command::spawn(&config.command, output),
        Admission::Cancelled(end) => Err(end),
        Admission::Terminated => return Ok(EXIT_TERMINATED),
    };
    let (end, captured, mut stay) = match command {
        Ok(command) => {
            line.command.send_replace(CommandState::Running);
            let capture = capture(&line, recorder, pipes, config.tee.then(|| console.spawn_copier()).transpose()?);
            let cancels = line.cancels.take().expect("taken once");
            let mut supervisor = Supervisor::new(command, signals, cancels);
            supervisor.patience = Patience::of(&config.spool, line.outbox());
            let end = supervisor.ended().await;
            info!(code = end.code(), "the command ended");
            line.command.send_replace(CommandState::Ended);
            let deadline = Instant::now() + config.linger;
            let captured = supervisor.captured(capture, deadline).await?;
            (end, captured, Linger { deadline, hurry: supervisor.hurry, signals: supervisor.signals })
        }
        Err(end) => {
            tell_not_started(&end);
            let deadline = Instant::now() + config.linger;
            (end, Captured { recorder, copier: None }, Linger { deadline, hurry: None, signals })
        }
    };
    let code = end.code();
    herald.tell(Event::Terminated(Terminated { code, ..Terminated::default() }));
    captured.recorder.finish(end, None);
    stay.leave(config.linger.min(HURRY));
    stay.until(Some(stay.deadline), line.delivered()).await;
    let delivery = line.close().await;
    if let Some(copier) = captured.copier {
        stay.until(None, copier.finish()).await;
    }
    match delivery {
        Some(Delivery::Complete) => Ok(code),
        _ if !config.require_delivery => Ok(code),
        Some(Delivery::Incomplete(why) | Delivery::Refused(why)) => Err(Failure::Undelivered { code, why }),
        None => Err(Failure::Undelivered { code, why: "the server has not confirmed it in time".into() }),
    }
}

/// Says on the agent's own log that nothing ran, and what to exit with.
fn tell_not_started(end: &End) -> u8 {
    if let End::NotStarted { reason, .. } = end {
        error!("{reason}");
    }
    end.code()
}

/// Whether the command may start.
enum Admission {
    Granted,
    /// The server has cancelled it, and shall be told that it never ran.
    Cancelled(End),
    /// A signal came first.
    Terminated,
}

/// `--start connected`.
async fn wait_for_welcome(line: &mut Line, signals: &mut Signals) -> Result<Admission, Failure> {
    let mut welcomed = line.welcomed.clone();
    loop {
        tokio::select! {
            _ = welcomed.wait_for(|welcomed| *welcomed) => return welcomed_or_refused(line).await,
            caught = signals.next() => if let Caught::Other(Signal::TERM | Signal::INT) = caught {
                info!("told to end before the command was started");
                return Ok(Admission::Terminated);
            },
        }
    }
}

async fn welcomed_or_refused(line: &mut Line) -> Result<Admission, Failure> {
    if *line.welcomed.borrow() {
        return Ok(cancelled(line).map_or(Admission::Granted, Admission::Cancelled));
    }
    line.delivered().await;
    match line.delivery() {
        Some(Delivery::Refused(reason)) => Err(Failure::Refused(reason.clone())),
        Some(Delivery::Complete | Delivery::Incomplete(_)) | None => Ok(Admission::Granted),
    }
}

/// The end of a command that was cancelled before its start. A cancel in the welcome is here before the welcome is.
fn cancelled(line: &mut Line) -> Option<End> {
    line.cancels.as_mut()?.try_recv().ok()?;
    Some(End::NotStarted { code: EXIT_TERMINATED, reason: "cancelled before it was started".into() })
}

fn capture(line: &Line, recorder: Recorder, pipes: Pipes, copier: Option<Copier>) -> Capturing {
    let (waivers, waivers_rx) = watch::channel(Waivers::default());
    let capture = Capture::new(pipes, recorder, copier, line.last_output.clone(), waivers_rx);
    Capturing { task: tokio::spawn(capture.run()), waivers }
}

/// A capture that runs, and the way to end it early.
struct Capturing {
    task: JoinHandle<Captured>,
    waivers: watch::Sender<Waivers>,
}

/// Watches over the command: signals pass through, TERM and cancels are followed by KILL after a grace period.
struct Supervisor {
    command: Command,
    signals: Signals,
    cancels: Option<mpsc::Receiver<Cancel>>,
    plan: Plan,
    patience: Option<Patience>,
    give_up: bool,
    /// When to be gone, after TERM or INT when the command had ended: they are meant for what is left of the agent's stay.
    hurry: Option<Instant>,
}

/// `--on-offline stop`: how long the server may be out of reach.
#[derive(Debug, Clone)]
struct Patience {
    outbox: Arc<Outbox>,
    limit: Duration,
}

impl Patience {
    fn of(config: &SpoolConfig, outbox: &Arc<Outbox>) -> Option<Self> {
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

/// What happens next to the process group, and when.
#[derive(Debug, Clone, Copy)]
enum Plan {
    Nothing,
    Terminate(Instant),
    Kill(Instant),
    GiveUp(Instant),
}

impl Plan {
    fn at(self) -> Option<Instant> {
        match self {
            Self::Nothing => None,
            Self::Terminate(at) | Self::Kill(at) | Self::GiveUp(at) => Some(at),
        }
    }
}

impl Supervisor {
    fn new(command: Command, signals: Signals, cancels: mpsc::Receiver<Cancel>) -> Self {
        Self {
            command,
            signals,
            cancels: Some(cancels),
            plan: Plan::Nothing,
            patience: None,
            give_up: false,
            hurry: None,
        }
    }

    /// Waits for the command itself to end.
    async fn ended(&mut self) -> End {
        loop {
            if let Some(end) = self.command.end() {
                return end.clone();
            }
            self.step().await;
        }
    }

    /// Waits for the end of the output: both pipes at their ends, or everybody gone who should have closed them. After
    /// `deadline` the capture waits for the server no longer, and in a hurry not for the reader of the copy either.
    async fn captured(&mut self, mut capture: Capturing, deadline: Instant) -> Result<Captured, Failure> {
        self.patience = None; // there is no command left to end
        if let Plan::Nothing = self.plan {
            self.plan = Plan::Terminate(Instant::now() + LEFTOVER_PATIENCE);
        }
        loop {
            let now = Instant::now();
            let hurried = self.hurry.is_some_and(|at| at <= now);
            let late = hurried || deadline <= now;
            capture.waivers.send_replace(Waivers {
                stalled_copy: true,
                copy: hurried,
                writers: self.give_up,
                room: late,
            });
            let hurry = self.hurry.filter(|_| !hurried);
            let next = if late { hurry } else { soonest(Some(deadline), hurry) };
            tokio::select! {
                captured = &mut capture.task => return Ok(captured.map_err(io::Error::from)?),
                () = self.step() => {}
                () = expiry(next) => {}
            }
        }
    }

    /// Handles whatever happens next. Cancel safe.
    async fn step(&mut self) {
        tokio::select! {
            biased;
            caught = self.signals.next() => self.handle_signal(caught),
            cancel = recv(&mut self.cancels) => match cancel {
                Some(cancel) => self.terminate(Duration::from_millis(cancel.grace).min(MAX_GRACE)),
                None => self.cancels = None,
            },
            () = expiry(self.plan.at()) => self.handle_plan(),
            () = Patience::ended(self.patience.as_ref()) => {
                self.patience = None;
                warn!("the server has been out of reach for --offline-limit; ending the command");
                self.terminate(GRACE);
            }
        }
    }

    fn handle_signal(&mut self, caught: Caught) {
        match caught {
            Caught::Child => self.command.reap(),
            Caught::Other(signal) => {
                if let Signal::TERM | Signal::INT = signal {
                    self.command.reap(); // its end may not have been noticed yet
                    if self.command.end().is_some() {
                        self.hurry.get_or_insert(Instant::now() + HURRY);
                    }
                }
                if signal == Signal::TERM { self.terminate(GRACE) } else { self.command.signal(signal) }
            }
        }
    }

    fn terminate(&mut self, grace: Duration) {
        self.command.signal(Signal::TERM);
        let kill = Instant::now() + grace;
        self.plan = match self.plan {
            Plan::Kill(at) => Plan::Kill(at.min(kill)),
            Plan::GiveUp(at) => Plan::GiveUp(at),
            Plan::Nothing | Plan::Terminate(_) => Plan::Kill(kill),
        };
    }

    fn handle_plan(&mut self) {
        let now = Instant::now();
        self.plan = match self.plan {
            Plan::Terminate(_) if self.command.has_members() => {
                warn!("processes of the command are still running after its end; terminating them");
                self.command.signal(Signal::TERM);
                Plan::Kill(now + GRACE)
            }
            Plan::Kill(_) if self.command.has_members() => {
                warn!("the grace period is over; killing the command's processes");
                self.command.signal(Signal::KILL);
                Plan::GiveUp(now + AFTER_KILL)
            }
            Plan::Terminate(_) | Plan::Kill(_) | Plan::GiveUp(_) | Plan::Nothing => {
                self.give_up = self.command.end().is_some();
                Plan::Nothing
            }
        };
    }
}

/// Pending for ever without a channel.
async fn recv(cancels: &mut Option<mpsc::Receiver<Cancel>>) -> Option<Cancel> {
    match cancels {
        Some(cancels) => cancels.recv().await,
        None => std::future::pending().await,
    }
}

fn soonest(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    a.into_iter().chain(b).min()
}

/// What is left of the agent's stay after the command's end; TERM cuts it short.
struct Linger {
    /// When delivery must be over.
    deadline: Instant,
    /// When everything must be over.
    hurry: Option<Instant>,
    signals: Signals,
}

impl Linger {
    /// Leaves at least this much, however long the output has taken.
    fn leave(&mut self, least: Duration) {
        let least = Instant::now() + least;
        self.deadline = self.deadline.max(least);
        self.hurry = self.hurry.map(|hurry| hurry.max(least));
    }

    /// Waits for `work`, but no longer than until `deadline`.
    async fn until(&mut self, deadline: Option<Instant>, work: impl Future<Output = ()>) {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                biased;
                () = &mut work => return,
                () = expiry(soonest(deadline, self.hurry)) => return,
                caught = self.signals.next() => if let Caught::Other(Signal::TERM | Signal::INT) = caught {
                    self.hurry.get_or_insert(Instant::now() + HURRY);
                },
            }
        }
    }
}
