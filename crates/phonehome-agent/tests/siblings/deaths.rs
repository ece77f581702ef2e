//! Whose death ends a command, and how.

use rustix::process::Signal;

use crate::support::{Container, Ended, Gate, Pod};

#[test]
fn a_death_from_before_means_never_started_and_the_tombstone_says_why() {
    for (options, code) in [(&[][..], 143), (&["--expected-exit", "143"], 0)] {
        let pod = Pod::new();
        pod.carve("main", &died(7));
        let proxy = pod.start("proxy", &[&["--death-deps", "main"], options].concat(), "echo started").ended();
        assert_eq!((proxy.code, &*proxy.stdout), (code, ""), "{}", proxy.log);
        let stone = pod.tombstone("proxy");
        assert_eq!(stone.value("Reason"), Some("not started: main has died with exit code 7"));
        assert_eq!((stone.value("Born"), stone.value("ExitCode")), (None, Some("143")));
    }
}

#[test]
fn a_main_whose_options_are_wrong_is_a_death_too() {
    let missing = ["--redact-file", "/no/such/file"];
    for (options, reason) in [
        (&missing[..], "cannot read file /no/such/file (--redact-file): No such file or directory (os error 2)"),
        (&["--death-deps", "main"], "--death-deps names main, which is this container itself (--name)"),
    ] {
        let pod = Pod::new();
        let log = pod.path("termination-log");
        std::fs::write(&log, "").unwrap();
        pod.carve("main", &format!("{BORN}Attempt: 2\n"));
        let proxy = pod.start("proxy", &["--death-deps", "main"], WAIT);
        pod.carved("proxy", "Born");
        let options = [&["--termination-log", log.to_str().unwrap()], options].concat();
        let main = pod.start("main", &options, "echo started").ended();
        assert_eq!((main.code, &*main.stdout), (125, ""), "{}", main.log);
        assert_eq!(proxy.ended().code, 143);
        assert_eq!(pod.tombstone("proxy").value("Reason"), Some("main has died with exit code 125"));
        let stone = pod.tombstone("main");
        assert_eq!((stone.value("Reason"), stone.value("Attempt")), (Some(reason), Some("3")));
        assert_eq!((stone.value("Born"), stone.value("ExitCode")), (None, Some("125")));
        assert_eq!(std::fs::read_to_string(log).unwrap(), reason);
    }
    let pod = Pod::new();
    let shown = pod.start("main", &[&missing[..], &["--print-config"]].concat(), "echo started").ended();
    assert_eq!(shown.code, 125);
    assert!(!crate::support::exists(pod.graveyard()), "who only looks does not die");
}

#[test]
fn a_death_during_the_wait_for_a_birth_ends_the_wait() {
    let pod = Pod::new();
    let options = ["--death-deps", "main", "--birth-deps", "db", "--birth-timeout", "off"];
    let mut proxy = pod.start("proxy", &options, "echo started");
    proxy.log.shows("waiting for db");
    pod.carve("main", &died(0));
    let proxy = proxy.ended();
    assert_eq!((proxy.code, &*proxy.stdout), (143, ""), "{}", proxy.log);
}

/// The other way round is a matter of form: its keys come first, and it ignores the rest.
#[test]
fn kubexit_and_this_agent_understand_each_others_deaths() {
    let pod = Pod::new();
    let proxy = pod.start("proxy", &["--death-deps", "main"], WAIT);
    pod.carve("main", BORN);
    pod.carved("proxy", "Born");
    pod.carve("main", &died(-1));
    assert_eq!(proxy.ended().code, 143);
    let stone = pod.tombstone("proxy");
    assert_eq!(stone.keys()[..3], ["Born", "Died", "ExitCode"], "{}", stone.0);
    assert_eq!(stone.value("ExitCode"), Some("143"));
    assert_eq!(stone.value("Reason"), Some("main has died with exit code -1"));
}

#[test]
fn one_death_of_several_is_enough() {
    let pod = Pod::new();
    let (main, other) = (pod.start("main", &[], WAIT), pod.start("other", &[], WAIT));
    let proxy = pod.start("proxy", &["--death-deps", "main,other,never"], WAIT);
    for name in ["main", "other", "proxy"] {
        pod.carved(name, "Born");
    }
    other.signal(Signal::KILL); // it has no chance to carve anything: that is no death
    main.signal(Signal::TERM);
    assert_eq!((main.ended().code, proxy.ended().code), (143, 143));
    assert_eq!(pod.tombstone("proxy").value("Reason"), Some("main has died with exit code 143"));
    assert_eq!(pod.tombstone("other").value("Died"), None);
}

#[test]
fn the_signal_can_be_chosen_and_goes_to_the_whole_group() {
    let script = "trap 'echo parent; exit 9' USR1; trap 'echo TERM; exit 8' TERM
        (trap 'echo child; exit' USR1; echo up; while :; do read _ <gate; done) &
        while :; do wait; done";
    let (pod, mut proxy) = running(&["--death-signal", "SIGUSR1"], script);
    assert_eq!(proxy.stdout.next(), "up");
    pod.carve("main", &died(0));
    let proxy = proxy.ended();
    let mut told: Vec<_> = proxy.stdout.lines().collect();
    told.sort_unstable();
    assert_eq!((proxy.code, &*told), (9, &["child", "parent"][..]), "{}", proxy.log);
}

#[test]
fn who_does_not_listen_is_killed_after_the_grace_period() {
    for (expected, code) in [("any", 137), ("any,KILL", 0)] {
        let options = ["--grace-period", "300ms", "--expected-exit", expected];
        let (pod, mut proxy) = running(&options, "trap '' TERM; echo up; while :; do read _ <gate; done");
        assert_eq!(proxy.stdout.next(), "up");
        pod.carve("main", &died(0));
        let proxy = proxy.ended();
        assert_eq!(proxy.code, code, "{}", proxy.log);
        let stone = pod.tombstone("proxy");
        assert_eq!((stone.value("ExitCode"), stone.value("Signal")), (Some("137"), Some("SIGKILL")));
    }
}

#[test]
fn an_end_that_was_expected_is_a_success_and_a_crash_never_is() {
    for (expected, reaction, code) in [
        ("0-3,143", "exit 3", 0),
        ("0-3,143", "exit 4", 4),
        ("any", "exit 77", 0),
        ("any", "ulimit -c 0; kill -SEGV $$", 139),
        ("any", "ulimit -c 0; kill -ABRT $$", 134),
        ("0-255", "exit 139", 139),
    ] {
        let script = format!("trap '{reaction}' TERM; echo up; while :; do read _ <gate; done");
        let (pod, mut proxy) = running(&["--expected-exit", expected], &script);
        assert_eq!(proxy.stdout.next(), "up");
        pod.carve("main", &died(0));
        let proxy = proxy.ended();
        assert_eq!(proxy.code, code, "{expected} {reaction}: {}", proxy.log);
    }
}

#[test]
fn an_end_of_its_own_or_at_somebody_elses_wish_is_never_expected() {
    let (_pod, proxy) = running(&["--expected-exit", "any"], "exit 3");
    assert_eq!(proxy.ended().code, 3);
    let (_pod, mut proxy) = running(&["--expected-exit", "any"], &format!("echo up; {WAIT}"));
    assert_eq!(proxy.stdout.next(), "up");
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.ended().code, 143);
}

/// A restarted container is alive again for those who come after it.
#[test]
fn a_restart_is_another_attempt_and_a_life_of_its_own() {
    let pod = Pod::new();
    assert_eq!(pod.start("main", &[], "exit 3").ended().code, 3);
    assert_eq!(pod.tombstone("main").value("Attempt"), Some("1"));
    let main = pod.start("main", &[], WAIT);
    let stone = pod.carved("main", "Born");
    assert_eq!(stone.keys(), ["Born", "Attempt"], "nothing of the last life");
    assert_eq!(stone.value("Attempt"), Some("2"));
    let _never = Gate::new(&pod.path("never"));
    let proxy = pod.start("proxy", &["--death-deps", "main"], "read _ <never");
    pod.carved("proxy", "Born");
    pod.gate.open();
    assert_eq!((main.ended().code, proxy.ended().code), (0, 143));
}

/// From the moment its agent is there, and not only once its command is.
#[test]
fn a_restarted_container_that_waits_is_not_dead() {
    let pod = Pod::new();
    pod.carve("main", &died(1));
    let main = pod.start("main", &["--birth-deps", "db", "--birth-timeout", "off"], "true");
    let stone = pod.carved("main", "Attempt");
    assert_eq!(stone.keys(), ["Attempt"]);
    let proxy = pod.start("proxy", &["--death-deps", "main"], WAIT);
    pod.carved("proxy", "Born");
    pod.carve("db", BORN);
    assert_eq!((main.ended().code, proxy.ended().code), (0, 143));
}

#[test]
fn a_death_of_another_generation_is_none() {
    let pod = Pod::new();
    pod.carve("main", &format!("{}Generation: \"last-pod\"\n", died(0)));
    let proxy = pod.start("proxy", &["--death-deps", "main", "--generation", "this-pod"], WAIT);
    assert_eq!(pod.carved("proxy", "Born").value("Generation"), Some("this-pod"));
    let main = pod.start("main", &["--generation", "this-pod"], "exit 5").ended();
    let Ended { code, log, .. } = proxy.ended();
    assert_eq!((main.code, code), (5, 143), "{log}");
    assert_eq!(pod.tombstone("proxy").value("Reason"), Some("main has died with exit code 5"));
    assert_eq!(pod.tombstone("main").value("Attempt"), Some("1"), "a life of another pod is not counted");
}

/// A proxy that depends on `main`, and has been born.
fn running(options: &[&str], script: &str) -> (Pod, Container) {
    let pod = Pod::new();
    let proxy = pod.start("proxy", &[&["--death-deps", "main"], options].concat(), script);
    pod.carved("proxy", "Born");
    (pod, proxy)
}

fn died(code: i32) -> String {
    format!("{BORN}Died: \"2026-11-21T08:58:45Z\"\nExitCode: {code}\n")
}

const WAIT: &str = "read _ <gate";

const BORN: &str = "Born: \"2026-11-21T08:58:44.123456789Z\"\n";
