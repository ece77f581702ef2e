//! A command whose memory runs out.

use std::process::Output;

use phonehome_proto::frame::End;

use crate::{
    cgroup::Cgroup,
    server::{Server, Told},
    support::{AGENT, python, skipped, stderr},
};

const LIMIT: &str = "100000000";

#[test]
fn who_takes_more_memory_than_there_is_is_said_to() {
    let Some(python) = python() else { return };
    let Some((output, told, message)) = limited(&[python, "-c", "bytearray(b'x') * 400_000_000"]) else { return };
    assert_eq!(output.status.code(), Some(137), "{}", stderr(&output));
    assert_eq!(told.finished.end, End::Signalled { signal: 9, core: false, oom: true });
    assert!(told.terminated().oom);
    assert_eq!(message, "the command was ended by SIGKILL, memory ran out");
}

#[test]
fn a_child_of_the_command_may_be_the_one() {
    let Some(python) = python() else { return };
    let script = format!("{python} -c \"bytearray(b'x') * 400_000_000\"; exit 3");
    let Some((output, told, message)) = limited(&["sh", "-c", &script]) else { return };
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert_eq!(told.finished.end, End::Exited(3));
    assert!(told.terminated().oom);
    assert_eq!(message, "the command exited with 3, memory ran out");
}

#[test]
fn a_kill_by_hand_is_none_of_memorys() {
    let Some((output, told, message)) = limited(&["sh", "-c", "kill -9 $$"]) else { return };
    assert_eq!(output.status.code(), Some(137), "{}", stderr(&output));
    assert_eq!(told.finished.end, End::Signalled { signal: 9, core: false, oom: false });
    assert!(!told.terminated().oom);
    assert_eq!(message, "the command was ended by SIGKILL");
}

/// What becomes of a command that has 100 MB with its agent, and what it leaves for the orchestrator.
fn limited(command: &[&str]) -> Option<(Output, Told, String)> {
    let Some(group) = Cgroup::new("memory", "memory.limit_in_bytes", LIMIT) else {
        skipped("no control group for memory can be made");
        return None;
    };
    let log = tempfile::NamedTempFile::new().expect("a file can be made");
    let server = Server::start();
    let mut agent = group.run("timeout");
    agent.args(["-s", "KILL", "60", AGENT]).args(server.options()).arg("--termination-log").arg(log.path());
    let output = agent.arg("--").args(command).output().expect("the agent can be run");
    let message = std::fs::read_to_string(log.path()).expect("the file is still there");
    Some((output, server.told(), message))
}
