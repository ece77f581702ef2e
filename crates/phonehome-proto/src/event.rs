//! Payloads of the event stream: one JSON object per record, told apart by its `event` member.
//!
//! When something happened is the time of its record, also when the server was away and hears of it later.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{frame::Stream, limits::MAX_PAYLOAD, text::shorten};

/// A fact about the build that is not its output. Events unknown here are stored and shown as they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// Bytes of a stream that were written by the command and will never arrive.
    Gap(Gap),
    /// An earlier agent of this step died, and this one has delivered what it left.
    TookOver(TookOver),
    /// The command has not been started yet.
    Waiting(Waiting),
    /// The command has been started.
    Born(Born),
    /// The command does its work: its readiness probe has passed.
    Ready(Ready),
    /// Something failed on the agent's side.
    Error(Fault),
    /// The agent has begun to end the command.
    Stopping(Stopping),
    /// The server has cancelled the build.
    Cancelled(Cancelled),
    /// Processes of the command that outlived it.
    Leftovers(Leftovers),
    /// The command has ended, or will never run.
    Terminated(Terminated),
    /// What was replaced in the output.
    Redaction(Redaction),
    /// The labels have changed; these are all of them.
    Labels(Labels),
}

/// What is missing, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// Whose bytes.
    pub stream: Stream,
    /// How many. The stream's next record starts this much further on.
    pub bytes: u64,
    /// Why, in a word or a sentence.
    pub cause: String,
}

/// What an earlier agent left in its spool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TookOver {
    /// Records that the server had not confirmed.
    pub records: u64,
    /// Whether its end was among what it left. Otherwise its last output may be missing, and nobody knows how much.
    pub finished: bool,
}

/// What the command waits for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// All that is still missing, for people: `the server`, `db to be born`.
    pub r#for: Vec<String>,
}

/// A command that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Born {
    /// The program's name, without its arguments.
    pub program: String,
    /// Its process id, as the agent sees it.
    pub pid: u32,
}

/// A command that is ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// The probe that says so, as configured.
    pub by: String,
}

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The chain of causes, joined by `: `.
    pub reason: String,
    /// The agent's latest own lines before it, the oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trace: Vec<String>,
}

/// Why a command is being ended, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stopping {
    /// Why, for people.
    pub reason: String,
    /// The signal that its process group got: `SIGTERM`.
    pub signal: String,
    /// When SIGKILL follows, milliseconds.
    pub grace_ms: u64,
}

/// A cancel from the server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cancelled {
    /// Why, as the server says.
    pub reason: String,
}

/// Processes that outlived the command, and what became of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leftovers {
    /// What was done about them: `wait`, `terminate` or `leave`.
    pub policy: String,
    /// Some of them.
    pub processes: Vec<Process>,
    /// How many there were in all.
    pub total: u64,
}

/// A process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number, as the agent sees it.
    pub pid: u32,
    /// Its name.
    pub name: String,
    /// The streams of the command that it holds open.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub holds: Vec<Stream>,
}

/// How a command ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminated {
    /// The exit code that says it: 128 more than the number of a signal.
    pub code: u8,
    /// The signal that ended it: `SIGKILL`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<String>,
    /// Whether it left a core file.
    #[serde(default)]
    pub core: bool,
    /// Whether memory ran out.
    #[serde(default)]
    pub oom: bool,
    /// Why it never ran, or was ended, where the agent knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// From its start to its end, milliseconds.
    pub duration_ms: u64,
}

/// What was replaced in the output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redaction {
    /// How many values are looked for.
    pub values: u64,
    /// How many times one was found and replaced.
    pub replaced: u64,
}

/// Labels of an attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Labels {
    /// As a hello has them.
    pub labels: BTreeMap<String, String>,
}

impl Event {
    /// Reads a payload; `None` for an event that this version does not know.
    #[must_use]
    pub fn parse(payload: &[u8]) -> Option<Self> {
        serde_json::from_slice(payload).ok()
    }

    /// The payload that says this.
    ///
    /// # Panics
    ///
    /// Never: none of its members can fail to be written as JSON.
    #[must_use]
    pub fn payload(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain members always serialise")
    }

    /// The same event with a payload that fits a record, whatever its members hold.
    ///
    /// Texts are shortened to [`MAX_TEXT`](crate::limits::MAX_TEXT) and lists to what fits beside them. Labels stay whole,
    /// as those of a hello do; should they not fit, an error takes their place.
    #[must_use]
    pub fn fitted(mut self) -> Self {
        if !matches!(self, Self::Labels(_)) {
            self.edit_texts(shorten);
        }
        match &mut self {
            Self::Waiting(Waiting { r#for }) => match cut(r#for, MAX_LIST) {
                0 => {}
                more => r#for.push(format!("{more} more")),
            },
            Self::Error(Fault { trace, .. }) => {
                trace.reverse(); // the newest lines say most
                cut(trace, MAX_LIST);
                trace.reverse();
            }
            Self::Leftovers(Leftovers { processes, .. }) => drop(cut(processes, MAX_LIST)), // the total is in it
            Self::Gap(_)
            | Self::TookOver(_)
            | Self::Born(_)
            | Self::Ready(_)
            | Self::Stopping(_)
            | Self::Cancelled(_)
            | Self::Terminated(_)
            | Self::Redaction(_)
            | Self::Labels(_) => {}
        }
        match self.payload().len() {
            ..=MAX_PAYLOAD => self,
            len => {
                let reason = format!("an event of {len} bytes is left out of the log: it does not fit a record");
                Self::Error(Fault { reason, trace: Vec::new() })
            }
        }
    }

    /// Lets every text be changed that says something: the values of labels, but not their keys.
    pub fn edit_texts(&mut self, mut edit: impl FnMut(&mut String)) {
        match self {
            Self::Gap(Gap { cause: text, .. })
            | Self::Born(Born { program: text, .. })
            | Self::Ready(Ready { by: text })
            | Self::Cancelled(Cancelled { reason: text }) => edit(text),
            Self::TookOver(TookOver { .. }) | Self::Redaction(Redaction { .. }) => {}
            Self::Waiting(Waiting { r#for }) => r#for.iter_mut().for_each(edit),
            Self::Error(Fault { reason, trace }) => std::iter::once(reason).chain(trace).for_each(edit),
            Self::Stopping(Stopping { reason, signal, .. }) => [reason, signal].into_iter().for_each(edit),
            Self::Leftovers(Leftovers { policy, processes, .. }) => {
                edit(policy);
                processes.iter_mut().for_each(|process| edit(&mut process.name));
            }
            Self::Terminated(Terminated { signal, reason, .. }) => signal.iter_mut().chain(reason).for_each(edit),
            Self::Labels(Labels { labels }) => labels.values_mut().for_each(edit),
        }
    }
}

/// What a list may take of a payload as JSON, bytes. The other half is for texts, of which an event has two at most: six
/// times [`MAX_TEXT`](crate::limits::MAX_TEXT) each when every byte of them has to be escaped.
const MAX_LIST: usize = MAX_PAYLOAD / 2;

/// Keeps the first items, no more than `limit` bytes of JSON, and says how many are gone.
fn cut<T: Serialize>(items: &mut Vec<T>, limit: usize) -> usize {
    let mut room = limit;
    let mut fits = |item: &T| {
        let len = serde_json::to_vec(item).map_or(limit, |json| json.len() + ",".len());
        room.checked_sub(len).inspect(|rest| room = *rest).is_some()
    };
    let kept = items.iter().take_while(|item| fits(item)).count();
    let more = items.len() - kept;
    items.truncate(kept);
    more
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_frozen_as_json() {
        let gap = Event::Gap(Gap { stream: Stream::Stdout, bytes: 7, cause: "spool-full".into() });
        assert_eq!(gap.payload(), br#"{"event":"gap","stream":"stdout","bytes":7,"cause":"spool-full"}"#);
        assert_eq!(Event::parse(&gap.payload()), Some(gap));
        assert_eq!(Event::parse(br#"{"event":"unheard-of"}"#), None);
    }

    #[test]
    fn a_take_over_is_frozen_as_json() {
        let took_over = Event::TookOver(TookOver { records: 3, finished: false });
        assert_eq!(took_over.payload(), br#"{"event":"took-over","records":3,"finished":false}"#);
        assert_eq!(Event::parse(&took_over.payload()), Some(took_over));
    }

    #[test]
    fn the_events_of_a_life_are_frozen_as_json() {
        let check = |event: Event, json: &str| {
            assert_eq!(String::from_utf8(event.payload()).unwrap(), json);
            assert_eq!(Event::parse(json.as_bytes()), Some(event));
        };
        check(
            Event::Waiting(Waiting { r#for: vec!["db to be born".into()] }),
            r#"{"event":"waiting","for":["db to be born"]}"#,
        );
        check(Event::Born(Born { program: "make".into(), pid: 7 }), r#"{"event":"born","program":"make","pid":7}"#);
        check(Event::Ready(Ready { by: "tcp:80".into() }), r#"{"event":"ready","by":"tcp:80"}"#);
        check(Event::Error(Fault { reason: "a: b".into(), trace: vec![] }), r#"{"event":"error","reason":"a: b"}"#);
        check(
            Event::Stopping(Stopping { reason: "main has died".into(), signal: "SIGTERM".into(), grace_ms: 30_000 }),
            r#"{"event":"stopping","reason":"main has died","signal":"SIGTERM","grace_ms":30000}"#,
        );
        check(Event::Cancelled(Cancelled { reason: "x".into() }), r#"{"event":"cancelled","reason":"x"}"#);
        let process = Process { pid: 7, name: "sleep".into(), holds: vec![Stream::Stdout] };
        check(
            Event::Leftovers(Leftovers { policy: "leave".into(), processes: vec![process], total: 1 }),
            r#"{"event":"leftovers","policy":"leave","processes":[{"pid":7,"name":"sleep","holds":["stdout"]}],"total":1}"#,
        );
        check(
            Event::Terminated(Terminated { code: 3, duration_ms: 5, ..Terminated::default() }),
            r#"{"event":"terminated","code":3,"core":false,"oom":false,"duration_ms":5}"#,
        );
        check(
            Event::Redaction(Redaction { values: 2, replaced: 9 }),
            r#"{"event":"redaction","values":2,"replaced":9}"#,
        );
        let labels = BTreeMap::from([("app".to_owned(), "x".to_owned())]);
        check(Event::Labels(Labels { labels }), r#"{"event":"labels","labels":{"app":"x"}}"#);
    }

    #[test]
    fn whatever_an_event_holds_it_fits_a_record_and_stays_of_its_kind() {
        for event in endless(&"\u{1}".repeat(100_000)) {
            let (kind, fitted) = (std::mem::discriminant(&event), event.fitted());
            assert_eq!(std::mem::discriminant(&fitted), kind, "{fitted:?}");
            let payload = fitted.payload();
            assert!(payload.len() <= MAX_PAYLOAD, "{} bytes", payload.len());
            assert_eq!(Event::parse(&payload), Some(fitted));
        }
    }

    #[test]
    fn what_fits_stays_as_it_is() {
        for event in endless("a few words").into_iter().filter(|event| event.payload().len() < MAX_LIST) {
            assert_eq!(event.clone().fitted(), event);
        }
    }

    #[test]
    fn of_a_list_as_much_stays_as_fits() {
        let names = |name: &str| (0..1000).map(|at| format!("{at} {name}")).collect::<Vec<_>>();
        let Event::Waiting(Waiting { r#for }) = Event::Waiting(Waiting { r#for: names(&"x".repeat(90)) }).fitted()
        else {
            panic!("it is another event now")
        };
        let more = format!("{} more", 1001 - r#for.len());
        assert!(r#for[0].starts_with("0 ") && r#for.len() > 300 && *r#for.last().unwrap() == more, "{for:?}");
        let fault = Fault { reason: String::new(), trace: names(&"x".repeat(90)) };
        let Event::Error(Fault { trace, .. }) = Event::Error(fault).fitted() else { panic!("it is another event now") };
        assert!(trace.len() > 300 && trace.last().unwrap().starts_with("999 "), "{trace:?}");
    }

    #[test]
    fn labels_stay_whole_or_an_error_takes_their_place() {
        let labels = |len| Event::Labels(Labels { labels: BTreeMap::from([("key".to_owned(), "x".repeat(len))]) });
        assert_eq!(labels(60_000).fitted(), labels(60_000));
        let Event::Error(Fault { reason, .. }) = labels(100_000).fitted() else { panic!("they do not fit") };
        assert!(reason.starts_with("an event of 1000"), "{reason}");
    }

    /// Every kind of event but labels, with `text` wherever one may be.
    fn endless(text: &str) -> Vec<Event> {
        let text = || text.to_owned();
        let process = Process { pid: u32::MAX, name: text(), holds: vec![Stream::Stdout, Stream::Stderr] };
        let max = u64::MAX;
        vec![
            Event::Gap(Gap { stream: Stream::Stdout, bytes: max, cause: text() }),
            Event::TookOver(TookOver { records: max, finished: true }),
            Event::Waiting(Waiting { r#for: vec![text(); 50] }),
            Event::Born(Born { program: text(), pid: u32::MAX }),
            Event::Ready(Ready { by: text() }),
            Event::Error(Fault { reason: text(), trace: vec![text(); 50] }),
            Event::Stopping(Stopping { reason: text(), signal: text(), grace_ms: max }),
            Event::Cancelled(Cancelled { reason: text() }),
            Event::Leftovers(Leftovers { policy: text(), processes: vec![process; 50], total: max }),
            Event::Terminated(Terminated {
                code: 1,
                signal: Some(text()),
                core: true,
                oom: true,
                reason: Some(text()),
                duration_ms: max,
            }),
            Event::Redaction(Redaction { values: max, replaced: max }),
        ]
    }
}
