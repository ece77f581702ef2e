//! The agent as a process: what it exits with, what it passes on, what it cleans up. No server is needed for that.

use std::{
    io::{BufRead, BufReader, Read},
    os::unix::process::ExitStatusExt,
    process::{Child, Command, Output, Stdio},
};

#[test]
fn the_exit_code_is_the_commands() {
    for code in [0, 1, 2, 7, 125, 126, 127, 128, 254, 255] {
        assert_eq!(run(&["sh", "-c", &format!("exit {code}")]).status.code(), Some(code));
    }
}

#[test]
fn a_signal_is_128_and_its_number() {
    for signal in [1, 2, 3, 6, 9, 10, 11, 13, 15, 31] {
        let status = run(&["sh", "-c", &format!("kill -{signal} $$")]).status;
        assert_eq!(status.code(), Some(128 + signal), "signal {signal}");
    }
}

#[test]
fn what_cannot_run_is_127_or_126_and_says_why() {
    let missing = run(&["/no/such/program"]);
    assert_eq!(missing.status.code(), Some(127));
    assert!(stderr(&missing).contains("cannot run /no/such/program"), "{}", stderr(&missing));
    let directory = run(&["/"]);
    assert_eq!(directory.status.code(), Some(126), "{}", stderr(&directory));
}

#[test]
fn the_agents_own_errors_are_125_and_help_is_none() {
    for wrong in [&["--no-such-option", "true"][..], &[], &["--tee", "maybe", "true"], &["--url", "http://x", "true"]] {
        assert_eq!(agent(wrong).output().unwrap().status.code(), Some(125), "{wrong:?}");
    }
    for good in ["--help", "--version"] {
        assert_eq!(agent(&[good]).output().unwrap().status.code(), Some(0));
    }
}

#[test]
fn output_is_the_commands_byte_for_byte_with_and_without_a_server() {
    let script = r"printf 'a\0b\377\r\nno newline'; printf 'err' >&2";
    for options in [&[][..], UNREACHABLE] {
        let output =
            agent(options).args(["--log-level", "error", "--linger", "0s", "--", "sh", "-c", script]).output().unwrap();
        assert_eq!(output.stdout, b"a\0b\xff\r\nno newline", "{options:?}");
        assert_eq!(output.stderr, b"err", "{options:?}");
    }
}

#[test]
fn own_lines_stay_out_of_the_commands_lines() {
    let script = "printf partial >&2; sleep 0.3; echo ' line' >&2; exit 4";
    let output =
        agent(UNREACHABLE).args(["--log-level", "debug", "--linger", "0s", "--", "sh", "-c", script]).output().unwrap();
    assert_eq!(output.status.code(), Some(4));
    assert!(stderr(&output).lines().any(|line| line == "partial line"), "{}", stderr(&output));
}

#[test]
fn the_token_does_not_reach_the_command() {
    let output = agent(&["--linger", "0s", "--", "env"])
        .env("PHONEHOME_URL", "ws://127.0.0.1:9")
        .env("PHONEHOME_BUILD", "b")
        .env("PHONEHOME_TOKEN", "hunter2")
        .output()
        .unwrap();
    let environment = String::from_utf8_lossy(&output.stdout);
    assert!(environment.contains("PHONEHOME_BUILD=b") && !environment.contains("PHONEHOME_TOKEN"), "{environment}");
    assert!(!stderr(&output).contains("hunter2"));
}

#[test]
fn signals_are_passed_on_to_the_whole_group() {
    for options in [&[][..], UNREACHABLE] {
        let script = "trap 'echo got it; exit 9' TERM; (trap 'echo child too; exit' TERM; echo ready; while :; do sleep 0.1; done) & \
                      while :; do wait; done";
        let mut agent = start(agent(options).args(["--linger", "0s", "--", "sh", "-c", script]));
        let mut lines = BufReader::new(agent.0.stdout.take().unwrap()).lines().map(Result::unwrap);
        assert_eq!(lines.next().as_deref(), Some("ready"));
        signal(&agent, "TERM");
        let mut rest: Vec<_> = lines.collect();
        rest.sort();
        assert_eq!(rest, ["child too", "got it"]);
        assert_eq!(agent.0.wait().unwrap().code(), Some(9));
    }
}

#[test]
fn term_before_the_start_means_never_started() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("ws://{}", listener.local_addr().unwrap());
    let options = ["--url", &url, "--build", "b", "--start", "connected", "--", "echo", "started"];
    let mut agent = start(&mut agent(&options));
    let (_connection, _) = listener.accept().unwrap(); // it has caught its signals and waits for a welcome
    signal(&agent, "TERM");
    let mut output = String::new();
    agent.0.stdout.take().unwrap().read_to_string(&mut output).unwrap();
    assert_eq!((agent.0.wait().unwrap().code(), &*output), (Some(143), ""));
}

#[test]
fn linger_bounds_the_stay_and_term_ends_it() {
    let mut agent = start(agent(UNREACHABLE).args(["--linger", "1h", "--", "sh", "-c", "echo over; exit 6"]));
    let mut lines = BufReader::new(agent.0.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "over");
    // The agent may not have noticed the end yet; the signal then goes to a command that is already gone.
    while agent.0.try_wait().unwrap().is_none() {
        signal(&agent, "TERM");
        std::thread::yield_now();
    }
    let status = agent.0.wait().unwrap();
    assert!(matches!(status.code(), Some(6 | 143)), "{status}");
}

#[test]
fn a_descendant_that_holds_the_output_is_ended_and_said() {
    let script = "sleep 1000 & echo $!";
    let output = agent(UNREACHABLE).args(["--linger", "0s", "--", "sh", "-c", script]).output().unwrap();
    let pid = String::from_utf8(output.stdout.clone()).unwrap().trim().to_owned();
    assert!(stderr(&output).contains("still running after its end"), "{}", stderr(&output));
    let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    assert!(state.is_empty() || state.contains(") Z "), "{state}");
}

#[test]
fn as_pid_1_it_reaps_orphans_and_keeps_the_commands_status() {
    let script = "for i in 1 2 3 4 5; do (sleep 0.05 &); done; echo parent $PPID; sleep 0.5; \
                  grep -l '^State:.Z' /proc/[0-9]*/status; exit 5";
    let mut unshare = Command::new("unshare");
    unshare.args(["--pid", "--fork", "--mount-proc", AGENT, "--", "sh", "-c", script]);
    match unshare.output() {
        Ok(output) if !stderr(&output).contains("unshare failed") => {
            assert_eq!(String::from_utf8_lossy(&output.stdout), "parent 1\n");
            assert_eq!(output.status.code(), Some(5));
        }
        Ok(_) | Err(_) => skipped("unshare cannot make a pid namespace"),
    }
}

const AGENT: &str = env!("CARGO_BIN_EXE_phonehome-agent");

/// A server that is not there: port 9 of loopback refuses.
const UNREACHABLE: &[&str] = &["--url", "ws://127.0.0.1:9", "--build", "b"];

fn agent(arguments: &[&str]) -> Command {
    let mut command = Command::new(AGENT);
    command.args(arguments).stdin(Stdio::null());
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("PHONEHOME_")) {
        command.env_remove(name);
    }
    command
}

fn run(command: &[&str]) -> Output {
    agent(&["--"]).args(command).output().expect("the agent can be run")
}

/// Killed when the test is over, whatever its end.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill()); // it has ended already in a test that passed
        drop(self.0.wait());
    }
}

fn start(command: &mut Command) -> Running {
    Running(command.stdout(Stdio::piped()).spawn().expect("the agent can be run"))
}

fn signal(agent: &Running, name: &str) {
    let status =
        Command::new("kill").args([&format!("-{name}"), &agent.0.id().to_string()]).status().expect("kill can be run");
    assert!(status.success() || status.signal().is_none());
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[expect(clippy::print_stderr, reason = "a test that did not run says so")]
fn skipped(reason: &str) {
    eprintln!("skipped: {reason}");
}
