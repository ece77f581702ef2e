//! The agent as an init: what the tests of two well-known ones expect of them, as PID 1 and as a subreaper.
//!
//! | tini | here |
//! |---|---|
//! | every exit code | `table::every_exit_code_is_the_agents_and_is_told` |
//! | exit codes remapped to 0 (`-e`) | no such option |
//! | orphans reaped, in its group or not; as PID 1 and as a subreaper (`-s`, `TINI_SUBREAPER`, a proxy) | [`orphans_are_reaped_by_whoever_is_their_init`]; it always makes itself a subreaper |
//! | reaped processes are named (`-w`) | no such option; they are at debug level |
//! | a warning when nothing can be reaped | does not happen: since Linux 3.4 there are subreapers |
//! | TERM, USR1, USR2 end a command and what it started: 128 + n | [`a_signal_ends_a_command_that_does_nothing_about_it`] |
//! | a signal to the group (`-g`) | [`the_group_gets_a_signal_that_its_leader_ignores`]; it is always the group |
//! | blocked and ignored signals are the command's, too | on purpose not: `signals::the_command_begins_with_default_dispositions_and_an_empty_mask` |
//! | a signal at the parent's death (`-p`) | `signals::it_dies_with_its_parent_when_told_to` |
//!
//! | dumb-init | here |
//! |---|---|
//! | a whole pipeline ends | [`a_pipeline_in_the_background_ends_with_the_command`] |
//! | the direct child only (`-c`, `DUMB_INIT_SETSID=0`) | no such option |
//! | TERM to everybody when the child has exited | [`who_is_left_is_told_to_end_wherever_it_hides`] |
//! | a program that is not there | `what_cannot_run_is_127_or_126_and_says_why` |
//! | help, version, bad options | `the_agents_own_errors_are_125_and_help_is_none` |
//! | bad rewrites | `signals::bad_signals_are_refused_with_what_to_do` |
//! | the child's working directory; its own is `/` | [`the_command_starts_where_the_agent_was_started`]; paths in its options mean that place, so it stays there |
//! | exit codes, and 128 + n | `table` |
//! | every signal that can be caught | `signals::every_signal_that_can_be_caught_reaches_the_command` |
//! | rewritten and dropped signals | `signals::a_signal_may_be_rewritten_or_dropped` |
//! | TSTP, TTIN, TTOU stop both, CONT continues both | `signals::stop_and_continue_reach_the_command_and_the_agent` |
//! | no zombies with PID 1 | [`orphans_are_reaped_by_whoever_is_their_init`] |
//! | a terminal can be written to and read to its end | [`a_terminal_is_read_to_its_end`] |
//! | a shell has job control | [`a_shell_on_the_agents_terminal_has_job_control`] |
//! | HUP of a terminal that changes hands is nobody's | [`a_terminal_changes_hands_without_a_hangup`] |
//! | CONT likewise | the command gets one with the terminal, as from a shell's fg |

use std::{
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    time::Duration,
};

use tokio::time::Instant;

use crate::support::{
    AGENT, Running, UNREACHABLE, agent, as_pid_1, eventually, is_gone, lines, python, signal, start, stderr, stdout,
};

/// Makes a hundred orphans in several groups and ends with 5 once it is the only child of its own parent.
const ORPHANS: &str = r"
import os, sys, time
agent = os.getppid()
for n in range(100):
    if os.fork() == 0:
        if n % 2: os.setsid()
        if os.fork() == 0:
            time.sleep(n % 3 * 0.1)
            os._exit(n)
        os._exit(0)
for n in range(100): os.wait()
def parent(pid):
    try: return int(open(f'/proc/{pid}/stat').read().rpartition(') ')[2].split()[1])
    except OSError: return None
limit = time.monotonic() + 20
while (children := [pid for pid in os.listdir('/proc') if pid.isdigit() and parent(pid) == agent]) != [str(os.getpid())]:
    if time.monotonic() > limit: sys.exit(f'left: {children}')
    time.sleep(0.01)
sys.exit(5)
";

#[test]
fn orphans_are_reaped_by_whoever_is_their_init() {
    let Some(python) = python() else { return };
    for mut agent in places() {
        let output = agent.args(["--linger", "0s", "--", python, "-c", ORPHANS]).output().unwrap();
        assert_eq!(output.status.code(), Some(5), "{agent:?}: {}", stderr(&output));
    }
}

#[test]
fn a_signal_ends_a_command_that_does_nothing_about_it() {
    // Not INT, which a dash notes for later and may then forget.
    for (name, code) in [("TERM", 143), ("HUP", 129), ("USR1", 138), ("USR2", 140)] {
        for mut place in places() {
            let mut started = start(place.args(["--linger", "0s", "--", "sh", "-c", "echo ready; sleep 1000; exit 3"]));
            let mut lines = lines(&mut started).map(Result::unwrap);
            assert_eq!(lines.next().as_deref(), Some("ready"));
            send(&inner(&started), name);
            assert_eq!(started.0.wait().unwrap().code(), Some(code), "{name} {place:?}");
            assert_eq!(lines.next(), None, "whom it started has ended as well");
        }
    }
}

#[test]
fn the_group_gets_a_signal_that_its_leader_ignores() {
    let Some(python) = python() else { return };
    let script = r"
import os, signal, subprocess
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
child = subprocess.Popen(['sleep', '1000'], preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_DFL))
print('ready', flush=True)
os._exit(-child.wait())
";
    let mut agent = start(&mut agent(&["--", python, "-c", script]));
    assert_eq!(lines(&mut agent).next().unwrap().unwrap(), "ready");
    signal(&agent, "USR1");
    assert_eq!(agent.0.wait().unwrap().code(), Some(10), "the child was ended by it, and the leader says so");
}

#[test]
fn signals_reach_pid_1_from_inside_and_from_outside() {
    let Some(mut place) = as_pid_1() else { return };
    let script = "for s in HUP INT USR1 USR2; do trap \"echo $s\" $s; done; trap 'echo TERM; exit 7' TERM; \
                  echo $PPID; kill -USR1 1; kill -9 1; kill -STOP 1; while :; do sleep 0.05; done";
    let mut unshare = start(place.args([AGENT, "--", "sh", "-c", script]));
    let mut lines = lines(&mut unshare).map(Result::unwrap);
    assert_eq!(lines.next().as_deref(), Some("1"));
    assert_eq!(lines.next().as_deref(), Some("USR1"));
    let agent = inner(&unshare);
    for name in ["HUP", "INT", "USR2", "TERM"] {
        send(&agent, name);
        assert_eq!(lines.next().as_deref(), Some(name), "neither KILL nor STOP from inside has done anything");
    }
    assert_eq!(unshare.0.wait().unwrap().code(), Some(7));
}

#[test]
fn a_pipeline_in_the_background_ends_with_the_command() {
    let script = "yes 'oh, hi' | tail & yes error | tail >&2 & echo ready; ps -o pid= -g $$; wait";
    let script = script.replace("ps -o pid= -g $$", "jobs -p"); // the leaders of both
    let mut agent = start(agent(&["--grace-period", "10s", "--", "sh", "-c", &script]).stderr(Stdio::null()));
    let mut lines = lines(&mut agent).map(Result::unwrap);
    assert_eq!(lines.next().as_deref(), Some("ready"));
    let yes: Vec<_> = lines.by_ref().take(2).collect();
    let begin = Instant::now();
    signal(&agent, "TERM");
    assert_eq!(agent.0.wait().unwrap().code(), Some(143));
    assert!(yes.len() == 2 && yes.iter().all(|pid| is_gone(pid)));
    assert!(begin.elapsed() < Duration::from_secs(5), "nobody had to be killed");
    assert_eq!(lines.next(), None);
}

#[test]
fn who_is_left_is_told_to_end_wherever_it_hides() {
    let Some(python) = python() else { return };
    // One stays in the command's group, below a parent that has left it and does not care; one is on its own.
    let script = r"
import os, signal, time
def last_words(name):
    def say(*_):
        os.write(1, f'{name} was told\n'.encode())
        os._exit(0)
    signal.signal(signal.SIGTERM, say)
    os.write(write, b'.')
    while True: signal.pause()
read, write = os.pipe()
if os.fork() == 0:
    if os.fork() == 0: last_words('group')
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.write(write, b'.')
    while True: signal.pause()
if os.fork() == 0:
    os.setsid()
    last_words('alone')
seen = b''
while len(seen) < 3: seen += os.read(read, 3)
os._exit(6)
";
    for mut place in places_without_a_server() {
        let output = place.args(["--grace-period", "1s", "--", python, "-c", script]).output().unwrap();
        assert_eq!(output.status.code(), Some(6), "{}", stderr(&output));
        let told = stdout(&output);
        let mut told: Vec<_> = told.lines().collect();
        told.sort_unstable();
        assert_eq!(told, ["alone was told", "group was told"], "{}", stderr(&output));
    }
}

#[test]
fn a_stranger_of_the_same_name_is_left_alone() {
    // A pod may share one namespace of processes: what is not below the agent is none of its business.
    let mut stranger = Running(Command::new("sleep").arg("1000").process_group(0).spawn().unwrap());
    let script = "sleep 1000 & setsid sleep 1000 & exit 3";
    for options in [&[][..], UNREACHABLE] {
        let output =
            agent(options).args(["--linger", "0s", "--grace-period", "1s", "--", "sh", "-c", script]).output().unwrap();
        assert_eq!(output.status.code(), Some(3));
        assert!(stderr(&output).contains("(sleep)"), "{}", stderr(&output));
        assert!(stranger.0.try_wait().unwrap().is_none());
    }
}

#[test]
fn the_command_starts_where_the_agent_was_started() {
    let dir = tempfile::tempdir().unwrap();
    let output = agent(&["--", "pwd", "-P"]).current_dir(dir.path()).output().unwrap();
    assert_eq!(stdout(&output).trim(), dir.path().canonicalize().unwrap().to_str().unwrap());
}

/// Runs `sys.argv[2:]` on a terminal, writes `sys.argv[1]` to it and prints what comes back.
const ON_A_TERMINAL: &str = r"
import os, pty, signal, sys, termios
signal.alarm(20)
pid, terminal = pty.fork()
if pid == 0: os.execvp(sys.argv[2], sys.argv[2:])
flags = termios.tcgetattr(terminal)
flags[1] &= ~termios.OPOST
flags[3] &= ~termios.ECHO
termios.tcsetattr(terminal, termios.TCSANOW, flags)
os.write(terminal, sys.argv[1].encode().decode('unicode_escape').encode())
try:
    while block := os.read(terminal, 1024): os.write(1, block)
except OSError: pass
os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
";

#[test]
fn a_terminal_is_read_to_its_end() {
    let Some(python) = python() else { return };
    let output = on_a_terminal(python, r"1\n2\n3\n\x04\x04", &["tac"]);
    assert_eq!((output.status.code(), &*stdout(&output)), (Some(0), "3\n2\n1\n"), "{}", stderr(&output));
}

#[test]
fn a_shell_on_the_agents_terminal_has_job_control() {
    let Some(python) = python() else { return };
    let input = r"echo flags: $-\nsleep 1000 &\nkill %1\nwait %1\necho code $?\nexit 9\n";
    let output = on_a_terminal(python, input, &["bash", "--norc", "--noprofile", "-m"]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(9), "{text}");
    assert!(!text.contains("no job control") && !text.contains("cannot set terminal"), "{text}");
    let flags = text.split("flags: ").nth(1).and_then(|rest| rest.lines().next());
    assert!(flags.is_some_and(|flags| flags.contains('m')) && text.contains("code 143"), "{text}");
}

#[test]
fn a_terminal_changes_hands_without_a_hangup() {
    let Some(python) = python() else { return };
    // A CONT it may get, as from a shell's fg: reading before the terminal was its own would have stopped it.
    let script = "trap 'echo HUP' HUP; read x; echo $x; sleep 0.3; exit 4";
    let output = on_a_terminal(python, r"something\n", &["sh", "-c", script]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(text.contains("something") && !text.contains("HUP"), "{text}");
}

#[test]
fn a_stop_at_the_terminal_stops_the_agent_once_and_fg_continues_it() {
    let Some(python) = python() else { return };
    let shell = r"
import os, pty, signal, sys
signal.alarm(20)
pid, terminal = pty.fork()
if pid == 0: # the shell, of which the agent is a job
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    job = os.fork()
    if job == 0:
        os.setpgid(0, 0)
        os.tcsetpgrp(0, os.getpid())
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)
        os.execv(sys.argv[1], sys.argv[1:])
    for _ in range(2):
        _, status = os.waitpid(job, os.WUNTRACED)
        if not os.WIFSTOPPED(status): os._exit(101)
        if os.tcgetpgrp(0) == os.getpgrp(): os._exit(102)
        os.tcsetpgrp(0, job)
        os.write(1, b'continued\n')
        os.killpg(job, signal.SIGCONT)
    _, status = os.waitpid(job, os.WUNTRACED)
    os._exit(103 if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status))
seen = b''
def await_text(text):
    global seen
    while text not in seen: seen += os.read(terminal, 1024)
    seen = seen.partition(text)[2]
await_text(b'ready')
agent = int(open(f'/proc/{pid}/task/{pid}/children').read())
for word, stop in [(b'one', lambda: os.write(terminal, b'\x1a')), (b'two', lambda: os.kill(agent, signal.SIGTSTP))]:
    stop()
    await_text(b'continued')
    os.write(terminal, word + b'\n')
    await_text(b'got ' + word)
os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
";
    // An orphan ends after each word: the agent hears of a child, and must not take that for another stop.
    let script =
        "echo ready; read x; (true &); sleep 0.2; echo got $x; read x; (true &); sleep 0.2; echo got $x; exit 9";
    let output = Command::new(python).args(["-c", shell, AGENT, "--", "sh", "-c", script]).output().unwrap();
    assert_eq!(output.status.code(), Some(9), "{} {}", stdout(&output), stderr(&output));
}

fn on_a_terminal(python: &str, input: &str, command: &[&str]) -> std::process::Output {
    let mut shell = Command::new(python);
    shell.args(["-c", ON_A_TERMINAL, input, AGENT, "--log-level", "error", "--"]).args(command);
    shell.output().expect("python can be run")
}

/// An agent in every place where it may find itself.
fn places() -> Vec<Command> {
    let mut places = places_without_a_server();
    places.push(agent(UNREACHABLE));
    places
}

/// As a subreaper, and as PID 1.
fn places_without_a_server() -> Vec<Command> {
    let pid_1 = as_pid_1().map(|mut place| {
        place.arg(AGENT);
        place
    });
    [agent(&[])].into_iter().chain(pid_1).collect()
}

/// The agent that `started` is, or that it has started as PID 1.
fn inner(started: &Running) -> String {
    let is_agent =
        |pid: u32| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ends_with("phonehome-agent"));
    let pid = started.0.id();
    if is_agent(pid) {
        return pid.to_string();
    }
    let mut found = String::new();
    eventually("an agent runs", || {
        found = child_of(&started.0);
        !found.is_empty()
    });
    found
}

/// The only child of a process.
fn child_of(process: &Child) -> String {
    let pid = process.id();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children.split_whitespace().next().unwrap_or_default().to_owned()
}

fn send(pid: &str, signal: &str) {
    let status = Command::new("kill").args([&format!("-{signal}"), pid]).status().expect("kill can be run");
    assert!(status.success());
}
