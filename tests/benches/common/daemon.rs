//! Programs that run beside a bench, and how to wait for them.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::time::Instant;

use super::Result;

/// What something may take that must happen.
const PATIENCE: Duration = Duration::from_secs(300);

/// Between two looks at something nobody announces.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// A daemon that ends with its owner, and has a file for what it says.
pub(super) struct Daemon {
    pub(super) child: Child,
    log: PathBuf,
}

impl Daemon {
    pub(super) fn start(command: &mut Command, log: PathBuf) -> Result<Self> {
        let (out, errors) = (fs::File::create(&log)?, fs::File::options().append(true).open(&log)?);
        let child = command.stdin(Stdio::null()).stdout(out).stderr(errors).spawn()?;
        Ok(Self { child, log })
    }

    /// Waits until it has said something.
    pub(super) fn says(&mut self, text: &str) -> Result<()> {
        let log = self.log.clone();
        self.until(text, || Ok(fs::read_to_string(&log)?.contains(text)))
    }

    /// Waits for a fact that it brings about.
    pub(super) fn until(&mut self, what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
        let give_up = Instant::now() + PATIENCE;
        while !is_so()? {
            if self.child.try_wait()?.is_some() || Instant::now() > give_up {
                return Err(format!("no {what}: {}", fs::read_to_string(&self.log)?).into());
            }
            pause();
        }
        Ok(())
    }

    /// Asks it to end, and waits.
    pub(super) fn stop(&mut self) -> Result<()> {
        if self.child.try_wait()?.is_none() {
            let pid = Pid::from_raw(self.child.id().cast_signed()).ok_or("no process")?;
            kill_process(pid, Signal::TERM)?;
            self.child.wait()?;
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            drop(self.child.kill()); // it is gone, or goes
            drop(self.child.wait());
        }
    }
}

fn pause() {
    pause_for(LOOK_AGAIN);
}

#[expect(
    clippy::disallowed_methods,
    reason = "nothing else runs in this thread, and a loop would use CPU that is measured"
)]
pub(super) fn pause_for(time: Duration) {
    std::thread::sleep(time);
}

pub(super) fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

/// Whether somebody listens, without connecting (proc_net_tcp(5); state 0A is LISTEN).
pub(super) fn is_listening(port: u16) -> Result<bool> {
    Ok(fs::read_to_string("/proc/net/tcp")?.contains(&format!(":{port:04X} 00000000:0000 0A")))
}
