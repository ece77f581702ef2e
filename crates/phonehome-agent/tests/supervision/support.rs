//! An agent to start, to signal and to look at.

use std::{
    io::{BufRead, BufReader, Lines},
    process::{Child, ChildStdout, Command, Output, Stdio},
    time::Duration,
};

use tokio::time::Instant;

pub(crate) const AGENT: &str = env!("CARGO_BIN_EXE_phonehome-agent");

/// A server that is not there: port 9 of loopback refuses.
pub(crate) const UNREACHABLE: &[&str] = &["--url", "ws://127.0.0.1:9", "--build", "b"];

pub(crate) fn agent(arguments: &[&str]) -> Command {
    let mut command = Command::new(AGENT);
    command.args(arguments).stdin(Stdio::null());
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("PHONEHOME_")) {
        command.env_remove(name);
    }
    command
}

pub(crate) fn run(command: &[&str]) -> Output {
    agent(&["--"]).args(command).output().expect("the agent can be run")
}

/// Killed when the test is over, whatever its end.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill()); // it has ended already in a test that passed
        drop(self.0.wait());
    }
}

pub(crate) fn start(command: &mut Command) -> Running {
    Running(command.stdout(Stdio::piped()).spawn().expect("the agent can be run"))
}

pub(crate) fn signal(agent: &Running, name: &str) {
    let status =
        Command::new("kill").args([&format!("-{name}"), &agent.0.id().to_string()]).status().expect("kill can be run");
    assert!(status.success(), "no {name} for the agent: {status}");
}

/// The code with which it ends, which takes 20 s at most.
pub(crate) fn ended(agent: &mut Running) -> Option<i32> {
    eventually("the agent has ended", || agent.0.try_wait().expect("it can be waited for").is_some());
    agent.0.wait().expect("it has ended").code()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub(crate) fn skipped(reason: &str) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let line = format!("skipped: {test}: {reason}\n");
    // Past the capture of test output: a test that did not run must show.
    std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes()).expect("standard error is open");
}

/// Lines of the agent's standard output, as they come.
pub(crate) fn lines(agent: &mut Running) -> Lines<BufReader<ChildStdout>> {
    BufReader::new(agent.0.stdout.take().expect("its output is a pipe")).lines()
}

/// Runs it for at most 30 s.
pub(crate) fn bounded(arguments: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.args(["-s", "KILL", "30", AGENT]).args(arguments);
    command.stdin(Stdio::null()).output().expect("the agent can be run")
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A python that any user can run; `None`, and said, where there is none.
pub(crate) fn python() -> Option<&'static str> {
    let works = |path: &&str| Command::new(path).arg("--version").output().is_ok_and(|output| output.status.success());
    let found = ["/usr/bin/python3", "python3"].into_iter().find(works);
    if found.is_none() {
        skipped("there is no python3");
    }
    found
}

/// Runs what is added to it as PID 1 of a namespace of its own, which dies with whoever started it; `None`, and said, where
/// that is not possible.
pub(crate) fn as_pid_1() -> Option<Command> {
    let unshare = || {
        let mut unshare = Command::new("unshare");
        unshare.args(["--pid", "--fork", "--kill-child", "--mount-proc"]).stdin(Stdio::null());
        unshare
    };
    let works = unshare().arg("true").output().is_ok_and(|output| output.status.success());
    if !works {
        skipped("unshare cannot make a pid namespace");
    }
    works.then(unshare)
}

/// What is left in a process's place: nothing, or a status that nobody has fetched.
pub(crate) fn is_gone(pid: &str) -> bool {
    assert!(pid.parse::<u32>().is_ok(), "{pid}");
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.is_empty() || stat.contains(") Z ")
}

/// Looks until it is so, for at most 20 s.
pub(crate) fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(20), "it never came to this: {what}");
        std::thread::yield_now();
    }
}
