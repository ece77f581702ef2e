//! A running program whose output is read all the time.

use std::{os::unix::process::ExitStatusExt, process::Stdio, sync::Arc};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::{Child, Command},
    sync::watch,
    task::JoinHandle,
};

use super::patiently;

/// A process that ends with its test.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    pub(crate) stdout: Output,
    pub(crate) stderr: Output,
}

impl Process {
    /// Starts it with nothing on its standard input.
    pub(crate) fn spawn(command: &mut Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let (stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        Self { child, stdout: Output::read(stdout), stderr: Output::read(stderr) }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().expect("it was not waited for yet").cast_signed()).unwrap()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Waits for its end and says how it ended, as a shell does: a signal is 128 more than its number.
    pub(crate) async fn ended(&mut self) -> i32 {
        exit_code(patiently("a process ends", self.child.wait()).await.unwrap())
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }
}

/// As a shell says it.
pub(crate) fn exit_code(status: std::process::ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap())
}

/// What a process writes to one of its streams.
#[derive(Debug, Clone)]
pub(crate) struct Output {
    seen: watch::Receiver<Seen>,
    reader: Arc<Reader>,
}

#[derive(Debug, Default)]
struct Seen {
    bytes: Vec<u8>,
    ended: bool,
}

/// Ends with the last who is interested.
#[derive(Debug)]
struct Reader(JoinHandle<()>);

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Output {
    fn read(mut stream: impl AsyncRead + Send + Unpin + 'static) -> Self {
        let (seen, receiver) = watch::channel(Seen::default());
        let reader = tokio::spawn(async move {
            let mut block = vec![0; 64 * 1024];
            while let Ok(count @ 1..) = stream.read(&mut block).await {
                seen.send_modify(|seen| seen.bytes.extend_from_slice(&block[..count]));
            }
            seen.send_modify(|seen| seen.ended = true);
        });
        Self { seen: receiver, reader: Arc::new(Reader(reader)) }
    }

    /// Waits until it contains `text`.
    pub(crate) async fn shows(&self, text: &str) {
        let mut seen = self.seen.clone();
        let shown = seen.wait_for(|seen| seen.ended || contains(&seen.bytes, text.as_bytes()));
        let result = tokio::time::timeout(super::PATIENCE, shown).await.map(drop);
        let so_far = self.so_far();
        assert!(contains(&so_far, text.as_bytes()), "no {text:?} ({result:?}) in: {}", so_far.escape_ascii());
    }

    /// Waits for its end and returns all of it.
    pub(crate) async fn all(&self) -> Vec<u8> {
        let mut seen = self.seen.clone();
        patiently("an output ends", seen.wait_for(|seen| seen.ended)).await.unwrap();
        self.so_far()
    }

    /// What was written up to now.
    pub(crate) fn so_far(&self) -> Vec<u8> {
        self.seen.borrow().bytes.clone()
    }

    /// Closes the reading end: the writer's next write fails.
    pub(crate) async fn stop_reading(&self) {
        self.reader.0.abort();
        let mut seen = self.seen.clone();
        while seen.changed().await.is_ok() {} // the reader's end drops the sender, and the pipe before it
    }
}

/// Whether `text` occurs in `bytes`.
fn contains(bytes: &[u8], text: &[u8]) -> bool {
    bytes.windows(text.len()).any(|window| window == text)
}
