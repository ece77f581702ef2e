//! Sockets whose owners waste the server's time, beside agents who do not.

use std::{net::SocketAddr, time::Duration};

use rustix::process::Signal;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{MIB, peak_memory};
use crate::{
    faults::long_or,
    harness::{Process, Standing, patiently},
};

/// How long a socket that was cut stays away.
const PAUSE: Duration = Duration::from_millis(200);

/// Between two bytes of a socket that dribbles.
const DRIBBLE: Duration = Duration::from_secs(1);

/// Addresses that they come from.
const ADDRESSES: u8 = 64;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sockets_that_dribble_headers_keep_nobody_out() {
    let standing = Standing::start(&[]).await;
    let tokens = declare(&standing).await;
    let strangers = besiege(standing.address, b"GET /api/v1/builds HTTP/1.1\r\nHost: x\r\nX-Padding: ").await;
    let url = format!("ws://{}", standing.address);
    let agents = tokens.iter().map(|(build, token)| agent(&standing, build, token, &url)).collect();
    all_end(agents).await;
    assert_eq!(standing.get("/healthz").await.status, 200);
    for (build, _) in &tokens {
        assert_eq!(standing.ended(build).await["verdict"], json!("succeeded"));
    }
    assert_eq!(standing.get("/healthz").await.status, 200);
    drop(strangers);
    assert!(peak_memory(&standing.process) < memory(), "{}", peak_memory(&standing.process));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sockets_that_dribble_a_tls_hello_keep_nobody_out() {
    // Declared while it speaks plainly: what this is about comes after.
    let mut standing = Standing::start(&[]).await;
    let tokens = declare(&standing).await;
    standing.process.signal(Signal::TERM);
    assert_eq!(standing.process.ended().await, 0);
    standing.options(&["--tls-self-signed"]);
    standing.start_again().await;
    // The beginning of a record that would carry a client's hello of 512 bytes (RFC 8446, section 5.1).
    let strangers = besiege(standing.address, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03").await;
    let url = format!("wss://{}", standing.address);
    let agents = tokens.iter().map(|(build, token)| agent(&standing, build, token, &url)).collect();
    all_end(agents).await;
    assert!(peak_memory(&standing.process) < memory(), "{}", peak_memory(&standing.process));
    drop(strangers);
    standing.process.signal(Signal::TERM);
    assert_eq!(standing.process.ended().await, 0);
    standing.options(&[]);
    standing.start_again().await;
    for (build, _) in &tokens {
        assert_eq!(standing.ended(build).await["complete"], json!(true));
    }
}

/// A handshake takes tens of kilobytes.
fn memory() -> u64 {
    long_or(96 * MIB, 256 * MIB)
}

async fn declare(standing: &Standing) -> Vec<(String, String)> {
    let mut tokens = Vec::new();
    for number in 0..long_or(20, 100) {
        let build = format!("honest-{number}");
        let token = standing.declare_one(&build).await;
        tokens.push((build, token));
    }
    tokens
}

fn agent(standing: &Standing, build: &str, token: &str, url: &str) -> Process {
    let mut command = standing.agent_command(build, token);
    command.env("PHONEHOME_URL", url);
    if let Some(pin) = pin(standing) {
        command.env("PHONEHOME_PIN", pin);
    }
    let options = ["--tee", "off", "--require-delivery", "--linger", "1m", "--"];
    Process::spawn(command.args(options).args(["sh", "-c", "seq 1 20000"]))
}

/// What the server says of its key, when it has one.
fn pin(standing: &Standing) -> Option<String> {
    let told = String::from_utf8(standing.process.stderr.so_far()).unwrap();
    let serving = told.lines().find(|line| line.contains("\"serving\""))?;
    let serving: serde_json::Value = serde_json::from_str(serving).unwrap();
    let found = serving.pointer("/pin").or_else(|| serving.pointer("/fields/pin"))?;
    Some(found.as_str()?.to_owned())
}

async fn all_end(agents: Vec<Process>) {
    for mut agent in agents {
        let code = agent.ended().await;
        assert_eq!(code, 0, "{}", String::from_utf8_lossy(&agent.stderr.so_far()));
    }
}

/// Opens many sockets that say nothing, or a byte of `beginning` now and then, and come back when they are cut.
async fn besiege(target: SocketAddr, beginning: &'static [u8]) -> JoinSet<()> {
    let mut strangers = JoinSet::new();
    let (sender, mut arrivals) = tokio::sync::mpsc::channel(16);
    let count = long_or(500, 5000);
    for number in 0..count {
        let sender = sender.clone();
        strangers.spawn(async move {
            let mut socket = stranger(target, number).await;
            sender.send(()).await.unwrap_or(()); // they may all have been counted
            loop {
                dribble(&mut socket, if number % 3 == 0 { &[] } else { beginning }).await;
                sleep(PAUSE).await;
                socket = stranger(target, number).await;
            }
        });
    }
    for _ in 0..count {
        patiently("strangers arrive", arrivals.recv()).await.unwrap();
    }
    strangers
}

/// Connects, as often as it takes.
async fn stranger(target: SocketAddr, number: u32) -> TcpStream {
    loop {
        let socket = TcpSocket::new_v4().unwrap();
        let host = 2 + (number % u32::from(ADDRESSES)) as u8;
        socket.bind(SocketAddr::from(([127, 0, 0, host], 0))).unwrap();
        if let Ok(stream) = socket.connect(target).await {
            return stream;
        }
        sleep(PAUSE).await;
    }
}

/// A byte at a time, until the server has had enough.
async fn dribble(socket: &mut TcpStream, bytes: &[u8]) {
    let mut bytes = bytes.iter().copied().chain(std::iter::repeat(b'x'));
    let says_nothing = bytes.size_hint().0 == 0;
    let mut answer = [0; 512];
    loop {
        if let Ok(Ok(0) | Err(_)) = timeout(DRIBBLE, socket.read(&mut answer)).await {
            return;
        }
        let byte = bytes.next().unwrap_or(b'x');
        if !says_nothing && socket.write_all(&[byte]).await.is_err() {
            return;
        }
    }
}
