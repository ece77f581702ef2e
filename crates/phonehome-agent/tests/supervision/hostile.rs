//! Commands that mean harm, or look like it.

use std::{
    process::{Command, Stdio},
    time::Duration,
};

use tokio::time::Instant;

use crate::{
    cgroup::Cgroup,
    server::Server,
    support::{
        AGENT, UNREACHABLE, agent, as_pid_1, bounded, eventually, is_gone, lines, python, signal, skipped, start,
        stderr, stdout,
    },
};

/// Forks as often as it can, in one group or each in a session of its own, and TERM is nothing to it.
const BOMB: &str = r"
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.write(1, b'ready\n')
while True:
    try:
        if os.fork() == 0 and sys.argv[1] == 'apart': os.setsid()
    except OSError: pass
";

/// Processes and threads that it may have, with the agent.
const MOST: &str = "60";

/// So many processes, and hardly anybody can start another one.
const GONE_OFF: usize = 50;

#[test]
fn a_fork_bomb_ends_with_the_grace_period() {
    let Some(python) = python() else { return };
    for how in ["together", "apart"] {
        let Some(group) = Cgroup::new("pids", "pids.max", MOST) else {
            return skipped("no control group for processes can be made");
        };
        // A server by name: looking that up takes a thread, which there is none for.
        let options = ["--url", "ws://localhost:9", "--build", "b", "--grace-period", "1s", "--linger", "1s"];
        let mut command = group.run(AGENT);
        command.args(options).args(["--", python, "-c", BOMB, how]).stderr(Stdio::piped());
        let mut agent = start(&mut command);
        let mut lines = lines(&mut agent);
        assert_eq!(lines.next().unwrap().unwrap(), "ready");
        eventually("it has gone off", || group.members() >= GONE_OFF);
        let begin = Instant::now();
        signal(&agent, "TERM");
        let status = agent.0.wait().unwrap();
        let mut told = String::new();
        std::io::Read::read_to_string(&mut agent.0.stderr.take().unwrap(), &mut told).unwrap();
        assert_eq!(status.code(), Some(137), "{how}: {told}");
        assert!(begin.elapsed() < Duration::from_secs(15), "{how}: {:?} {told}", begin.elapsed());
        assert!(!told.contains("panicked"), "{how}: {told}");
        eventually("everybody has ended", || group.members() == 0);
    }
}

#[test]
fn a_fork_bomb_ends_with_pid_1() {
    let (Some(python), Some(pid_1)) = (python(), as_pid_1()) else { return };
    let Some(group) = Cgroup::new("pids", "pids.max", MOST) else {
        return skipped("no control group for processes can be made");
    };
    let mut command = group.run("unshare");
    command.args(pid_1.get_args()).args([AGENT, "--grace-period", "300ms", "--", python, "-c", BOMB, "apart"]);
    let mut unshare = start(&mut command);
    assert_eq!(lines(&mut unshare).next().unwrap().unwrap(), "ready");
    eventually("it has gone off", || group.members() >= GONE_OFF);
    let agent = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", unshare.0.id())).unwrap();
    assert!(Command::new("kill").arg(agent.trim()).status().unwrap().success());
    assert_eq!(unshare.0.wait().unwrap().code(), Some(137));
    eventually("everybody has ended", || group.members() == 0);
}

#[test]
fn no_room_for_a_thread_is_an_error_and_no_panic() {
    for limit in 1..6 {
        let Some(group) = Cgroup::new("pids", "pids.max", &limit.to_string()) else {
            return skipped("no control group for processes can be made");
        };
        for options in [&["--url", "ws://localhost:9", "--build", "b"][..], &["--ready-when", "file:/no/such"]] {
            let mut command = group.run(AGENT);
            let output = command.args(options).args(["--linger", "0s", "--", "sleep", "0.1"]).output().unwrap();
            assert!(!stderr(&output).contains("panicked"), "{limit} {options:?}: {}", stderr(&output));
            let code = output.status.code();
            assert!(
                matches!((limit, code), (4.., Some(0)) | (..4, Some(0 | 125 | 126))),
                "{limit} {options:?}: {code:?}"
            );
        }
    }
}

#[test]
fn a_flood_of_signals_puts_nothing_off() {
    let Some(python) = python() else { return };
    // Signals that queue, from several processes: whenever the agent looks, there is one.
    let flood = r"
import os, signal
for number in signal.valid_signals() - {9, 19}: signal.signal(number, signal.SIG_IGN)
agent = os.pidfd_open(os.getppid()) # nobody else of its number must ever get one
for _ in range(3): os.fork()
os.write(1, b'ready\n')
while True:
    for number in range(34, 65):
        try: signal.pidfd_send_signal(agent, number)
        except BlockingIOError: pass
";
    for options in [&[][..], UNREACHABLE] {
        let options = [options, &["--grace-period", "500ms", "--linger", "0s", "--", python, "-c", flood]].concat();
        // The queue is one for all processes of a user: so few leave room for everybody else's.
        let mut limited = Command::new("prlimit");
        limited.args(["--sigpending=4000", AGENT]).args(&options).stdin(Stdio::null()).stderr(Stdio::null());
        let mut agent = start(&mut limited);
        let mut lines = lines(&mut agent);
        assert_eq!(lines.by_ref().take(8).count(), 8);
        let begin = Instant::now();
        signal(&agent, "TERM");
        eventually("the agent has ended", || agent.0.try_wait().unwrap().is_some());
        assert_eq!(agent.0.wait().unwrap().code(), Some(137));
        assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
        assert_eq!(lines.count(), 0, "everybody who could write is gone");
    }
}

#[test]
fn who_closes_its_output_early_is_still_waited_for() {
    let server = Server::start();
    let script = "echo last; exec >&- 2>&-; sleep 0.5; exit 3";
    let output = bounded(&[&server.options()[..], &["--", "sh", "-c", script]].concat());
    assert_eq!((output.status.code(), &*stdout(&output)), (Some(3), "last\n"));
    let told = server.told();
    assert_eq!((told.finished.end.code(), &*told.output[0]), (3, &b"last\n"[..]));
    assert!(told.finished.usage.unwrap().wall >= 500_000);

    let script = "echo last; exec >&- 2>&-; trap '' TERM; while :; do sleep 0.1; done";
    let options = [UNREACHABLE, &["--grace-period", "300ms", "--linger", "0s", "--", "sh", "-c", script]].concat();
    let mut agent = start(agent(&options).stderr(Stdio::null()));
    let mut lines = lines(&mut agent);
    assert_eq!(lines.next().unwrap().unwrap(), "last");
    eventually("the agent has ended", || {
        signal(&agent, "TERM"); // the first may come before it is ignored
        agent.0.try_wait().unwrap().is_some()
    });
    assert!(matches!(agent.0.wait().unwrap().code(), Some(137 | 143)));
}

#[test]
fn the_agents_memory_is_closed_to_a_command_of_the_same_user() {
    let Some(python) = python() else { return };
    let spy = r"
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
agent = os.getppid()
def say(what, result): print(what, 'works' if result >= 0 else errno.errorcode[ctypes.get_errno()], flush=True)
def look(what):
    try: print(what, 'works', len(os.listdir(what) if what.endswith('/fd') else open(what, 'rb').read(1)))
    except OSError as error: print(what.rpartition('/')[2], errno.errorcode[error.errno], flush=True)
print('uid', os.getuid(), flush=True)
libc.ptrace.argtypes = [ctypes.c_long] * 4
say('attach', libc.ptrace(16, agent, 0, 0))
say('seize', libc.ptrace(0x4206, agent, 0, 0))
say('pidfd_getfd', libc.syscall(438, os.pidfd_open(agent), 0, 0))
for name in ['environ', 'mem', 'fd', 'maps', 'auxv']: look(f'/proc/{agent}/{name}')
";
    let is_root = rustix::process::geteuid().is_root();
    let mut command = Command::new(if is_root { "setpriv" } else { "env" });
    command.args(if is_root { &["--reuid=65534", "--regid=65534", "--clear-groups"][..] } else { &[] });
    command.args([AGENT, "--url", "ws://127.0.0.1:9", "--build", "b", "--linger", "0s", "--", python, "-c", spy]);
    let output = command.env("PHONEHOME_TOKEN", "hunter2hunter2").current_dir("/").output().unwrap();
    if output.status.code() == Some(126) {
        return skipped("another user cannot run the agent from where it is");
    }
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let uid = if is_root { "65534".to_owned() } else { rustix::process::geteuid().as_raw().to_string() };
    let expected = "attach EPERM\nseize EPERM\npidfd_getfd EPERM\nenviron EACCES\nmem EACCES\nfd EACCES\n\
                    maps EACCES\nauxv EACCES\n";
    assert_eq!(stdout(&output), format!("uid {uid}\n{expected}"));
}

#[test]
fn a_command_that_kills_its_agent_writes_to_nobody_and_lives_on() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("said");
    // Without PID 1's protection nothing keeps a process from killing another one of its user.
    let script = "trap '' PIPE; kill -9 $PPID; while printf x; do :; done 2>/dev/null; echo over >\"$0\"";
    let options = [UNREACHABLE, &["--", "sh", "-c", script, file.to_str().unwrap()]].concat();
    let output = agent(&options).stderr(Stdio::null()).output().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&output.status), Some(9));
    eventually("it has noticed that nobody reads", || file.exists());
}

#[test]
fn who_has_stopped_itself_or_waits_for_a_tracer_is_killed_after_the_grace_period() {
    let Some(python) = python() else { return };
    let traced = "import ctypes, os; ctypes.CDLL(None).ptrace(0, 0, 0, 0); print(os.getpid(), flush=True); os.kill(os.getpid(), 10)";
    for command in [["sh", "-c", "echo $$; kill -STOP $$"], [python, "-c", traced]] {
        for options in [&[][..], UNREACHABLE, &["--pty"]] {
            let options = [options, &["--grace-period", "300ms", "--linger", "0s", "--"], &command[..]].concat();
            let mut agent = start(agent(&options).stderr(Stdio::null()));
            let pid = lines(&mut agent).next().unwrap().unwrap();
            eventually("it has stopped", || is_in_state(&pid, &["T", "t"]));
            signal(&agent, "TERM");
            assert_eq!(agent.0.wait().unwrap().code(), Some(137));
            assert!(is_gone(&pid));
        }
    }
}

#[test]
fn orphans_of_another_subreaper_come_to_the_agent_at_last() {
    let Some(python) = python() else { return };
    let script = r"
import ctypes, os, signal, time
read, write = os.pipe()
if os.fork() == 0:
    ctypes.CDLL(None).prctl(36, 1)
    os.setsid()
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            os.write(write, b'%d' % os.getpid())
            time.sleep(1000)
        os._exit(0)
    os.wait()
    time.sleep(1000)
print(os.read(read, 16).decode(), flush=True)
os._exit(4)
";
    let output = bounded(&["--grace-period", "5s", "--", python, "-c", script]);
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
    assert!(is_gone(stdout(&output).trim()));
}

#[test]
fn who_goes_on_writing_after_the_end_gets_an_error_and_holds_nothing_up() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("said");
    let script = "(trap '' PIPE; while printf x; do sleep 0.02; done 2>/dev/null; echo over >\"$0\") & exit 3";
    let options = [UNREACHABLE, &["--linger", "0s", "--leftovers", "leave"], &["--", "sh", "-c", script]].concat();
    let output = bounded(&[&options[..], &[file.to_str().unwrap()]].concat());
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    eventually("it was told that nobody reads", || file.exists());
}

fn is_in_state(pid: &str, states: &[&str]) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().and_then(|rest| rest.split(' ').next()).is_some_and(|state| states.contains(&state))
}
