//! What has to be there before a command starts.

use rustix::process::Signal;

use crate::support::{Container, Pod};

#[test]
fn a_birth_that_does_not_come_is_125_and_says_what_was_missing() {
    let pod = Pod::new();
    pod.carve("web", BORN);
    pod.carve("old", DIED);
    let options =
        ["--birth-timeout", "1s", "--birth-deps", "web,db,web:ready,old", "--wait-for", "queue=file:/no/such/file"];
    let main = pod.start("main", &options, "echo started").ended();
    assert_eq!((main.code, &*main.stdout), (125, ""));
    let reason = "not started: waited 1s for: db to be born (no tombstone; there are: old, web), web to be ready (its \
                  tombstone has no Ready yet), old to be born (it died at 2026-11-21T08:58:45Z with exit code 7), queue to \
                  pass file:/no/such/file (No such file or directory (os error 2)); the graveyard is ";
    let reason = format!("{reason}{}", pod.graveyard().display());
    assert!(main.log.contains(&reason), "{}", main.log);
    let stone = pod.tombstone("main");
    assert_eq!(stone.value("Reason"), Some(&*reason));
    assert_eq!((stone.value("Born"), stone.value("ExitCode")), (None, Some("125")));
    assert!(stone.value("Died").is_some());
}

#[test]
fn what_is_waited_for_is_said_whenever_it_changes() {
    let pod = Pod::new();
    let mut main = pod.start("main", &["--birth-deps", "a, b", "--birth-deps", "c"], "echo started");
    main.log.shows("waiting for a to be born, b to be born, c to be born");
    pod.carve("b", BORN);
    main.log.shows("waiting for a to be born, c to be born");
    pod.carve("c", BORN);
    main.log.shows("waiting for a to be born");
    pod.carve("a", BORN);
    let main = main.ended();
    assert_eq!((main.code, &*main.stdout), (0, "started\n"));
    assert_eq!(main.log.matches("waiting for").count(), 3, "{}", main.log);
}

#[test]
fn term_during_the_wait_is_143_and_nothing_starts() {
    let pod = Pod::new();
    let mut main = pod.start("main", &["--birth-deps", "db", "--birth-timeout", "off"], "echo started");
    main.log.shows("waiting for db");
    main.signal(Signal::TERM);
    let main = main.ended();
    assert_eq!((main.code, &*main.stdout), (143, ""), "{}", main.log);
    let stone = pod.tombstone("main");
    assert_eq!(stone.value("Reason"), Some("SIGTERM came before it was started"));
    assert_eq!((stone.value("Born"), stone.value("ExitCode")), (None, Some("143")));
}

/// kubexit writes in place: first an empty file, then a part of it.
#[test]
fn a_tombstone_of_kubexit_counts_once_it_is_whole() {
    let pod = Pod::new();
    let mut main = pod.start("main", &["--birth-deps", "db,cache"], "echo started");
    main.log.shows("waiting for db to be born, cache to be born");
    pod.carve("db", "");
    pod.carve("db", "Born: \"2026-11-");
    pod.carve("cache", BORN);
    main.log.shows("waiting for db to be born");
    pod.carve("db", BORN);
    let main = main.ended();
    assert_eq!((main.code, &*main.stdout), (0, "started\n"), "{}", main.log);
    assert!(!main.log.contains("not read as a tombstone"), "a torn one is no news: {}", main.log);
}

#[test]
fn siblings_may_wait_for_each_other_in_a_row() {
    let pod = Pod::new();
    let probe = format!("file:{}", pod.path("is ready").display());
    let third = pod.start("third", &["--birth-deps", "second:ready"], "echo third");
    let second = pod.start("second", &["--birth-deps", "first", "--ready-when", &probe], WAIT);
    let first = pod.start("first", &[], WAIT);
    pod.carved("second", "Born");
    std::fs::write(pod.path("is ready"), "").unwrap();
    let third = third.ended();
    assert_eq!((third.code, &*third.stdout), (0, "third\n"), "{}", third.log);
    let stones = ["first", "second", "third"].map(|name| pod.tombstone(name));
    let born = stones.each_ref().map(|stone| stone.value("Born").unwrap());
    assert!(born.is_sorted(), "{born:?}");
    end([first, second]);
}

fn end(containers: impl IntoIterator<Item = Container>) {
    for container in containers {
        container.signal(Signal::TERM);
        assert_eq!(container.ended().code, 143);
    }
}

const WAIT: &str = "read _ <gate";

const BORN: &str = "Born: \"2026-11-21T08:58:44.123456789Z\"\n";
const DIED: &str = "Born: \"2026-11-21T08:58:44.123456789Z\"\nDied: \"2026-11-21T08:58:45Z\"\nExitCode: 7\n";
