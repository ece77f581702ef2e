//! Limits on what an agent and all below it may use, by control groups of version 1.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio, id},
    sync::atomic::{AtomicU32, Ordering},
};

use crate::support::eventually;

/// A group of this test's own. Whoever is left in it is killed at the end.
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    /// `None` where this cannot be done.
    pub(crate) fn new(controller: &str, limit: &str, value: &str) -> Option<Self> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let name = format!("phonehome-test-{}-{}", id(), MADE.fetch_add(1, Ordering::Relaxed));
        let path = PathBuf::from("/sys/fs/cgroup").join(controller).join(name);
        fs::create_dir(&path).ok()?;
        let group = Self(path);
        fs::write(group.0.join(limit), value).ok()?;
        Some(group)
    }

    /// Runs a program in it, with the arguments that are added.
    pub(crate) fn run(&self, program: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$ >\"$0/cgroup.procs\" && exec \"$@\""]).arg(&self.0).arg(program);
        command.stdin(Stdio::null());
        command
    }

    /// How many processes are in it.
    pub(crate) fn members(&self) -> usize {
        self.processes().lines().count()
    }

    fn processes(&self) -> String {
        fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        eventually("a control group is empty", || {
            for process in self.processes().lines() {
                drop(Command::new("kill").args(["-9", process]).stderr(Stdio::null()).status()); // it may be gone
            }
            fs::remove_dir(&self.0).is_ok()
        });
    }
}
