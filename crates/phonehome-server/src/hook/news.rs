//! What a pusher is told of an agent's events. Output and verdict say most of it; told is what else makes a person wait
//! or wonder: output that is missing, a wait for somebody else, a fault, an end that somebody made, and processes that
//! stayed behind.

use std::collections::BTreeMap;

use phonehome_proto::{
    event::{Event, Fault, Gap, Leftovers, Stopping, TookOver, Waiting},
    frame::Stream,
    id::{Attempt, StepName},
};

use crate::words::OneLine;

/// What was told of each step's newest attempt.
#[derive(Debug, Default)]
pub(super) struct News(BTreeMap<StepName, Heard>);

#[derive(Debug, Default)]
struct Heard {
    attempt: Attempt,
    /// What it waits for was told, which is told once: an agent says it again whenever something of it has come.
    waits: bool,
    /// It was cancelled, so that its command is stopped is no news. The last line has the reason.
    is_cancelled: bool,
}

/// Things and processes that are named; the rest is counted.
const MOST_NAMED: usize = 5;

impl News {
    /// The line for an event, if it is worth one.
    pub(super) fn line(&mut self, step: &StepName, attempt: Attempt, event: &Event) -> Option<String> {
        let heard = self.heard(step, attempt);
        match event {
            Event::Gap(Gap { stream, bytes, cause }) => {
                Some(format!("{bytes} bytes of {} of step {step} are missing here: {}", name(*stream), OneLine(cause)))
            }
            Event::TookOver(TookOver { finished: false, .. }) => {
                Some(format!("step {step}: the attempt before it was cut off, its last output may be missing"))
            }
            Event::Waiting(Waiting { r#for }) if !r#for.is_empty() => {
                let is_first = !std::mem::replace(&mut heard.waits, true);
                is_first.then(|| format!("step {step} waits for {}", list(r#for, r#for.len() as u64)))
            }
            Event::Error(Fault { reason, .. }) => Some(format!("step {step}: {}", OneLine(reason))),
            Event::Cancelled(_) => {
                heard.is_cancelled = true;
                None
            }
            Event::Stopping(Stopping { reason, .. }) if !heard.is_cancelled => {
                Some(format!("step {step} is being stopped: {}", OneLine(reason)))
            }
            Event::Leftovers(leftovers) => tell_leftovers(step, leftovers),
            // Facts for those who read the log later; the output and the verdict say what a pusher has to know.
            Event::TookOver(_)
            | Event::Waiting(_)
            | Event::Born(_)
            | Event::Ready(_)
            | Event::Stopping(_)
            | Event::Terminated(_)
            | Event::Redaction(_)
            | Event::Labels(_) => None,
        }
    }

    fn heard(&mut self, step: &StepName, attempt: Attempt) -> &mut Heard {
        let heard = self.0.entry(step.clone()).or_default();
        if heard.attempt != attempt {
            *heard = Heard { attempt, ..Heard::default() };
        }
        heard
    }
}

fn name(stream: Stream) -> &'static str {
    match stream {
        Stream::Stdout => "stdout",
        Stream::Stderr => "stderr",
        Stream::Event => "events",
    }
}

fn tell_leftovers(step: &StepName, Leftovers { policy, processes, total }: &Leftovers) -> Option<String> {
    let fate = match &**policy {
        "wait" => "waited for",
        "terminate" => "terminated",
        "leave" => "left alone",
        other => return Some(format!("step {step}: {total} processes outlived its command: {}", OneLine(other))),
    };
    let names: Vec<_> = processes.iter().map(|process| process.name.clone()).collect();
    let named = if names.is_empty() { String::new() } else { format!(": {}", list(&names, *total)) };
    let (processes, are) = if *total == 1 { ("process", "is") } else { ("processes", "are") };
    (*total > 0).then(|| format!("step {step}: {total} {processes} outlived its command and {are} {fate}{named}"))
}

/// The first of them by name, and how many more there are.
fn list(names: &[String], total: u64) -> String {
    let named: Vec<_> = names.iter().take(MOST_NAMED).map(|name| OneLine(name).to_string()).collect();
    match total.saturating_sub(named.len() as u64) {
        0 => named.join(", "),
        more => format!("{} and {more} more", named.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use phonehome_proto::event::{Born, Cancelled, Labels, Process, Ready, Redaction, Terminated};

    use super::*;

    #[test]
    fn a_wait_is_told_once_in_each_attempt() {
        let mut news = Told::default();
        let waiting =
            |names: &[&str]| Event::Waiting(Waiting { r#for: names.iter().map(|&name| name.into()).collect() });
        assert_eq!(news.line(1, &waiting(&[])), None);
        let both = waiting(&["the server", "db to be born"]);
        assert_eq!(news.line(1, &both).unwrap(), "step main waits for the server, db to be born");
        assert_eq!(news.line(1, &waiting(&["db to be born"])), None);
        assert!(news.line(2, &both).is_some());
    }

    #[test]
    fn whoever_ends_a_command_is_named_unless_the_build_was_cancelled() {
        let mut news = Told::default();
        let stopping =
            Event::Stopping(Stopping { reason: "main has died".into(), signal: "SIGTERM".into(), grace_ms: 1 });
        assert_eq!(news.line(1, &stopping).unwrap(), "step main is being stopped: main has died");
        assert_eq!(news.line(1, &Event::Cancelled(Cancelled { reason: "hung up".into() })), None);
        assert_eq!(news.line(1, &stopping), None);
        assert!(news.line(2, &stopping).is_some());
    }

    #[test]
    fn processes_that_stay_behind_are_told_by_name_and_number() {
        let process = |name: &str| Process { pid: 7, name: name.into(), holds: vec![] };
        for (policy, names, total, expected) in [
            ("wait", &["sleep"][..], 1, "step main: 1 process outlived its command and is waited for: sleep"),
            (
                "terminate",
                &["a", "b", "c", "d", "e", "f"],
                20,
                "step main: 20 processes outlived its command and are terminated: a, b, c, d, e and 15 more",
            ),
            ("leave", &[], 2, "step main: 2 processes outlived its command and are left alone"),
            ("bury\n", &[], 2, "step main: 2 processes outlived its command: bury"),
        ] {
            let processes = names.iter().map(|name| process(name)).collect();
            let event = Event::Leftovers(Leftovers { policy: policy.into(), processes, total });
            assert_eq!(Told::default().line(1, &event).as_deref(), Some(expected));
        }
        let none = Event::Leftovers(Leftovers { policy: "wait".into(), processes: vec![], total: 0 });
        assert_eq!(Told::default().line(1, &none), None);
    }

    #[test]
    fn what_is_missing_and_what_fails_is_told_whatever_it_says() {
        let hostile = "\x1b[2J".repeat(50_000);
        let fault = Event::Error(Fault { reason: hostile.clone(), trace: vec![hostile.clone()] });
        let gap = Event::Gap(Gap { stream: Stream::Stdout, bytes: 7, cause: hostile.clone() });
        let waiting = Event::Waiting(Waiting { r#for: vec![hostile.clone(); 1000] });
        let process = Process { pid: 1, name: hostile.clone(), holds: vec![] };
        let leftovers = Event::Leftovers(Leftovers { policy: "wait".into(), processes: vec![process; 9], total: 9 });
        let stopping = Event::Stopping(Stopping { reason: hostile, signal: String::new(), grace_ms: 0 });
        for event in [fault, gap, waiting, leftovers, stopping] {
            let line = Told::default().line(1, &event).unwrap();
            assert!(line.len() < 3000 && !line.contains(char::is_control), "{} bytes", line.len());
        }
        let cut = Event::TookOver(TookOver { records: 1, finished: false });
        assert!(Told::default().line(1, &cut).unwrap().contains("was cut off"));
    }

    #[test]
    fn what_output_and_verdict_say_anyway_is_not_told() {
        for event in [
            Event::TookOver(TookOver { records: 1, finished: true }),
            Event::Born(Born { program: "make".into(), pid: 7 }),
            Event::Ready(Ready { by: "tcp:80".into() }),
            Event::Terminated(Terminated::default()),
            Event::Redaction(Redaction { values: 1, replaced: 1 }),
            Event::Labels(Labels { labels: BTreeMap::new() }),
        ] {
            assert_eq!(Told::default().line(1, &event), None);
        }
    }

    /// News of one step.
    #[derive(Default)]
    struct Told(News);

    impl Told {
        fn line(&mut self, attempt: Attempt, event: &Event) -> Option<String> {
            self.0.line(&StepName::default(), attempt, event)
        }
    }
}
