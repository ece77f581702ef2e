//! What processes use, and how children end.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Child,
    time::Duration,
};

use super::{Result, daemon::Daemon};

/// CPU time of a daemon and its children so far.
pub(super) fn cpu(daemon: &Daemon) -> Result<Duration> {
    ticks(&format!("/proc/{}/stat", daemon.child.id()), 0..4)
}

/// Waits for children, all of which must succeed.
pub(super) fn all_ended(children: impl IntoIterator<Item = Child>) -> Result<()> {
    let ended: Vec<_> = children.into_iter().map(|mut child| child.wait()).collect();
    for status in ended {
        let status = status?;
        if !status.success() {
            return Err(format!("a program ended with {status}").into());
        }
    }
    Ok(())
}

/// CPU time of all children that were waited for, with theirs.
pub(super) fn children_cpu() -> Result<Duration> {
    ticks("/proc/self/stat", 2..4)
}

/// Fields from the 14th on of proc_pid_stat(5): own user and system time, then those of children; in ticks of 10 ms.
fn ticks(path: &str, fields: std::ops::Range<usize>) -> Result<Duration> {
    let stat = fs::read_to_string(path)?;
    let (_, rest) = stat.rsplit_once(") ").ok_or("no stat")?;
    let times = rest.split(' ').skip(11 + fields.start).take(fields.len());
    Ok(Duration::from_millis(10 * times.map(|field| field.parse::<u64>().unwrap_or(0)).sum::<u64>()))
}

/// The bytes of all files together; one that is not there yet has none.
pub(super) fn total_size(paths: &[PathBuf]) -> u64 {
    paths.iter().map(|path| fs::metadata(path).map_or(0, |found| found.len())).sum()
}

/// Where a program is.
pub(super) fn installed(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/opt/fluent-bit/bin".into()]);
    places.map(|directory: PathBuf| directory.join(program)).find(|place| Path::is_file(place))
}
