//! Which ends count as success when the agent itself has ended the command because a sibling died.

use std::{borrow::Cow, ops::RangeInclusive, str::FromStr};

use phonehome_proto::{frame::End, signal};
use rustix::process::Signal;

/// The ends that were expected. None by default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExpectedExits(Vec<RangeInclusive<u8>>);

/// Why a text does not say which ends are expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExpectedExitsError {
    /// It is none of the forms.
    #[error("{0:?} is neither an exit code (0-255), a range of them (0-3), a signal (SIGTERM) nor any")]
    BadItem(String),
    /// The end by this signal is never the wish of whoever ended the command.
    #[error("{0} is a crash, which is never expected")]
    Crash(Cow<'static, str>),
}

/// Signals that the kernel sends to a program that is broken, or that it sends itself for the same reason.
const CRASHES: [Signal; 7] =
    [Signal::ILL, Signal::TRAP, Signal::ABORT, Signal::BUS, Signal::FPE, Signal::SEGV, Signal::SYS];

impl ExpectedExits {
    /// Whether this end was expected. `ended_by_us` says that a signal was sent to the command because of the death of a
    /// sibling, before the command ended; what ends by itself is never expected, and neither is a crash.
    #[must_use]
    pub fn allows(&self, end: &End, ended_by_us: bool) -> bool {
        ended_by_us && !is_crash(end) && self.0.iter().any(|codes| codes.contains(&end.code()))
    }
}

fn is_crash(end: &End) -> bool {
    match end {
        End::Signalled { core: true, .. } | End::Signalled { oom: true, .. } => true,
        End::Signalled { .. } | End::Exited(_) | End::NotStarted { .. } => crash(end.code()).is_some(),
    }
}

/// The crash that an exit code tells of, also when a shell passes it on.
fn crash(code: u8) -> Option<Cow<'static, str>> {
    let crash = CRASHES.into_iter().find(|crash| code == of_signal(*crash))?;
    Some(signal::name(number(crash)))
}

fn of_signal(signal: Signal) -> u8 {
    128 + number(signal)
}

fn number(signal: Signal) -> u8 {
    signal.as_raw() as u8 // signals are numbered up to 64
}

impl FromStr for ExpectedExits {
    type Err = ExpectedExitsError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
        items.map(item).collect::<Result<Vec<_>, _>>().map(|items| Self(items.concat()))
    }
}

fn item(text: &str) -> Result<Vec<RangeInclusive<u8>>, ExpectedExitsError> {
    if text == "any" {
        let kill = of_signal(Signal::KILL); // only who says so expects a command that does not listen to the signal
        return Ok(vec![0..=kill - 1, kill + 1..=u8::MAX]);
    }
    let bad = || ExpectedExitsError::BadItem(text.to_owned());
    if let Some((first, last)) = text.split_once('-') {
        let range = first.parse().map_err(|_| bad())?..=last.parse().map_err(|_| bad())?;
        return if range.is_empty() { Err(bad()) } else { Ok(vec![range]) };
    }
    let code = match text.parse() {
        Ok(code) => code,
        Err(_) => 128 + signal::parse(text).ok_or_else(bad)?,
    };
    match crash(code) {
        Some(name) => Err(ExpectedExitsError::Crash(name)),
        None => Ok(vec![code..=code]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_listed_is_expected_of_whom_we_ended() {
        let exits = parse("143, SIGINT,0-3");
        for (end, expected) in [
            (killed_by(Signal::TERM), true),
            (killed_by(Signal::INT), true),
            (End::Exited(143), true),
            (End::Exited(3), true),
            (End::Exited(4), false),
            (killed_by(Signal::KILL), false),
            (End::NotStarted { code: 143, reason: String::new() }, true),
        ] {
            assert_eq!(exits.allows(&end, true), expected, "{end:?}");
            assert!(!exits.allows(&end, false), "{end:?}");
        }
        assert!(!ExpectedExits::default().allows(&End::Exited(0), true));
        assert!(parse("KILL").allows(&killed_by(Signal::KILL), true));
    }

    #[test]
    fn a_crash_is_never_expected() {
        for exits in ["any", "0-255"] {
            let exits = parse(exits);
            assert!(exits.allows(&End::Exited(77), true) && exits.allows(&killed_by(Signal::TERM), true));
            for crash in CRASHES {
                assert!(!exits.allows(&killed_by(crash), true), "{crash:?}");
                assert!(!exits.allows(&End::Exited(of_signal(crash)), true), "{crash:?}, told by a shell");
            }
            let term = Signal::TERM.as_raw() as u8;
            assert!(!exits.allows(&End::Signalled { signal: term, core: true, oom: false }, true));
            assert!(!exits.allows(&End::Signalled { signal: term, core: false, oom: true }, true));
        }
        assert!(!parse("any").allows(&killed_by(Signal::KILL), true));
        assert!(parse("any,137").allows(&killed_by(Signal::KILL), true));
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for (text, expected) in [
            ("256", "\"256\" is neither"),
            ("3-1", "\"3-1\" is neither"),
            ("-1", "\"-1\" is neither"),
            ("SIGNOPE", "\"SIGNOPE\" is neither"),
            ("139", "SIGSEGV is a crash"),
            ("0,sigabrt", "SIGABRT is a crash"),
        ] {
            let failure = text.parse::<ExpectedExits>().unwrap_err().to_string();
            assert!(failure.starts_with(expected), "{failure}");
        }
        assert_eq!(parse(""), ExpectedExits::default());
    }

    fn parse(text: &str) -> ExpectedExits {
        text.parse().unwrap()
    }

    fn killed_by(signal: Signal) -> End {
        End::Signalled { signal: signal.as_raw() as u8, core: false, oom: false }
    }
}
