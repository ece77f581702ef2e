//! The agent's whole life on one page.

use std::{io, sync::Arc, time::Duration};

use phonehome_proto::{
    frame::{Cancel, CommandState, End},
    id::ProducerId,
};
use rustix::process::Signal;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};
use tracing::{debug, error, info, warn};

use crate::{
    capture::{Capture, Captured},
    command::{self, Caught, Command, Output, Pipes, Signals},
    config::{Config, Home, Start},
    console::Console,
    failure::{EXIT_TERMINATED, Failure},
    outbox::Outbox,
    uplink::{Delivery, Dialler, Identity, Uplink},
};

/// Between TERM and KILL for the command's process group, unless a cancel says otherwise.
const GRACE: Duration = Duration::from_secs(30);

/// How long descendants may keep the output open after the command's end before they are told to end.
const LEFTOVER_PATIENCE: Duration = Duration::from_secs(5);

/// How long output is still awaited once everybody was killed.
const AFTER_KILL: Duration = Duration::from_secs(1);

/// What remains of the linger once TERM says that time is up.
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
    let mut line = Line::open(home, config.spool_memory)?;
    let mut stay = Linger::new(config.linger);
    if config.start == Start::Connected
        && let Some(code) = line.wait_for_welcome(&mut signals).await?
    {
        return Ok(code);
    }
    let (end, captured) = match Command::spawn(&config.command, output) {
        Ok(command) => {
            line.command.send_replace(CommandState::Running);
            let capture = line.capture(pipes, config.tee.then(|| console.spawn_copier()).transpose()?);
            let cancels = line.cancels.take().expect("taken once");
            let mut supervisor = Supervisor::new(command, signals, cancels);
            let end = supervisor.ended().await;
            info!(code = end.code(), "the command ended");
            line.command.send_replace(CommandState::Ended);
            let captured = supervisor.captured(capture).await?;
            stay.hurried = supervisor.hurried;
            stay.signals = Some(supervisor.signals);
            (end, captured)
        }
        Err(end) => {
            tell_not_started(&end);
            stay.signals = Some(signals);
            (end, Captured::default())
        }
    };
    let code = end.code();
    line.outbox.finish(captured.finished(end));
    stay.begin();
    stay.until(line.delivered()).await;
    line.tell_undelivered();
    if let Some(copier) = captured.copier {
        stay.until(copier.finish()).await;
    }
    Ok(code)
}

/// Says on the agent's own log that nothing ran, and what to exit with.
fn tell_not_started(end: &End) -> u8 {
    if let End::NotStarted { reason, .. } = end {
        error!("{reason}");
    }
    end.code()
}

/// The connection home, seen from the command's side.
struct Line {
    outbox: Arc<Outbox>,
    uplink: JoinHandle<Delivery>,
    welcomed: watch::Receiver<bool>,
    command: watch::Sender<CommandState>,
    cancels: Option<mpsc::Receiver<Cancel>>,
    last_output: watch::Sender<Instant>,
}

impl Line {
    fn open(home: Home, spool_memory: u64) -> Result<Self, Failure> {
        let mut producer = [0; 16];
        getrandom::fill(&mut producer).map_err(|error| io::Error::other(error.to_string()))?;
        let outbox = Arc::new(Outbox::new(spool_memory));
        let (welcomed_tx, welcomed) = watch::channel(false);
        let (cancels_tx, cancels) = mpsc::channel(1);
        let (command, command_rx) = watch::channel(CommandState::Waiting);
        let (last_output, last_output_rx) = watch::channel(Instant::now());
        let uplink = Uplink {
            dialler: Dialler::new(home.address, home.token, home.trust),
            identity: Identity { build: home.build, step: home.step, producer: ProducerId(producer) },
            outbox: outbox.clone(),
            welcomed: welcomed_tx,
            cancels: cancels_tx,
            command: command_rx,
            last_output: last_output_rx,
        };
        let uplink = tokio::spawn(uplink.run());
        Ok(Self { outbox, uplink, welcomed, command, cancels: Some(cancels), last_output })
    }

    /// `--start connected`. Returns the exit code when the command must not be started any more.
    async fn wait_for_welcome(&mut self, signals: &mut Signals) -> Result<Option<u8>, Failure> {
        let mut welcomed = self.welcomed.clone();
        loop {
            tokio::select! {
                _ = welcomed.wait_for(|welcomed| *welcomed) => return self.welcomed_or_refused().await,
                caught = signals.next() => if let Caught::Other(Signal::TERM | Signal::INT) = caught {
                    info!("told to end before the command was started");
                    return Ok(Some(EXIT_TERMINATED));
                },
            }
        }
    }

    async fn welcomed_or_refused(&mut self) -> Result<Option<u8>, Failure> {
        if *self.welcomed.borrow() {
            return Ok(None);
        }
        match (&mut self.uplink).await {
            Ok(Delivery::Refused(reason)) => Err(Failure::Refused(reason)),
            Ok(Delivery::Complete | Delivery::Incomplete(_)) | Err(_) => Ok(None),
        }
    }

    fn capture(&self, pipes: Pipes, copier: Option<crate::console::Copier>) -> Capturing {
        let (stop, stopped) = oneshot::channel();
        let capture = Capture {
            stdout: Some(pipes.stdout),
            stderr: pipes.stderr,
            outbox: self.outbox.clone(),
            copier,
            last_output: self.last_output.clone(),
        };
        Capturing { task: tokio::spawn(capture.run(stopped)), stop: Some(stop) }
    }

    /// Says what is left when there is no time left.
    fn tell_undelivered(&self) {
        if !self.uplink.is_finished() {
            let records = self.outbox.with(|sender| sender.next() - sender.oldest());
            warn!(records, "the server has not confirmed the end of the log within --linger");
        }
    }

    /// Waits until the server has accepted the end, and says so when it has not.
    async fn delivered(&mut self) {
        match (&mut self.uplink).await {
            Ok(Delivery::Complete) => debug!("the server has the complete log"),
            Ok(Delivery::Incomplete(reason)) => warn!("the server has the log, but it is incomplete: {reason}"),
            Ok(Delivery::Refused(_)) => {} // said when it happened
            Err(panicked) => error!("delivery failed: {panicked}"),
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.uplink.abort();
    }
}

/// A capture that runs, and the way to end it early.
struct Capturing {
    task: JoinHandle<Captured>,
    stop: Option<oneshot::Sender<()>>,
}

/// Watches over the command: signals pass through, TERM and cancels are followed by KILL after a grace period.
struct Supervisor {
    command: Command,
    signals: Signals,
    cancels: Option<mpsc::Receiver<Cancel>>,
    plan: Plan,
    give_up: bool,
    /// Whether TERM or INT came when the command had already ended: they are meant for what is left of the agent's stay.
    hurried: bool,
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
        Self { command, signals, cancels: Some(cancels), plan: Plan::Nothing, give_up: false, hurried: false }
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

    /// Waits for the end of the output: both pipes at their ends, or everybody gone who should have closed them.
    async fn captured(&mut self, mut capture: Capturing) -> Result<Captured, Failure> {
        if let Plan::Nothing = self.plan {
            self.plan = Plan::Terminate(Instant::now() + LEFTOVER_PATIENCE);
        }
        loop {
            tokio::select! {
                captured = &mut capture.task => return Ok(captured.map_err(io::Error::from)?),
                () = self.step() => {}
            }
            if self.give_up
                && let Some(stop) = capture.stop.take()
            {
                warn!("output is still held open by a process outside the command's group; it is read no further");
                stop.send(()).unwrap_or(()); // the capture may have ended by itself
            }
        }
    }

    /// Handles whatever happens next. Cancel safe.
    async fn step(&mut self) {
        tokio::select! {
            biased;
            caught = self.signals.next() => self.handle_signal(caught),
            cancel = recv(&mut self.cancels) => match cancel {
                Some(cancel) => self.terminate(Duration::from_millis(cancel.grace)),
                None => self.cancels = None,
            },
            () = expiry(self.plan.at()) => self.handle_plan(),
        }
    }

    fn handle_signal(&mut self, caught: Caught) {
        match caught {
            Caught::Child => self.command.reap(),
            Caught::Other(signal) => {
                if let Signal::TERM | Signal::INT = signal {
                    self.command.reap(); // its end may not have been noticed yet
                    self.hurried |= self.command.end().is_some();
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

/// Pending for ever without a deadline.
async fn expiry(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// The time after the command's end that is left for delivery; TERM cuts it short.
struct Linger {
    limit: Duration,
    deadline: Instant,
    signals: Option<Signals>,
    /// Whether somebody wanted it short before it began.
    hurried: bool,
}

impl Linger {
    fn new(limit: Duration) -> Self {
        Self { limit, deadline: Instant::now(), signals: None, hurried: false }
    }

    fn begin(&mut self) {
        let limit = if self.hurried { self.limit.min(HURRY) } else { self.limit };
        self.deadline = Instant::now() + limit;
    }

    /// Waits for `work`, but no longer than what is left.
    async fn until(&mut self, work: impl Future<Output = ()>) {
        let mut work = std::pin::pin!(work);
        loop {
            let signal = async {
                match &mut self.signals {
                    Some(signals) => signals.next().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                _ = timeout(self.deadline.saturating_duration_since(Instant::now()), &mut work) => return,
                caught = signal => if let Caught::Other(Signal::TERM | Signal::INT) = caught {
                    self.deadline = self.deadline.min(Instant::now() + HURRY);
                },
            }
        }
    }
}
