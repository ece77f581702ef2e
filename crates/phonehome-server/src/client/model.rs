//! What a standing server answers, as far as its clients use it. Members that are unknown here are left alone.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::words::OneLine;

/// A build in a list.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(crate) struct Summary {
    pub(crate) id: String,
    pub(crate) state: String,
    pub(crate) verdict: Option<String>,
    pub(crate) exit_code: Option<u8>,
    pub(crate) complete: Option<bool>,
    pub(crate) created: String,
    pub(crate) ended: Option<String>,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) bytes: u64,
}

/// A build with everything known about it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(crate) struct Detail {
    pub(crate) id: String,
    pub(crate) state: String,
    pub(crate) verdict: Option<String>,
    /// The verdict in words: `failed: step main: exit code 3`.
    pub(crate) reason: Option<String>,
    pub(crate) exit_code: Option<u8>,
    pub(crate) complete: Option<bool>,
    pub(crate) incomplete: Option<String>,
    pub(crate) created: String,
    pub(crate) ended: Option<String>,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) bytes: u64,
    pub(crate) sealed: bool,
    pub(crate) steps: Vec<Step>,
    pub(crate) reports: Vec<Report>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(crate) struct Step {
    pub(crate) step: String,
    pub(crate) attempts: Vec<Attempt>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(crate) struct Attempt {
    pub(crate) attempt: u32,
    pub(crate) state: String,
    pub(crate) started: Option<String>,
    pub(crate) ended: Option<String>,
    pub(crate) exit_code: Option<u8>,
    pub(crate) signal: Option<String>,
    pub(crate) oom: Option<bool>,
    pub(crate) reason: Option<String>,
    pub(crate) complete: Option<bool>,
    pub(crate) records: u64,
    pub(crate) bytes: StreamBytes,
    pub(crate) digest: Option<String>,
    pub(crate) cuts: Option<u64>,
    pub(crate) lost_records: Option<u64>,
}

/// Of each stream once the agent has told its end, and of both as they are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(crate) struct StreamBytes {
    pub(crate) stdout: Option<u64>,
    pub(crate) stderr: Option<u64>,
    pub(crate) total: u64,
}

/// What a launcher or an exporter told of a build.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(crate) struct Report {
    pub(crate) r#type: String,
    pub(crate) reason: String,
    pub(crate) message: String,
    pub(crate) object: Option<String>,
    pub(crate) count: Option<u64>,
}

/// A build that was declared.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Declared {
    pub(crate) id: String,
    pub(crate) token: String,
    pub(crate) agent_url: String,
    #[serde(default)]
    pub(crate) pin: Option<String>,
}

/// Exit codes of a build that has no code of its own.
const EXIT_LOST: u8 = 121;
const EXIT_TIMED_OUT: u8 = 124;
const EXIT_ERROR: u8 = 125;
const EXIT_CANCELLED: u8 = 130;

impl Detail {
    pub(crate) fn has_ended(&self) -> bool {
        self.verdict.is_some()
    }

    /// What a process exits with that ends as the build did; `None` while it runs.
    pub(crate) fn exit_code(&self) -> Option<u8> {
        let verdict = self.verdict.as_deref()?;
        Some(match verdict {
            "succeeded" => 0,
            "failed" => self.exit_code.unwrap_or(1).max(1),
            "cancelled" => EXIT_CANCELLED,
            "timed-out" => EXIT_TIMED_OUT,
            "lost" => EXIT_LOST,
            _ => EXIT_ERROR,
        })
    }

    /// The verdict in words.
    pub(crate) fn told(&self) -> String {
        let verdict = self.verdict.as_deref().unwrap_or(&self.state).replace('-', " ");
        OneLine(self.reason.as_deref().unwrap_or(&verdict)).to_string()
    }

    /// Whether any agent has ever said hello.
    pub(crate) fn was_connected(&self) -> bool {
        self.steps.iter().any(|step| !step.attempts.is_empty())
    }
}

impl Attempt {
    /// Bytes that its agent has written, or those that are stored while it has not said how many.
    pub(crate) fn total(&self) -> u64 {
        let told = self.bytes.stdout.zip(self.bytes.stderr);
        told.map_or(self.bytes.total, |(stdout, stderr)| stdout.saturating_add(stderr))
    }
}

impl Report {
    /// In words, whatever it says.
    pub(crate) fn told(&self) -> String {
        let about = self.object.as_deref().map(|object| format!("{}: ", OneLine(object))).unwrap_or_default();
        let often = self.count.filter(|count| *count > 1).map(|count| format!(" ({count} times)")).unwrap_or_default();
        let reason = OneLine(&self.reason);
        match OneLine(&self.message).to_string() {
            message if message.is_empty() => format!("{about}{reason}{often}"),
            message => format!("{about}{reason}: {message}{often}"),
        }
    }

    pub(crate) fn is_warning(&self) -> bool {
        self.r#type == "Warning"
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_process_ends_as_the_build_did() {
        for (verdict, code, expected) in [
            ("succeeded", json!(0), Some(0)),
            ("failed", json!(7), Some(7)),
            ("failed", json!(null), Some(1)),
            ("failed", json!(0), Some(1)),
            ("cancelled", json!(130), Some(130)),
            ("timed-out", json!(null), Some(124)),
            ("lost", json!(null), Some(121)),
            ("error", json!(null), Some(125)),
            ("of later days", json!(null), Some(125)),
        ] {
            let detail: Detail = serde_json::from_value(json!({"verdict": verdict, "exit_code": code})).unwrap();
            assert_eq!(detail.exit_code(), expected, "{verdict} {code}");
        }
        assert_eq!(Detail::default().exit_code(), None);
    }

    #[test]
    fn what_is_told_stays_on_its_line() {
        let report = Report {
            r#type: "Warning".into(),
            reason: "Failed".into(),
            message: "cannot pull\n\x1b[2J".into(),
            object: Some("Pod/b".into()),
            count: Some(3),
        };
        assert_eq!(report.told(), "Pod/b: Failed: cannot pull??[2J (3 times)");
        let detail = Detail { verdict: Some("timed-out".into()), ..Detail::default() };
        assert_eq!(detail.told(), "timed out");
    }
}
