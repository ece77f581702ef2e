//! How a command ended, in words.

use std::{
    fs::OpenOptions,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::Duration,
};

pub(crate) use phonehome_proto::text::shortened;
use phonehome_proto::{event::Terminated, frame::End, signal};
use rustix::fs::OFlags;
use tracing::{debug, warn};

/// The event that says how the command ended.
pub(crate) fn terminated(end: &End, oom: bool, duration: Duration) -> Terminated {
    let duration_ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let (signal, core, reason) = match end {
        End::Exited(_) => (None, false, None),
        End::NotStarted { reason, .. } => (None, false, Some(reason.clone())),
        End::Signalled { signal, core, .. } => (Some(signal::name(*signal).into_owned()), *core, None),
    };
    Terminated { code: end.code(), signal, core, oom, reason, duration_ms }
}

/// A short reason for a failure; `None` for a success.
pub(crate) fn reason(terminated: &Terminated) -> Option<String> {
    let Terminated { code, signal, core, oom, reason, .. } = terminated;
    let mut text = match (reason, signal) {
        (Some(reason), _) => reason.clone(),
        (None, Some(signal)) => format!("the command was ended by {signal}"),
        (None, None) if *code == 0 => return None,
        (None, None) => format!("the command exited with {code}"),
    };
    if *core {
        text.push_str(", a core was dumped");
    }
    if *oom {
        text.push_str(", memory ran out");
    }
    Some(text)
}

/// Writes `message` to the file from which an orchestrator reads why a container ended, if there is one: Kubernetes shows
/// it in the container's status (`terminationMessagePath`).
pub fn leave_message(path: &Path, message: &str) {
    match write(path, message) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => debug!("there is no {}", path.display()),
        Err(error) => warn!("no reason can be left in {}: {error}", path.display()),
        Ok(()) => {}
    }
}

/// Never makes the file, and never waits for a reader of something else that has its name.
fn write(path: &Path, message: &str) -> io::Result<()> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let mut file = OpenOptions::new().write(true).truncate(true).custom_flags(flags).open(path)?;
    file.write_all(shortened(message, MAX_MESSAGE).as_bytes())
}

/// Kubernetes reads no more, bytes.
const MAX_MESSAGE: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_has_a_reason_and_a_success_has_none() {
        let reason = |end: End, oom| reason(&terminated(&end, oom, Duration::ZERO));
        assert_eq!(reason(End::Exited(0), false), None);
        assert_eq!(reason(End::Exited(2), false).unwrap(), "the command exited with 2");
        assert_eq!(reason(End::Exited(1), true).unwrap(), "the command exited with 1, memory ran out");
        let killed = End::Signalled { signal: 9, core: false, oom: true };
        assert_eq!(reason(killed, true).unwrap(), "the command was ended by SIGKILL, memory ran out");
        let crashed = End::Signalled { signal: 11, core: true, oom: false };
        assert_eq!(reason(crashed, false).unwrap(), "the command was ended by SIGSEGV, a core was dumped");
        assert_eq!(reason(End::NotStarted { code: 127, reason: "no".into() }, false).unwrap(), "no");
    }

    #[test]
    fn a_message_is_left_only_where_a_file_waits_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("log");
        assert!(write(&file, "x").is_err() && !file.exists());
        std::fs::write(&file, "an old and longer message").unwrap();
        write(&file, &"é".repeat(MAX_MESSAGE)).unwrap();
        let message = std::fs::read_to_string(&file).unwrap();
        assert!(message.ends_with("é…") && (MAX_MESSAGE - 2..=MAX_MESSAGE).contains(&message.len()));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(write(&link, "x").is_err());
    }
}
