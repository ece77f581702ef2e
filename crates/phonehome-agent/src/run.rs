//! The agent's whole life on one page.

use std::{io, sync::Arc, time::Duration};

use phonehome_env::Env;
use phonehome_proto::{
    event::{Born, Event, Terminated},
    frame::{CommandState, End, Usage},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tracing::{error, info, warn};

use crate::{
    capture::{Capture, Waivers},
    cause,
    command::{self, Blocked, Command, Output, Reaper, Signals, Sources},
    config::Config,
    console::{Console, Copier},
    failure::Failure,
    gate::{Admission, Denied, Gate},
    herald::Herald,
    line::Line,
    probe::{exec::Children, output::OutputWatch},
    recorder::Recorder,
    siblings::Siblings,
    supervisor::{Capturing, HURRY, Patience, Supervisor, Watched},
    uplink::Delivery,
};

/// Runs the command, delivers its log and returns the exit code.
///
/// `signals` have been blocked since this process began: one that came before the command is started counts.
///
/// # Errors
///
/// When the agent itself cannot do its work. Whatever happens to the command or on the wire is a code, not an error.
pub fn run(config: Config, console: &Console, signals: Blocked) -> Result<u8, Failure> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_io().enable_time().thread_keep_alive(FOR_EVER).on_thread_start(command::block_again);
    let runtime = runtime.build()?;
    if config.home.is_some() || config.siblings.has_probes() {
        keep_worker(&runtime)?;
    }
    let termination_log = config.supervision.termination_log.clone();
    let result = runtime.block_on(live(config, console, signals));
    runtime.shutdown_background(); // a name look-up may still be under way, nobody waits for it
    result.inspect_err(|failure| cause::leave_message(&termination_log, &failure.to_string()))
}

/// Starts the thread that looks up names and waits for disks: later the command may have left no room for one, and the
/// runtime panics when it needs its first and gets none.
fn keep_worker(runtime: &tokio::runtime::Runtime) -> io::Result<()> {
    let room = std::thread::Builder::new().spawn(|| ())?; // an error here, where the runtime would panic
    drop(room.join()); // it does nothing
    command::block_again();
    drop(runtime.spawn_blocking(|| ())); // nobody waits for nothing
    Ok(())
}

/// Longer than any build.
const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

async fn live(mut config: Config, console: &Console, signals: Blocked) -> Result<u8, Failure> {
    command::prepare_process(&config.supervision);
    let signals = Signals::new(signals)?;
    let reaper = Reaper::default();
    let log = Log::open(&mut config).await?;
    let runner = Arc::new(Children(reaper.clone()));
    let siblings = Siblings::open(config.siblings.clone(), &Env::real(), Some(log.herald.clone()), runner);
    Life { config, console, log, siblings, signals, reaper }.live().await
}

/// Everything that lasts from the agent's start to its end.
struct Life<'a> {
    config: Config,
    console: &'a Console,
    log: Log,
    siblings: Siblings,
    signals: Signals,
    reaper: Reaper,
}

/// A command that was started, and how its output is read.
struct Started {
    command: Command,
    sources: Option<Sources>,
}

impl Life<'_> {
    async fn live(mut self) -> Result<u8, Failure> {
        match self.start().await {
            Ok(Ok(started)) => self.attend(started).await,
            Ok(Err(denied)) => self.do_without(denied).await,
            Err(failure) => {
                let end = End::NotStarted { code: failure.exit_code(), reason: failure.to_string() };
                self.siblings.died(&end, None).await;
                Err(failure)
            }
        }
    }

    /// Waits until the command may be started, and starts it.
    async fn start(&mut self) -> Result<Result<Started, Denied>, Failure> {
        // Before the command exists: not even its first byte can be missed.
        let (output, sources) = match self.log.sources(&self.config) {
            Ok(both) => both,
            Err(failure) => return Ok(Err(Denied::failed(&failure))),
        };
        let gate = Gate {
            start: self.config.start,
            siblings: &mut self.siblings,
            line: self.log.line.as_mut(),
            recorder: self.log.recorder.as_mut(),
            signals: &mut self.signals,
            reaper: &self.reaper,
        };
        let early = match gate.admission().await? {
            Admission::Granted(early) => early,
            Admission::Denied(denied) => return Ok(Err(denied)),
        };
        let variables: Vec<_> = self.siblings.variables().collect();
        let user = self.config.supervision.user;
        match Command::spawn(&self.config.command, output, user, &variables, &self.reaper) {
            Ok(command) => {
                early.into_iter().for_each(|signal| command.pass_on(signal));
                Ok(Ok(Started { command, sources }))
            }
            Err(end) => Ok(Err(Denied::because(end))),
        }
    }

    /// From the command's start to the agent's end.
    async fn attend(mut self, Started { command, sources }: Started) -> Result<u8, Failure> {
        let program = self.config.command.first().map(|program| program.to_string_lossy().into_owned());
        self.log.herald.tell(Event::Born(Born { program: program.unwrap_or_default(), pid: command.pid() }));
        self.log.tell_state(CommandState::Running);
        let watch = self.siblings.take_output_watch();
        let capture = self.log.capture(&self.config, sources, watch, self.console)?;
        if capture.is_none() {
            self.console.lend();
        }
        self.siblings.born();
        let Self { config, console, mut log, mut siblings, signals, reaper } = self;
        let watched = Watched {
            command,
            signals,
            reaper,
            herald: log.herald.clone(),
            cancels: log.line.as_mut().and_then(|line| line.cancels.take()),
            patience: log.line.as_ref().and_then(|line| Patience::of(&config.spool, line.outbox())),
            deaths: siblings.deaths(),
        };
        let mut supervisor =
            Supervisor::new(watched, config.supervision.clone(), config.siblings.death_signal, config.linger);
        let end = supervisor.ended().await;
        info!(code = end.code(), "the command ended");
        log.tell_state(CommandState::Ended);
        let death = supervisor.death().map(ToOwned::to_owned);
        let is_expected = config.siblings.expected_exits.allows(&end, death.is_some());
        supervisor.until(None, siblings.died(&end, death.as_deref())).await;
        let deadline = Instant::now() + config.linger;
        let (recorder, copier) = match capture {
            Some(capture) => {
                let captured = supervisor.captured(capture, deadline).await?;
                (Some(captured.recorder), captured.copier)
            }
            None => {
                supervisor.outlived().await;
                console.take_back();
                (None, None)
            }
        };
        let command = supervisor.command();
        let mut terminated = cause::terminated(&end, command.ran_out_of_memory(), command.duration());
        terminated.reason = terminated.reason.or(death);
        let end = judged(end, is_expected);
        let code = end.code();
        log.finish(&config, recorder, end, terminated, Some(command.usage()));
        supervisor.leave(config.linger.min(HURRY));
        let deadline = deadline.max(Instant::now() + config.linger.min(HURRY));
        let mut delivery = Outcome::Nobody;
        if let Some(mut line) = log.line.take() {
            supervisor.until(Some(deadline), line.delivered()).await;
            delivery = Outcome::Of(line.close().await);
        }
        if let Some(copier) = copier {
            supervisor.until(None, copier.finish()).await;
        }
        supervisor.left().await;
        let hold = config.supervision.hold[usize::from(code != 0)];
        if !hold.is_zero() && !supervisor.is_told_to_end() {
            tell_hold(hold);
            supervisor.until(Some(Instant::now() + hold), std::future::pending()).await;
        }
        delivery.exit_code(code, config.require_delivery)
    }

    /// Nothing runs: only that is left to be told.
    async fn do_without(mut self, denied: Denied) -> Result<u8, Failure> {
        let Denied { end, mut told_to_end, by_death } = denied;
        let end = masked(&self.config, end);
        let is_expected = self.config.siblings.expected_exits.allows(&end, by_death);
        if let End::NotStarted { code, reason } = &end {
            tell_why(&self.log, *code, reason, told_to_end || by_death);
        }
        self.siblings.died(&end, None).await;
        let recorder = self.log.recorder.take();
        let terminated = cause::terminated(&end, false, Duration::ZERO);
        let end = judged(end, is_expected);
        let code = end.code();
        self.log.finish(&self.config, recorder, end, terminated, None);
        let mut delivery = Outcome::Nobody;
        if let Some(mut line) = self.log.line.take() {
            self.stay(self.config.linger, &mut told_to_end, line.delivered()).await;
            delivery = Outcome::Of(line.close().await);
        }
        let hold = self.config.supervision.hold[usize::from(code != 0)];
        if !hold.is_zero() && !told_to_end {
            tell_hold(hold);
            self.stay(hold, &mut told_to_end, std::future::pending()).await;
        }
        delivery.exit_code(code, self.config.require_delivery)
    }

    /// Waits for `work`, but no longer than for `time`, and not for long once the agent was told to end.
    async fn stay(&mut self, time: Duration, told_to_end: &mut bool, work: impl Future<Output = ()>) {
        let mut work = std::pin::pin!(work);
        let mut deadline = Instant::now() + if *told_to_end { time.min(HURRY) } else { time };
        loop {
            tokio::select! {
                biased;
                () = &mut work => return,
                () = sleep_until(deadline) => return,
                caught = self.signals.next() => {
                    self.reaper.reap();
                    if caught.ends().is_some() {
                        *told_to_end = true;
                        deadline = deadline.min(Instant::now() + HURRY);
                    }
                }
            }
        }
    }
}

fn tell_hold(time: Duration) {
    warn!("holding for {} s; TERM ends it", time.as_secs_f64());
}

/// The end as it counts: who ended the command for a death says whether that is a success. How it really ended is in the
/// event.
fn judged(end: End, is_expected: bool) -> End {
    if is_expected { End::Exited(0) } else { end }
}

/// What became of the log.
enum Outcome {
    /// There is nobody to deliver it to.
    Nobody,
    /// How the delivery ended, if it has.
    Of(Option<Delivery>),
}

impl Outcome {
    /// What to exit with when the command's own code is `code`.
    fn exit_code(self, code: u8, is_required: bool) -> Result<u8, Failure> {
        let why = match self {
            Self::Nobody | Self::Of(Some(Delivery::Complete)) => return Ok(code),
            Self::Of(_) if !is_required => return Ok(code),
            Self::Of(Some(Delivery::Incomplete(why) | Delivery::Refused(why))) => why,
            Self::Of(None) => "the server has not confirmed it in time".into(),
        };
        Err(Failure::Undelivered { code, why })
    }
}

/// The same end, in whose words no secret is.
fn masked(config: &Config, end: End) -> End {
    match (end, &config.redactor) {
        (End::NotStarted { code, reason }, Some(redactor)) => {
            End::NotStarted { code, reason: redactor.mask_text(&reason).into_owned() }
        }
        (end, _) => end,
    }
}

/// Says why nothing ran: as an error, unless it was somebody's wish.
fn tell_why(log: &Log, code: u8, reason: &str, was_wished: bool) {
    if was_wished {
        warn!(code, "{reason}");
    } else {
        error!("{reason}");
        log.herald.fault(reason.to_owned());
    }
}

/// Where facts and output go.
struct Log {
    /// `None` without a server.
    line: Option<Line>,
    /// `None` when nobody looks at the output, or once somebody else writes.
    recorder: Option<Recorder>,
    herald: Herald,
}

impl Log {
    async fn open(config: &mut Config) -> Result<Self, Failure> {
        let env = Env::real();
        let (line, mut recorder) = match config.home.take() {
            Some(home) => {
                let (line, recorder) = Line::open(&env, home, &config.spool).await?;
                (Some(line), Some(recorder))
            }
            None => {
                warn!("no --url (PHONEHOME_URL): the command runs unobserved");
                (None, config.looks_at_output().then(|| Recorder::for_nobody(env.clone())))
            }
        };
        if let (Some(recorder), Some(redactor)) = (&mut recorder, &config.redactor) {
            recorder.redact(redactor.clone());
        }
        let herald = recorder.as_ref().map_or_else(|| Herald::new(env.nature).0, Recorder::herald);
        Ok(Self { line, recorder, herald })
    }

    /// Where the command will write to, made before the command is.
    fn sources(&self, config: &Config) -> Result<(Output, Option<Sources>), Failure> {
        let (output, sources) = match (&self.recorder, config.supervision.pty) {
            (None, _) => return Ok((Output::Inherited, None)),
            (Some(_), Some(size)) => Sources::terminal(size).map_err(Failure::Terminal)?,
            (Some(_), None) => Sources::pipes(config.merge)?,
        };
        Ok((output, Some(sources)))
    }

    fn capture(
        &mut self,
        config: &Config,
        sources: Option<Sources>,
        watch: Option<OutputWatch>,
        console: &Console,
    ) -> Result<Option<Capturing>, Failure> {
        let (Some(sources), Some(recorder)) = (sources, self.recorder.take()) else { return Ok(None) };
        let copies = config.tee || self.line.is_none(); // somebody has to see it
        let copier: Option<Copier> = copies.then(|| console.spawn_copier()).transpose()?;
        let last_output =
            self.line.as_ref().map_or_else(|| watch::Sender::new(Instant::now()), |line| line.last_output.clone());
        let (waivers, waivers_rx) = watch::channel(Waivers::default());
        let held = sources.held();
        let capture =
            Capture::new(sources, recorder, copier, config.redactor.clone(), last_output, waivers_rx).watched_by(watch);
        Ok(Some(Capturing { task: tokio::spawn(capture.run()), waivers, held }))
    }

    /// Ends the log: nothing more can be told.
    fn finish(
        &self,
        config: &Config,
        recorder: Option<Recorder>,
        end: End,
        terminated: Terminated,
        usage: Option<Usage>,
    ) {
        if let Some(reason) = cause::reason(&terminated) {
            cause::leave_message(&config.supervision.termination_log, &reason);
        }
        self.herald.tell(Event::Terminated(terminated));
        if let Some(recorder) = recorder {
            recorder.finish(end, usage);
        }
    }

    fn tell_state(&self, state: CommandState) {
        if let Some(line) = &self.line {
            line.command.send_replace(state);
        }
    }
}
