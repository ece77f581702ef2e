//! One line: its members, their order, and where labels go.

use std::{collections::BTreeMap, sync::Arc};

use phonehome_proto::{
    frame::UnixMicros,
    id::{Attempt, BuildId, StepName},
};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::stamp::Stamp;

/// Labels as an agent tells them.
pub(super) type Labels = Arc<BTreeMap<String, String>>;

/// Where a line has its labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum LabelForm {
    /// Among the line's own members. One whose name is a member's, or begins with `label_`, gets `label_` in front, so
    /// that no two of them meet.
    Flat,
    /// In an object of their own, `labels`.
    #[default]
    Nested,
}

/// How much somebody should look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Level {
    Info,
    Warning,
    Error,
}

/// What became of the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Action {
    Create,
    Update,
    Delete,
}

/// What the step's command does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum State {
    Waiting,
    Running,
    Error,
    Terminated,
}

/// How a command ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct Exit {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) exit_code: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) signal: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) oom: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) duration_ms: Option<u64>,
}

/// Where it happened.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct Place {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pod: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) namespace: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) node: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) container: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pod_uid: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pod_ip: Option<String>,
}

impl Place {
    /// As labels tell it: the agent's own by the names of OpenTelemetry, or short ones.
    pub(super) fn of(labels: &BTreeMap<String, String>) -> Self {
        let find = |names: [&str; 2]| names.iter().find_map(|name| labels.get(*name).cloned());
        Self {
            pod: find(["k8s.pod.name", "pod"]),
            namespace: find(["k8s.namespace.name", "namespace"]),
            node: find(["k8s.node.name", "node"]),
            container: find(["k8s.container.name", "container"]),
            pod_uid: find(["k8s.pod.uid", "uid"]),
            pod_ip: find(["k8s.pod.ip", "ip"]),
        }
    }
}

/// How often the same has happened, when it is more than once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Repeated {
    pub(super) count: u64,
    pub(super) first_time: Stamp,
    pub(super) last_time: Stamp,
}

/// A change, told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Line {
    pub(super) time: Stamp,
    pub(super) level: Level,
    #[serde(flatten)]
    pub(super) place: Place,
    pub(super) build: BuildId,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) step: Option<StepName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) attempt: Option<Attempt>,
    pub(super) action: Action,
    pub(super) state: State,
    pub(super) reason: String,
    pub(super) info: String,
    #[serde(flatten)]
    pub(super) exit: Exit,
    #[serde(flatten)]
    pub(super) repeated: Option<Repeated>,
    #[serde(skip)]
    pub(super) labels: Labels,
}

/// Every member a line may have.
pub(super) const MEMBERS: [&str; 22] = [
    "time",
    "level",
    "pod",
    "namespace",
    "node",
    "container",
    "pod_uid",
    "pod_ip",
    "build",
    "step",
    "attempt",
    "action",
    "state",
    "reason",
    "info",
    "exit_code",
    "signal",
    "oom",
    "duration_ms",
    "count",
    "first_time",
    "last_time",
];

/// What is put in front of a label that would hide a member.
const PREFIX: &str = "label_";

impl Line {
    /// The line, with its end.
    pub(super) fn to_json(&self, form: LabelForm) -> Vec<u8> {
        let mut json = serde_json::to_vec(self).expect("a line is plain data");
        let labels: Map<_, _> = match form {
            LabelForm::Flat => self.labels.iter().map(|(key, value)| (flat(key), value.as_str().into())).collect(),
            LabelForm::Nested => {
                let labels = self.labels.iter().map(|(key, value)| (key.clone(), value.as_str().into()));
                Map::from_iter([("labels".to_owned(), Value::Object(labels.collect()))])
            }
        };
        if !labels.is_empty() {
            let more = serde_json::to_vec(&labels).expect("labels are plain data");
            json.pop(); // the brace that closes it: what follows is one that opens, which the comma replaces
            json.push(b',');
            json.extend_from_slice(&more[1..]);
        }
        json.push(b'\n');
        json
    }
}

/// The name of a label among the members of a line.
fn flat(key: &str) -> String {
    let is_taken = MEMBERS.contains(&key) || key == "labels" || key.starts_with(PREFIX);
    if is_taken { format!("{PREFIX}{key}") } else { key.to_owned() }
}

/// The level that the state of things has.
pub(super) fn level(state: State, exit_code: Option<u8>) -> Level {
    match state {
        State::Waiting => Level::Warning,
        State::Error => Level::Error,
        State::Terminated if exit_code.is_some_and(|code| code != 0) => Level::Error,
        State::Running | State::Terminated => Level::Info,
    }
}

/// A line about the log itself: some others are missing.
pub(super) fn dropped(time: UnixMicros, count: u64) -> Vec<u8> {
    let line = serde_json::json!({
        "time": Stamp(time), "level": Level::Error, "action": Action::Update, "state": State::Error,
        "reason": "LinesDropped", "info": format!("{count} lines of this log could not be written in time"), "count": count,
    });
    format!("{line}\n").into_bytes()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_line_is_frozen() {
        let text = String::from_utf8(line(&[("app", "x")]).to_json(LabelForm::Nested)).unwrap();
        assert_eq!(
            text,
            "{\"time\":\"1970-01-01T00:00:00.000001Z\",\"level\":\"error\",\"pod\":\"p-1\",\"namespace\":\"ci\",\
             \"node\":\"n\",\"build\":\"b\",\"step\":\"main\",\"attempt\":1,\"action\":\"update\",\
             \"state\":\"terminated\",\"reason\":\"Error\",\"info\":\"exit code 3\",\"exit_code\":3,\
             \"duration_ms\":5,\"labels\":{\"app\":\"x\"}}\n"
        );
    }

    #[test]
    fn flat_labels_hide_nothing_and_do_not_meet() {
        let labels = [("app", "1"), ("state", "2"), ("label_state", "3"), ("labels", "4"), ("a\"b", "5\n")];
        let value: Value = serde_json::from_slice(&line(&labels).to_json(LabelForm::Flat)).unwrap();
        assert_eq!(value["state"], "terminated");
        let expected =
            [("app", "1"), ("label_state", "2"), ("label_label_state", "3"), ("label_labels", "4"), ("a\"b", "5\n")];
        for (key, expected) in expected {
            assert_eq!(value[key], expected, "{key}");
        }
    }

    #[test]
    fn every_member_is_listed_and_can_be_no_label() {
        let mut full = line(&[]);
        full.place =
            Place { pod_uid: Some("u".into()), pod_ip: Some("i".into()), container: Some("c".into()), ..full.place };
        full.exit = Exit { signal: Some("SIGKILL".into()), oom: true, ..full.exit };
        full.repeated = Some(Repeated { count: 2, first_time: Stamp(1), last_time: Stamp(2) });
        let value: Value = serde_json::from_slice(&full.to_json(LabelForm::Flat)).unwrap();
        let mut found: Vec<_> = value.as_object().unwrap().keys().map(String::as_str).collect();
        let mut listed = MEMBERS.to_vec();
        found.sort_unstable();
        listed.sort_unstable();
        assert_eq!(found, listed);
    }

    #[test]
    fn a_line_without_labels_is_whole() {
        for (form, expected) in [(LabelForm::Flat, Value::Null), (LabelForm::Nested, json!({}))] {
            let value: Value = serde_json::from_slice(&line(&[]).to_json(form)).unwrap();
            assert_eq!(value["labels"], expected);
        }
    }

    #[test]
    fn levels_follow_the_rule() {
        use State::{Error, Running, Terminated, Waiting};
        for (state, code, expected) in [
            (Waiting, None, Level::Warning),
            (Running, None, Level::Info),
            (Error, None, Level::Error),
            (Terminated, Some(0), Level::Info),
            (Terminated, Some(3), Level::Error),
            (Terminated, None, Level::Info),
        ] {
            assert_eq!(level(state, code), expected, "{state:?} {code:?}");
        }
    }

    #[test]
    fn missing_lines_are_told_as_a_line() {
        let value: Value = serde_json::from_slice(&dropped(0, 7)).unwrap();
        assert_eq!(
            (&value["reason"], &value["count"], &value["level"]),
            (&json!("LinesDropped"), &json!(7), &json!("error"))
        );
    }

    fn line(labels: &[(&str, &str)]) -> Line {
        let text = |text: &str| Some(text.to_owned());
        Line {
            time: Stamp(1),
            level: Level::Error,
            place: Place { pod: text("p-1"), namespace: text("ci"), node: text("n"), ..Place::default() },
            build: "b".parse().unwrap(),
            step: Some(StepName::default()),
            attempt: Some(1),
            action: Action::Update,
            state: State::Terminated,
            reason: "Error".into(),
            info: "exit code 3".into(),
            exit: Exit { exit_code: Some(3), duration_ms: Some(5), ..Exit::default() },
            repeated: None,
            labels: Arc::new(labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()),
        }
    }
}
