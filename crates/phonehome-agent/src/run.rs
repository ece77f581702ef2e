//! The agent's whole life on one page.

use std::{sync::Arc, time::Duration};

use phonehome_env::Env;
use phonehome_proto::{
    event::{Born, Event, Terminated},
    frame::{CommandState, End, Usage},
};
use tokio::{sync::watch, time::Instant};
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
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    let result = runtime.block_on(live(config, console, signals));
    runtime.shutdown_background(); // a name look-up may still be under way, nobody waits for it
    result
}

async fn live(mut config: Config, console: &Console, signals: Blocked) -> Result<u8, Failure> {
    command::prepare_process(&config.supervision);
    let mut signals = Signals::new(signals)?;
    let reaper = Reaper::default();
    let mut log = Log::open(&mut config).await?;
    let (output, sources) = log.sources(&config)?;
    let runner = Arc::new(Children(reaper.clone()));
    let mut siblings = Siblings::open(config.siblings.clone(), &Env::real(), Some(log.herald.clone()), runner);
    let gate = Gate {
        start: config.start,
        siblings: &mut siblings,
        line: log.line.as_mut(),
        recorder: log.recorder.as_mut(),
        signals: &mut signals,
        reaper: &reaper,
    };
    let (early, command) = match gate.admission().await {
        Ok(Admission::Granted(early)) => {
            let variables: Vec<_> = siblings.variables().collect();
            let command = Command::spawn(&config.command, output, config.supervision.user, &variables, &reaper);
            (early, command.map_err(Denied::because))
        }
        Ok(Admission::Denied(denied)) => (Vec::new(), Err(denied)),
        Err(failure) => {
            let end = End::NotStarted { code: failure.exit_code(), reason: failure.to_string() };
            siblings.died(&end, None).await;
            return Err(failure);
        }
    };
    match command {
        Ok(command) => attend(&config, log, siblings, (command, early), (signals, reaper), sources, console).await,
        Err(denied) => never_started(&config, log, siblings, denied).await,
    }
}

/// From the command's start to the agent's end.
async fn attend(
    config: &Config,
    mut log: Log,
    mut siblings: Siblings,
    (command, early): (Command, Vec<u8>),
    (signals, reaper): (Signals, Reaper),
    sources: Option<Sources>,
    console: &Console,
) -> Result<u8, Failure> {
    let program = config.command.first().map(|program| program.to_string_lossy().into_owned()).unwrap_or_default();
    log.herald.tell(Event::Born(Born { program, pid: command.pid() }));
    log.tell_state(CommandState::Running);
    early.into_iter().for_each(|signal| command.pass_on(signal));
    let capture = log.capture(config, sources, siblings.take_output_watch(), console)?;
    if capture.is_none() {
        console.lend();
    }
    siblings.born();
    let watched = Watched {
        command,
        signals,
        reaper,
        herald: log.herald.clone(),
        cancels: log.line.as_mut().and_then(|line| line.cancels.take()),
        patience: log.line.as_ref().and_then(|line| Patience::of(&config.spool, line.outbox())),
        deaths: siblings.deaths(),
    };
    let death_signal = config.siblings.death_signal;
    let mut supervisor = Supervisor::new(watched, config.supervision.clone(), death_signal, config.linger);
    let end = supervisor.ended().await;
    info!(code = end.code(), "the command ended");
    log.tell_state(CommandState::Ended);
    let death = supervisor.death().map(ToOwned::to_owned);
    let is_expected = config.siblings.expected_exits.allows(&end, death.is_some());
    supervisor.until(None, siblings.died(&end, death.as_deref())).await;
    let deadline = Instant::now() + config.linger;
    let captured = match capture {
        Some(capture) => Some(supervisor.captured(capture, deadline).await?),
        None => {
            supervisor.outlived().await;
            console.take_back();
            None
        }
    };
    let command = supervisor.command();
    let duration = u64::try_from(command.duration().as_millis()).unwrap_or(u64::MAX);
    let mut terminated = cause::terminated(&end, command.ran_out_of_memory(), duration);
    terminated.reason = terminated.reason.or(death);
    let (recorder, copier) = captured.map_or((None, None), |captured| (Some(captured.recorder), captured.copier));
    // Who ended it for a death says whether that is a success; how it really ended is in the event.
    let end = if is_expected { End::Exited(0) } else { end };
    let code = end.code();
    log.finish(config, recorder, end, terminated, Some(command.usage()));
    supervisor.leave(config.linger.min(HURRY));
    let deadline = deadline.max(Instant::now() + config.linger.min(HURRY));
    let delivery = match log.line.take() {
        Some(mut line) => {
            supervisor.until(Some(deadline), line.delivered()).await;
            Some(line.close().await)
        }
        None => None,
    };
    if let Some(copier) = copier {
        supervisor.until(None, copier.finish()).await;
    }
    supervisor.left().await;
    hold(&mut supervisor, config.supervision.hold[usize::from(code != 0)]).await;
    judge(config, code, delivery)
}

/// Nothing ran: only that is left to be told.
async fn never_started(config: &Config, mut log: Log, mut siblings: Siblings, denied: Denied) -> Result<u8, Failure> {
    let Denied { end, told_to_end, by_death } = denied;
    let end = masked(config, end);
    let is_expected = config.siblings.expected_exits.allows(&end, by_death);
    let code = if is_expected { 0 } else { end.code() };
    if let End::NotStarted { reason, .. } = &end {
        tell_why(&log, code, reason, told_to_end || by_death);
    }
    siblings.died(&end, None).await;
    let recorder = log.recorder.take();
    let terminated = cause::terminated(&end, false, 0);
    let end = if is_expected { End::Exited(0) } else { end };
    log.finish(config, recorder, end, terminated, None);
    let stay = if told_to_end { config.linger.min(HURRY) } else { config.linger };
    let Some(mut line) = log.line.take() else { return Ok(code) };
    drop(tokio::time::timeout(stay, line.delivered()).await); // what close() finds then says how it ended
    judge(config, code, Some(line.close().await))
}

/// The same end, in whose words no secret is.
fn masked(config: &Config, end: End) -> End {
    match (end, &config.redaction) {
        (End::NotStarted { code, reason }, Some(redaction)) => {
            End::NotStarted { code, reason: redaction.redactor.mask_text(&reason).into_owned() }
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

/// Stays alive, so that a person can look inside, until the time is over or somebody says TERM.
async fn hold(supervisor: &mut Supervisor, time: Duration) {
    if time.is_zero() || supervisor.is_told_to_end() {
        return;
    }
    warn!("holding for {} s; TERM ends it", time.as_secs_f64());
    supervisor.until(Some(Instant::now() + time), std::future::pending()).await;
}

/// What to exit with.
fn judge(config: &Config, code: u8, delivery: Option<Option<Delivery>>) -> Result<u8, Failure> {
    match delivery {
        None | Some(Some(Delivery::Complete)) => Ok(code),
        Some(_) if !config.require_delivery => Ok(code),
        Some(Some(Delivery::Incomplete(why) | Delivery::Refused(why))) => Err(Failure::Undelivered { code, why }),
        Some(None) => Err(Failure::Undelivered { code, why: "the server has not confirmed it in time".into() }),
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
        if let (Some(recorder), Some(redaction)) = (&mut recorder, &config.redaction) {
            recorder.redact(redaction.redactor.clone());
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
        let capture = Capture::new(sources, recorder, copier, config.redaction.clone(), last_output, waivers_rx)
            .watched_by(watch);
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
