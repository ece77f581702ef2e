//! The life of one build, from the first wait to the verdict.
//!
//! ```text
//! Running --every step finished---------------------------> Ended(succeeded | failed)
//!    |----never connected, or nobody is left to stop------> Ended(timed out | cancelled | lost | error)
//!    '----cancel, total or idle timeout, a step lost--> Ending --agents gone or grace over--> Ended(the same)
//! ```

use std::{collections::BTreeMap, fmt, time::Duration};

use phonehome_proto::{
    frame::{Cancel, End, FinishedAck},
    id::StepName,
};
use serde::Serialize;
use tokio::time::Instant;

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
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// Why its log is not proven complete; `None` when counts and digests of every step agree with what is stored.
    pub incomplete: Option<String>,
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

/// An end in words.
struct Told<'a>(&'a End);

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            End::Exited(code) => write!(f, "exit code {code}"),
            End::NotStarted { code, reason } => write!(f, "{reason} (exit code {code})"),
            End::Signalled { signal, oom: true, .. } => {
                write!(f, "out of memory, killed by signal {signal} (exit code {})", self.0.code())
            }
            End::Signalled { signal, core: true, .. } => {
                write!(f, "killed by signal {signal}, core dumped (exit code {})", self.0.code())
            }
            End::Signalled { signal, .. } => {
                write!(f, "killed by signal {signal} (exit code {})", self.0.code())
            }
        }
    }
}

/// The life of one build.
#[derive(Debug)]
pub(crate) struct Life {
    clocks: Clocks,
    /// In the order of declaration.
    order: Vec<StepName>,
    steps: BTreeMap<StepName, Step>,
    started: Instant,
    /// Since when no agent is there although one is awaited: the start, or the end of a step.
    waiting: Instant,
    last_output: Instant,
    phase: Phase,
}

#[derive(Debug, Clone)]
enum Step {
    Awaited,
    Connected,
    Away { since: Instant },
    Finished { end: End, answer: FinishedAck, confirmed: bool },
}

#[derive(Debug)]
enum Phase {
    Running,
    Ending { outcome: Outcome, deadline: Instant },
    Ended(Verdict),
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
    pub(crate) fn new(steps: Vec<StepName>, clocks: Clocks, now: Instant) -> Self {
        Self {
            clocks,
            steps: steps.iter().map(|step| (step.clone(), Step::Awaited)).collect(),
            order: steps,
            started: now,
            waiting: now,
            last_output: now,
            phase: Phase::Running,
        }
    }

    pub(crate) fn expects(&self, step: &StepName) -> bool {
        self.steps.contains_key(step)
    }

    /// How long a vanished agent is waited for.
    pub(crate) fn lost_limit(&self) -> Option<Duration> {
        self.clocks.lost
    }

    /// The steps, as a person would list them.
    pub(crate) fn step_list(&self) -> String {
        self.order.iter().map(StepName::as_str).collect::<Vec<_>>().join(", ")
    }

    pub(crate) fn verdict(&self) -> Option<&Verdict> {
        match &self.phase {
            Phase::Ended(verdict) => Some(verdict),
            Phase::Running | Phase::Ending { .. } => None,
        }
    }

    /// Whether any agent has ever said hello.
    pub(crate) fn was_connected(&self) -> bool {
        self.steps.values().any(|step| !matches!(step, Step::Awaited))
    }

    /// Whether every step that finished has seen that its end was accepted.
    pub(crate) fn is_confirmed(&self) -> bool {
        self.steps.values().all(|step| !matches!(step, Step::Finished { confirmed: false, .. }))
    }

    pub(crate) fn handle_connected(&mut self, step: &StepName, now: Instant) {
        if let Some(state @ (Step::Awaited | Step::Away { .. })) = self.steps.get_mut(step) {
            *state = Step::Connected;
            self.last_output = self.last_output.max(now);
        }
    }

    /// An agent of the step had been there before this process was.
    pub(crate) fn handle_found(&mut self, step: &StepName, now: Instant) {
        if let Some(state @ Step::Awaited) = self.steps.get_mut(step) {
            *state = Step::Away { since: now };
        }
    }

    pub(crate) fn handle_disconnected(&mut self, step: &StepName, now: Instant) {
        if let Some(state @ Step::Connected) = self.steps.get_mut(step) {
            *state = Step::Away { since: now };
        }
    }

    pub(crate) fn handle_output(&mut self, now: Instant) {
        self.last_output = now;
    }

    /// An end was stored.
    pub(crate) fn handle_finished(&mut self, step: &StepName, end: End, answer: FinishedAck, now: Instant) -> Action {
        if let Some(state @ (Step::Awaited | Step::Connected | Step::Away { .. })) = self.steps.get_mut(step) {
            *state = Step::Finished { end, answer, confirmed: false };
            self.waiting = now;
        }
        self.settle()
    }

    /// The agent has seen that its end was accepted.
    pub(crate) fn handle_confirmed(&mut self, step: &StepName) {
        if let Some(Step::Finished { confirmed, .. }) = self.steps.get_mut(step) {
            *confirmed = true;
        }
    }

    /// Somebody wants the build to stop. The second wish is not to wait for it.
    pub(crate) fn handle_cancel(&mut self, reason: String, now: Instant) -> Action {
        match &self.phase {
            Phase::Ending { outcome, .. } => self.end(outcome.clone()),
            Phase::Running => self.stop(Outcome::Cancelled { reason }, now),
            Phase::Ended(_) => Action::Nothing,
        }
    }

    /// phonehome cannot go on with this build.
    pub(crate) fn handle_error(&mut self, reason: String, now: Instant) -> Action {
        match &self.phase {
            Phase::Running => self.stop(Outcome::Error { reason }, now),
            Phase::Ending { .. } | Phase::Ended(_) => Action::Nothing,
        }
    }

    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Running => self.clocks().into_iter().map(|(at, _)| at).min(),
            Phase::Ending { deadline, .. } => Some(*deadline),
            Phase::Ended(_) => None,
        }
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant) -> Action {
        match &self.phase {
            Phase::Running => match self.clocks().into_iter().find(|(at, _)| *at <= now) {
                Some((_, outcome)) => self.stop(outcome, now),
                None => Action::Nothing,
            },
            Phase::Ending { outcome, deadline } if *deadline <= now => self.end(outcome.clone()),
            Phase::Ending { .. } | Phase::Ended(_) => Action::Nothing,
        }
    }

    /// When which clock runs out, as things are.
    fn clocks(&self) -> Vec<(Instant, Outcome)> {
        let connected = self.steps.values().any(|step| matches!(step, Step::Connected));
        let away = |step: &Step| if let Step::Away { since } = step { Some(*since) } else { None };
        let lost = self.steps.iter().filter_map(|(step, state)| Some((away(state)? + self.clocks.lost?, step)));
        let mut clocks: Vec<_> = lost.map(|(at, step)| (at, Outcome::Lost { step: step.clone() })).collect();
        let timed_out = |clock| Outcome::TimedOut { clock };
        let awaited = self.steps.values().any(|step| matches!(step, Step::Awaited));
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
            Phase::Running if self.steps.values().all(|step| matches!(step, Step::Finished { .. })) => {
                let outcome = self.judge();
                self.end(outcome)
            }
            Phase::Ending { outcome, .. } if !self.steps.values().any(|step| self.is_stoppable(step)) => {
                self.end(outcome.clone())
            }
            Phase::Running | Phase::Ending { .. } | Phase::Ended(_) => Action::Nothing,
        }
    }

    /// Whether an agent is there, or may come back in time, to be stopped.
    fn is_stoppable(&self, step: &Step) -> bool {
        match step {
            Step::Connected => true,
            Step::Away { .. } => !matches!(self.phase, Phase::Ending { outcome: Outcome::Lost { .. }, .. }),
            Step::Awaited | Step::Finished { .. } => false,
        }
    }

    fn judge(&self) -> Outcome {
        let failed = self.order.iter().find_map(|name| match self.steps.get(name)? {
            Step::Finished { end, .. } if end.code() != 0 => Some((name.clone(), end.clone())),
            Step::Finished { .. } | Step::Awaited | Step::Connected | Step::Away { .. } => None,
        });
        failed.map_or(Outcome::Succeeded, |(step, end)| Outcome::Failed { step, end })
    }

    fn end(&mut self, outcome: Outcome) -> Action {
        let incomplete = self.order.iter().find_map(|name| match self.steps.get(name)? {
            Step::Finished { answer: FinishedAck::Complete, .. } => None,
            Step::Finished { answer: FinishedAck::Incomplete(reason), .. } => Some(format!("step {name}: {reason}")),
            Step::Finished { answer: FinishedAck::Resume(_), .. } | Step::Connected | Step::Away { .. } => {
                Some(format!("step {name}: its end never arrived"))
            }
            Step::Awaited => Some(format!("step {name} never connected")),
        });
        self.phase = Phase::Ended(Verdict { outcome, incomplete });
        Action::End
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_succeeds_when_its_step_has_finished() {
        let mut build = Build::new(&["main"]);
        build.life.handle_connected(&step("main"), build.now);
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
        lost.life.handle_connected(&step("main"), lost.now);
        lost.life.handle_disconnected(&step("main"), lost.now);
        lost.pass(120);
        assert_eq!((lost.verdict().outcome.clone(), lost.code()), (Outcome::Lost { step: step("main") }, 121));
        assert!(!lost.verdict().is_complete());

        let mut total = Build::new(&["main"]);
        total.life.handle_connected(&step("main"), total.now);
        assert!(matches!(total.pass(3600), Action::Cancel(_)));
        assert_eq!(total.finish("main", 143), Action::End);
        assert_eq!(total.verdict().outcome, Outcome::TimedOut { clock: Clock::Total });
        assert!(total.verdict().is_complete(), "its last output arrived all the same");
    }

    #[test]
    fn an_agent_from_before_a_restart_is_waited_for_like_one_that_vanished() {
        let mut build = Build::new(&["main"]);
        build.life.handle_found(&step("main"), build.now);
        assert!(build.life.was_connected());
        assert_eq!(build.pass(119), Action::Nothing);
        assert_eq!(build.pass(1), Action::End);
        assert_eq!(build.verdict().outcome, Outcome::Lost { step: step("main") });
    }

    #[test]
    fn idle_counts_from_the_last_output_and_only_while_connected() {
        let clocks = Clocks { idle: Some(Duration::from_secs(60)), ..Clocks::default() };
        let mut build = Build::with(&["main"], clocks);
        build.pass(200);
        build.life.handle_connected(&step("main"), build.now);
        assert_eq!(build.pass(59), Action::Nothing);
        build.life.handle_output(build.now);
        assert_eq!(build.pass(59), Action::Nothing);
        assert!(matches!(build.pass(1), Action::Cancel(_)));
    }

    #[test]
    fn a_cancel_waits_for_the_agent_and_no_longer_than_grace() {
        let mut build = Build::new(&["main"]);
        build.life.handle_connected(&step("main"), build.now);
        assert!(matches!(build.life.handle_cancel("hung up".into(), build.now), Action::Cancel(_)));
        assert_eq!(build.pass(39), Action::Nothing);
        assert_eq!(build.pass(1), Action::End);
        assert_eq!(build.code(), 130);
    }

    #[test]
    fn a_second_cancel_ends_at_once() {
        let mut build = Build::new(&["main"]);
        build.life.handle_connected(&step("main"), build.now);
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
        build.life.handle_connected(&step("build"), build.now);
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
            Self { life: Life::new(steps.iter().map(|name| step(name)).collect(), clocks, now), now }
        }

        fn pass(&mut self, seconds: u64) -> Action {
            self.now += Duration::from_secs(seconds);
            self.life.handle_timeout(self.now)
        }

        fn finish(&mut self, name: &str, code: u8) -> Action {
            self.life.handle_finished(&step(name), End::Exited(code), FinishedAck::Complete, self.now)
        }

        fn verdict(&self) -> &Verdict {
            self.life.verdict().unwrap()
        }

        fn code(&self) -> u8 {
            self.verdict().exit_code()
        }
    }

    fn step(name: &str) -> StepName {
        name.parse().unwrap()
    }
}
