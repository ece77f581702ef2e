//! The standing server where it hurts: logs larger than memory, strangers who waste its time, readers who do not read, an
//! upgrade, a full disk, a clock that goes backwards.
//!
//! By default sizes are such that each test takes seconds; `PHONEHOME_SWEEP=full` takes those of the real thing. What
//! must be cheap is shown by what the server did for it, bytes read and memory taken, never by time.

mod clock;
mod followers;
mod large;
mod room;
mod strangers;
mod upgrade;

use std::{fs, future::Future, time::Duration};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};

use crate::harness::{ADMIN, Process, Standing, patiently};

const MIB: u64 = 1 << 20;

/// Waits for something that takes longer the larger the trial is.
async fn within<T>(limit: Duration, what: &str, event: impl Future<Output = T>) -> T {
    match timeout(limit, event).await {
        Ok(value) => value,
        Err(_) => panic!("waited {} s for nothing: {what}", limit.as_secs()),
    }
}

/// Bytes that a process has asked the system to read so far, from files and sockets (proc_pid_io(5)).
fn bytes_read(process: &Process) -> u64 {
    figure(process, "io", "rchar: ")
}

/// The most memory a process has had so far, bytes.
fn peak_memory(process: &Process) -> u64 {
    figure(process, "status", "VmHWM:") * 1024
}

fn figure(process: &Process, file: &str, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/{file}", process.pid().as_raw_nonzero())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// A reader of the API that reads no more than it says.
struct Reader {
    stream: TcpStream,
    has_head: bool,
    /// What came and was not asked for yet.
    left: Vec<u8>,
}

impl Reader {
    /// Asks, and does not wait for the answer.
    async fn ask(standing: &Standing, path: &str, headers: &str) -> Self {
        let mut stream = TcpStream::connect(standing.address).await.unwrap();
        let request = format!(
            "GET {path} HTTP/1.0\r\nHost: {}\r\nAuthorization: Bearer {ADMIN}\r\n{headers}\r\n",
            standing.address
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        Self { stream, has_head: false, left: Vec::new() }
    }

    /// The next `count` bytes of the body, or what is left of it.
    async fn next(&mut self, count: usize) -> Vec<u8> {
        while !self.has_head {
            assert!(self.more().await, "the server hung up: {}", self.left.escape_ascii());
            self.skip_head();
        }
        while self.left.len() < count && self.more().await {}
        let rest = self.left.split_off(count.min(self.left.len()));
        std::mem::replace(&mut self.left, rest)
    }

    fn skip_head(&mut self) {
        if let Some(end) = self.left.windows(4).position(|window| window == b"\r\n\r\n") {
            assert_eq!(self.left.get(8..11), Some(&b" 20"[..]), "{}", self.left.escape_ascii());
            self.left.drain(..end + 4);
            self.has_head = true;
        }
    }

    /// Reads once, and says whether there was something.
    async fn more(&mut self) -> bool {
        let mut block = [0; 16 * 1024];
        let got = patiently("more of an answer", self.stream.read(&mut block)).await.unwrap();
        self.left.extend_from_slice(&block[..got]);
        got > 0
    }

    /// All that is left of the body.
    async fn rest(&mut self) -> Vec<u8> {
        self.next(usize::MAX).await
    }
}

/// The build once it has ended, however long that takes.
async fn ended_within(limit: Duration, standing: &Standing, build: &str) -> Value {
    within(limit, "a build ends", async {
        loop {
            let answer = standing.get(&format!("/api/v1/builds/{build}")).await.json();
            if answer["state"] == json!("ended") {
                return answer;
            }
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await
}

/// An answer, and how many bytes the server read for it.
async fn cost<T>(standing: &Standing, event: impl Future<Output = T>) -> (T, u64) {
    let before = bytes_read(&standing.process);
    let value = event.await;
    (value, bytes_read(&standing.process) - before)
}
