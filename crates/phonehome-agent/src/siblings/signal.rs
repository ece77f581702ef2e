//! Signals by the names that people use.

use rustix::process::Signal;

/// Those that every Linux knows, as signal(7) spells them.
const NAMES: [(&str, Signal); 31] = [
    ("SIGHUP", Signal::HUP),
    ("SIGINT", Signal::INT),
    ("SIGQUIT", Signal::QUIT),
    ("SIGILL", Signal::ILL),
    ("SIGTRAP", Signal::TRAP),
    ("SIGABRT", Signal::ABORT),
    ("SIGBUS", Signal::BUS),
    ("SIGFPE", Signal::FPE),
    ("SIGKILL", Signal::KILL),
    ("SIGUSR1", Signal::USR1),
    ("SIGSEGV", Signal::SEGV),
    ("SIGUSR2", Signal::USR2),
    ("SIGPIPE", Signal::PIPE),
    ("SIGALRM", Signal::ALARM),
    ("SIGTERM", Signal::TERM),
    ("SIGSTKFLT", Signal::STKFLT),
    ("SIGCHLD", Signal::CHILD),
    ("SIGCONT", Signal::CONT),
    ("SIGSTOP", Signal::STOP),
    ("SIGTSTP", Signal::TSTP),
    ("SIGTTIN", Signal::TTIN),
    ("SIGTTOU", Signal::TTOU),
    ("SIGURG", Signal::URG),
    ("SIGXCPU", Signal::XCPU),
    ("SIGXFSZ", Signal::XFSZ),
    ("SIGVTALRM", Signal::VTALARM),
    ("SIGPROF", Signal::PROF),
    ("SIGWINCH", Signal::WINCH),
    ("SIGIO", Signal::IO),
    ("SIGPWR", Signal::POWER),
    ("SIGSYS", Signal::SYS),
];

/// `SIGTERM`; `None` for one that has only a number.
pub(crate) fn name(number: i32) -> Option<&'static str> {
    NAMES.iter().find(|(_, signal)| signal.as_raw() == number).map(|(name, _)| *name)
}

/// `TERM`, `SIGTERM`, `sigterm` or `15`.
pub(crate) fn parse(text: &str) -> Option<Signal> {
    if let Ok(number) = text.parse() {
        return Signal::from_named_raw(number);
    }
    let upper = text.to_ascii_uppercase();
    let short = upper.strip_prefix("SIG").unwrap_or(&upper);
    NAMES.iter().find(|(name, _)| name.strip_prefix("SIG") == Some(short)).map(|(_, signal)| *signal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_has_its_name_and_its_number() {
        for (text, signal) in NAMES {
            assert_eq!(name(signal.as_raw()), Some(text));
            for form in [text.to_owned(), text.to_lowercase(), signal.as_raw().to_string(), text.replacen("SIG", "", 1)]
            {
                assert_eq!(parse(&form), Some(signal), "{form}");
            }
        }
        for text in ["", "SIG", "0", "-1", "99", "TERMINATE"] {
            assert_eq!(parse(text), None, "{text}");
        }
        assert_eq!(name(64), None);
    }
}
