//! The last line of a hook: how the build ended, and what is proven about its log.

use std::fmt;

use super::ending::{Cause, Ending};
use crate::StepLog;

/// The one line that says both.
pub(crate) fn summary(ending: &Ending) -> String {
    let Ending { words, code, steps, .. } = ending;
    let code = if ending.cause == Cause::Itself { String::new() } else { format!(" (exit code {code})") };
    let account = Account(steps);
    match &ending.incomplete {
        None => format!("build {words}{code}; the log is complete: {account}"),
        Some(reason) if steps.is_empty() => format!("build {words}{code}; the log is not complete: {reason}"),
        Some(reason) => format!("build {words}{code}; the log is not complete: {reason}; stored: {account}"),
    }
}

/// Whether the line says nothing that the exit code and the output do not say: the build ended by itself, and its log
/// is proven complete.
pub(crate) fn is_plain(ending: &Ending) -> bool {
    ending.cause == Cause::Itself && ending.incomplete.is_none()
}

/// Bytes, records, digests and cuts of all steps.
struct Account<'a>(&'a [StepLog]);

impl fmt::Display for Account<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sum = |number: fn(&StepLog) -> u64| self.0.iter().map(number).fold(0, u64::saturating_add);
        let (bytes, records) = (Count(sum(|step| step.bytes), "byte"), Count(sum(|step| step.records), "record"));
        write!(f, "{bytes} in {records}, BLAKE3 {}, ", Digests(self.0))?;
        write!(f, "{} survived", Count(sum(|step| step.cuts), "cut"))
    }
}

/// The digest, with several steps that of each behind its name.
struct Digests<'a>(&'a [StepLog]);

impl fmt::Display for Digests<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [StepLog { digest, .. }] = self.0 {
            return write!(f, "{digest}");
        }
        for (at, StepLog { step, digest, .. }) in self.0.iter().enumerate() {
            write!(f, "{}{step} {digest}", if at == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

/// A number of things, named by one of them.
struct Count(u64, &'static str);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(number, thing) = self;
        write!(f, "{number} {thing}{}", if *number == 1 { "" } else { "s" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Clock, Digest, End, Outcome, Verdict};

    #[test]
    fn a_complete_log_is_told_with_its_proof() {
        let verdict =
            Verdict { outcome: Outcome::Succeeded, incomplete: None, steps: vec![log("main", 1_234_567, 3)], ended: 0 };
        let digest = "07".repeat(32);
        let expected = format!(
            "build succeeded; the log is complete: 1234567 bytes in 321 records, BLAKE3 {digest}, 3 cuts survived"
        );
        assert_eq!(summary(&verdict.clone().into()), expected);
        assert!(is_plain(&verdict.into()));
    }

    #[test]
    fn several_steps_are_added_up_and_each_keeps_its_digest() {
        let outcome = Outcome::Failed { step: "test".parse().unwrap(), end: End::Exited(3) };
        let verdict =
            Verdict { outcome, incomplete: None, steps: vec![log("build", 1, 1), log("test", 0, 0)], ended: 0 };
        let digest = "07".repeat(32);
        let expected = format!(
            "build failed: step test: exit code 3; the log is complete: 1 byte in 642 records, \
             BLAKE3 build {digest}, test {digest}, 1 cut survived"
        );
        assert_eq!(summary(&verdict.clone().into()), expected);
        assert!(is_plain(&verdict.into()));
    }

    #[test]
    fn what_is_missing_is_told_and_what_is_stored_as_well() {
        let incomplete = Some("step main: its end never arrived".to_owned());
        let outcome = Outcome::Lost { step: "main".parse().unwrap() };
        let lost = Verdict { outcome, incomplete, steps: vec![log("main", 6, 0)], ended: 0 };
        let told = summary(&lost.clone().into());
        let expected =
            "(exit code 121); the log is not complete: step main: its end never arrived; stored: 6 bytes in 321";
        assert!(told.contains(expected), "{told}");
        assert!(!is_plain(&lost.into()));

        let incomplete = Some("step main never connected".to_owned());
        let outcome = Outcome::TimedOut { clock: Clock::NeverConnected };
        let nobody = summary(&Verdict { outcome, incomplete, steps: Vec::new(), ended: 0 }.into());
        assert!(nobody.ends_with("(exit code 124); the log is not complete: step main never connected"), "{nobody}");
    }

    #[test]
    fn a_build_that_did_not_end_by_itself_is_never_passed_over() {
        let outcome = Outcome::Cancelled { reason: "hung up".into() };
        assert!(!is_plain(&Verdict { outcome, incomplete: None, steps: vec![log("main", 6, 0)], ended: 0 }.into()));
        let incomplete = Some("the digest differs".to_owned());
        assert!(!is_plain(&Verdict { outcome: Outcome::Succeeded, incomplete, steps: Vec::new(), ended: 0 }.into()));
    }

    fn log(step: &str, bytes: u64, cuts: u64) -> StepLog {
        let (step, digest) = (step.parse().unwrap(), Digest([7; 32]));
        StepLog { step, attempt: 1, complete: true, records: 321, bytes, digest, cuts, end: None, usage: None }
    }
}
