//! How a build ended, as a person and an exit code are told: by a verdict of this process or by a standing server.

use crate::{Clock, Digest, Outcome, StepLog, Verdict, client::model::Detail};

/// The end of a build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ending {
    /// The verdict in words.
    pub(crate) words: String,
    pub(crate) code: u8,
    pub(crate) cause: Cause,
    /// Why the log is not proven complete.
    pub(crate) incomplete: Option<String>,
    /// What is stored of each step's newest attempt.
    pub(crate) steps: Vec<StepLog>,
}

/// What the end calls for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The build ended by itself, and its exit code is its own.
    Itself,
    /// Its agent vanished.
    Lost,
    /// No agent ever came.
    Nobody,
    /// Everything else speaks for itself.
    Other,
}

/// What a hook exits with when phonehome could not do its work.
pub(super) const EXIT_ERROR: u8 = 125;

impl Ending {
    /// phonehome could not do its work.
    pub(crate) fn failed(reason: &str) -> Self {
        let incomplete = Some("its end was not waited for".to_owned());
        Self { words: format!("error: {reason}"), code: EXIT_ERROR, cause: Cause::Other, incomplete, steps: Vec::new() }
    }
}

impl From<Verdict> for Ending {
    fn from(verdict: Verdict) -> Self {
        let cause = match &verdict.outcome {
            Outcome::Succeeded | Outcome::Failed { .. } => Cause::Itself,
            Outcome::Lost { .. } => Cause::Lost,
            Outcome::TimedOut { clock: Clock::NeverConnected } => Cause::Nobody,
            Outcome::Cancelled { .. } | Outcome::Error { .. } => Cause::Other,
            Outcome::TimedOut { clock: Clock::Idle | Clock::Total } => Cause::Other,
        };
        let code = verdict.exit_code();
        let Verdict { outcome, incomplete, steps, .. } = verdict;
        Self { words: outcome.to_string(), code, cause, incomplete, steps }
    }
}

impl From<&Detail> for Ending {
    fn from(detail: &Detail) -> Self {
        let cause = match detail.verdict.as_deref().unwrap_or_default() {
            "succeeded" | "failed" => Cause::Itself,
            "lost" => Cause::Lost,
            "timed-out" if !detail.was_connected() => Cause::Nobody,
            _ => Cause::Other,
        };
        let unproven = || detail.incomplete.clone().unwrap_or_else(|| "the server does not prove it".into());
        Self {
            words: detail.told(),
            code: detail.exit_code().unwrap_or(EXIT_ERROR),
            cause,
            incomplete: if detail.complete == Some(true) { None } else { Some(unproven()) },
            steps: steps(detail),
        }
    }
}

/// What the server says of each step's newest attempt, as far as it makes sense.
fn steps(detail: &Detail) -> Vec<StepLog> {
    let step_log = |step: &crate::client::model::Step| {
        let newest = step.attempts.iter().max_by_key(|attempt| attempt.attempt)?;
        Some(StepLog {
            step: step.step.parse().ok()?,
            attempt: newest.attempt,
            complete: newest.complete == Some(true),
            records: newest.records,
            bytes: newest.total(),
            digest: newest.digest.as_deref()?.parse::<Digest>().ok()?,
            cuts: newest.cuts.unwrap_or_default(),
            end: None,
            usage: None,
        })
    };
    detail.steps.iter().filter_map(step_log).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_remote_build_ends_as_it_would_here() {
        let ending = |detail| Ending::from(&serde_json::from_value::<Detail>(detail).unwrap());
        let digest = "0a".repeat(32);
        let attempt = |number, bytes| json!({"attempt": number, "bytes": bytes, "digest": digest, "records": 2});
        let steps = json!([{"step": "main", "attempts": [
            attempt(1, json!({"stdout": 9, "stderr": 9})), attempt(2, json!({"stdout": 3, "stderr": 4})),
        ]}]);
        let failed = ending(json!({
            "verdict": "failed", "reason": "failed: step main: exit code 3", "exit_code": 3, "complete": true,
            "steps": steps,
        }));
        assert_eq!((&*failed.words, failed.code, failed.cause), ("failed: step main: exit code 3", 3, Cause::Itself));
        assert_eq!((failed.incomplete, failed.steps.len()), (None, 1));
        assert_eq!((failed.steps[0].attempt, failed.steps[0].bytes), (2, 7));

        let nobody = ending(json!({"verdict": "timed-out", "complete": false, "steps": [{"step": "main"}]}));
        assert_eq!((nobody.code, nobody.cause), (124, Cause::Nobody));
        assert!(nobody.incomplete.is_some());
        assert_eq!(ending(json!({"verdict": "timed-out", "steps": steps})).cause, Cause::Other);
        assert_eq!(ending(json!({"verdict": "lost"})).cause, Cause::Lost);
    }
}
