//! The agent as a process: what it exits with, what it passes on, what it cleans up. No server is needed for that.

mod cgroup;
mod child;
mod death;
mod empty;
mod hostile;
mod init;
mod leftovers;
mod memory;
mod server;
mod signals;
mod support;
mod table;
mod terminal;

use std::{
    io::{BufRead, BufReader, Read},
    net::TcpListener,
    os::fd::OwnedFd,
    process::{Command, Output, Stdio},
    time::Duration,
};

use phonehome_proto::frame::{Cancel, End};
use rustix::{
    fs::{OFlags, fcntl_setfl},
    pipe::{PipeFlags, pipe_with},
};
use tokio::time::Instant;

use server::Server;
use support::{AGENT, Running, UNREACHABLE, agent, run, signal, skipped, start, stderr};

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
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
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
    assert!(stderr(&output).contains(&format!("stdout held open by pid {pid} (sleep)")), "{}", stderr(&output));
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

#[test]
fn a_full_spool_keeps_it_no_longer_than_the_linger() {
    let start = Instant::now();
    let output = limited(&["--linger", "2s", "--tee", "off", "--", "sh", "-c", "head -c 8500000 /dev/zero; exit 7"]);
    assert_eq!(output.status.code(), Some(7), "{}", stderr(&output));
    assert!(start.elapsed() >= Duration::from_secs(2));
    assert!(stderr(&output).contains("has not confirmed"), "{}", stderr(&output));
}

#[test]
fn term_ends_the_wait_for_a_full_spool_and_the_copy_is_whole() {
    let script = "trap '' TERM; echo ready; head -c 8500000 /dev/zero; exit 7";
    let mut agent = start(agent(UNREACHABLE).args(["--linger", "1h", "--", "sh", "-c", script]));
    let mut output = BufReader::new(agent.0.stdout.take().unwrap());
    output.read_line(&mut String::new()).unwrap();
    let reader = std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()).unwrap());
    assert_eq!(terminate(&mut agent), Some(7));
    assert_eq!(reader.join().unwrap(), 8_500_000);
}

#[test]
fn term_ends_the_wait_for_a_stalled_reader_of_the_copy() {
    let script = "trap '' TERM; echo ready; head -c 1500000 /dev/zero; exit 7";
    let mut agent = start(agent(UNREACHABLE).args(["--linger", "1h", "--", "sh", "-c", script]));
    let mut output = BufReader::new(agent.0.stdout.take().unwrap());
    output.read_line(&mut String::new()).unwrap();
    assert_eq!(terminate(&mut agent), Some(7));
}

#[test]
fn a_slow_reader_gets_the_whole_copy_also_after_the_linger() {
    let script = r#""$0" --url ws://127.0.0.1:9 --build b --linger 0s -- head -c 700000 /dev/zero | (sleep 2; wc -c)"#;
    let output = Command::new("timeout").args(["-s", "KILL", "30", "sh", "-c", script, AGENT]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "700000", "{}", stderr(&output));
}

#[test]
fn a_standard_error_that_nobody_reads_holds_nothing_up() {
    let (_reader, writer) = full_pipe();
    let script = "sleep 1; exit 3";
    let status = Command::new("timeout")
        .args(["-s", "KILL", "20", AGENT])
        .args(UNREACHABLE)
        .args(["--tee", "off", "--linger", "1s", "--log-level", "debug", "--", "sh", "-c", script])
        .stderr(writer)
        .status();
    assert_eq!(status.unwrap().code(), Some(3));
}

#[test]
fn the_command_may_read_the_terminal() {
    let script = "import os, pty, signal, sys\n\
                  signal.alarm(20)\n\
                  pid, terminal = pty.fork()\n\
                  if pid == 0: os.execv(sys.argv[1], sys.argv[1:])\n\
                  os.write(terminal, b'something\\n')\n\
                  sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))";
    let read = r#"read x; [ "$x" = something ] && exit 9"#;
    match Command::new("python3").args(["-c", script, AGENT, "--", "sh", "-c", read]).output() {
        Ok(output) => assert_eq!(output.status.code(), Some(9), "{}", stderr(&output)),
        Err(_) => skipped("there is no python3"),
    }
}

#[test]
fn a_very_long_name_is_told_in_short() {
    let output = run(&["x".repeat(70_000).as_str()]);
    assert_eq!(output.status.code(), Some(126));
    let text = stderr(&output);
    assert!(text.contains("cannot run xxx") && text.contains("too long") && text.len() < 2000, "{text}");
}

#[test]
fn an_empty_variable_is_not_set() {
    let help = agent(&["--help"]).output().unwrap().stdout;
    let help = String::from_utf8(help).unwrap();
    let names: Vec<_> = help
        .split(|letter: char| !letter.is_ascii_uppercase() && letter != '_')
        .filter(|word| word.starts_with("PHONEHOME_"))
        .collect();
    assert!(names.len() > 10, "{help}");
    let output = agent(&["--", "sh", "-c", "exit 3"]).envs(names.iter().map(|name| (name, ""))).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    let options = names.iter().filter(|name| !matches!(**name, "PHONEHOME_URL" | "PHONEHOME_BUILD"));
    let output = agent(UNREACHABLE)
        .args(["--linger", "0s", "--", "sh", "-c", "exit 4"])
        .envs(options.map(|name| (name, "")))
        .output();
    assert_eq!(output.unwrap().status.code(), Some(4));
}

#[test]
fn an_endless_duration_is_refused() {
    let output = agent(&["--linger", "400000000000years", "--", "true"]).output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("more than 10 years"), "{}", stderr(&output));
}

#[test]
fn a_cancel_before_the_start_means_never_started_and_the_server_is_told() {
    let server = Server::that_cancels(Cancel { reason: "superseded".into(), grace: u64::MAX });
    let options = ["--url", &server.url, "--build", "b", "--start", "connected", "--", "echo", "started"];
    let output = agent(&options).output().unwrap();
    assert_eq!((output.status.code(), &*output.stdout), (Some(143), &b""[..]), "{}", stderr(&output));
    let told = server.told();
    assert!(matches!(told.finished.end, End::NotStarted { code: 143, .. }));
    assert_eq!(told.output, [b"", b""]);
}

/// The agent with a server that is not there, for at most 20 s.
fn limited(arguments: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.args(["-s", "KILL", "20", AGENT]).args(UNREACHABLE).args(arguments);
    command.stdin(Stdio::null()).output().expect("the agent can be run")
}

/// Sends TERM until the agent has ended: it may not have noticed the command's end at the first.
fn terminate(agent: &mut Running) -> Option<i32> {
    let start = Instant::now();
    loop {
        if let Some(status) = agent.0.try_wait().expect("it is a child") {
            return status.code();
        }
        assert!(start.elapsed() < Duration::from_secs(20), "it does not end");
        signal(agent, "TERM");
    }
}

/// A pipe that takes nothing more.
fn full_pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).expect("a pipe can be made");
    while rustix::io::write(&writer, &[b'x'; 4096]).is_ok() {}
    fcntl_setfl(&writer, OFlags::empty()).expect("a pipe can be blocking");
    (reader, writer)
}
