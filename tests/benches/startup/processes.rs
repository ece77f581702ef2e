//! Starting programs, and what they use.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use tokio::time::Instant;

use super::Result;

/// What processes used.
#[derive(Clone, Copy)]
pub(super) struct Used {
    pub(super) cpu: Duration,
    /// Without input or output: the price of memory that is touched for the first time.
    pub(super) faults: u64,
}

impl Used {
    pub(super) fn since(self, before: Self) -> Self {
        Self { cpu: self.cpu - before.cpu, faults: self.faults - before.faults }
    }

    pub(super) fn per_run(self, runs: u32) -> Self {
        Self { cpu: self.cpu / runs, faults: self.faults / u64::from(runs) }
    }
}

/// What all children used that were waited for, and theirs (getrusage(2)).
pub(super) fn used() -> Used {
    #[expect(unsafe_code, reason = "there is no safe wrapper, and /proc counts in ticks of 10 ms")]
    // SAFETY: rusage is plain data for which zeroes are valid; the pointer is to a local. With a valid `who` the call
    // cannot fail.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage);
        usage
    };
    let time = |time: libc::timeval| {
        Duration::from_secs(time.tv_sec.unsigned_abs()) + Duration::from_micros(time.tv_usec.unsigned_abs())
    };
    Used { cpu: time(usage.ru_utime) + time(usage.ru_stime), faults: usage.ru_minflt.unsigned_abs() }
}

/// Runs a command to its end, silent and with an environment of its own. Returns the time it took.
pub(super) fn run(words: &[PathBuf], variables: &[(&str, String)]) -> Result<Duration> {
    let mut command = quiet(words, variables);
    let start = Instant::now();
    let status = command.status()?;
    let wall = start.elapsed();
    if status.success() { Ok(wall) } else { Err(format!("{words:?} ended with {status}").into()) }
}

/// A command with nothing to read, nobody to write to, and these variables.
pub(super) fn quiet(words: &[PathBuf], variables: &[(&str, String)]) -> Command {
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).env_clear().envs(env::var_os("PATH").map(|path| ("PATH", path)));
    command.envs(variables.iter().map(|(name, value)| (name, value)));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Where a program is. By its name alone it would be started in another way, which costs more.
pub(super) fn installed(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|directory| directory.join(program)).find(|place| place.is_file())
}

/// Builds the agent as it is shipped, into the directory that this program was built into: `TARGET/PROFILE/deps/NAME`.
pub(super) fn static_agent() -> Result<PathBuf> {
    let triple = format!("{}-unknown-linux-musl", env::consts::ARCH);
    let own = env::current_exe()?;
    let target: &Path = own.ancestors().nth(3).ok_or("no target directory")?;
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["rustc", "--locked", "--profile", "dist", "-p", "phonehome-agent", "--bin", "phonehome-agent"]);
    cargo.args(["--target", &triple, "--target-dir"]).arg(target).args(["--", "-C", "relocation-model=static"]);
    if !cargo.status()?.success() {
        return Err("the agent does not build; name one".into());
    }
    Ok(target.join(triple).join("dist/phonehome-agent"))
}
