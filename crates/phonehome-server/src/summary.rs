//! What a list says of a build: a line of `builds`, an element of `GET builds`, a row of the catalogue.

use std::{collections::BTreeMap, io};

use phonehome_proto::{
    frame::UnixMicros,
    id::{BuildId, StepName},
};
use serde::{Deserialize, Serialize};

use crate::{
    builds::{Build, BuildPhase, Outcome, Verdict},
    report::Report,
};

/// A build in short.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Summary {
    pub(crate) id: BuildId,
    pub(crate) state: BuildPhase,
    /// The kind of its verdict: `succeeded`, `failed`, `cancelled`, `timed-out`, `lost`, `error`.
    pub(crate) verdict: Option<String>,
    /// The verdict in words.
    pub(crate) reason: Option<String>,
    pub(crate) exit_code: Option<u8>,
    /// Whether its log is proven complete.
    pub(crate) complete: Option<bool>,
    /// RFC 3339.
    pub(crate) created: String,
    pub(crate) ended: Option<String>,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) steps: Vec<StepName>,
    /// Bytes of output that are stored, over all attempts.
    pub(crate) bytes: u64,
    /// What was told last by a launcher or an exporter.
    pub(crate) report: Option<Report>,
    pub(crate) sealed: bool,
}

impl Summary {
    /// What is known of a build at this moment. `labels` are those that its agents tell, which the declared ones cover.
    pub(crate) fn of(build: &Build, mut labels: BTreeMap<String, String>, sealed: bool) -> io::Result<Self> {
        let verdict = build.known_verdict();
        let declaration = &build.declaration;
        labels.extend(declaration.labels.clone());
        Ok(Self {
            id: build.id.clone(),
            state: build.phase(),
            verdict: verdict.as_ref().map(|verdict| kind(&verdict.outcome).to_owned()),
            reason: verdict.as_ref().map(|verdict| verdict.outcome.to_string()),
            exit_code: verdict.as_ref().map(Verdict::exit_code),
            complete: verdict.as_ref().map(Verdict::is_complete),
            created: rfc3339(declaration.created),
            ended: verdict.as_ref().map(|verdict| rfc3339(verdict.ended)),
            labels,
            steps: declaration.steps.clone(),
            bytes: build.output_bytes()?,
            report: build.reports().last().map(|report| (**report).clone()),
            sealed,
        })
    }

    #[cfg(test)]
    pub(crate) fn example(id: &str) -> Self {
        Self {
            id: id.parse().unwrap(),
            state: BuildPhase::Waiting,
            verdict: None,
            reason: None,
            exit_code: None,
            complete: None,
            created: rfc3339(0),
            ended: None,
            labels: BTreeMap::new(),
            steps: Vec::new(),
            bytes: 0,
            report: None,
            sealed: false,
        }
    }
}

/// The word for an outcome, as in `verdict.json`.
pub(crate) fn kind(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Cancelled { .. } => "cancelled",
        Outcome::Error { .. } => "error",
        Outcome::Failed { .. } => "failed",
        Outcome::Lost { .. } => "lost",
        Outcome::Succeeded => "succeeded",
        Outcome::TimedOut { .. } => "timed-out",
    }
}

/// A time as RFC 3339 has it, in UTC with microseconds.
pub(crate) fn rfc3339(time: UnixMicros) -> String {
    // The latest that the format can say is the year 9999.
    const LATEST: UnixMicros = 253_402_300_799_999_999;
    let since = std::time::Duration::from_micros(time.min(LATEST));
    humantime::format_rfc3339_micros(std::time::UNIX_EPOCH + since).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_told_to_the_microsecond_and_never_panics() {
        assert_eq!(rfc3339(1_767_323_045_000_007), "2026-01-02T03:04:05.000007Z");
        assert_eq!(rfc3339(u64::MAX), "9999-12-31T23:59:59.999999Z");
    }
}
