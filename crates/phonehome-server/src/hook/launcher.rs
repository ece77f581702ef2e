//! The command that starts the builder.

use std::{ffi::OsString, process::Stdio, time::Duration};

use bytes::BytesMut;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::{Child, Command},
    sync::mpsc,
    time::timeout,
};
use tokio_util::task::TaskTracker;
use tracing::debug;

use super::printer::Notice;

/// A launcher that was started, or could not be.
#[derive(Debug)]
pub(super) struct Launcher {
    state: State,
    group: Option<Pid>,
    /// Tasks that read what it writes.
    readers: TaskTracker,
}

#[derive(Debug)]
enum State {
    Running(Child),
    NotStarted(String),
    Ended,
}

/// How a launcher ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Launched {
    Ok,
    Failed(String),
}

/// How long its output may stay open after its end before it is taken for ended.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What this process knows a standing server by, or is one with, and a builder has no business with.
const SECRETS: [&str; 7] = [
    "PHONEHOME_ADMIN_TOKEN",
    "PHONEHOME_ADMIN_TOKEN_FILE",
    "PHONEHOME_PIN",
    "PHONEHOME_READ_TOKEN",
    "PHONEHOME_READ_TOKEN_FILE",
    "PHONEHOME_TOKEN",
    "PHONEHOME_TOKEN_FILE",
];

/// One read of what it writes, bytes.
const BLOCK: usize = 8 * 1024;

impl Launcher {
    /// Starts it in a process group of its own, with the hook's standard input, where git writes what is pushed. What it
    /// writes goes through the printer, so that nothing it leaves behind holds the hook's own streams open.
    pub(super) fn start(command: &[OsString], variables: &[(&str, String)], lines: mpsc::Sender<Notice>) -> Self {
        let Some((program, arguments)) = command.split_first() else {
            return Self { state: State::NotStarted("is not given".into()), group: None, readers: TaskTracker::new() };
        };
        let mut process = Command::new(program);
        process.args(arguments);
        for name in SECRETS {
            process.env_remove(name);
        }
        process.envs(variables.iter().map(|(name, value)| (name, value)));
        process.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped());
        let readers = TaskTracker::new();
        match process.spawn() {
            Ok(mut child) => {
                forward(&readers, child.stdout.take(), lines.clone());
                forward(&readers, child.stderr.take(), lines);
                readers.close();
                let group = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
                Self { group, state: State::Running(child), readers }
            }
            Err(error) => {
                readers.close();
                let reason = format!("{} could not be started: {error}", program.to_string_lossy());
                Self { state: State::NotStarted(reason), group: None, readers }
            }
        }
    }

    /// Waits for its end and what it wrote until then, and after that never again. Cancel safe.
    pub(super) async fn ended(&mut self) -> Launched {
        let launched = match &mut self.state {
            State::Running(child) => match child.wait().await {
                Ok(status) if status.success() => Launched::Ok,
                Ok(status) => Launched::Failed(format!("failed with {status}")),
                Err(error) => Launched::Failed(format!("could not be waited for: {error}")),
            },
            State::NotStarted(reason) => Launched::Failed(std::mem::take(reason)),
            State::Ended => std::future::pending().await,
        };
        // Its last words come first; what it left in the background may keep its output open for as long as it likes.
        drop(timeout(LAST_WORDS, self.readers.wait()).await);
        self.state = State::Ended;
        launched
    }

    /// Tells it, and what it started in its process group, to end.
    pub(super) fn terminate(&self) {
        if let (State::Running(_), Some(group)) = (&self.state, self.group)
            && let Err(errno) = kill_process_group(group, Signal::TERM)
        {
            debug!("the launcher ended by itself: {errno}");
        }
    }

    /// Gives it `patience` to end by itself, then terminates it.
    pub(super) async fn finish(mut self, patience: Duration) {
        if let State::Running(_) = self.state
            && timeout(patience, self.ended()).await.is_err()
        {
            self.terminate();
        }
    }
}

fn forward(
    readers: &TaskTracker,
    stream: Option<impl AsyncRead + Send + Unpin + 'static>,
    lines: mpsc::Sender<Notice>,
) {
    let Some(mut stream) = stream else { return };
    readers.spawn(async move {
        let mut block = BytesMut::new();
        loop {
            block.reserve(BLOCK);
            match stream.read_buf(&mut block).await {
                Ok(1..) => {
                    if lines.send(Notice::Launcher(block.split().freeze())).await.is_err() {
                        // Nobody prints any more; what it writes is still read, or it would be stopped.
                        drop(tokio::io::copy(&mut stream, &mut tokio::io::sink()).await);
                        return;
                    }
                }
                Ok(0) | Err(_) => return,
            }
        }
    });
}
