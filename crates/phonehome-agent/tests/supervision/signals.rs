//! Which signals reach the command, and how.

use crate::support::{AGENT, UNREACHABLE, agent, bounded, lines, run, signal, skipped, start, stderr, stdout};
use std::process::Command;

/// Prints the number of every signal it gets; ends with 7 after USR2.
const PRINTER: &str = r"
import os, signal, sys
def show(number, frame):
    print(int(number), flush=True)
    if number == signal.SIGUSR2: os._exit(7)
for number in sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}):
    signal.signal(number, show)
print('ready', flush=True)
while True: signal.pause()
";

#[test]
fn every_signal_that_can_be_caught_reaches_the_command() {
    if !has_python() {
        return skipped("there is no python3");
    }
    for options in [&[][..], UNREACHABLE] {
        let mut agent = start(agent(options).args(["--linger", "0s", "--", "python3", "-c", PRINTER]));
        let mut lines = lines(&mut agent).map(Result::unwrap);
        assert_eq!(lines.next().as_deref(), Some("ready"));
        // Stopping signals stop the agent as well, another test has them. TERM begins its end, it comes last.
        let stops = [20, 21, 22];
        let numbers = (1..=64).filter(|n| ![9, 19, 17, 18, 12, 15, 32, 33].contains(n) && !stops.contains(n));
        for number in numbers.chain([18, 15]) {
            signal(&agent, &number.to_string());
            assert_eq!(lines.next(), Some(number.to_string()), "{options:?}");
        }
        signal(&agent, "USR2");
        assert_eq!(lines.next().as_deref(), Some("12"));
        assert_eq!(agent.0.wait().unwrap().code(), Some(7));
    }
}

#[test]
fn signals_that_a_libc_keeps_for_itself_reach_the_command_too() {
    for number in [32, 33, 34] {
        let mut agent = start(&mut agent(&["--", "sh", "-c", "echo ready; exec sleep 1000"]));
        assert_eq!(lines(&mut agent).next().unwrap().unwrap(), "ready");
        signal(&agent, &number.to_string());
        assert_eq!(agent.0.wait().unwrap().code(), Some(128 + number));
    }
}

#[test]
fn of_a_burst_of_real_time_signals_each_one_arrives() {
    if !has_python() {
        return skipped("there is no python3");
    }
    let counter = "
import os, signal
block = {signal.SIGRTMIN + 1, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, block)
print('ready', flush=True)
count = 0
while signal.sigwait(block) != signal.SIGTERM: count += 1
print(count, flush=True)
";
    let mut agent = start(&mut agent(&["--", "python3", "-c", counter]));
    let mut lines = lines(&mut agent).map(Result::unwrap);
    assert_eq!(lines.next().as_deref(), Some("ready"));
    let burst = format!("import os\nfor _ in range(1000): os.kill({}, 35)", agent.0.id());
    assert!(Command::new("python3").args(["-c", &burst]).status().unwrap().success());
    signal(&agent, "TERM");
    assert_eq!(lines.next().as_deref(), Some("1000"));
}

#[test]
fn a_signal_may_be_rewritten_or_dropped() {
    let script = "for s in HUP INT QUIT USR1 TERM; do trap \"echo $s\" $s; done; trap 'echo USR2; exit 3' USR2; \
                  echo ready; while :; do sleep 0.05; done";
    let mut agent = start(&mut agent(&["--rewrite-signal", "15:3,USR1:SIGHUP,INT:0", "--", "sh", "-c", script]));
    let mut lines = lines(&mut agent).map(Result::unwrap);
    assert_eq!(lines.next().as_deref(), Some("ready"));
    for (sent, seen) in [("TERM", Some("QUIT")), ("USR1", Some("HUP")), ("INT", None), ("USR2", Some("USR2"))] {
        signal(&agent, sent);
        if seen.is_some() {
            assert_eq!(lines.next().as_deref(), seen);
        }
    }
    assert_eq!(agent.0.wait().unwrap().code(), Some(3));
}

#[test]
fn a_signal_that_came_before_the_command_means_that_it_never_starts() {
    // exec keeps a blocked signal pending: it is there before the agent's first instruction.
    let script = "
import os, signal, sys
number = int(sys.argv[1])
signal.pthread_sigmask(signal.SIG_BLOCK, {number})
os.kill(os.getpid(), number)
os.execv(sys.argv[2], sys.argv[2:])
";
    if !has_python() {
        return skipped("there is no python3");
    }
    for (number, code) in [(15, 143), (2, 130), (1, 129), (3, 131)] {
        for options in [&[][..], &["--url", "ws://127.0.0.1:9", "--build", "b", "--linger", "0s"]] {
            let mut python = Command::new("python3");
            python.args(["-c", script, &number.to_string(), AGENT]).args(options).args(["--", "echo", "started"]);
            let output = python.output().unwrap();
            assert_eq!((output.status.code(), &*stdout(&output)), (Some(code), ""), "{}", stderr(&output));
            assert!(stderr(&output).contains("came before it was started"));
        }
    }
}

#[test]
fn the_command_begins_with_default_dispositions_and_an_empty_mask() {
    if !has_python() {
        return skipped("there is no python3");
    }
    let ignore = "
import os, signal, sys
for number in signal.valid_signals() - {9, 19}: signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
os.execv(sys.argv[1], sys.argv[1:])
";
    for options in [&[][..], &["--pty"], &["--merge"]] {
        let mut python = Command::new("python3");
        let output = python.args(["-c", ignore, AGENT]).args(options).args(["--", "cat", "/proc/self/status"]).output();
        let status = stdout(&output.unwrap());
        for set in ["SigBlk", "SigIgn", "SigCgt", "SigPnd", "ShdPnd"] {
            assert!(status.contains(&format!("{set}:\t{:016}\n", 0)), "{options:?}: {status}");
        }
    }
}

#[test]
fn who_ignores_term_is_killed_after_the_grace_period_with_its_group() {
    let script = "trap '' TERM; (trap '' TERM; echo $$; sleep 1000) & echo ready; wait; sleep 1000";
    let mut agent = start(&mut agent(&["--grace-period", "300ms", "--", "sh", "-c", script]));
    let mut lines = lines(&mut agent).map(Result::unwrap);
    assert!(lines.by_ref().any(|line| line == "ready"));
    signal(&agent, "TERM");
    assert_eq!(agent.0.wait().unwrap().code(), Some(137));
    assert_eq!(lines.by_ref().filter(|line| line == "ready").count(), 0, "everybody who could write is gone");
}

#[test]
fn stop_and_continue_reach_the_command_and_the_agent() {
    let mut agent = start(&mut agent(&["--", "sh", "-c", "echo $$; exec sleep 1000"]));
    let mut lines = lines(&mut agent).map(Result::unwrap);
    let command: u32 = lines.next().unwrap().parse().unwrap();
    for stop in ["TSTP", "TTIN", "TTOU"] {
        signal(&agent, stop);
        await_state(agent.0.id(), 'T');
        await_state(command, 'T');
        signal(&agent, "CONT");
        await_state(command, 'S');
        await_state(agent.0.id(), 'S');
    }
    signal(&agent, "TERM");
    assert_eq!(agent.0.wait().unwrap().code(), Some(143));
}

#[test]
fn it_dies_with_its_parent_when_told_to() {
    let script = "\"$0\" --parent-death-signal TERM -- sh -c 'trap \"echo told; exit\" TERM; echo $PPID; while :; do sleep 0.05; done' & \
                  read never";
    let mut parent = start(Command::new("sh").args(["-c", script, AGENT]).stdin(std::process::Stdio::piped()));
    let mut lines = lines(&mut parent).map(Result::unwrap);
    assert!(lines.next().is_some());
    parent.0.kill().unwrap();
    assert_eq!(lines.next().as_deref(), Some("told"));
}

#[test]
fn bad_signals_are_refused_with_what_to_do() {
    for wrong in [["--rewrite-signal", "15"], ["--rewrite-signal", "NOSUCH:3"], ["--parent-death-signal", "0"]] {
        let output = bounded(&[wrong[0], wrong[1], "--", "true"]);
        assert_eq!(output.status.code(), Some(125), "{wrong:?}");
        assert!(stderr(&output).contains("such as"), "{}", stderr(&output));
    }
    assert_eq!(run(&["true"]).status.code(), Some(0));
}

/// Waits until a process is in this state (proc(5)).
fn await_state(pid: u32, state: char) {
    let start = tokio::time::Instant::now();
    loop {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with(state)) {
            return;
        }
        assert!(start.elapsed() < std::time::Duration::from_secs(20), "{pid} is not {state}: {stat}");
        std::thread::yield_now();
    }
}

fn has_python() -> bool {
    Command::new("python3").arg("--version").output().is_ok()
}

#[test]
fn a_signal_that_came_before_the_command_is_rewritten_likewise() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("start");
    let wait = format!("it=file:{}", file.display());
    let options = ["--rewrite-signal", "USR1:0,USR2:CONT", "--log-level", "info", "--wait-for", &wait];
    let mut agent = agent(&options);
    let mut agent = start(agent.args(["--", "echo", "started"]).stderr(std::process::Stdio::piped()));
    let mut told = std::io::BufRead::lines(std::io::BufReader::new(agent.0.stderr.take().unwrap()));
    assert!(told.any(|line| line.unwrap().contains("waiting for it to pass")));
    signal(&agent, "USR1");
    signal(&agent, "USR2");
    std::fs::write(&file, "").unwrap();
    assert_eq!(lines(&mut agent).next().unwrap().unwrap(), "started");
    assert_eq!(agent.0.wait().unwrap().code(), Some(0));
}

#[test]
fn a_command_that_leaves_its_group_is_signalled_all_the_same() {
    if !has_python() {
        return skipped("there is no python3");
    }
    let script = "
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: print('told', flush=True))
other = os.fork()
if other == 0:
    os.setpgid(0, 0)
    time.sleep(1000)
while True:
    try:
        os.setpgid(0, other)
        break
    except PermissionError:
        pass
print('left', flush=True)
while True: time.sleep(0.05)
";
    let mut agent = start(&mut agent(&["--grace-period", "500ms", "--", "python3", "-c", script]));
    let mut lines = lines(&mut agent).map(Result::unwrap);
    assert_eq!(lines.next().as_deref(), Some("left"));
    signal(&agent, "TERM");
    assert_eq!(lines.next().as_deref(), Some("told"));
    assert_eq!(agent.0.wait().unwrap().code(), Some(137));
}
