//! The agent's whole life on one page.

use std::{io, sync::Arc, time::Duration};

use phonehome_env::Env;
use phonehome_proto::{
    event::{Born, Event},
    frame::{CommandState, End},
};
use tokio::time::{Instant, sleep_until};
use tracing::{error, info, warn};

use crate::{
    cause,
    command::{self, Blocked, Command, Reaper, Signals},
    config::Config,
    console::{Console, Copier},
    failure::Failure,
    gate::{Admission, Denied, Gate},
    ledger::{Inputs, Ledger},
    probe::exec::Children,
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
    if config.home.is_some() || config.siblings.needs_a_worker() {
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
    let ledger = Ledger::open(&mut config).await?;
    let runner = Arc::new(Children(reaper.clone()));
    let siblings = Siblings::open(config.siblings.clone(), &Env::real(), Some(ledger.herald.clone()), runner);
    Life { config, console, ledger, siblings, signals, reaper }.live().await
}

/// Everything that lasts from the agent's start to its end.
struct Life<'a> {
    config: Config,
    console: &'a Console,
    ledger: Ledger,
    siblings: Siblings,
    signals: Signals,
    reaper: Reaper,
}

/// A command that was started, and how its output is read.
struct Started {
    command: Command,
    inputs: Option<Inputs>,
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
        let (output, inputs) = match self.ledger.inputs(&self.config, self.console) {
            Ok(both) => both,
            Err(failure) => return Ok(Err(Denied::failed(&failure))),
        };
        let gate = Gate {
            start: self.config.start,
            siblings: &mut self.siblings,
            line: self.ledger.line.as_mut(),
            recorder: self.ledger.recorder.as_mut(),
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
                let rewrites = &self.config.supervision.rewrites;
                early
                    .into_iter()
                    .filter_map(|signal| rewrites.apply(signal))
                    .for_each(|signal| command.pass_on(signal));
                Ok(Ok(Started { command, inputs }))
            }
            Err(end) => Ok(Err(Denied::because(end))),
        }
    }

    /// From the command's start to the agent's end.
    async fn attend(mut self, Started { command, inputs }: Started) -> Result<u8, Failure> {
        let program = self.config.command.first().map(|program| program.to_string_lossy().into_owned());
        self.ledger.herald.tell(Event::Born(Born { program: program.unwrap_or_default(), pid: command.pid() }));
        self.ledger.tell_state(CommandState::Running);
        let watch = self.siblings.take_output_watch();
        let capture = self.ledger.capture(&self.config, inputs, watch);
        if capture.is_none() {
            self.console.lend();
        }
        self.siblings.born();
        let Self { config, console, mut ledger, siblings, signals, reaper } = self;
        let watched = Watched {
            command,
            signals,
            reaper,
            herald: ledger.herald.clone(),
            cancels: ledger.line.as_mut().and_then(|line| line.cancels.take()),
            patience: ledger.line.as_ref().and_then(|line| Patience::of(&config.spool, line.outbox())),
            deaths: siblings.deaths(),
        };
        let death_signal = config.siblings.death_signal;
        let supervisor = Supervisor::new(watched, config.supervision.clone(), death_signal, config.linger);
        Attendance { config, console, ledger, siblings, supervisor }.live(capture).await
    }

    /// Nothing runs: only that is left to be told.
    async fn do_without(mut self, denied: Denied) -> Result<u8, Failure> {
        let Denied { end, mut told_to_end, is_wished, by_death } = denied;
        let end = masked(&self.config, end);
        let is_expected = self.config.siblings.expected_exits.allows(&end, by_death);
        if let End::NotStarted { code, reason } = &end {
            tell_why(&self.ledger, *code, reason, is_wished);
        }
        self.siblings.died(&end, None).await;
        let recorder = self.ledger.recorder.take();
        let terminated = cause::terminated(&end, false, Duration::ZERO);
        let end = judged(end, is_expected);
        let code = end.code();
        self.ledger.finish(&self.config, recorder, end, terminated, None);
        let mut delivery = Outcome::Nobody;
        if let Some(mut line) = self.ledger.line.take() {
            let time = if told_to_end { self.config.linger.min(HURRY) } else { self.config.linger };
            told_to_end |= self.stay(time, HURRY, line.delivered()).await;
            delivery = Outcome::Of(line.close().await);
        }
        let hold = self.config.supervision.hold[usize::from(code != 0)];
        if !hold.is_zero() && !told_to_end && !is_wished {
            tell_hold(hold);
            self.stay(hold, Duration::ZERO, std::future::pending()).await;
        }
        command::kill_descendants(); // of probes: there was no command to have any
        delivery.exit_code(code, self.config.require_delivery)
    }

    /// Waits for `work`, but no longer than for `time`, and than for `hurry` once the agent is told to end. Says whether it
    /// was.
    async fn stay(&mut self, time: Duration, hurry: Duration, work: impl Future<Output = ()>) -> bool {
        let mut work = std::pin::pin!(work);
        let mut deadline = Instant::now() + time;
        let mut told_to_end = false;
        loop {
            tokio::select! {
                biased;
                () = &mut work => return told_to_end,
                () = sleep_until(deadline) => return told_to_end,
                caught = self.signals.next() => {
                    self.reaper.reap();
                    if caught.ends().is_some() {
                        told_to_end = true;
                        deadline = deadline.min(Instant::now() + hurry);
                    }
                }
            }
        }
    }
}

/// What lasts from the command's start to the agent's end.
struct Attendance<'a> {
    config: Config,
    console: &'a Console,
    ledger: Ledger,
    siblings: Siblings,
    supervisor: Supervisor,
}

impl Attendance<'_> {
    async fn live(mut self, capture: Option<Capturing>) -> Result<u8, Failure> {
        let (end, death) = self.command_ended().await;
        let deadline = Instant::now() + self.config.linger;
        let (recorder, copier) = self.output_ended(capture, deadline).await?;
        let code = self.finish(recorder, end, death);
        let outcome = self.delivered(deadline).await;
        if let Some(copier) = copier {
            let until = self.supervisor.copy_until();
            self.supervisor.until(until, copier.finish()).await;
        }
        self.supervisor.left().await;
        self.hold(code).await;
        outcome.exit_code(code, self.config.require_delivery)
    }

    /// How the command ended, and the death of the sibling for which it was ended.
    async fn command_ended(&mut self) -> (End, Option<String>) {
        let end = self.supervisor.ended().await;
        info!(code = end.code(), "the command ended");
        self.ledger.tell_state(CommandState::Ended);
        let death = self.supervisor.death().map(ToOwned::to_owned);
        self.supervisor.until(None, self.siblings.died(&end, death.as_deref())).await;
        (end, death)
    }

    async fn output_ended(
        &mut self,
        capture: Option<Capturing>,
        deadline: Instant,
    ) -> Result<(Option<Recorder>, Option<Copier>), Failure> {
        let Some(capture) = capture else {
            self.supervisor.outlived().await;
            self.console.take_back();
            return Ok((None, None));
        };
        let captured = self.supervisor.captured(capture, deadline).await?;
        Ok((Some(captured.recorder), captured.copier))
    }

    /// Ends the log and says what to exit with.
    fn finish(&mut self, recorder: Option<Recorder>, end: End, death: Option<String>) -> u8 {
        let command = self.supervisor.command();
        let is_expected = self.config.siblings.expected_exits.allows(&end, death.is_some());
        let mut terminated = cause::terminated(&end, command.ran_out_of_memory(), command.duration());
        terminated.reason = terminated.reason.or(death);
        let end = judged(end, is_expected);
        let code = end.code();
        self.ledger.finish(&self.config, recorder, end, terminated, Some(command.usage()));
        code
    }

    async fn delivered(&mut self, deadline: Instant) -> Outcome {
        let least = self.config.linger.min(HURRY);
        self.supervisor.leave(least);
        let Some(mut line) = self.ledger.line.take() else { return Outcome::Nobody };
        self.supervisor.until(Some(deadline.max(Instant::now() + least)), line.delivered()).await;
        Outcome::Of(line.close().await)
    }

    /// Stays alive, so that a person can look inside, until the time is over or somebody says TERM.
    async fn hold(&mut self, code: u8) {
        let hold = self.config.supervision.hold[usize::from(code != 0)];
        if !hold.is_zero() && !self.supervisor.is_told_to_end() {
            tell_hold(hold);
            self.supervisor.hold(Instant::now() + hold).await;
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
fn tell_why(ledger: &Ledger, code: u8, reason: &str, was_wished: bool) {
    if was_wished {
        warn!(code, "{reason}");
    } else {
        error!("{reason}");
        ledger.herald.fault(reason.to_owned());
    }
}
