//! Who follows a running build: to its end, to the server's end, or without reading.

use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;
use tokio::time::timeout;

use super::{MIB, Reader, peak_memory};
use crate::{
    faults::long_or,
    harness::{ADMIN, Process, Standing, skipped, works},
};

/// Lines that are written in two parts.
const PARTS: usize = 200;

/// What curl exits with when a body ends before its end.
const PARTIAL_FILE: i32 = 18;

fn curl(standing: &Standing, path: &str) -> Process {
    let mut command = standing.scene.command("curl");
    command.args(["-sSN", "-H", &format!("Authorization: Bearer {ADMIN}")]);
    Process::spawn(command.arg(format!("http://{}{path}", standing.address)))
}

#[tokio::test]
async fn curl_follows_a_build_to_its_end_through_lines_that_come_in_parts() {
    if !works("curl", &["--version"]) {
        return skipped("curl is missing");
    }
    let standing = Standing::start(&[]).await;
    let token = standing.declare_one("b").await;
    let (part, line) = (standing.scene.gate("part"), standing.scene.gate("line"));
    let script = format!(
        "n=1; while [ $n -le {PARTS} ]; do printf 'step %s' $n; {}; printf ' done\\n'; {}; n=$((n + 1)); done; exit 3",
        part.pass(),
        line.pass()
    );
    let mut agent = standing.agent("b", &token, &["--tee", "off"], &script);
    standing.process.stderr.shows("\"connected\"").await;
    let log = "/api/v1/builds/b/log?follow=true";
    let mut text = curl(&standing, log);
    let mut json = curl(&standing, &format!("{log}&format=ndjson"));
    let mut events = curl(&standing, "/api/v1/builds/b/events");
    let mut expected = String::new();
    for number in 1..=PARTS {
        // What a line begins with is seen while the build waits before its rest.
        expected += &format!("step {number}");
        text.stdout.shows(&expected).await;
        part.open();
        expected += " done\n";
        text.stdout.shows(&expected).await;
        line.open();
    }
    assert_eq!(agent.ended().await, 3);
    for follower in [&mut text, &mut json, &mut events] {
        assert_eq!(follower.ended().await, 0);
    }
    assert_eq!(String::from_utf8(text.stdout.all().await).unwrap(), expected);
    let told = String::from_utf8(json.stdout.all().await).unwrap();
    let lines: Vec<serde_json::Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let output: String = lines.iter().filter_map(|line| line["text"].as_str()).collect();
    assert_eq!(output, expected);
    assert_eq!(lines.last().unwrap()["end"]["verdict"], json!("failed"), "{told}");
    let told = String::from_utf8(events.stdout.all().await).unwrap();
    assert_eq!(told.matches("event: end\n").count(), 1, "{told}");
    assert!(told.rsplit("\n\n").nth(1).unwrap().contains("event: end"), "it is last: {told}");
}

#[tokio::test]
async fn curl_says_when_the_server_goes_away_under_it() {
    if !works("curl", &["--version"]) {
        return skipped("curl is missing");
    }
    let mut standing = Standing::start(&[]).await;
    let token = standing.declare_one("b").await;
    let gate = standing.scene.gate("end");
    let mut agent = standing.agent("b", &token, &[], &format!("echo begun; {}; echo ended", gate.pass()));
    for signal in [Signal::KILL, Signal::TERM] {
        let followers = ["log?follow=true", "log?follow=true&format=ndjson", "events"];
        let followers = followers.map(|what| curl(&standing, &format!("/api/v1/builds/b/{what}")));
        for follower in &followers {
            follower.stdout.shows("begun").await;
        }
        standing.process.signal(signal);
        assert_eq!(standing.process.ended().await, if signal == Signal::TERM { 0 } else { 128 + 9 });
        for mut follower in followers {
            assert_eq!(follower.ended().await, PARTIAL_FILE, "{signal:?}");
        }
        standing.start_again().await;
    }
    gate.open();
    assert_eq!(agent.ended().await, 0);
    let mut whole = curl(&standing, "/api/v1/builds/b/log?follow=true");
    assert_eq!(whole.ended().await, 0);
    assert_eq!(whole.stdout.all().await, b"begun\nended\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_that_do_not_read_slow_no_build_and_cost_little_memory() {
    let lines = long_or(1_000_000, 40_000_000);
    let standing = Standing::start(&[]).await;
    let gate = standing.scene.gate("followed");
    let token = standing.declare_one("b").await;
    let script = format!("echo begun; {}; seq -f '%063.0f' 1 {lines}", gate.pass());
    let mut agent = standing.agent("b", &token, &["--tee", "off"], &script);
    standing.process.stderr.shows("\"connected\"").await;
    let mut idle = Vec::new();
    for what in ["log?follow=true", "log?follow=true&format=ndjson", "events", "log?follow=true&timestamps=true"] {
        for _ in 0..READERS / 4 {
            let mut reader = Reader::ask(&standing, &format!("/api/v1/builds/b/{what}"), "").await;
            reader.next(1).await;
            idle.push((what, reader));
        }
    }
    let before = peak_memory(&standing.process);
    gate.open();
    // None of them reads anything: a build that waited for one would never end.
    let limit = long_or(Duration::from_secs(60), Duration::from_secs(1800));
    let ended = timeout(limit, async {
        while !agent.has_ended() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    assert!(ended.await.is_ok(), "the build waits for a reader");
    assert_eq!(agent.ended().await, 0);
    assert_eq!(standing.ended("b").await["complete"], json!(true));
    let grown = peak_memory(&standing.process) - before;
    assert!(grown < BUILD + READERS as u64 * READER, "{grown} bytes for {READERS} readers");
    // Who reads in the end gets it all.
    let (_, reader) = &mut idle[0];
    let expected = b"begun\n".len() - 1 + lines * 64;
    assert_eq!(reader.rest().await.len(), expected);
}

/// Readers that do not read.
const READERS: usize = 40;

/// What one may cost.
const READER: u64 = MIB;

/// What the build itself may.
const BUILD: u64 = 32 * MIB;
