//! What a launcher or an event exporter tells of a build: what only the cluster knows, such as an image that cannot be
//! pulled.
//!
//! The shape is that of a Kubernetes event (events.k8s.io, core/v1 `Event`), so that kubernetes-event-exporter's webhook
//! can send what it has as it is. Somebody who tells by hand needs `reason` and `message` only.

use std::collections::BTreeMap;

use phonehome_proto::{frame::UnixMicros, limits::MAX_TEXT, text::shortened};
use serde::{Deserialize, Deserializer, Serialize, de::Error};

use crate::object::{object, optional_object};

/// One thing told. A line of `reports`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Report {
    /// When it was received, microseconds since 1970.
    pub(crate) time: UnixMicros,
    /// `Normal` or `Warning`.
    pub(crate) r#type: String,
    /// In one word, for programs.
    pub(crate) reason: String,
    /// For people.
    pub(crate) message: String,
    /// What it is about: `Pod/builder-7`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) object: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) namespace: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) node: Option<String>,
    /// Who noticed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) source: Option<String>,
    /// How often it has happened.
    #[serde(default = "once")]
    pub(crate) count: u64,
    /// When it happened first and last, as the teller has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) first: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) last: Option<String>,
}

fn once() -> u64 {
    1
}

/// Reports that are kept of one build.
pub(crate) const MAX_REPORTS: usize = 200;

impl Report {
    /// Whether it is the same thing again, perhaps more often.
    pub(crate) fn repeats(&self, other: &Self) -> bool {
        (&self.reason, &self.message, &self.object) == (&other.reason, &other.message, &other.object)
    }

    /// The line in the file.
    pub(crate) fn to_line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).expect("a report is plain data");
        line.push(b'\n');
        line
    }

    /// The lines of a file; a torn last one is none.
    pub(crate) fn parse_lines(text: &[u8]) -> Vec<Self> {
        text.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()
    }
}

/// What may be sent: a report by hand, or an event as Kubernetes has it. What else an event says is not looked at.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Told {
    r#type: Option<String>,
    reason: Option<String>,
    message: Option<String>,
    /// `note` is what events.k8s.io/v1 calls a message.
    note: Option<String>,
    object: Option<String>,
    source: Option<Source>,
    #[serde(deserialize_with = "whole")]
    count: Option<u64>,
    first_timestamp: Option<String>,
    last_timestamp: Option<String>,
    event_time: Option<String>,
    reporting_component: Option<String>,
    #[serde(deserialize_with = "optional_object")]
    involved_object: Option<Involved>,
    /// The name in events.k8s.io/v1.
    #[serde(deserialize_with = "optional_object")]
    regarding: Option<Involved>,
}

/// A count; `3.0` is one in JSON.
fn whole<'de, D: Deserializer<'de>>(input: D) -> Result<Option<u64>, D::Error> {
    const MOST: f64 = 9_007_199_254_740_991.0; // the last that every JSON library tells from its neighbours
    let count = Option::<f64>::deserialize(input)?;
    match count {
        Some(count) if !(0.0..=MOST).contains(&count) || count.fract() != 0.0 => Err(D::Error::custom("not a count")),
        Some(_) | None => Ok(count.map(|count| count as u64)),
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Source {
    Name(String),
    Kubernetes(#[serde(deserialize_with = "object")] KubernetesSource),
}

#[derive(Debug, Clone, Deserialize)]
struct KubernetesSource {
    component: Option<String>,
    host: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Involved {
    kind: Option<String>,
    namespace: Option<String>,
    name: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
}

/// Label, or annotation, of a pod or job that says which build it belongs to.
pub(crate) const BUILD_LABEL: &str = "phonehome/build";

/// Nothing was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a report needs a reason or a message")]
pub(crate) struct Empty;

impl Told {
    /// The build that its object says it belongs to.
    pub(crate) fn build(&self) -> Option<&str> {
        let object = self.involved_object.as_ref().or(self.regarding.as_ref())?;
        let names = [&object.labels, &object.annotations];
        names.into_iter().flatten().find_map(|names| names.get(BUILD_LABEL)).map(String::as_str)
    }

    /// What is kept of it, received at `time`. Texts are cut to what a frame may hold.
    pub(crate) fn into_report(self, time: UnixMicros) -> Result<Report, Empty> {
        let given = |text: Option<String>| text.map(fitted).filter(|text| !text.is_empty());
        let (reason, message) = (given(self.reason), given(self.message).or_else(|| given(self.note)));
        if reason.is_none() && message.is_none() {
            return Err(Empty);
        }
        let involved = self.involved_object.or(self.regarding).unwrap_or_default();
        let named = involved.name.map(|name| match involved.kind {
            Some(kind) => format!("{kind}/{name}"),
            None => name,
        });
        let (source, node) = match self.source {
            Some(Source::Name(name)) => (Some(name), None),
            Some(Source::Kubernetes(KubernetesSource { component, host })) => (component, host),
            None => (None, None),
        };
        Ok(Report {
            time,
            r#type: given(self.r#type).unwrap_or_else(|| "Normal".into()),
            reason: reason.unwrap_or_else(|| "Reported".into()),
            message: message.unwrap_or_default(),
            object: given(self.object.or(named)),
            namespace: given(involved.namespace),
            node: given(node),
            source: given(source.or(self.reporting_component)),
            count: self.count.unwrap_or(1).max(1),
            first: given(self.first_timestamp.or(self.event_time)),
            last: given(self.last_timestamp),
        })
    }
}

fn fitted(text: String) -> String {
    shortened(&text, MAX_TEXT).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What kubernetes-event-exporter posts: the event with the labels and annotations of its object.
    const EXPORTED: &str = r#"{"metadata":{"name":"builder-7.17a","namespace":"builds","uid":"u","creationTimestamp":"2026-01-02T03:04:05Z"},
        "reason":"Failed","message":"Failed to pull image \"nope\": not found","source":{"component":"kubelet","host":"node-1"},
        "firstTimestamp":"2026-01-02T03:04:05Z","lastTimestamp":"2026-01-02T03:05:05Z","count":3,"type":"Warning",
        "eventTime":null,"reportingComponent":"","reportingInstance":"","clusterName":"",
        "involvedObject":{"kind":"Pod","namespace":"builds","name":"builder-7","uid":"v","apiVersion":"v1",
        "labels":{"phonehome/build":"b-7"},"annotations":{},"ownerReferences":[],"deleted":false}}"#;

    #[test]
    fn an_exported_event_is_a_report() {
        let told: Told = serde_json::from_str(EXPORTED).unwrap();
        assert_eq!(told.build(), Some("b-7"));
        let report = told.into_report(9).unwrap();
        assert_eq!((report.r#type.as_str(), report.reason.as_str(), report.count), ("Warning", "Failed", 3));
        assert_eq!((report.object.as_deref(), report.node.as_deref()), (Some("Pod/builder-7"), Some("node-1")));
        assert_eq!((report.source.as_deref(), report.last.as_deref()), (Some("kubelet"), Some("2026-01-02T03:05:05Z")));
        assert_eq!(Report::parse_lines(&[report.to_line(), b"{\"torn".to_vec()].concat()), [report]);
    }

    #[test]
    fn a_report_by_hand_needs_little() {
        let told: Told = serde_json::from_str(r#"{"reason":"Queued","source":"ci"}"#).unwrap();
        assert_eq!(told.build(), None);
        let report = told.into_report(9).unwrap();
        assert_eq!((report.r#type.as_str(), report.source.as_deref(), report.count), ("Normal", Some("ci"), 1));
        assert_eq!(serde_json::from_str::<Told>("{}").unwrap().into_report(9), Err(Empty));
    }

    #[test]
    fn annotations_name_the_build_too() {
        let told: Told =
            serde_json::from_str(r#"{"note":"n","regarding":{"annotations":{"phonehome/build":"b"}}}"#).unwrap();
        assert_eq!(told.build(), Some("b"));
    }
}
