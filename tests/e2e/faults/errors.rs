//! Operations of the server's disk fail once: the build goes on, and nothing that was acknowledged is lost.

use std::{collections::BTreeMap, fs, os::unix::fs::MetadataExt};

use crate::{
    faults::{
        at_each,
        crash::{OPERATIONS, has_fault_points},
        long_or,
    },
    harness::{Lines, Site, eventually, skipped},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_fails_once_at_any_operation_loses_nothing() {
    if !has_fault_points().await {
        return skipped("the programs have no fault points, they are a release build's");
    }
    let mut places = Vec::new();
    for action in ["eio", "enospc"] {
        for (operation, names) in OPERATIONS {
            for name in names {
                let turns = long_or(1, 12);
                places.extend((1..=turns).map(|at| format!("{action}@{at}:{operation}:{name}")));
            }
        }
    }
    at_each(places, |fault| async move {
        let site = Site::new();
        let lines = Lines::prepare(&site.scene, 300);
        let mut agent = site.agent(&["--linger", "5m", "--start", "connected"], Lines::ALL);
        // A server that cannot start because of it is started again.
        let lives = site.serve(|life| site.start(&[], if life == 0 { &fault } else { "" })).await;
        assert!(lives.iter().all(|life| !life.was_killed()), "{fault}");
        site.agent_ended(&mut agent, &lives).await;
        site.assert_whole(1, lines.all(), 7, &lives);
    })
    .await;
}

/// What a failed sync has left of a file nobody knows: another takes its place, with another inode.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_whose_sync_failed_is_not_written_to_again() {
    if !has_fault_points().await {
        return skipped("the programs have no fault points, they are a release build's");
    }
    at_each(["log", "index"], |name| async move {
        let site = Site::new();
        Lines::prepare(&site.scene, 60_000);
        let collector = site.start(&[], &format!("eio@20:sync:{name}"));
        collector.stderr.shows("listening on").await;
        let mut agent = site.agent(&["--linger", "5m"], Lines::UNTIL_ENOUGH);
        eventually("the log begins", || site.stored(1) > 0).await;
        let inodes = || {
            let inode = |name| (name, fs::metadata(site.attempt(1).join(name)).map_or(0, |found| found.ino()));
            ["log", "events", "index"].map(inode).into_iter().collect::<BTreeMap<_, _>>()
        };
        let before = inodes();
        eventually("the file is replaced", || inodes()[name] != before[name] && inodes()[name] != 0).await;
        for other in ["log", "events", "index"].into_iter().filter(|other| *other != name) {
            assert_eq!(inodes()[other], before[other], "{other} has done nothing wrong");
        }
        site.scene.write("enough", "");
        let lives = [crate::harness::Life::of(collector).await];
        assert_eq!(agent.ended().await, 7);
        site.assert_whole(1, &Lines::written(&site.scene), 7, &lives);
    })
    .await;
}
