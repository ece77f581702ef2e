//! Processes that outlive the command.

use std::time::Duration;

use tokio::time::Instant;

use crate::support::{UNREACHABLE, agent, bounded, is_gone, lines, signal, start, stderr, stdout};

const QUICK: [&str; 4] = ["--linger", "0s", "--grace-period", "500ms"];

#[test]
fn a_daemon_of_its_own_session_that_holds_the_output_is_ended_and_named() {
    let script = "setsid sh -c 'echo $$; exec sleep 1000' & sleep 0.2; echo over";
    let output = bounded(&[UNREACHABLE, &QUICK, &["--", "sh", "-c", script]].concat());
    assert_eq!(output.status.code(), Some(0));
    let daemon = stdout(&output).lines().next().unwrap().to_owned();
    assert!(stderr(&output).contains(&format!("stdout held open by pid {daemon} (sleep)")), "{}", stderr(&output));
    assert!(is_gone(&daemon));
}

#[test]
fn one_that_ignores_term_is_killed_after_the_grace_period() {
    let script = "setsid sh -c \"trap '' TERM; echo \\$\\$; while :; do sleep 0.1; done\" & sleep 0.2";
    let output = bounded(&[UNREACHABLE, &QUICK, &["--", "sh", "-c", script]].concat());
    assert!(is_gone(stdout(&output).trim()), "{}", stderr(&output));
    assert!(stderr(&output).contains("killing what the command has left behind"), "{}", stderr(&output));
}

#[test]
fn a_quiet_daemon_is_ended_and_the_agent_does_not_wait_for_its_patience() {
    let script = "setsid sleep 1000 >/dev/null 2>&1 & echo $!";
    for options in [&[][..], UNREACHABLE] {
        let begin = Instant::now();
        let output = bounded(&[options, &QUICK, &["--", "sh", "-c", script]].concat());
        assert!(begin.elapsed() < Duration::from_secs(4), "it does not hold the output");
        assert!(stderr(&output).contains("still running after its end: pid"), "{}", stderr(&output));
        assert!(is_gone(stdout(&output).trim()));
    }
}

#[test]
fn one_that_is_about_to_end_is_no_leftover() {
    let script = "(sleep 0.5; echo late) & echo early";
    for policy in ["wait", "terminate", "leave"] {
        let output = bounded(&[UNREACHABLE, &QUICK, &["--leftovers", policy, "--", "sh", "-c", script]].concat());
        assert_eq!(stdout(&output), "early\nlate\n", "{policy}");
        assert!(!stderr(&output).contains("held open"), "{}", stderr(&output));
    }
}

#[test]
fn waiting_takes_as_long_as_it_takes() {
    // Longer than the others' patience: it is said, and then waited for.
    let script = "setsid sh -c 'sleep 6; echo late' & exit 3";
    let output = bounded(&[UNREACHABLE, &QUICK, &["--leftovers", "wait", "--", "sh", "-c", script]].concat());
    assert_eq!((output.status.code(), &*stdout(&output)), (Some(3), "late\n"));
    assert!(stderr(&output).contains("held open by pid"), "{}", stderr(&output));
}

#[test]
fn waiting_ends_with_term() {
    let script = "setsid sleep 1000 & echo $!; exit 3";
    let options = [UNREACHABLE, &QUICK, &["--leftovers", "wait", "--", "sh", "-c", script]].concat();
    let mut agent = start(&mut agent(&options));
    let mut lines = lines(&mut agent).map(Result::unwrap);
    let daemon = lines.next().unwrap();
    let begin = Instant::now();
    while agent.0.try_wait().unwrap().is_none() {
        signal(&agent, "TERM");
        assert!(begin.elapsed() < Duration::from_secs(20));
        std::thread::yield_now();
    }
    assert!(is_gone(&daemon));
}

#[test]
fn in_a_hurry_nobody_is_left_behind_who_ignores_term() {
    let script = "setsid sh -c \"trap '' TERM; echo \\$\\$; while :; do sleep 0.1; done\" & sleep 0.2; exit 3";
    let mut agent =
        start(agent(UNREACHABLE).args(["--linger", "1h", "--grace-period", "1h", "--", "sh", "-c", script]));
    let mut lines = lines(&mut agent).map(Result::unwrap);
    let daemon = lines.next().unwrap();
    let begin = Instant::now();
    while agent.0.try_wait().unwrap().is_none() {
        signal(&agent, "TERM");
        assert!(begin.elapsed() < Duration::from_secs(20));
        std::thread::yield_now();
    }
    assert!(is_gone(&daemon));
}

#[test]
fn who_writes_to_the_agents_own_streams_has_time_to_end() {
    if !bounded(&["--", "bash", "-c", "exit 0"]).status.success() {
        return crate::support::skipped("there is no bash");
    }
    let script = "exec > >(while read line; do sleep 0.3; echo \"[$line]\"; done); echo 1; echo 2";
    for options in [&[][..], UNREACHABLE] {
        let output = bounded(&[options, &["--linger", "0s", "--", "bash", "-c", script]].concat());
        assert_eq!(stdout(&output), "[1]\n[2]\n", "{options:?} {}", stderr(&output));
    }
}

#[test]
fn a_stopped_one_hears_that_it_is_to_end() {
    let script = "setsid sleep 1000 >/dev/null 2>&1 & echo $!; kill -STOP $!; exit 3";
    let begin = Instant::now();
    let output = bounded(&["--", "sh", "-c", script]);
    assert!(begin.elapsed() < Duration::from_secs(15), "well before the grace period of 30 s is over");
    assert_eq!(output.status.code(), Some(3));
    assert!(is_gone(stdout(&output).trim()));
}

#[test]
fn what_is_left_is_read_for_a_while_and_not_touched() {
    let script = "setsid sh -c 'echo $$; exec sleep 1000' & sleep 0.2; echo over";
    let output = bounded(&[UNREACHABLE, &QUICK, &["--leftovers", "leave", "--", "sh", "-c", script]].concat());
    let daemon = stdout(&output).lines().next().unwrap().to_owned();
    assert!(stderr(&output).contains(&format!("stdout held open by pid {daemon} (sleep)")), "{}", stderr(&output));
    assert!(!is_gone(&daemon));
    assert!(std::process::Command::new("kill").args(["-9", &daemon]).status().unwrap().success());
}

#[test]
fn a_stranger_who_holds_the_output_is_named_and_never_signalled() {
    // The test itself holds it, by a descriptor that it opens through /proc.
    let mut agent = start(
        agent(UNREACHABLE)
            .args(QUICK)
            .args(["--", "sh", "-c", "echo $$; read x; echo over"])
            .stdin(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped()),
    );
    let mut lines = lines(&mut agent).map(Result::unwrap);
    let command = lines.next().unwrap();
    let _held = std::fs::OpenOptions::new().write(true).open(format!("/proc/{command}/fd/1")).unwrap();
    drop(agent.0.stdin.take());
    assert_eq!(lines.next().as_deref(), Some("over"));
    let mut told = String::new();
    std::io::Read::read_to_string(&mut agent.0.stderr.take().unwrap(), &mut told).unwrap();
    assert!(told.contains(&format!("stdout held open by pid {} (", std::process::id())), "{told}");
    assert_eq!(agent.0.wait().unwrap().code(), Some(0));
}
