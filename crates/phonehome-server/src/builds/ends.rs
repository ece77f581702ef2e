//! How commands end: in words, and in `verdict.json`.

use std::fmt;

use phonehome_proto::{
    frame::{End, Usage},
    id::{Attempt, Digest, StepName},
    signal,
};
use serde::{Deserialize, Serialize};

use super::state::StepLog;
use crate::words::OneLine;

/// An end in words.
pub(super) struct Told<'a>(pub(super) &'a End);

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let code = self.0.code();
        match self.0 {
            End::Exited(code) => write!(f, "exit code {code}"),
            End::NotStarted { reason, .. } => write!(f, "{} (exit code {code})", OneLine(reason)),
            End::Signalled { signal, core, oom } => {
                let oom = if *oom { ", out of memory" } else { "" };
                let core = if *core { ", core dumped" } else { "" };
                write!(f, "killed by {}{oom}{core} (exit code {code})", signal::name(*signal))
            }
        }
    }
}

/// A step in `verdict.json`.
#[derive(Serialize, Deserialize)]
pub(super) struct StepFile {
    step: StepName,
    attempt: Attempt,
    complete: bool,
    records: u64,
    bytes: u64,
    digest: Digest,
    cuts: u64,
    exit_code: Option<u8>,
    signal: Option<String>,
    core: bool,
    oom: bool,
    reason: Option<String>,
    usage: Option<UsageFile>,
}

/// What a command used, with the units in the names.
#[derive(Serialize, Deserialize)]
struct UsageFile {
    wall_us: u64,
    user_us: u64,
    system_us: u64,
    max_rss_bytes: u64,
}

impl From<StepLog> for StepFile {
    fn from(log: StepLog) -> Self {
        let StepLog { step, attempt, complete, records, bytes, digest, cuts, end, usage } = log;
        let exit_code = end.as_ref().map(End::code);
        let (signal, core, oom, reason) = match end {
            Some(End::Signalled { signal, core, oom }) => (Some(signal::name(signal).into_owned()), core, oom, None),
            Some(End::NotStarted { reason, .. }) => (None, false, false, Some(reason)),
            Some(End::Exited(_)) | None => (None, false, false, None),
        };
        let usage = usage.map(UsageFile::from);
        Self { step, attempt, complete, records, bytes, digest, cuts, exit_code, signal, core, oom, reason, usage }
    }
}

impl From<StepFile> for StepLog {
    fn from(file: StepFile) -> Self {
        let end = file.end();
        let StepFile { step, attempt, complete, records, bytes, digest, cuts, usage, .. } = file;
        Self { step, attempt, complete, records, bytes, digest, cuts, end, usage: usage.map(Usage::from) }
    }
}

impl StepFile {
    fn end(&self) -> Option<End> {
        let code = self.exit_code?;
        Some(match (self.signal.as_deref().and_then(signal::parse), &self.reason) {
            (Some(signal), _) => End::Signalled { signal, core: self.core, oom: self.oom },
            (None, Some(reason)) => End::NotStarted { code, reason: reason.clone() },
            (None, None) => End::Exited(code),
        })
    }
}

impl From<UsageFile> for Usage {
    fn from(UsageFile { wall_us, user_us, system_us, max_rss_bytes }: UsageFile) -> Self {
        Self { wall: wall_us, user: user_us, system: system_us, max_rss: max_rss_bytes }
    }
}

impl From<Usage> for UsageFile {
    fn from(Usage { wall, user, system, max_rss }: Usage) -> Self {
        Self { wall_us: wall, user_us: user, system_us: system, max_rss_bytes: max_rss }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn an_end_is_told_in_words() {
        let killed = |signal, core, oom| End::Signalled { signal, core, oom };
        for (end, expected) in [
            (End::Exited(3), "exit code 3"),
            (killed(9, false, true), "killed by SIGKILL, out of memory (exit code 137)"),
            (killed(11, true, false), "killed by SIGSEGV, core dumped (exit code 139)"),
            (killed(6, true, true), "killed by SIGABRT, out of memory, core dumped (exit code 134)"),
            (killed(37, false, false), "killed by SIGRTMIN+3 (exit code 165)"),
            (
                End::NotStarted { code: 127, reason: "make: no such\x1b[2J file".into() },
                "make: no such?[2J file (exit code 127)",
            ),
        ] {
            assert_eq!(Told(&end).to_string(), expected);
        }
    }

    #[test]
    fn a_verdict_names_the_cause_of_death_and_what_was_used() {
        let usage = Usage { wall: 5, user: 4, system: 3, max_rss: 2 };
        let killed = file(Some(End::Signalled { signal: 9, core: false, oom: true }), Some(usage));
        assert_eq!((&killed["exit_code"], &killed["signal"]), (&json!(137), &json!("SIGKILL")));
        assert_eq!((&killed["core"], &killed["oom"], &killed["reason"]), (&json!(false), &json!(true), &Value::Null));
        assert_eq!(killed["usage"], json!({"wall_us": 5, "user_us": 4, "system_us": 3, "max_rss_bytes": 2}));

        let missing = file(Some(End::NotStarted { code: 127, reason: "no such file".into() }), None);
        assert_eq!((&missing["exit_code"], &missing["reason"]), (&json!(127), &json!("no such file")));
        assert_eq!((&missing["signal"], &missing["usage"]), (&Value::Null, &Value::Null));

        let lost = file(None, None);
        assert_eq!(lost["exit_code"], Value::Null);
    }

    #[test]
    fn a_step_comes_back_from_its_file() {
        let usage = Some(Usage { wall: 5, user: 4, system: 3, max_rss: 2 });
        for end in [
            None,
            Some(End::Exited(3)),
            Some(End::NotStarted { code: 127, reason: "no such file".into() }),
            Some(End::Signalled { signal: 37, core: true, oom: true }),
        ] {
            let text = file(end.clone(), usage);
            let back: StepLog = serde_json::from_value(text.clone()).unwrap();
            assert_eq!((&back.end, back.usage), (&end, usage));
            assert_eq!(serde_json::to_value(back).unwrap(), text);
        }
    }

    fn file(end: Option<End>, usage: Option<Usage>) -> Value {
        let (step, digest) = (StepName::default(), Digest([7; 32]));
        let (attempt, complete, records, bytes, cuts) = (1, true, 3, 30, 0);
        let log = StepLog { step, attempt, complete, records, bytes, digest, cuts, end, usage };
        serde_json::to_value(log).unwrap()
    }
}
