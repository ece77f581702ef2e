//! The agent is killed at any moment, and the next one of its step takes over what it left.

use std::{fs, time::Duration};

use rustix::process::Signal;
use serde_json::Value;
use tokio::time::sleep;

use crate::{
    faults::{at_each, long_or},
    harness::{Life, Lines, Mode, Proxy, Random, Site, eventually},
};

/// Some agents have a server all the time, over a network that cuts; the others never had one when they die.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_killed_at_any_moment_leaves_a_clean_beginning() {
    at_each(0..long_or(10, 100), |seed| async move {
        let site = Site::new();
        let mut random = Random::new(seed);
        let lines = Lines::prepare(&site.scene, 20_000);
        let has_server = seed % 3 != 0;
        let mut collector = if has_server { Some(site.started().await) } else { None };
        let proxy = Proxy::to(site.address, Mode::Cut(4_000..150_000), seed).await;
        let options = ["--linger", "5m", "--spool-dir", "spool"];
        let mut first = site.agent_through(&proxy, &options, Lines::UNTIL_ENOUGH);
        eventually("it writes", || site.scene.path("written").exists()).await;
        if has_server {
            eventually("some of it is stored, or the agent says why not", || site.stored(1) > 0 || first.has_ended())
                .await;
            assert!(!first.has_ended(), "{}", String::from_utf8_lossy(&first.stderr.so_far()));
        }
        sleep(Duration::from_millis(random.within(0..800))).await; // any moment
        first.signal(Signal::KILL);
        assert_eq!(first.ended().await, 137);
        let written = Lines::written(&site.scene);
        let collector = collector.take().unwrap_or_else(|| site.start(&[], ""));
        let second = "cat lines | head -n 200; exit 7";
        let mut second = site.agent_through(&proxy, &options, second);
        let life = Life::of(collector).await;
        assert_eq!(second.ended().await, 7, "seed {seed}");

        let (stored, heir) = taken_over(&site, &written, has_server, seed);
        assert!(lines.all().starts_with(&stored), "seed {seed}: {} bytes are no beginning", stored.len());
        site.assert_whole(heir, &lines.first(200), 7, &[life]);
    })
    .await;
}

/// What is stored of the killed agent, and the number of its successor's attempt.
fn taken_over(site: &Site, written: &[u8], had_server: bool, seed: u64) -> (Vec<u8>, u32) {
    if !site.attempt(2).exists() {
        assert!(!had_server, "seed {seed}: the second agent passes for the first");
        return (Vec::new(), 1); // it had spooled nothing before it died
    }
    let stored = fs::read(site.attempt(1).join("log")).unwrap();
    // What the command copies to its file it has written to the agent before.
    assert!(stored.len() <= written.len() + LINE, "seed {seed}: more than was written");
    let events = fs::read_to_string(site.attempt(2).join("events")).unwrap();
    let mut told = events.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    // When everything was acknowledged before it died there is nothing to take over.
    assert!(had_server || told.any(|event| event["event"] == "took-over"), "seed {seed}: {events}");
    (stored, 2)
}

/// More than one line has.
const LINE: usize = 100;
