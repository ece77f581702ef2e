//! Who lives below this process, as far as `/proc` tells (proc(5)).
//!
//! An image may have no `/proc`; then nobody is found, and only the command's process group is known.

use std::{collections::HashMap, fs, io};

use phonehome_proto::{event::Process, frame::Stream};
use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

/// A process that lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Living {
    pub(crate) pid: Pid,
    parent: Option<Pid>,
    pub(crate) group: Option<Pid>,
    /// When it started, clock ticks since boot: with the number it names one process for ever.
    started: u64,
    pub(crate) name: String,
}

/// Every living descendant of `ancestor`.
pub(crate) fn of(ancestor: Pid) -> Vec<Living> {
    below(ancestor, processes().unwrap_or_default())
}

/// A pipe or terminal that the command writes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) streams: Vec<Stream>,
    /// What a descriptor of it looks like in `/proc`: `pipe:[1234]`, `/dev/pts/3`.
    pub(crate) link: String,
}

/// Describes `living` and what of `held` it holds open. Of other users' processes nobody may know.
pub(crate) fn describe(living: &Living, held: &[Held]) -> Process {
    let links = descriptors(living.pid);
    let holds = held.iter().filter(|held| links.contains(&held.link)).flat_map(|held| held.streams.clone()).collect();
    Process { pid: living.pid.as_raw_nonzero().get().unsigned_abs(), name: living.name.clone(), holds }
}

/// Everybody who holds one of `held` open, except `myself`.
pub(crate) fn holders(held: &[Held], myself: Pid) -> Vec<Process> {
    let others = processes().unwrap_or_default().into_iter().filter(|living| living.pid != myself);
    others.map(|living| describe(&living, held)).filter(|process| !process.holds.is_empty()).collect()
}

/// Sends a signal to exactly this process: the handle is opened first, and only then is its owner looked at, so that no
/// other process of the same number can get it.
pub(crate) fn signal(living: &Living, signal: Signal) -> io::Result<()> {
    let handle = pidfd_open(living.pid, PidfdFlags::empty())?;
    if read_process(living.pid).is_none_or(|now| now.started != living.started) {
        return Err(Errno::SRCH.into());
    }
    Ok(pidfd_send_signal(handle, signal)?)
}

fn below(ancestor: Pid, all: Vec<Living>) -> Vec<Living> {
    let mut children: HashMap<Option<Pid>, Vec<Living>> = HashMap::new();
    for living in all {
        children.entry(living.parent).or_default().push(living);
    }
    let mut found = children.remove(&Some(ancestor)).unwrap_or_default();
    let mut next = 0;
    while let Some(living) = found.get(next) {
        let theirs = children.remove(&Some(living.pid)).unwrap_or_default();
        found.extend(theirs);
        next += 1;
    }
    found
}

fn processes() -> io::Result<Vec<Living>> {
    let numbers = fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    Ok(numbers.filter_map(Pid::from_raw).filter_map(read_process).collect())
}

fn read_process(pid: Pid) -> Option<Living> {
    parse_stat(&fs::read(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?)
}

/// `PID (NAME) STATE PARENT GROUP SESSION ...`; the name may hold anything, parentheses too. `None` for one that has
/// ended and only waits to be reaped.
fn parse_stat(stat: &[u8]) -> Option<Living> {
    let open = stat.iter().position(|byte| *byte == b'(')?;
    let close = stat.iter().rposition(|byte| *byte == b')')?;
    let name = String::from_utf8_lossy(stat.get(open + 1..close)?).into_owned();
    let number = std::str::from_utf8(&stat[..open]).ok()?.trim().parse().ok()?;
    let fields: Vec<&str> = std::str::from_utf8(&stat[close + 1..]).ok()?.split_ascii_whitespace().collect();
    let id = |at: usize| Some(Pid::from_raw(fields.get(at)?.parse().ok()?));
    if matches!(*fields.first()?, "Z" | "X") {
        return None;
    }
    let started = fields.get(STARTED)?.parse().ok()?;
    Some(Living { pid: Pid::from_raw(number)?, parent: id(1)?, group: id(2)?, started, name })
}

/// Position of the start time behind the name: field 22 of all.
const STARTED: usize = 19;

/// What the descriptors of a process lead to.
fn descriptors(pid: Pid) -> Vec<String> {
    let Ok(entries) = fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero())) else { return Vec::new() };
    let links = entries.take(MAX_DESCRIPTORS).filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    links.map(|link| link.to_string_lossy().into_owned()).collect()
}

/// Descriptors looked at per process.
const MAX_DESCRIPTORS: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_hold_anything() {
        let stat = b"12 (a) (b c) S 1 12 12 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 777 4096 100 18446744073709551615";
        let living = parse_stat(stat).unwrap();
        assert_eq!((living.pid, &*living.name, living.started), (pid(12), "a) (b c", 777));
        assert_eq!((living.parent, living.group), (Some(pid(1)), Some(pid(12))));
        assert_eq!(parse_stat(b"12 (a) Z 1 12 12 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 777 0 0 0"), None);
        for broken in [&b""[..], b"12", b"12 (a", b"12 (a) S", b"x (a) S 1 1 1", b")12("] {
            assert_eq!(parse_stat(broken), None);
        }
    }

    #[test]
    fn descendants_are_those_below_however_deep() {
        let living = |number, parent| Living {
            pid: pid(number),
            parent: Pid::from_raw(parent),
            group: None,
            started: 0,
            name: String::new(),
        };
        let all = vec![living(9, 8), living(8, 5), living(5, 1), living(6, 1), living(7, 6), living(1, 0)];
        let mut found: Vec<_> = below(pid(5), all).iter().map(|living| living.pid.as_raw_nonzero().get()).collect();
        found.sort_unstable();
        assert_eq!(found, [8, 9]);
    }

    #[test]
    fn who_holds_a_pipe_is_found() {
        let (read, _write) = io::pipe().unwrap();
        let link = fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&read))).unwrap();
        let held = [Held { streams: vec![Stream::Stderr], link: link.to_string_lossy().into_owned() }];
        let myself = rustix::process::getpid();
        let found = describe(&read_process(myself).unwrap(), &held);
        assert_eq!((found.pid, found.holds), (std::process::id(), vec![Stream::Stderr]));
        assert!(holders(&held, myself).is_empty());
        assert!(holders(&held, Pid::INIT).iter().any(|process| process.pid == std::process::id()));
    }

    fn pid(number: i32) -> Pid {
        Pid::from_raw(number).unwrap()
    }
}
