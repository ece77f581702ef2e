//! The server is killed at the operations of its disk, by the fault points of debug builds.

use crate::{
    faults::{LINGER, at_each, is_full, long_or},
    harness::{Life, Lines, Site, eventually, skipped},
};

/// What a server does to files, and the names on which it does it in an ordinary build.
pub(super) const OPERATIONS: [(&str, &[&str]); 7] = [
    ("mkdir", &["builds", "1", "kept"]),
    ("open", &["reserve.tmp", "log", "events", "index", "attempt.tmp", "finished.tmp", "verdict.tmp"]),
    ("write", &["reserve.tmp", "log", "index", "attempt.tmp", "finished.tmp", "verdict.tmp"]),
    ("sync", &["reserve.tmp", "log", "index", "attempt.tmp", "finished.tmp", "verdict.tmp"]),
    ("truncate", &["reserve.tmp", "attempt.tmp", "finished.tmp", "verdict.tmp"]),
    ("rename", &["reserve", "attempt.json", "finished.json", "verdict.json"]),
    ("syncdir", &["data", "builds", "kept", "main", "1"]),
];

/// Files that are written to again and again: killed at a later time too.
const GROWING: [&str; 2] = ["log", "index"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_killed_at_any_operation_goes_on_where_its_log_ends() {
    if !has_fault_points().await {
        return skipped("the programs have no fault points, they are a release build's");
    }
    let mut places = Vec::new();
    for (operation, names) in OPERATIONS {
        for name in names {
            places.push(format!("kill@1:{operation}:{name}"));
            if operation == "write" {
                places.push(format!("torn@1:{operation}:{name}"));
            }
            if GROWING.contains(name) && ["write", "sync"].contains(&operation) {
                places.push(format!("kill@4:{operation}:{name}"));
            }
        }
    }
    at_each(places, |fault| async move {
        assert!(killed_once(&fault).await, "{fault} has not happened");
    })
    .await;
}

/// Every operation of every kind, up to the last of a build.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_killed_at_the_nth_operation_goes_on_for_every_n() {
    if !is_full() {
        return skipped("it takes minutes; PHONEHOME_SWEEP=full runs it");
    }
    let kinds = OPERATIONS.iter().map(|(operation, _)| ("kill", *operation)).chain([("torn", "write")]);
    at_each(kinds, |(action, operation)| async move {
        for at in 1.. {
            if !killed_once(&format!("{action}@{at}:{operation}:*")).await {
                assert!(at > 3, "{action} at {operation}: there were only {at}");
                return;
            }
        }
    })
    .await;
}

/// One build whose server is killed in every one of its lives, each time an operation later: in the middle of recovery
/// as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_killed_in_every_life_comes_further_in_each() {
    if !has_fault_points().await {
        return skipped("the programs have no fault points, they are a release build's");
    }
    let kinds = [("kill", "open"), ("torn", "write"), ("kill", "sync"), ("kill", "syncdir"), ("kill", "truncate")];
    at_each(kinds, |(action, operation)| async move {
        let site = Site::new();
        let _lines = Lines::prepare(&site.scene, 60_000);
        let mut agent = site.agent(&LINGER, Lines::UNTIL_ENOUGH);
        let last = long_or(8, 60);
        let mut lives = Vec::new();
        for at in 1..=last {
            let mut collector = site.start(&[], &format!("{action}@{at}:{operation}:*"));
            let before = site.stored(1);
            // Operations that a running server does not do are over once it gets on.
            eventually("it dies or gets on", || collector.has_ended() || site.stored(1) > before + GETS_ON).await;
            lives.push(Life::cut_short(collector).await);
        }
        site.scene.write("enough", "");
        lives.extend(site.serve(|_| site.start(&[], "")).await);
        site.agent_ended(&mut agent, &lives).await;
        site.assert_whole(1, &Lines::written(&site.scene), 7, &lives);
    })
    .await;
}

/// Bytes that a server which is not killed at its start stores in one life.
const GETS_ON: u64 = 10_000;

/// Runs a build whose server gets this fault in its first life. Says whether it died of it.
async fn killed_once(fault: &str) -> bool {
    let site = Site::new();
    let lines = Lines::prepare(&site.scene, 300);
    // It begins when it is welcomed, so that its lines are stored in many rounds.
    let mut agent = site.agent(&["--linger", "5m", "--start", "connected"], Lines::ALL);
    let lives = site.serve(|life| site.start(&[], if life == 0 { fault } else { "" })).await;
    site.agent_ended(&mut agent, &lives).await;
    site.assert_whole(1, lines.all(), 7, &lives);
    lives[0].was_killed()
}

/// Whether the collector is one of a debug build.
pub(super) async fn has_fault_points() -> bool {
    let site = Site::new();
    let mut collector = site.start(&[], "kill@1:mkdir:*");
    let told = collector.stderr.clone();
    eventually("it dies or listens", || collector.has_ended() || !told.so_far().is_empty()).await;
    Life::cut_short(collector).await.told.is_empty()
}
