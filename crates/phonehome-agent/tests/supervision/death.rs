//! Why the command ended, and where that is said; what happens after it.

use std::time::Duration;

use tokio::time::Instant;

use crate::support::{UNREACHABLE, agent, bounded, ended, lines, signal, start, stderr};

#[test]
fn a_reason_is_left_for_the_orchestrator_if_it_has_a_file_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("log");
    let path = file.to_str().unwrap();
    for (script, expected) in
        [("exit 3", "the command exited with 3"), ("kill -SEGV $$", "the command was ended by SIGSEGV"), ("exit 0", "")]
    {
        std::fs::write(&file, "").unwrap();
        bounded(&["--termination-log", path, "--", "sh", "-c", &format!("ulimit -c 0; {script}")]);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), expected);
    }
    bounded(&["--termination-log", path, "--", "/no/such/program"]);
    assert!(std::fs::read_to_string(&file).unwrap().starts_with("cannot run /no/such/program"));
    std::fs::remove_file(&file).unwrap();
    assert_eq!(bounded(&["--termination-log", path, "--", "sh", "-c", "exit 3"]).status.code(), Some(3));
    assert!(!file.exists());
}

#[test]
fn it_holds_after_the_end_and_term_ends_that() {
    for (options, code) in [(&["--hold", "1h"][..], 0), (&["--hold-on-failure", "1h"], 5)] {
        let script = format!("exit {code}");
        let mut agent = start(agent(options).args(["--", "sh", "-c", &script]).stderr(std::process::Stdio::piped()));
        let mut told = std::io::BufRead::lines(std::io::BufReader::new(agent.0.stderr.take().unwrap()));
        assert!(told.any(|line| line.unwrap().contains("holding for 3600 s")));
        signal(&agent, "TERM");
        assert_eq!(agent.0.wait().unwrap().code(), Some(code));
    }
}

#[test]
fn it_holds_only_as_long_as_it_was_told_and_only_when_it_was() {
    for (options, code, holds) in [
        (&["--hold", "700ms"][..], 0, true),
        (&["--hold", "700ms"], 1, true),
        (&["--hold-on-failure", "700ms"], 1, true),
        (&["--hold-on-failure", "700ms"], 0, false),
    ] {
        let begin = Instant::now();
        let output = bounded(&[options, &["--", "sh", "-c", &format!("exit {code}")]].concat());
        assert!(!holds || begin.elapsed() >= Duration::from_millis(700), "{options:?}: {:?}", begin.elapsed());
        assert_eq!(output.status.code(), Some(code));
        assert_eq!(stderr(&output).contains("holding"), holds, "{}", stderr(&output));
    }
}

#[test]
fn a_command_that_was_told_to_end_is_not_held() {
    let mut agent = start(&mut agent(&["--hold", "1h", "--", "sh", "-c", "echo ready; exec sleep 1000"]));
    assert_eq!(lines(&mut agent).next().unwrap().unwrap(), "ready");
    signal(&agent, "TERM");
    assert_eq!(ended(&mut agent), Some(143));
}

#[test]
fn after_term_everything_is_over_within_the_pods_grace() {
    let script = "trap '' TERM; echo ready; while :; do sleep 0.1; done";
    let options = ["--grace-period", "1h", "--linger", "1h", "--", "sh", "-c", script];
    let mut agent = start(
        agent(UNREACHABLE).env("PHONEHOME_TERMINATION_GRACE", "4").args(options).stderr(std::process::Stdio::piped()),
    );
    let mut told = std::io::BufRead::lines(std::io::BufReader::new(agent.0.stderr.take().unwrap()));
    assert!(told.any(|line| line.unwrap().contains("after TERM the command is killed after 2 s")));
    assert_eq!(lines(&mut agent).next().unwrap().unwrap(), "ready");
    let begin = Instant::now();
    signal(&agent, "TERM");
    assert_eq!(agent.0.wait().unwrap().code(), Some(137));
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
}

#[test]
fn what_could_not_run_is_told_and_held_like_any_failure_and_term_ends_that() {
    let options = ["--linger", "1h", "--hold-on-failure", "1h", "--", "/no/such/program"];
    let mut agent = start(agent(UNREACHABLE).args(options).stderr(std::process::Stdio::piped()));
    let mut told = std::io::BufRead::lines(std::io::BufReader::new(agent.0.stderr.take().unwrap()));
    assert!(told.any(|line| line.unwrap().contains("cannot run /no/such/program")));
    signal(&agent, "TERM");
    assert_eq!(agent.0.wait().unwrap().code(), Some(127));
}

#[test]
fn a_command_that_was_ended_for_a_sibling_is_not_held() {
    let graveyard = tempfile::tempdir().unwrap();
    let path = graveyard.path().to_str().unwrap();
    let options = ["--hold-on-failure", "1h", "--graveyard", path, "--death-deps", "main"];
    let mut agent = start(agent(&options).args(["--", "sh", "-c", "echo ready; exec sleep 1000"]));
    assert_eq!(lines(&mut agent).next().unwrap().unwrap(), "ready");
    std::fs::write(
        graveyard.path().join("main"),
        "Born: \"2026-11-21T08:58:44Z\"\nDied: \"2026-11-21T08:58:45Z\"\nExitCode: 0\n",
    )
    .unwrap();
    assert_eq!(agent.0.wait().unwrap().code(), Some(143));
    let output = bounded(&[&options[..], &["--", "echo", "started"]].concat());
    assert_eq!((output.status.code(), &*output.stdout), (Some(143), &b""[..]), "{}", stderr(&output));
}
