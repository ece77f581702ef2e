//! What the command finds when it starts, and what it cannot do to the agent.

use std::{os::fd::AsRawFd, process::Command};

use crate::support::{AGENT, UNREACHABLE, agent, bounded, lines, python, signal, skipped, start, stderr, stdout};

#[test]
fn the_command_sees_three_descriptors() {
    // One that the agent itself inherits, too.
    let (read, _write) = std::io::pipe().unwrap();
    rustix::io::fcntl_setfd(&read, rustix::io::FdFlags::empty()).unwrap();
    assert!(read.as_raw_fd() > 2);
    for options in [&[][..], &["--pty"], UNREACHABLE] {
        let output = bounded(&[options, &["--linger", "0s", "--", "ls", "/proc/self/fd"]].concat());
        // The fourth is ls's own, of the directory.
        assert_eq!(stdout(&output).split_whitespace().collect::<Vec<_>>(), ["0", "1", "2", "3"], "{options:?}");
    }
}

#[test]
fn a_token_is_nowhere_in_the_agent_but_where_it_is_needed() {
    let mut agent = start(agent(&["--linger", "0s", "--", "sh", "-c", "echo ready; sleep 1000"]).envs([
        ("PHONEHOME_URL", "ws://127.0.0.1:9"),
        ("PHONEHOME_BUILD", "b"),
        ("PHONEHOME_TOKEN", "hunter2hunter2"),
    ]));
    let mut lines = lines(&mut agent);
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    let environ = std::fs::read(format!("/proc/{}/environ", agent.0.id())).unwrap(); // root may read it all the same
    let text = String::from_utf8_lossy(&environ);
    assert!(text.contains("PHONEHOME_BUILD=b") && !text.contains("hunter2"), "{text}");
}

#[test]
fn a_token_that_is_given_twice_is_nowhere_in_the_agent_either() {
    let Some(python) = python() else { return };
    let script = "
import ctypes, sys
strings = lambda texts: (ctypes.c_char_p * (len(texts) + 1))(*[text.encode() for text in texts], None)
variables = ['PHONEHOME_TOKEN=hunter2-first', 'PHONEHOME_TOKENS=other', 'X=y', 'PHONEHOME_TOKEN=hunter2-second']
ctypes.CDLL(None).execve(sys.argv[1].encode(), strings(sys.argv[1:]), strings(variables + ['PATH=/usr/bin:/bin']))
";
    let mut command = Command::new(python);
    command.args(["-c", script, AGENT]).args(["--", "sh", "-c", "echo ready $PHONEHOME_TOKEN; exec sleep 1000"]);
    let mut agent = start(&mut command);
    assert_eq!(lines(&mut agent).next().unwrap().unwrap(), "ready");
    let environ = std::fs::read(format!("/proc/{}/environ", agent.0.id())).unwrap();
    signal(&agent, "TERM");
    assert_eq!(agent.0.wait().unwrap().code(), Some(143));
    let text = String::from_utf8_lossy(&environ);
    assert!(text.contains("PHONEHOME_TOKENS=other") && !text.contains("hunter2"), "{text}");
}

#[test]
fn another_user_runs_the_command_and_can_do_nothing_to_the_agent() {
    if !rustix::process::geteuid().is_root() {
        return skipped("only root can become another user");
    }
    let script = "id -u; id -g; id -G; echo again >/dev/stdout; kill -9 $PPID; cat /proc/$PPID/environ; exit 4";
    for options in [&[][..], UNREACHABLE, &["--pty"]] {
        let more = ["--linger", "0s", "--user", "12345:12346", "--", "sh", "-c", script];
        let output = bounded(&[options, &more].concat());
        assert_eq!(output.status.code(), Some(4), "{options:?}: {} {}", stdout(&output), stderr(&output));
        if !options.is_empty() {
            assert!(stdout(&output).starts_with("12345\n12346\n12346\nagain\n"), "{options:?}: {}", stdout(&output));
        }
        let all = stdout(&output) + &stderr(&output);
        assert_eq!(
            all.matches("denied").count() + all.matches("not permitted").count(),
            if options.is_empty() { all.matches("denied").count() + 1 } else { 2 },
            "{all}"
        );
    }
}

#[test]
fn the_command_can_gain_no_privileges_when_told_so() {
    for (option, bit) in [(&["--no-new-privileges"][..], "1"), (&[], "0")] {
        let output = bounded(&[option, &["--", "grep", "NoNewPrivs", "/proc/self/status"]].concat());
        assert_eq!(stdout(&output), format!("NoNewPrivs:\t{bit}\n"));
    }
}

#[test]
fn who_may_not_change_the_user_is_told_so() {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--clear-groups", AGENT, "--user", "1", "--", "true"]);
    match command.output() {
        Ok(output) if output.status.code() == Some(126) => {
            assert!(stderr(&output).contains("not permitted"), "{}", stderr(&output));
        }
        Ok(output) if !rustix::process::geteuid().is_root() => skipped(&stderr(&output)),
        Ok(output) => panic!("{:?} {}", output.status, stderr(&output)),
        Err(_) => skipped("there is no setpriv"),
    }
}

#[test]
fn a_variable_that_the_agent_sets_takes_the_place_of_the_one_it_was_given() {
    for options in [&[][..], &["--pty"]] {
        let mut command = agent(&[&["--ready-when", "notify"], options, &["--", "env"]].concat());
        let output = command.env("NOTIFY_SOCKET", "/run/systemd/notify").output().unwrap();
        let variables = stdout(&output);
        let sockets: Vec<_> = variables.lines().filter(|line| line.starts_with("NOTIFY_SOCKET=")).collect();
        assert!(matches!(sockets[..], [one] if one.starts_with("NOTIFY_SOCKET=@")), "{options:?}: {sockets:?}");
    }
}
