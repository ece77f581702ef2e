//! The life of one build, from the first wait to the verdict.
//!
//! ```text
//! Running --every step finished---------------------------> Ended(succeeded | failed)
//!    |----never connected, or nobody is left to stop------> Ended(timed out | cancelled | lost | error)
//!    '----cancel, total or idle timeout, a step lost--> Ending --agents gone or grace over--> Ended(the same)
//! ```

use std::{fmt, time::Duration};

use phonehome_proto::{
    frame::{Cancel, Counts, End, Finished, FinishedAck, UnixMicros, Usage},
    id::{Attempt, Digest, StepName},
};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::ends::{StepFile, Told};

/// Time limits of a build. `None` is no limit.
#[derive(Debug, Clone)]
pub struct Clocks {
    /// Until the first agent, or the next of several steps, says hello.
    pub connect: Option<Duration>,
    /// Without any output, although the agent lives.
    pub idle: Option<Duration>,
    /// Without an agent that had been there, before its end was told.
    pub lost: Option<Duration>,
    /// In all.
    pub total: Option<Duration>,
    /// Between TERM and KILL when the build is stopped.
    pub grace: Duration,
}

impl Default for Clocks {
    fn default() -> Self {
        Self {
            connect: Some(Duration::from_secs(300)),
            idle: None,
            lost: Some(Duration::from_secs(120)),
            total: Some(Duration::from_secs(3600)),
            grace: Duration::from_secs(30),
        }
    }
}

/// How a build ended. Whether its log is complete is another question, see [`Verdict::incomplete`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "kebab-case")]
pub enum Outcome {
    /// Somebody stopped it.
    Cancelled {
        /// Who or why.
        reason: String,
    },
    /// phonehome could not do its work.
    Error {
        /// What went wrong.
        reason: String,
    },
    /// A step's command ended with another code than 0.
    Failed {
        /// The first such step, in the order in which the steps were declared.
        step: StepName,
        /// How it ended.
        end: End,
    },
    /// An agent vanished and did not come back in time.
    Lost {
        /// Its step.
        step: StepName,
    },
    /// Every command ended with code 0.
    Succeeded,
    /// A clock ran out.
    TimedOut {
        /// Which.
        clock: Clock,
    },
}

/// A limit that ran out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Clock {
    /// Nobody phoned home.
    NeverConnected,
    /// No output.
    Idle,
    /// The whole build.
    Total,
}

/// Exit codes of a build that has no code of its own.
const EXIT_LOST: u8 = 121;
const EXIT_TIMED_OUT: u8 = 124;
const EXIT_ERROR: u8 = 125;
const EXIT_CANCELLED: u8 = 130;

/// Everything known at the end of a build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "VerdictFile", into = "VerdictFile")]
pub struct Verdict {
    /// How it ended.
    pub outcome: Outcome,
    /// Why its log is not proven complete; `None` when counts and digests of every step agree with what is stored.
    pub incomplete: Option<String>,
    /// What is stored, and for a complete step proven: in the order of declaration, without steps that never connected.
    pub steps: Vec<StepLog>,
    /// When, microseconds since 1970.
    pub ended: UnixMicros,
}

/// What is stored of a step at the end of its build: of its newest attempt, which is the one that counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "StepFile", into = "StepFile")]
pub struct StepLog {
    /// The step.
    pub step: StepName,
    /// Which life of its agent.
    pub attempt: Attempt,
    /// Whether the agent's own account, told at its end, agrees with what is stored.
    pub complete: bool,
    /// Records, those of events included.
    pub records: u64,
    /// Bytes of standard output and standard error together.
    pub bytes: u64,
    /// BLAKE3 of these bytes in the order in which they were read.
    pub digest: Digest,
    /// How often the agent's connection was cut, or fell silent, and came back before the end. A server that was started
    /// again counts from then on.
    pub cuts: u64,
    /// How its command ended; `None` when that never arrived.
    pub end: Option<End>,
    /// What its command used, where the agent's system tells.
    pub usage: Option<Usage>,
}

/// `verdict.json`.
#[derive(Serialize, Deserialize)]
struct VerdictFile {
    #[serde(flatten)]
    outcome: Outcome,
    complete: bool,
    incomplete: Option<String>,
    steps: Vec<StepLog>,
    #[serde(default)]
    ended: UnixMicros,
}

impl From<Verdict> for VerdictFile {
    fn from(verdict: Verdict) -> Self {
        let complete = verdict.is_complete();
        let Verdict { outcome, incomplete, steps, ended } = verdict;
        Self { outcome, complete, incomplete, steps, ended }
    }
}

impl From<VerdictFile> for Verdict {
    fn from(file: VerdictFile) -> Self {
        let VerdictFile { outcome, complete: _, incomplete, steps, ended } = file;
        Self { outcome, incomplete, steps, ended }
    }
}

impl Verdict {
    /// The exit code that says the same: the build's own, 121 lost, 124 timed out, 125 error, 130 cancelled.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match &self.outcome {
            Outcome::Succeeded => 0,
            Outcome::Failed { end, .. } => end.code(),
            Outcome::Lost { .. } => EXIT_LOST,
            Outcome::TimedOut { .. } => EXIT_TIMED_OUT,
            Outcome::Error { .. } => EXIT_ERROR,
            Outcome::Cancelled { .. } => EXIT_CANCELLED,
        }
    }

    /// Whether the log is proven complete.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.incomplete.is_none()
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cancelled { reason } => write!(f, "cancelled: {reason}"),
            Self::Error { reason } => write!(f, "error: {reason}"),
            Self::Failed { step, end } => write!(f, "failed: step {step}: {}", Told(end)),
            Self::Lost { step } => write!(f, "lost: the agent of step {step} vanished and did not come back"),
            Self::Succeeded => f.write_str("succeeded"),
            Self::TimedOut { clock: Clock::NeverConnected } => f.write_str("timed out: nobody phoned home"),
            Self::TimedOut { clock: Clock::Idle } => f.write_str("timed out: the build wrote nothing for too long"),
            Self::TimedOut { clock: Clock::Total } => f.write_str("timed out: the build took too long"),
        }
    }
}

/// The life of one build.
#[derive(Debug)]
pub(crate) struct Life {
    clocks: Clocks,
    /// In the order of declaration. They are few, and builds are many: a map would take more than it saves.
    steps: Vec<Declared>,
    started: Instant,
    /// Since when no agent is there although one is awaited: the start, or the end of a step.
    waiting: Instant,
    last_output: Instant,
    phase: Phase,
}

/// A step and how it stands.
#[derive(Debug)]
struct Declared {
    name: StepName,
    state: Step,
    cuts: Cuts,
}

#[derive(Debug, Clone)]
enum Step {
    Awaited,
    Connected,
    Away { since: Instant },
    Finished(Box<Done>),
}

/// A step that has ended.
#[derive(Debug, Clone)]
struct Done {
    told: Finished,
    answer: FinishedAck,
    /// Whether its agent has seen that.
    confirmed: bool,
}

/// Connections of the newest attempt that came in place of one before them.
#[derive(Debug, Default)]
struct Cuts {
    attempt: Attempt,
    count: u64,
}

/// What the store holds of a step's newest attempt.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    pub(crate) attempt: Attempt,
    pub(crate) counts: Counts,
    pub(crate) digest: Digest,
}

#[derive(Debug)]
enum Phase {
    Running,
    Ending { outcome: Outcome, deadline: Instant },
    Ended { outcome: Outcome },
}

/// How far a build has got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum BuildPhase {
    /// Nobody has phoned home yet.
    Waiting,
    /// An agent has.
    Running,
    /// Its agents are told to stop.
    Stopping,
    /// It has its verdict.
    Ended,
}

/// How an attempt stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum StepState {
    /// Its agent is not connected.
    Away,
    /// Its agent is connected.
    Connected,
    /// Its end is stored.
    Finished,
    /// A newer attempt has taken over.
    Superseded,
}

/// What a change asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// Tell every agent to stop.
    Cancel(Cancel),
    /// The verdict is known.
    End,
    /// Nothing.
    Nothing,
}

/// How much longer than the grace period agents get to deliver the last output.
const AFTER_GRACE: Duration = Duration::from_secs(10);

impl Life {
    /// A life that began at `started`, and for which nobody was there to wait for before `now`.
    pub(crate) fn new(steps: Vec<StepName>, clocks: Clocks, started: Instant, now: Instant) -> Self {
        let mut declared: Vec<Declared> = Vec::with_capacity(steps.len());
        for name in steps {
            if declared.iter().all(|known| known.name != name) {
                declared.push(Declared { name, state: Step::Awaited, cuts: Cuts::default() });
            }
        }
        Self { clocks, steps: declared, started, waiting: now, last_output: now, phase: Phase::Running }
    }

    fn step(&self, name: &StepName) -> Option<&Declared> {
        self.steps.iter().find(|step| step.name == *name)
    }

    fn state(&self, name: &StepName) -> Option<&Step> {
        self.step(name).map(|step| &step.state)
    }

    fn step_mut(&mut self, name: &StepName) -> Option<&mut Declared> {
        self.steps.iter_mut().find(|step| step.name == *name)
    }

    fn states(&self) -> impl Iterator<Item = &Step> {
        self.steps.iter().map(|step| &step.state)
    }

    pub(crate) fn expects(&self, step: &StepName) -> bool {
        self.step(step).is_some()
    }

    /// Makes it one that has ended. Which ends counted is told next, with [`Self::handle_finished`].
    pub(crate) fn restore(&mut self, verdict: Verdict) {
        for log in verdict.steps {
            if let Some(step) = self.step_mut(&log.step) {
                step.cuts = Cuts { attempt: log.attempt, count: log.cuts };
            }
        }
        self.phase = Phase::Ended { outcome: verdict.outcome };
    }

    pub(crate) fn build_phase(&self) -> BuildPhase {
        match &self.phase {
            Phase::Running if self.was_connected() => BuildPhase::Running,
            Phase::Running => BuildPhase::Waiting,
            Phase::Ending { .. } => BuildPhase::Stopping,
            Phase::Ended { .. } => BuildPhase::Ended,
        }
    }

    pub(crate) fn step_state(&self, step: &StepName) -> StepState {
        match self.state(step) {
            Some(Step::Connected) => StepState::Connected,
            Some(Step::Finished(_)) => StepState::Finished,
            Some(Step::Awaited | Step::Away { .. }) | None => StepState::Away,
        }
    }

    /// How often the connection of the step's newest attempt was cut.
    pub(crate) fn cut_count(&self, step: &StepName) -> u64 {
        self.step(step).map_or(0, |step| step.cuts.count)
    }

    /// Whether nothing has stopped or ended it.
    pub(crate) fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Running)
    }

    /// Whether an agent is connected.
    pub(crate) fn has_agents(&self) -> bool {
        self.states().any(|step| matches!(step, Step::Connected))
    }

    /// How long a vanished agent is waited for.
    pub(crate) fn lost_limit(&self) -> Option<Duration> {
        self.clocks.lost
    }

    /// The steps, as a person would list them.
    pub(crate) fn step_list(&self) -> String {
        self.steps.iter().map(|step| step.name.as_str()).collect::<Vec<_>>().join(", ")
    }

    /// Whether the verdict is known.
    pub(crate) fn has_ended(&self) -> bool {
        matches!(self.phase, Phase::Ended { .. })
    }

    /// Whether a step has its end.
    pub(crate) fn has_finished(&self, step: &StepName) -> bool {
        matches!(self.state(step), Some(Step::Finished(_)))
    }

    /// Whether every step has its end.
    pub(crate) fn has_all_ends(&self) -> bool {
        self.states().all(|step| matches!(step, Step::Finished(_)))
    }

    /// The verdict, once it is known. `stored` tells what the store holds of a step, `ended` is the time of day.
    pub(crate) fn verdict(&self, stored: impl Fn(&StepName) -> Option<Stored>, ended: UnixMicros) -> Option<Verdict> {
        let Phase::Ended { outcome } = &self.phase else { return None };
        let incomplete = self.steps.iter().find_map(Declared::incomplete);
        let steps = self.steps.iter().filter_map(|step| Some(step.log(stored(&step.name)?))).collect();
        Some(Verdict { outcome: outcome.clone(), incomplete, steps, ended })
    }

    /// Whether any agent has ever said hello.
    pub(crate) fn was_connected(&self) -> bool {
        self.states().any(|step| !matches!(step, Step::Awaited))
    }

    /// Whether every step that finished has seen that its end was accepted.
    pub(crate) fn is_confirmed(&self) -> bool {
        self.states().all(|step| !matches!(step, Step::Finished(done) if !done.confirmed))
    }

    pub(crate) fn handle_connected(&mut self, step: &StepName, attempt: Attempt, now: Instant) {
        let Some(step) = self.step_mut(step) else { return };
        step.count_cut(attempt);
        if let Step::Awaited | Step::Away { .. } = step.state {
            step.state = Step::Connected;
            self.last_output = self.last_output.max(now);
        }
    }

    /// An agent of the step had been there before this process was.
    pub(crate) fn handle_found(&mut self, step: &StepName, attempt: Attempt, now: Instant) {
        let Some(step) = self.step_mut(step) else { return };
        step.count_cut(attempt);
        if let Step::Awaited = step.state {
            step.state = Step::Away { since: now };
        }
    }

    pub(crate) fn handle_disconnected(&mut self, step: &StepName, now: Instant) {
        if let Some(Declared { state: state @ Step::Connected, .. }) = self.step_mut(step) {
            *state = Step::Away { since: now };
        }
    }

    pub(crate) fn handle_output(&mut self, now: Instant) {
        self.last_output = now;
    }

    /// An end was stored. After the end of the build it is told in the verdict, of which it changes nothing else.
    pub(crate) fn handle_finished(
        &mut self,
        step: &StepName,
        told: Finished,
        answer: FinishedAck,
        now: Instant,
    ) -> Action {
        let open = self.step_mut(step).map(|step| &mut step.state);
        if let Some(state @ (Step::Awaited | Step::Connected | Step::Away { .. })) = open {
            *state = Step::Finished(Box::new(Done { told, answer, confirmed: false }));
            self.waiting = now;
        }
        self.settle()
    }

    /// The agent has seen that its end was accepted.
    pub(crate) fn handle_confirmed(&mut self, step: &StepName) {
        if let Some(Declared { state: Step::Finished(done), .. }) = self.step_mut(step) {
            done.confirmed = true;
        }
    }

    /// Somebody wants the build to stop. The second wish is not to wait for it.
    pub(crate) fn handle_cancel(&mut self, reason: String, now: Instant) -> Action {
        match &self.phase {
            Phase::Ending { outcome, .. } => self.end(outcome.clone()),
            Phase::Running => self.stop(Outcome::Cancelled { reason }, now),
            Phase::Ended { .. } => Action::Nothing,
        }
    }

    /// phonehome cannot go on with this build.
    pub(crate) fn handle_error(&mut self, reason: String, now: Instant) -> Action {
        match &self.phase {
            Phase::Running => self.stop(Outcome::Error { reason }, now),
            Phase::Ending { .. } | Phase::Ended { .. } => Action::Nothing,
        }
    }

    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Running => self.clocks().into_iter().map(|(at, _)| at).min(),
            Phase::Ending { deadline, .. } => Some(*deadline),
            Phase::Ended { .. } => None,
        }
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant) -> Action {
        match &self.phase {
            Phase::Running => match self.clocks().into_iter().find(|(at, _)| *at <= now) {
                Some((_, outcome)) => self.stop(outcome, now),
                None => Action::Nothing,
            },
            Phase::Ending { outcome, deadline } if *deadline <= now => self.end(outcome.clone()),
            Phase::Ending { .. } | Phase::Ended { .. } => Action::Nothing,
        }
    }

    /// When which clock runs out, as things are.
    fn clocks(&self) -> Vec<(Instant, Outcome)> {
        let connected = self.has_agents();
        let away = |step: &Step| if let Step::Away { since } = step { Some(*since) } else { None };
        let lost = self.steps.iter().filter_map(|step| Some((away(&step.state)? + self.clocks.lost?, &step.name)));
        let mut clocks: Vec<_> = lost.map(|(at, step)| (at, Outcome::Lost { step: step.clone() })).collect();
        let timed_out = |clock| Outcome::TimedOut { clock };
        let awaited = self.states().any(|step| matches!(step, Step::Awaited));
        if awaited && !connected && clocks.is_empty() {
            clocks.extend(self.clocks.connect.map(|limit| (self.waiting + limit, timed_out(Clock::NeverConnected))));
        }
        if connected {
            clocks.extend(self.clocks.idle.map(|limit| (self.last_output + limit, timed_out(Clock::Idle))));
        }
        clocks.extend(self.clocks.total.map(|limit| (self.started + limit, timed_out(Clock::Total))));
        clocks
    }

    /// Ends the build as soon as its agents have stopped.
    fn stop(&mut self, outcome: Outcome, now: Instant) -> Action {
        let cancel = Cancel { reason: outcome.to_string(), grace: self.clocks.grace.as_millis() as u64 };
        self.phase = Phase::Ending { outcome, deadline: now + self.clocks.grace + AFTER_GRACE };
        match self.settle() {
            Action::End => Action::End,
            Action::Nothing | Action::Cancel(_) => Action::Cancel(cancel),
        }
    }

    /// Ends the build if nothing is left to wait for.
    fn settle(&mut self) -> Action {
        match &self.phase {
            Phase::Running if self.has_all_ends() => {
                let outcome = self.judge();
                self.end(outcome)
            }
            Phase::Ending { outcome, .. } if !self.states().any(|step| self.is_stoppable(step)) => {
                self.end(outcome.clone())
            }
            Phase::Running | Phase::Ending { .. } | Phase::Ended { .. } => Action::Nothing,
        }
    }

    /// Whether an agent is there, or may come back in time, to be stopped.
    fn is_stoppable(&self, step: &Step) -> bool {
        match step {
            Step::Connected => true,
            Step::Away { .. } => !matches!(self.phase, Phase::Ending { outcome: Outcome::Lost { .. }, .. }),
            Step::Awaited | Step::Finished(_) => false,
        }
    }

    fn judge(&self) -> Outcome {
        let failed = self.steps.iter().find_map(|step| Some((&step.name, step.done().filter(|done| done.failed())?)));
        failed.map_or(Outcome::Succeeded, |(step, done)| Outcome::Failed {
            step: step.clone(),
            end: done.told.end.clone(),
        })
    }

    fn end(&mut self, outcome: Outcome) -> Action {
        self.phase = Phase::Ended { outcome };
        Action::End
    }
}

impl Declared {
    fn done(&self) -> Option<&Done> {
        match &self.state {
            Step::Finished(done) => Some(done),
            Step::Awaited | Step::Connected | Step::Away { .. } => None,
        }
    }

    /// A connection of an attempt that had one before is what a cut looks like from here, whether the older one is known
    /// to be gone or still half open.
    fn count_cut(&mut self, attempt: Attempt) {
        if attempt > self.cuts.attempt {
            self.cuts = Cuts { attempt, count: 0 };
        } else if attempt == self.cuts.attempt && self.done().is_none() {
            self.cuts.count += 1;
        }
    }

    /// Of a complete log the agent's own account is told, which is what is stored, by definition.
    fn log(&self, stored: Stored) -> StepLog {
        let Stored { attempt, counts, digest } = stored;
        let done = self.done();
        let proven = done.filter(|done| done.answer == FinishedAck::Complete).map(|done| &done.told);
        let (counts, digest) = proven.map_or((counts, digest), |told| (told.counts, told.digest));
        StepLog {
            step: self.name.clone(),
            attempt,
            complete: proven.is_some(),
            records: counts.records(),
            bytes: counts.output_bytes(),
            digest,
            cuts: if self.cuts.attempt == attempt { self.cuts.count } else { 0 },
            end: done.map(|done| done.told.end.clone()),
            usage: done.and_then(|done| done.told.usage),
        }
    }

    /// Why its log is not proven complete, if it is not.
    fn incomplete(&self) -> Option<String> {
        let name = &self.name;
        match &self.state {
            Step::Finished(done) => match &done.answer {
                FinishedAck::Complete => None,
                FinishedAck::Incomplete(reason) => Some(format!("step {name}: {reason}")),
                FinishedAck::Resume(_) => Some(format!("step {name}: its end never arrived")),
            },
            Step::Connected | Step::Away { .. } => Some(format!("step {name}: its end never arrived")),
            Step::Awaited => Some(format!("step {name} never connected")),
        }
    }
}

impl Done {
    fn failed(&self) -> bool {
        self.told.end.code() != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_succeeds_when_its_step_has_finished() {
        let mut build = Build::new(&["main"]);
        build.life.handle_connected(&step("main"), 1, build.now);
        assert_eq!(build.finish("main", 0), Action::End);
        assert_eq!((build.code(), build.verdict().is_complete()), (0, true));
    }

    #[test]
    fn the_first_failed_step_in_declared_order_gives_the_code() {
        let mut build = Build::new(&["build", "test"]);
        assert_eq!(build.finish("test", 7), Action::Nothing);
        assert_eq!(build.finish("build", 3), Action::End);
        assert_eq!(build.code(), 3);
    }

    #[test]
    fn each_clock_has_its_own_verdict() {
        let mut never = Build::new(&["main"]);
        never.pass(300);
        assert_eq!(never.verdict().outcome, Outcome::TimedOut { clock: Clock::NeverConnected });
        assert_eq!(never.code(), 124);

        let mut lost = Build::new(&["main"]);
        lost.life.handle_connected(&step("main"), 1, lost.now);
        lost.life.handle_disconnected(&step("main"), lost.now);
        lost.pass(120);
        assert_eq!((lost.verdict().outcome, lost.code()), (Outcome::Lost { step: step("main") }, 121));
        assert!(!lost.verdict().is_complete());

        let mut total = Build::new(&["main"]);
        total.life.handle_connected(&step("main"), 1, total.now);
        assert!(matches!(total.pass(3600), Action::Cancel(_)));
        assert_eq!(total.finish("main", 143), Action::End);
        assert_eq!(total.verdict().outcome, Outcome::TimedOut { clock: Clock::Total });
        assert!(total.verdict().is_complete(), "its last output arrived all the same");
    }

    #[test]
    fn an_agent_from_before_a_restart_is_waited_for_like_one_that_vanished() {
        let mut build = Build::new(&["main"]);
        build.life.handle_found(&step("main"), 1, build.now);
        assert!(build.life.was_connected());
        assert_eq!(build.pass(119), Action::Nothing);
        assert_eq!(build.pass(1), Action::End);
        assert_eq!(build.verdict().outcome, Outcome::Lost { step: step("main") });
    }

    #[test]
    fn every_connection_that_replaces_one_of_the_same_attempt_is_a_cut() {
        let mut build = Build::new(&["main"]);
        build.connect(1);
        build.life.handle_disconnected(&step("main"), build.now);
        build.connect(1);
        build.connect(1); // the one before was half open, and nobody ever says that it is gone
        build.life.handle_disconnected(&step("main"), build.now);
        build.connect(1);
        build.finish("main", 0);
        build.connect(1); // to hear the answer to its end
        assert_eq!(build.log(1).cuts, 3);
    }

    #[test]
    fn a_cut_that_nobody_came_back_from_was_not_survived() {
        let mut build = Build::new(&["main"]);
        build.connect(1);
        build.life.handle_disconnected(&step("main"), build.now);
        build.pass(120);
        let log = build.log(1);
        assert_eq!((log.cuts, log.complete), (0, false));
        assert_eq!((log.records, log.bytes, log.digest), (2, 20, Digest([2; 32])), "as it is stored");
    }

    #[test]
    fn a_new_attempt_counts_its_own_cuts() {
        let mut build = Build::new(&["main"]);
        build.connect(1);
        build.connect(1);
        build.connect(2);
        build.connect(1); // a hello that was long under way
        build.connect(2);
        build.finish("main", 0);
        let log = build.log(2);
        assert_eq!((log.attempt, log.cuts, log.complete), (2, 1, true));
        assert_eq!((log.records, log.bytes, log.digest), (3, 30, Digest([7; 32])), "as the agent has told");
    }

    #[test]
    fn coming_back_after_a_restart_of_the_server_is_a_cut_survived() {
        let mut build = Build::new(&["main"]);
        build.life.handle_found(&step("main"), 1, build.now);
        build.connect(1);
        build.finish("main", 0);
        assert_eq!(build.log(1).cuts, 1);
    }

    #[test]
    fn a_verdict_on_disk_says_whether_the_log_is_complete() {
        let mut build = Build::new(&["main"]);
        build.connect(1);
        build.finish("main", 3);
        let stored = Stored { attempt: 1, counts: counts(1), digest: Digest([0; 32]) };
        let verdict = build.life.verdict(|_| Some(stored.clone()), 0).unwrap();
        let digest = "07".repeat(32);
        assert_eq!(
            serde_json::to_value(verdict).unwrap(),
            serde_json::json!({
                "verdict": "failed", "step": "main", "end": {"exited": 3}, "complete": true, "incomplete": null, "ended": 0,
                "steps": [{"step": "main", "attempt": 1, "complete": true, "records": 3, "bytes": 30, "digest": digest,
                    "cuts": 0, "exit_code": 3, "signal": null, "core": false, "oom": false, "reason": null, "usage": null}],
            })
        );
    }

    #[test]
    fn the_account_of_a_step_has_its_end_and_what_it_used() {
        let mut build = Build::new(&["main", "other"]);
        let end = End::Signalled { signal: 9, core: false, oom: true };
        let usage = Some(Usage { wall: 4, user: 3, system: 2, max_rss: 1 });
        let finished =
            Finished { next: 3, counts: counts(3), digest: Digest([7; 32]), end: end.clone(), time: 0, usage };
        build.life.handle_finished(&step("main"), finished, FinishedAck::Complete, build.now);
        build.life.handle_cancel("enough".into(), build.now);
        let stored = Stored { attempt: 1, counts: counts(1), digest: Digest([0; 32]) };
        let [main, other] = &build.life.verdict(|_| Some(stored.clone()), 0).unwrap().steps[..] else { panic!() };
        assert_eq!((&main.end, main.usage), (&Some(end), usage));
        assert_eq!((&other.end, other.usage), (&None, None));
    }

    #[test]
    fn idle_counts_from_the_last_output_and_only_while_connected() {
        let clocks = Clocks { idle: Some(Duration::from_secs(60)), ..Clocks::default() };
        let mut build = Build::with(&["main"], clocks);
        build.pass(200);
        build.life.handle_connected(&step("main"), 1, build.now);
        assert_eq!(build.pass(59), Action::Nothing);
        build.life.handle_output(build.now);
        assert_eq!(build.pass(59), Action::Nothing);
        assert!(matches!(build.pass(1), Action::Cancel(_)));
    }

    #[test]
    fn a_cancel_waits_for_the_agent_and_no_longer_than_grace() {
        let mut build = Build::new(&["main"]);
        build.life.handle_connected(&step("main"), 1, build.now);
        assert!(matches!(build.life.handle_cancel("hung up".into(), build.now), Action::Cancel(_)));
        assert_eq!(build.pass(39), Action::Nothing);
        assert_eq!(build.pass(1), Action::End);
        assert_eq!(build.code(), 130);
    }

    #[test]
    fn a_second_cancel_ends_at_once() {
        let mut build = Build::new(&["main"]);
        build.life.handle_connected(&step("main"), 1, build.now);
        build.life.handle_cancel("first".into(), build.now);
        assert_eq!(build.life.handle_cancel("second".into(), build.now), Action::End);
        assert_eq!(build.verdict().outcome, Outcome::Cancelled { reason: "first".into() });
    }

    #[test]
    fn nobody_to_stop_means_no_wait() {
        let mut build = Build::new(&["main"]);
        assert_eq!(build.life.handle_cancel("hung up".into(), build.now), Action::End);
        let mut build = Build::new(&["main"]);
        assert_eq!(build.life.handle_error("launcher".into(), build.now), Action::End);
        assert_eq!(build.code(), 125);
    }

    #[test]
    fn rule_10_the_first_verdict_wins() {
        let mut build = Build::new(&["main"]);
        build.finish("main", 0);
        assert_eq!(build.life.handle_cancel("late".into(), build.now), Action::Nothing);
        assert_eq!(build.finish("main", 9), Action::Nothing);
        assert_eq!(build.code(), 0);
    }

    #[test]
    fn a_later_step_has_its_own_time_to_connect() {
        let mut build = Build::new(&["build", "test"]);
        build.life.handle_connected(&step("build"), 1, build.now);
        assert_eq!(build.pass(1000), Action::Nothing);
        build.finish("build", 0);
        assert_eq!(build.pass(299), Action::Nothing);
        assert_eq!(build.pass(1), Action::End);
        assert_eq!(build.verdict().outcome, Outcome::TimedOut { clock: Clock::NeverConnected });
    }

    struct Build {
        life: Life,
        now: Instant,
    }

    impl Build {
        fn new(steps: &[&str]) -> Self {
            Self::with(steps, Clocks::default())
        }

        fn with(steps: &[&str], clocks: Clocks) -> Self {
            let now = Instant::now();
            Self { life: Life::new(steps.iter().map(|name| step(name)).collect(), clocks, now, now), now }
        }

        fn pass(&mut self, seconds: u64) -> Action {
            self.now += Duration::from_secs(seconds);
            self.life.handle_timeout(self.now)
        }

        fn finish(&mut self, name: &str, code: u8) -> Action {
            let end = End::Exited(code);
            let finished = Finished { next: 3, counts: counts(3), digest: Digest([7; 32]), end, time: 0, usage: None };
            self.life.handle_finished(&step(name), finished, FinishedAck::Complete, self.now)
        }

        fn verdict(&self) -> Verdict {
            self.life.verdict(|_| None, 0).unwrap()
        }

        /// The verdict's account of its first step, of which attempt `attempt` is stored.
        fn log(&self, attempt: Attempt) -> StepLog {
            let stored = Stored { attempt, counts: counts(2), digest: Digest([2; 32]) };
            self.life.verdict(|_| Some(stored.clone()), 0).unwrap().steps.remove(0)
        }

        fn connect(&mut self, attempt: Attempt) {
            self.life.handle_connected(&step("main"), attempt, self.now);
        }

        fn code(&self) -> u8 {
            self.verdict().exit_code()
        }
    }

    /// So many records of ten bytes on standard output.
    fn counts(records: u64) -> Counts {
        let mut counts = Counts::default();
        (counts.stdout.records, counts.stdout.bytes) = (records, 10 * records);
        counts
    }

    fn step(name: &str) -> StepName {
        name.parse().unwrap()
    }
}
