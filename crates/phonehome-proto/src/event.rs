//! Payloads of the event stream: one JSON object per record, told apart by its `event` member.
//!
//! When something happened is the time of its record, also when the server was away and hears of it later.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::frame::Stream;

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
}
