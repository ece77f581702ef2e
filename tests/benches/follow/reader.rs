//! A follower: reads, notes when, and checks that each line comes once and in order.

use std::{
    io::Read,
    time::{Duration, SystemTime},
};

use super::Result;

/// The time that all processes of this machine share. A clock that is set meanwhile would show.
pub(super) fn now() -> Duration {
    SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default()
}

/// How lines are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// As they are.
    Text,
    /// In the `text` of the JSON of server-sent events.
    Events,
}

/// Reads to the end and says how long each line was on its way.
pub(super) fn follow(source: &mut impl Read, form: Form) -> Result<Vec<Duration>> {
    let (mut took, mut packed, mut text) = (Vec::new(), Vec::new(), Vec::new());
    let mut block = vec![0; 64 * 1024];
    loop {
        let count = source.read(&mut block)?;
        let read_at = now();
        if count == 0 {
            return Ok(took);
        }
        match form {
            Form::Text => text.extend_from_slice(&block[..count]),
            Form::Events => {
                packed.extend_from_slice(&block[..count]);
                while let Some(line) = next_line(&mut packed) {
                    text.extend(unpacked(&line)?.into_bytes());
                }
            }
        }
        while let Some(line) = next_line(&mut text) {
            took.push(read_at.saturating_sub(written_at(&line, took.len())?));
        }
    }
}

fn next_line(bytes: &mut Vec<u8>) -> Option<String> {
    let end = bytes.iter().position(|&byte| byte == b'\n')?;
    let line: Vec<u8> = bytes.drain(..=end).collect();
    Some(String::from_utf8_lossy(&line).into_owned())
}

/// The output in a line of an event, if any.
fn unpacked(line: &str) -> Result<String> {
    let Some(data) = line.strip_prefix("data:") else { return Ok(String::new()) };
    let data: serde_json::Value = serde_json::from_str(data)?;
    let is_output = data["stream"] == "stdout";
    Ok(data["text"].as_str().filter(|_| is_output).unwrap_or_default().to_owned())
}

/// When a line was written, which must be the one that comes next.
fn written_at(line: &str, number: usize) -> Result<Duration> {
    let mut words = line.split(' ');
    if words.next() != Some(number.to_string().as_str()) {
        return Err(format!("not line {number}: {line}").into());
    }
    Ok(Duration::from_nanos(words.next().unwrap_or_default().parse()?))
}
