//! How large the agent gets while a command writes.

use std::{
    fs,
    io::{self, Write},
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::time::interval;

use super::{Result, home::Home, processes::quiet, say, verdict};

/// Role of this program as the command: it writes so many bytes, at so many lines a second or, with 0, at once.
pub(super) const WRITER: &str = "write";

/// Largest resident set of the agent, KiB.
const LIMIT: u64 = 6 * 1024;

/// What a command writes: what that is like, bytes, lines a second.
const WORKLOADS: [(&str, u64, u32); 2] =
    [("200 MB at full speed", 200_000_000, 0), ("1,000 lines a second for 5 s", 5_000 * LINE.len() as u64, 1_000)];

const LINE: &[u8] = b"[ 42%] Building object src/library/module/some_file_of_usual_length.o\n";

/// How often the agent is looked at: it is gone soon after its last output.
const LOOK: Duration = Duration::from_millis(2);

/// Streams all workloads over TLS, with the options' defaults. Says whether the agent stayed within the limit.
pub(super) fn measure(agent: &Path, home: &Home) -> Result<bool> {
    say("\nlargest resident set of the agent while it streams over TLS, default settings");
    let mut is_within = true;
    for (name, bytes, rate) in WORKLOADS {
        let largest = stream(agent, home, bytes, rate)?;
        is_within &= largest <= LIMIT;
        say(&format!("{name:<30} {largest:>6} KiB, {LIMIT} allowed{}", verdict(largest <= LIMIT)));
    }
    Ok(is_within)
}

fn stream(agent: &Path, home: &Home, bytes: u64, rate: u32) -> Result<u64> {
    let own = std::env::current_exe()?;
    let role: [PathBuf; 3] = [WRITER.into(), bytes.to_string().into(), rate.to_string().into()];
    let words: Vec<_> = [agent.to_owned(), "--".into(), own].into_iter().chain(role).collect();
    let visit = home.expect()?;
    let mut child = quiet(&words, &visit.variables()).spawn()?;
    let status = format!("/proc/{}/status", child.id());
    let mut largest = 0;
    let mut looks = ticks(LOOK)?;
    let end = loop {
        if let Some(end) = child.try_wait()? {
            break end;
        }
        largest = high_water(&status).unwrap_or(largest);
        looks();
    };
    visit.succeeded()?;
    if end.success() { Ok(largest) } else { Err(format!("the agent ended with {end}").into()) }
}

/// `VmHWM`, KiB (proc_pid_status(5)). An ended process has none.
fn high_water(status: &str) -> Option<u64> {
    let text = fs::read_to_string(status).ok()?;
    text.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok())
}

/// The command.
pub(super) fn write(bytes: u64, rate: u32) -> Result<()> {
    let mut stdout = fs::File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let lines = bytes / LINE.len() as u64;
    if rate == 0 {
        let block = LINE.repeat(1_000);
        return Ok((0..lines / 1_000).try_for_each(|_| stdout.write_all(&block))?);
    }
    let mut next = ticks(Duration::from_secs(1) / rate)?;
    for _ in 0..lines {
        next();
        stdout.write_all(LINE)?;
    }
    Ok(())
}

/// Waits for the next of many moments that are `period` apart.
fn ticks(period: Duration) -> Result<impl FnMut()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    let mut ticks = runtime.block_on(async { interval(period) });
    Ok(move || {
        runtime.block_on(ticks.tick());
    })
}
