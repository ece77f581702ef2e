//! From a build to its follower.

use std::{
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use super::{
    Result, Tools,
    daemon::{free_port, is_listening},
    reader::{Form, follow},
    standing::{ADMIN, Standing},
};

pub(super) fn pipe(_: &Tools, _: &Path, command: [String; 4]) -> Result<Vec<Duration>> {
    let mut writer = Command::new(&command[0]).args(&command[1..]).stdout(Stdio::piped()).spawn()?;
    let took = follow(&mut writer.stdout.take().ok_or("no pipe")?, Form::Text)?;
    ended(writer)?;
    Ok(took)
}

/// A message per line, and nothing is kept.
pub(super) fn websocat(_: &Tools, _: &Path, command: [String; 4]) -> Result<Vec<Duration>> {
    let address = format!("127.0.0.1:{}", free_port()?);
    let port = address.rsplit(':').next().unwrap_or_default().parse()?;
    let mut receiver = Command::new("websocat");
    receiver.args(["-t", "-u", "--oneshot", &format!("ws-l:{address}"), "-"]);
    let mut receiver = receiver.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    while !is_listening(port)? {
        std::thread::yield_now();
    }
    let mut writer = Command::new(&command[0]).args(&command[1..]).stdout(Stdio::piped()).spawn()?;
    let output = writer.stdout.take().ok_or("no pipe")?;
    let sender = Command::new("websocat").args(["-t", "-u", "-", &format!("ws://{address}")]).stdin(output).spawn()?;
    let took = follow(&mut receiver.stdout.take().ok_or("no pipe")?, Form::Text)?;
    [writer, sender, receiver].into_iter().try_for_each(ended)?;
    Ok(took)
}

/// Stored, acknowledged, and read back.
pub(super) fn phonehome(
    tools: &Tools,
    scratch: &Path,
    command: [String; 4],
    durability: &str,
    what: &str,
) -> Result<Vec<Duration>> {
    let mut standing = Standing::start(&tools.server, scratch, durability)?;
    standing.declare("build")?;
    let mut stream = TcpStream::connect(("127.0.0.1", standing.port))?;
    write!(
        stream,
        "GET /api/v1/builds/build/{what} HTTP/1.0\r\nHost: localhost\r\nAuthorization: Bearer {ADMIN}\r\n\r\n"
    )?;
    skip_head(&mut stream)?;
    let agent = standing.agent(&tools.agent, "build").args(&command).spawn()?;
    let form = if what.starts_with("events") { Form::Events } else { Form::Text };
    let took = follow(&mut stream, form)?;
    ended(agent)?;
    standing.daemon.stop()?;
    Ok(took)
}

fn skip_head(stream: &mut TcpStream) -> Result<()> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    if head.split(' ').nth(1) == Some("200") { Ok(()) } else { Err(head.into()) }
}

fn ended(mut child: Child) -> Result<()> {
    let status = child.wait()?;
    if status.success() { Ok(()) } else { Err(format!("a program ended with {status}").into()) }
}
