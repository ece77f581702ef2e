//! What is a change, and what its lines say. Input and its time go in, lines come out.
//!
//! | change | action | state | reason |
//! |---|---|---|---|
//! | first hello of an attempt | create | waiting | `Connected` |
//! | the command waits | update | waiting | `Waiting`, and for what |
//! | the command was started, is ready | update | running | `Started`, `Ready` |
//! | something failed on the agent's side | update | error | `Error` |
//! | the command is being ended | update | as it is | `Stopping`, `Cancelled` |
//! | output is missing; processes were left | update | as it is | `Gap`, `TookOver`, `Leftovers` |
//! | the command has ended | update | terminated | `Completed`, `Failed`, `Killed`, `OOMKilled`, `NotStarted` |
//! | the connection was cut; it is back | update | as it is | `Disconnected`, `Reconnected` |
//! | the labels have changed | update | as it is | `LabelsChanged` |
//! | the end of the log was accepted | delete | terminated | as when it ended |
//! | a newer attempt took over | delete | as it is | `Superseded` |
//! | the build ended before | delete | error | `Lost`, `TimedOut`, `Cancelled`, `Error` |
//! | a report from outside | update | of the build | the report's |
//! | the verdict, for the build as a whole | delete | terminated or error | the verdict |

use std::{collections::BTreeMap, sync::Arc};

use phonehome_proto::{
    event::{Event, Terminated},
    frame::{End, UnixMicros},
    id::{Attempt, BuildId, StepName},
    limits::MAX_TEXT,
    signal,
    text::shortened,
};

use super::line::{Action, Exit, Labels, Level, Line, Place, Repeated, State, level};
use crate::{
    builds::{Clock, Outcome, Verdict},
    report::Report,
    stamp::Stamp,
};

/// Something that may be a change.
#[derive(Debug, Clone, Copy)]
pub(super) enum Change<'a> {
    /// An agent has said hello.
    Hello { labels: &'a BTreeMap<String, String> },
    /// It has told something, which is stored.
    Event(&'a Event),
    /// Its connection has ended.
    Disconnected,
    /// The end of its log was accepted.
    Finished { end: &'a End },
}

/// What somebody beside the build has told.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Told<'a> {
    pub(crate) is_warning: bool,
    pub(crate) reason: &'a str,
    pub(crate) message: &'a str,
    /// `Pod/builder-7`.
    pub(crate) object: Option<&'a str>,
    pub(crate) namespace: Option<&'a str>,
    pub(crate) node: Option<&'a str>,
}

/// How a build ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BuildEnd {
    /// In one word: `Succeeded`, `Lost`.
    pub(crate) reason: &'static str,
    /// For people.
    pub(crate) info: String,
    pub(crate) exit_code: u8,
    /// Whether the command itself, or somebody who stopped it, is behind it, and not a failure around it.
    pub(crate) is_own: bool,
}

impl<'a> From<&'a Report> for Told<'a> {
    fn from(report: &'a Report) -> Self {
        Self {
            is_warning: report.r#type == "Warning",
            reason: &report.reason,
            message: &report.message,
            object: report.object.as_deref(),
            namespace: report.namespace.as_deref(),
            node: report.node.as_deref(),
        }
    }
}

impl From<&Verdict> for BuildEnd {
    fn from(verdict: &Verdict) -> Self {
        let (reason, is_own) = match &verdict.outcome {
            Outcome::Cancelled { .. } => ("Cancelled", true),
            Outcome::Error { .. } => ("Error", false),
            Outcome::Failed { .. } => ("Failed", true),
            Outcome::Lost { .. } => ("Lost", false),
            Outcome::Succeeded => ("Succeeded", true),
            Outcome::TimedOut { clock: Clock::NeverConnected } => ("NeverConnected", false),
            Outcome::TimedOut { clock: Clock::Idle | Clock::Total } => ("TimedOut", false),
        };
        let incomplete = verdict.incomplete.as_ref().map(|why| format!("; the log is not complete: {why}"));
        let info = format!("{}{}", verdict.outcome, incomplete.unwrap_or_default());
        Self { reason, info, exit_code: verdict.exit_code(), is_own }
    }
}

/// What was told of all builds that have no verdict.
#[derive(Debug, Default)]
pub(super) struct Machine(BTreeMap<BuildId, Build>);

#[derive(Debug, Default)]
struct Build {
    steps: BTreeMap<StepName, Step>,
    reports: Facet,
}

/// The newest attempt of a step.
#[derive(Debug)]
struct Step {
    attempt: Attempt,
    place: Place,
    labels: Labels,
    state: State,
    exit: Exit,
    life: Facet,
    link: Facet,
    /// Whether its last line is told.
    is_deleted: bool,
}

/// One sequence of changes: what was told last, and how often each reason was there. The command's life and its
/// connection are two of them, so that a connection that comes back does not make everything new.
#[derive(Debug, Default)]
struct Facet {
    last: Option<(State, String, String)>,
    seen: BTreeMap<String, Seen>,
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    count: u64,
    /// How often it was when it was told.
    told: u64,
    first: UnixMicros,
    last: UnixMicros,
}

/// Reasons that are counted in one facet. Agents have fewer; reports may have any.
const MAX_REASONS: usize = 64;

impl Machine {
    /// Takes in something about a step.
    pub(super) fn handle(
        &mut self,
        build: &BuildId,
        step: &StepName,
        attempt: Attempt,
        time: UnixMicros,
        change: Change<'_>,
    ) -> Vec<Line> {
        let names = Names { build, step: Some(step) };
        if let Change::Hello { labels } = change {
            return self.0.entry(build.clone()).or_default().handle_hello(names, attempt, time, labels);
        }
        let known = self.0.get_mut(build).and_then(|known| known.steps.get_mut(step));
        let Some(known) = known.filter(|known| known.attempt == attempt && !known.is_deleted) else {
            return Vec::new(); // late news of an attempt, or a build, that is told to its end
        };
        match change {
            Change::Hello { .. } => Vec::new(),
            Change::Event(event) => known.handle_event(names, time, event),
            Change::Disconnected => known.tell_link(names, time, "Disconnected"),
            Change::Finished { end } => known.handle_finished(names, time, end),
        }
    }

    /// Takes in what somebody else tells of a build.
    pub(super) fn handle_report(
        &mut self,
        build: &BuildId,
        labels: &BTreeMap<String, String>,
        time: UnixMicros,
        told: &Told<'_>,
    ) -> Vec<Line> {
        let known = self.0.entry(build.clone()).or_default();
        let state = if known.steps.is_empty() { State::Waiting } else { State::Running };
        let own = |text: Option<&str>| text.map(str::to_owned);
        let pod = told.object.and_then(|object| object.strip_prefix("Pod/"));
        let place = Place { pod: own(pod), namespace: own(told.namespace), node: own(told.node), ..Place::default() };
        let draft = Draft::new(Action::Update, state, told.reason, told.message);
        let names = Names { build, step: None };
        let labels = Arc::new(labels.clone());
        let mut lines = known.reports.tell(time, draft, |draft, time, repeated| {
            names.line(draft, time, repeated, None, &place, &labels, &Exit::default())
        });
        if told.is_warning {
            lines.iter_mut().for_each(|line| line.level = line.level.max(Level::Warning));
        }
        lines
    }

    /// Takes in the end of a build, of which nothing is known after it.
    pub(super) fn handle_verdict(
        &mut self,
        build: &BuildId,
        labels: &BTreeMap<String, String>,
        time: UnixMicros,
        end: &BuildEnd,
    ) -> Vec<Line> {
        let mut known = self.0.remove(build).unwrap_or_default();
        let mut lines = Vec::new();
        for (step, known) in &mut known.steps {
            if !known.is_deleted {
                let state = if known.state == State::Terminated { State::Terminated } else { State::Error };
                lines.extend(known.delete(Names { build, step: Some(step) }, time, state, end.reason, &end.info));
            }
        }
        let state = if end.is_own { State::Terminated } else { State::Error };
        let draft = Draft::new(Action::Delete, state, end.reason, &end.info);
        let exit = Exit { exit_code: Some(end.exit_code), ..Exit::default() };
        let (place, labels) = (Place::of(labels), Arc::new(labels.clone()));
        let names = Names { build, step: None };
        lines.extend(known.reports.tell(time, draft, |draft, time, repeated| {
            let exit = if draft.action == Action::Delete { exit.clone() } else { Exit::default() };
            names.line(draft, time, repeated, None, &place, &labels, &exit)
        }));
        lines
    }
}

impl Build {
    fn handle_hello(
        &mut self,
        names: Names<'_>,
        attempt: Attempt,
        time: UnixMicros,
        labels: &BTreeMap<String, String>,
    ) -> Vec<Line> {
        let Some(step) = names.step else { return Vec::new() };
        let mut lines = Vec::new();
        match self.steps.get_mut(step) {
            Some(known) if known.attempt > attempt => return lines,
            Some(known) if known.attempt == attempt => {
                if !known.is_deleted {
                    lines = known.tell_link(names, time, "Reconnected");
                    lines.extend(known.relabel(names, time, labels));
                }
                return lines;
            }
            Some(known) if !known.is_deleted => {
                let info = format!("attempt {attempt} has taken over");
                lines = known.delete(names, time, known.state, "Superseded", &info);
            }
            Some(_) | None => {}
        }
        let mut new = Step::new(attempt, labels);
        lines.extend(new.tell(names, time, Action::Create, "Connected", "the agent has phoned home"));
        new.link.last = Some((State::Waiting, "Reconnected".into(), String::new())); // it is connected
        self.steps.insert(step.clone(), new);
        lines
    }
}

impl Step {
    fn new(attempt: Attempt, labels: &BTreeMap<String, String>) -> Self {
        Self {
            attempt,
            place: Place::of(labels),
            labels: Arc::new(labels.clone()),
            state: State::Waiting,
            exit: Exit::default(),
            life: Facet::default(),
            link: Facet::default(),
            is_deleted: false,
        }
    }

    fn handle_event(&mut self, names: Names<'_>, time: UnixMicros, event: &Event) -> Vec<Line> {
        let (state, reason, info) = match event {
            Event::Waiting(waiting) => (State::Waiting, "Waiting", waiting.r#for.join(", ")),
            Event::Born(born) => (State::Running, "Started", format!("{}, pid {}", born.program, born.pid)),
            Event::Ready(ready) => (State::Running, "Ready", ready.by.clone()),
            Event::Error(fault) => (State::Error, "Error", fault.reason.clone()),
            Event::Stopping(stopping) => (self.state, "Stopping", format!("{}: {}", stopping.signal, stopping.reason)),
            Event::Cancelled(cancelled) => (self.state, "Cancelled", cancelled.reason.clone()),
            Event::Gap(gap) => {
                let info = format!("{} bytes of {} are missing: {}", gap.bytes, gap.stream.name(), gap.cause);
                (self.state, "Gap", info)
            }
            Event::TookOver(took_over) => {
                let end = if took_over.finished { "with" } else { "without" };
                let info = format!("{} records of an agent that died, {end} its end", took_over.records);
                (self.state, "TookOver", info)
            }
            Event::Leftovers(leftovers) => {
                let info = format!("{} processes outlived the command: {}", leftovers.total, leftovers.policy);
                (self.state, "Leftovers", info)
            }
            Event::Terminated(terminated) => {
                self.exit = exit(terminated);
                (
                    State::Terminated,
                    why(&self.exit, terminated.reason.as_deref()),
                    told(&self.exit, terminated.reason.as_deref()),
                )
            }
            Event::Labels(labels) => return self.relabel(names, time, &labels.labels),
            Event::Redaction(_) => return Vec::new(), // an account, and no change
        };
        self.state = state;
        self.tell(names, time, Action::Update, reason, &info)
    }

    fn handle_finished(&mut self, names: Names<'_>, time: UnixMicros, end: &End) -> Vec<Line> {
        let duration_ms = self.exit.duration_ms;
        let (exit, reason) = match end {
            End::Exited(code) => (Exit { exit_code: Some(*code), ..Exit::default() }, None),
            End::NotStarted { code, reason } => {
                (Exit { exit_code: Some(*code), ..Exit::default() }, Some(reason.as_str()))
            }
            End::Signalled { signal, oom, .. } => {
                let name = Some(signal::name(*signal).into_owned());
                (Exit { exit_code: Some(end.code()), signal: name, oom: *oom, duration_ms: None }, None)
            }
        };
        let (word, info) = (why(&exit, reason), told(&exit, reason));
        self.exit = Exit { duration_ms, ..exit };
        self.delete(names, time, State::Terminated, word, &info)
    }

    fn relabel(&mut self, names: Names<'_>, time: UnixMicros, labels: &BTreeMap<String, String>) -> Vec<Line> {
        if *self.labels == *labels {
            return Vec::new();
        }
        (self.place, self.labels) = (Place::of(labels), Arc::new(labels.clone()));
        let mut facet = Facet::default(); // what they were is not kept: each change is one
        facet.tell(time, self.draft(Action::Update, "LabelsChanged", ""), self.liner(names))
    }

    fn tell_link(&mut self, names: Names<'_>, time: UnixMicros, reason: &str) -> Vec<Line> {
        let draft = self.draft(Action::Update, reason, "");
        let mut link = std::mem::take(&mut self.link);
        // Whether it is there is what counts, not in which state it finds the command.
        if let Some(last) = &mut link.last {
            last.0 = draft.state;
        }
        let lines = link.tell(time, draft, self.liner(names));
        self.link = link;
        lines
    }

    fn tell(&mut self, names: Names<'_>, time: UnixMicros, action: Action, reason: &str, info: &str) -> Vec<Line> {
        let draft = self.draft(action, reason, info);
        let mut life = std::mem::take(&mut self.life);
        let lines = life.tell(time, draft, self.liner(names));
        self.life = life;
        lines
    }

    fn delete(&mut self, names: Names<'_>, time: UnixMicros, state: State, reason: &str, info: &str) -> Vec<Line> {
        self.is_deleted = true;
        self.state = state;
        self.tell(names, time, Action::Delete, reason, info)
    }

    fn draft(&self, action: Action, reason: &str, info: &str) -> Draft {
        Draft::new(action, self.state, reason, info)
    }

    /// Makes lines of this step.
    fn liner<'a>(&'a self, names: Names<'a>) -> impl Fn(Draft, UnixMicros, Option<Repeated>) -> Line + 'a {
        move |draft, time, repeated| {
            let exit = if draft.state == State::Terminated { self.exit.clone() } else { Exit::default() };
            names.line(draft, time, repeated, Some(self.attempt), &self.place, &self.labels, &exit)
        }
    }
}

impl Facet {
    /// A line, unless the same was told last; and before it one about what was swallowed since.
    fn tell(
        &mut self,
        time: UnixMicros,
        draft: Draft,
        line: impl Fn(Draft, UnixMicros, Option<Repeated>) -> Line,
    ) -> Vec<Line> {
        let now = (draft.state, draft.reason.clone(), draft.info.clone());
        let is_same = draft.action == Action::Update && self.last.as_ref() == Some(&now);
        let mut lines = Vec::new();
        if !is_same
            && let Some((state, reason, info)) = self.last.take()
            && let Some(seen) = self.seen.get_mut(&reason).filter(|seen| seen.count > seen.told)
        {
            seen.told = seen.count;
            let (last, repeated) = (seen.last, seen.repeated());
            lines.push(line(Draft { action: Action::Update, state, reason, info }, last, repeated));
        }
        if draft.action == Action::Delete {
            lines.push(line(draft, time, None)); // once, and whatever was before
            return lines;
        }
        if !self.seen.contains_key(&draft.reason) && self.seen.len() >= MAX_REASONS {
            self.seen.pop_first(); // whoever has that many different reasons repeats none
        }
        let seen = self.seen.entry(draft.reason.clone()).or_insert(Seen { count: 0, told: 0, first: time, last: time });
        (seen.count, seen.last) = (seen.count + 1, time);
        if !is_same {
            seen.told = seen.count;
            let repeated = seen.repeated();
            lines.push(line(draft, time, repeated));
        }
        self.last = Some(now);
        lines
    }
}

impl Seen {
    fn repeated(&self) -> Option<Repeated> {
        let (first_time, last_time) = (Stamp(self.first), Stamp(self.last));
        (self.count > 1).then_some(Repeated { count: self.count, first_time, last_time })
    }
}

/// What a line says of its own.
#[derive(Debug)]
struct Draft {
    action: Action,
    state: State,
    reason: String,
    info: String,
}

impl Draft {
    /// Texts are cut to what an agent's own may have.
    fn new(action: Action, state: State, reason: &str, info: &str) -> Self {
        let fit = |text| shortened(text, MAX_TEXT).into_owned();
        Self { action, state, reason: fit(reason), info: fit(info) }
    }
}

/// What a line is about.
#[derive(Debug, Clone, Copy)]
struct Names<'a> {
    build: &'a BuildId,
    step: Option<&'a StepName>,
}

impl Names<'_> {
    #[expect(clippy::too_many_arguments, reason = "they are the members of a line")]
    fn line(
        self,
        draft: Draft,
        time: UnixMicros,
        repeated: Option<Repeated>,
        attempt: Option<Attempt>,
        place: &Place,
        labels: &Labels,
        exit: &Exit,
    ) -> Line {
        let Draft { action, state, reason, info } = draft;
        Line {
            time: Stamp(time),
            level: level(state, exit.exit_code),
            place: place.clone(),
            build: self.build.clone(),
            step: self.step.cloned(),
            attempt,
            action,
            state,
            reason,
            info,
            exit: exit.clone(),
            repeated,
            labels: labels.clone(),
        }
    }
}

fn exit(terminated: &Terminated) -> Exit {
    Exit {
        exit_code: Some(terminated.code),
        signal: terminated.signal.clone(),
        oom: terminated.oom,
        duration_ms: Some(terminated.duration_ms),
    }
}

/// An end in one word.
fn why(exit: &Exit, reason: Option<&str>) -> &'static str {
    match exit {
        Exit { oom: true, .. } => "OOMKilled",
        Exit { signal: Some(_), .. } => "Killed",
        Exit { exit_code: Some(0), .. } => "Completed",
        Exit { exit_code: Some(126 | 127), .. } if reason.is_some() => "NotStarted",
        _ => "Failed",
    }
}

/// An end in some more.
fn told(exit: &Exit, reason: Option<&str>) -> String {
    let code = exit.exit_code.unwrap_or_default();
    let signal = exit.signal.as_ref().map(|signal| format!("killed by {signal}, ")).unwrap_or_default();
    let oom = if exit.oom { "out of memory, " } else { "" };
    let reason = reason.map(|reason| format!(": {reason}")).unwrap_or_default();
    format!("{signal}{oom}exit code {code}{reason}")
}

#[cfg(test)]
mod tests {
    use phonehome_proto::{
        event::{Born, Cancelled, Fault, Gap, Leftovers, Ready, Redaction, Stopping, TookOver, Waiting},
        frame::Stream,
    };

    use super::*;

    #[test]
    fn a_life_is_told_from_its_hello_to_its_end() {
        let mut scene = Scene::default();
        scene.hello(1);
        scene.event(&waiting("db to be born"));
        scene.event(&born());
        scene.event(&Event::Ready(Ready { by: "tcp:80".into() }));
        scene.event(&terminated(0));
        scene.finish(&End::Exited(0));
        scene.expect(&[
            "warning create waiting Connected the agent has phoned home",
            "warning update waiting Waiting db to be born",
            "info update running Started make, pid 7",
            "info update running Ready tcp:80",
            "info update terminated Completed exit code 0",
            "info delete terminated Completed exit code 0",
        ]);
        scene.verdict(&succeeded());
        scene.expect(&["info delete terminated Succeeded succeeded"]);
        assert!(scene.machine.0.is_empty());
    }

    #[test]
    fn what_is_told_of_a_step_after_the_end_of_its_build_is_no_line_and_leaves_nothing() {
        let mut scene = Scene::connected();
        scene.verdict(&succeeded());
        scene.lines.clear();
        scene.change(1, Change::Disconnected);
        scene.event(&born());
        scene.finish(&End::Exited(0));
        scene.expect(&[]);
        assert!(scene.machine.0.is_empty());
    }

    #[test]
    fn a_bad_end_is_an_error_with_code_signal_and_time() {
        let mut scene = Scene::connected();
        let killed = Terminated {
            code: 137,
            signal: Some("SIGKILL".into()),
            oom: true,
            duration_ms: 5,
            ..Terminated::default()
        };
        scene.event(&Event::Terminated(killed));
        let line = scene.lines[0].clone();
        let expected = Exit { exit_code: Some(137), signal: Some("SIGKILL".into()), oom: true, duration_ms: Some(5) };
        assert_eq!((line.level, line.exit), (Level::Error, expected.clone()));
        scene.lines.clear();
        scene.finish(&End::Signalled { signal: 9, core: false, oom: true });
        assert_eq!(scene.lines[0].exit, expected, "with the time it took");
        scene.expect(&["error delete terminated OOMKilled killed by SIGKILL, out of memory, exit code 137"]);
    }

    #[test]
    fn what_never_ran_and_what_failed_are_told() {
        let mut scene = Scene::connected();
        scene.event(&Event::Error(Fault { reason: "the probe failed".into(), trace: vec![] }));
        scene.finish(&End::NotStarted { code: 127, reason: "make: no such file".into() });
        scene.expect(&[
            "error update error Error the probe failed",
            "error delete terminated NotStarted exit code 127: make: no such file",
        ]);
    }

    #[test]
    fn other_events_leave_the_state_as_it_is() {
        let mut scene = Scene::connected();
        scene.event(&born());
        scene.lines.clear();
        let (reason, signal) = ("main has died".to_owned(), "SIGTERM".to_owned());
        scene.event(&Event::Stopping(Stopping { reason, signal, grace_ms: 1 }));
        scene.event(&Event::Cancelled(Cancelled { reason: "enough".into() }));
        scene.event(&Event::Gap(Gap { stream: Stream::Stdout, bytes: 7, cause: "spool-full".into() }));
        scene.event(&Event::TookOver(TookOver { records: 3, finished: false }));
        scene.event(&Event::Leftovers(Leftovers { policy: "leave".into(), processes: vec![], total: 2 }));
        scene.event(&Event::Redaction(Redaction { values: 1, replaced: 1 }));
        scene.expect(&[
            "info update running Stopping SIGTERM: main has died",
            "info update running Cancelled enough",
            "info update running Gap 7 bytes of stdout are missing: spool-full",
            "info update running TookOver 3 records of an agent that died, without its end",
            "info update running Leftovers 2 processes outlived the command: leave",
        ]);
    }

    #[test]
    fn nothing_is_repeated_without_a_change_and_repeats_are_counted() {
        let mut scene = Scene::connected();
        for _ in 0..5 {
            scene.event(&waiting("db"));
        }
        scene.expect(&["warning update waiting Waiting db"]);
        scene.event(&born());
        scene.expect(&["warning update waiting Waiting db x5 2-6", "info update running Started make, pid 7"]);
        scene.event(&waiting("db"));
        scene.expect(&["warning update waiting Waiting db x6 2-8"]);
    }

    #[test]
    fn a_connection_that_comes_back_makes_nothing_else_new() {
        let mut scene = Scene::connected();
        scene.event(&waiting("db"));
        scene.lines.clear();
        for _ in 0..2 {
            scene.change(1, Change::Disconnected);
            scene.hello(1);
            scene.event(&waiting("db"));
        }
        scene.hello(1);
        scene.expect(&[
            "warning update waiting Disconnected ",
            "warning update waiting Reconnected ",
            "warning update waiting Disconnected  x2 3-6",
            "warning update waiting Reconnected  x2 4-7",
        ]);
    }

    #[test]
    fn a_newer_attempt_ends_the_older_one_which_is_heard_no_more() {
        let mut scene = Scene::connected();
        scene.hello(2);
        scene.change(1, Change::Event(&born()));
        scene.change(1, Change::Disconnected);
        scene.hello(1);
        scene.expect(&[
            "warning delete waiting Superseded attempt 2 has taken over",
            "warning create waiting Connected the agent has phoned home",
        ]);
    }

    #[test]
    fn after_the_end_nothing_is_told() {
        let mut scene = Scene::connected();
        scene.finish(&End::Exited(0));
        scene.lines.clear();
        scene.change(1, Change::Disconnected);
        scene.hello(1);
        scene.finish(&End::Exited(0));
        scene.expect(&[]);
    }

    #[test]
    fn a_lost_step_is_deleted_with_its_build() {
        let mut scene = Scene::connected();
        scene.event(&born());
        scene.lines.clear();
        let lost = BuildEnd { reason: "Lost", info: "gone".into(), exit_code: 121, is_own: false };
        scene.verdict(&lost);
        scene.expect(&["error delete error Lost gone", "error delete error Lost gone"]);
        assert_eq!((scene.told[0].step.is_some(), scene.told[1].step.is_some()), (true, false));
    }

    #[test]
    fn a_build_that_nobody_joined_is_told_by_its_reports_and_its_verdict() {
        let mut scene = Scene::default();
        for _ in 0..3 {
            scene.report("ErrImagePull", true);
        }
        let end = BuildEnd { reason: "NeverConnected", info: "nobody".into(), exit_code: 124, is_own: false };
        scene.verdict(&end);
        scene.expect(&[
            "warning update waiting ErrImagePull message",
            "warning update waiting ErrImagePull message x3 1-3",
            "error delete error NeverConnected nobody",
        ]);
        assert_eq!(scene.told[0].place.pod.as_deref(), Some("builder-7"));
    }

    #[test]
    fn a_warning_from_outside_is_one_while_the_build_runs() {
        let mut scene = Scene::connected();
        scene.report("Evicted", true);
        scene.report("Pulled", false);
        scene.expect(&["warning update running Evicted message", "info update running Pulled message"]);
    }

    #[test]
    fn labels_say_where_it_is_and_may_change() {
        let first = [("k8s.pod.name", "p-1"), ("k8s.namespace.name", "ci"), ("node", "n"), ("app", "x")];
        let mut scene = Scene { labels: labels(&first), ..Scene::default() };
        scene.hello(1);
        let place = scene.lines[0].place.clone();
        assert_eq!(
            (place.pod.as_deref(), place.namespace.as_deref(), place.node.as_deref()),
            (Some("p-1"), Some("ci"), Some("n"))
        );
        scene.lines.clear();
        let changed = labels(&[("k8s.pod.name", "p-2")]);
        for _ in 0..2 {
            scene.event(&Event::Labels(phonehome_proto::event::Labels { labels: changed.clone() }));
        }
        assert_eq!(*scene.lines[0].labels, changed);
        scene.expect(&["warning update waiting LabelsChanged "]);
    }

    #[test]
    fn texts_and_reasons_have_limits() {
        let mut scene = Scene::connected();
        for number in 0..1000 {
            scene.report(&format!("reason-{number}-{}", "x".repeat(5000)), false);
        }
        assert!(scene.lines.iter().all(|line| line.reason.len() <= MAX_TEXT));
        let known = &scene.machine.0[&"b".parse::<BuildId>().unwrap()];
        assert!(known.reports.seen.len() <= MAX_REASONS);
    }

    /// One step; each input comes a microsecond after the one before it.
    #[derive(Default)]
    struct Scene {
        machine: Machine,
        now: UnixMicros,
        labels: BTreeMap<String, String>,
        lines: Vec<Line>,
        told: Vec<Line>,
    }

    impl Scene {
        fn connected() -> Self {
            let mut scene = Self::default();
            scene.hello(1);
            scene.lines.clear();
            scene
        }

        fn change(&mut self, attempt: Attempt, change: Change<'_>) {
            self.now += 1;
            let (build, step) = ("b".parse().unwrap(), StepName::default());
            self.lines.extend(self.machine.handle(&build, &step, attempt, self.now, change));
        }

        fn hello(&mut self, attempt: Attempt) {
            let labels = self.labels.clone();
            self.change(attempt, Change::Hello { labels: &labels });
        }

        fn event(&mut self, event: &Event) {
            self.change(1, Change::Event(event));
        }

        fn finish(&mut self, end: &End) {
            self.change(1, Change::Finished { end });
        }

        fn report(&mut self, reason: &str, is_warning: bool) {
            self.now += 1;
            let (message, object) = ("message", Some("Pod/builder-7"));
            let told = Told { is_warning, reason, message, object, namespace: None, node: None };
            self.lines.extend(self.machine.handle_report(&"b".parse().unwrap(), &self.labels, self.now, &told));
        }

        fn verdict(&mut self, end: &BuildEnd) {
            self.now += 1;
            self.lines.extend(self.machine.handle_verdict(&"b".parse().unwrap(), &self.labels, self.now, end));
        }

        /// Compares with `LEVEL ACTION STATE REASON INFO[ xCOUNT FIRST-LAST]`, and forgets them.
        fn expect(&mut self, expected: &[&str]) {
            let word = |value: serde_json::Value| value.as_str().unwrap().to_owned();
            let found: Vec<_> = self
                .lines
                .iter()
                .map(|line| {
                    let words = [
                        serde_json::to_value(line.level),
                        serde_json::to_value(line.action),
                        serde_json::to_value(line.state),
                    ];
                    let words = words.map(|value| word(value.unwrap())).join(" ");
                    let repeated = line.repeated.map(|Repeated { count, first_time, last_time }| {
                        format!(" x{count} {}-{}", first_time.0, last_time.0)
                    });
                    format!("{words} {} {}{}", line.reason, line.info, repeated.unwrap_or_default())
                })
                .collect();
            assert_eq!(found, expected);
            self.told = std::mem::take(&mut self.lines);
        }
    }

    fn waiting(what: &str) -> Event {
        Event::Waiting(Waiting { r#for: vec![what.into()] })
    }

    fn born() -> Event {
        Event::Born(Born { program: "make".into(), pid: 7 })
    }

    fn terminated(code: u8) -> Event {
        Event::Terminated(Terminated { code, duration_ms: 5, ..Terminated::default() })
    }

    fn succeeded() -> BuildEnd {
        BuildEnd { reason: "Succeeded", info: "succeeded".into(), exit_code: 0, is_own: true }
    }

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }
}
