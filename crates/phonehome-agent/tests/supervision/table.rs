//! Every way in which a command can end: what the agent exits with, and what a server is told.

use std::{
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Command, Output, Stdio},
};

use phonehome_proto::{event::Terminated, frame::End, signal};

use crate::{
    server::{Server, Told},
    support::{AGENT, stderr},
};

/// The last of signal(7)'s numbers.
const LAST_SIGNAL: u8 = 64;

/// CHLD, CONT, STOP, TSTP, TTIN, TTOU, URG and WINCH, whose default is anything but an end.
const HARMLESS: [u8; 8] = [17, 18, 19, 20, 21, 22, 23, 28];

/// Ignored in children of a glibc that does not know better, as this test is one.
const KEPT_BY_LIBC: [u8; 2] = [32, 33];

#[test]
fn every_exit_code_is_the_agents_and_is_told() {
    let dir = tempfile::tempdir().unwrap();
    for_each(0..=u8::MAX, |code| {
        let (output, told) = run(&format!("printf out; printf err >&2; exit {code}"), dir.path());
        assert_eq!(output.status.code(), Some(code.into()), "{}", stderr(&output));
        assert_eq!(told.finished.end, End::Exited(code));
        assert_eq!(*told.terminated(), Terminated { code, ..ended(&told) });
        assert_eq!(told.output, [b"out", b"err"]);
        assert_used(&told);
    });
}

#[test]
fn every_signal_that_kills_is_128_more_and_told_with_its_core() {
    let deadly = (1..=LAST_SIGNAL).filter(|number| !HARMLESS.contains(number));
    for_each(deadly, |number| {
        // One shell dies without an agent: what the system says of that is what the agent has to say.
        let script = format!("ulimit -c unlimited 2>/dev/null; kill -{number} $$");
        let dir = tempfile::tempdir().unwrap();
        // Whoever runs these tests in the background ignores some signals, and a shell cannot take that back.
        let mut plain = Command::new("env");
        let plain = plain.args(["--default-signal", "sh", "-c", &script]).current_dir(dir.path()).status().unwrap();
        assert!(plain.signal() == Some(number.into()) || KEPT_BY_LIBC.contains(&number), "{number}: {plain}");
        let core = plain.core_dumped();

        let dir = tempfile::tempdir().unwrap();
        let (output, told) = run(&script, dir.path());
        let code = 128 + number;
        assert_eq!(output.status.code(), Some(code.into()), "{}", stderr(&output));
        assert_eq!(told.finished.end, End::Signalled { signal: number, core, oom: false });
        let signal = Some(signal::name(number).into_owned());
        assert_eq!(*told.terminated(), Terminated { code, signal, core, ..ended(&told) });
        assert_used(&told);
        if writes_cores_here() {
            assert_eq!(dir.path().read_dir().unwrap().count(), usize::from(core), "a file says so, too");
        }
    });
}

#[test]
fn what_never_ran_used_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for (command, code) in [("/no/such/program", 127), ("/", 126)] {
        let (output, told) = run_command(&[command], dir.path());
        assert_eq!(output.status.code(), Some(code.into()));
        assert!(matches!(&told.finished.end, End::NotStarted { code: told, .. } if *told == code));
        assert_eq!((told.finished.usage, told.terminated().code), (None, code));
    }
}

/// Whether a core file appears where its process was: core(5), the pattern is a plain name.
fn writes_cores_here() -> bool {
    let pattern = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap_or_default();
    !pattern.starts_with(['|', '/']) && !pattern.trim().is_empty()
}

/// What says nothing about how it ended.
fn ended(told: &Told) -> Terminated {
    Terminated { duration_ms: told.terminated().duration_ms, ..Terminated::default() }
}

fn assert_used(told: &Told) {
    let usage = told.finished.usage.expect("what ran has used something");
    assert!(usage.wall > 0 && usage.user + usage.system > 0 && usage.max_rss > 100_000, "{usage:?}");
}

fn run(script: &str, dir: &Path) -> (Output, Told) {
    run_command(&["sh", "-c", script], dir)
}

fn run_command(command: &[&str], dir: &Path) -> (Output, Told) {
    let server = Server::start();
    let mut agent = Command::new("timeout");
    agent.args(["-s", "KILL", "60", AGENT]).args(server.options()).args(["--log-level", "error", "--"]).args(command);
    let output = agent.current_dir(dir).stdin(Stdio::null()).output().expect("the agent can be run");
    (output, server.told())
}

/// Some at a time.
fn for_each(numbers: impl Iterator<Item = u8>, check: impl Fn(u8) + Sync) {
    const AT_A_TIME: usize = 4;
    let numbers: Vec<_> = numbers.collect();
    let check = &check;
    std::thread::scope(|scope| {
        for part in numbers.chunks(numbers.len().div_ceil(AT_A_TIME)) {
            scope.spawn(move || part.iter().for_each(|number| check(*number)));
        }
    });
}
