//! Names of signals, as `signal(7)` has them for Linux on x86, Arm and most other machines.
//!
//! The wire carries numbers; people read names. Both sides use this one table, so a build that ran on one kind of
//! machine reads the same on another.

use std::borrow::Cow;

/// The standard signals in the order of their numbers, from 1.
const STANDARD: [&str; 31] = [
    "SIGHUP",
    "SIGINT",
    "SIGQUIT",
    "SIGILL",
    "SIGTRAP",
    "SIGABRT",
    "SIGBUS",
    "SIGFPE",
    "SIGKILL",
    "SIGUSR1",
    "SIGSEGV",
    "SIGUSR2",
    "SIGPIPE",
    "SIGALRM",
    "SIGTERM",
    "SIGSTKFLT",
    "SIGCHLD",
    "SIGCONT",
    "SIGSTOP",
    "SIGTSTP",
    "SIGTTIN",
    "SIGTTOU",
    "SIGURG",
    "SIGXCPU",
    "SIGXFSZ",
    "SIGVTALRM",
    "SIGPROF",
    "SIGWINCH",
    "SIGIO",
    "SIGPWR",
    "SIGSYS",
];

/// Other names for some of them (`signal(7)`), without their `SIG`.
const SYNONYMS: [(&str, u8); 4] = [("CLD", 17), ("IOT", 6), ("POLL", 29), ("UNUSED", 31)];

/// The first real-time signal that programs may use: glibc keeps the two below for itself, and `kill -l` counts from
/// here too.
const REALTIME_MIN: u8 = 34;

/// The last signal of all.
const MAX: u8 = 64;

/// What a signal is called: `SIGKILL`, `SIGRTMIN+3`; `SIG32` where it has no name.
#[must_use]
pub fn name(number: u8) -> Cow<'static, str> {
    let standard = number.checked_sub(1).and_then(|index| STANDARD.get(usize::from(index)));
    match (standard, number) {
        (Some(name), _) => Cow::Borrowed(name),
        (None, REALTIME_MIN) => Cow::Borrowed("SIGRTMIN"),
        (None, REALTIME_MIN..=MAX) => Cow::Owned(format!("SIGRTMIN+{}", number - REALTIME_MIN)),
        (None, _) => Cow::Owned(format!("SIG{number}")),
    }
}

/// The signal that a person means by `TERM`, `SIGTERM`, `term` or `15`; `None` for what is no signal.
#[must_use]
pub fn parse(text: &str) -> Option<u8> {
    let upper = text.trim().to_ascii_uppercase();
    let bare = upper.strip_prefix("SIG").unwrap_or(&upper);
    let number = decimal(bare).or_else(|| standard(bare)).or_else(|| realtime(bare))?;
    (1..=MAX).contains(&number).then_some(number)
}

fn standard(bare: &str) -> Option<u8> {
    let numbered = (1..).zip(STANDARD).find(|(_, name)| name.strip_prefix("SIG") == Some(bare));
    let synonym = || SYNONYMS.iter().find(|(name, _)| *name == bare).map(|(_, number)| *number);
    numbered.map(|(number, _)| number).or_else(synonym)
}

/// `RTMIN`, `RTMIN+n`, `RTMAX`, `RTMAX-n`, never outside of the two.
fn realtime(bare: &str) -> Option<u8> {
    let number = if let Some(rest) = bare.strip_prefix("RTMIN") {
        REALTIME_MIN.checked_add(distance(rest, '+')?)?
    } else {
        MAX.checked_sub(distance(bare.strip_prefix("RTMAX")?, '-')?)?
    };
    (REALTIME_MIN..=MAX).contains(&number).then_some(number)
}

fn distance(rest: &str, sign: char) -> Option<u8> {
    if rest.is_empty() { Some(0) } else { decimal(rest.strip_prefix(sign)?) }
}

/// Digits only: what [`str::parse`] takes has a `+` as well.
fn decimal(text: &str) -> Option<u8> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_the_names_of_the_manual_page() {
        let names = [(1, "SIGHUP"), (9, "SIGKILL"), (11, "SIGSEGV"), (15, "SIGTERM"), (17, "SIGCHLD"), (31, "SIGSYS")];
        for (number, expected) in names {
            assert_eq!(name(number), expected);
        }
        assert_eq!([name(34), name(37), name(64)], ["SIGRTMIN", "SIGRTMIN+3", "SIGRTMIN+30"]);
    }

    #[test]
    fn a_number_without_a_name_is_shown_as_it_is() {
        assert_eq!([name(0), name(32), name(33), name(65), name(255)], ["SIG0", "SIG32", "SIG33", "SIG65", "SIG255"]);
    }

    #[test]
    fn what_names_a_signal_is_read_back_as_that_signal() {
        for number in 1..=MAX {
            assert_eq!(parse(&name(number)), Some(number), "{}", name(number));
            assert_eq!(parse(&number.to_string()), Some(number));
        }
    }

    #[test]
    fn people_write_signals_in_several_ways() {
        for text in ["TERM", "SIGTERM", "15", "sigterm", " Term\n", "SIG15"] {
            assert_eq!(parse(text), Some(15), "{text}");
        }
        let others = [("IOT", 6), ("SIGCLD", 17), ("POLL", 29), ("RTMIN", 34), ("SIGRTMAX", 64), ("rtmax-1", 63)];
        for (text, number) in others {
            assert_eq!(parse(text), Some(number), "{text}");
        }
    }

    #[test]
    fn what_names_no_signal_is_none() {
        let wrong = [
            "",
            "SIG",
            "0",
            "65",
            "256",
            "-9",
            "+9",
            "TERMINATE",
            "SIGSIGTERM",
            "RTMIN-1",
            "RTMIN+31",
            "RTMAX-31",
            "RTMIN+",
            "RTMIN++1",
            "RTMIN+255",
            "RTMAX-65",
            "é",
        ];
        for text in wrong {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
