//! A pod: agents that share a graveyard, and what a test sees of them.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    net::SocketAddr,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, sync_channel},
    thread,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::inotify::{self, CreateFlags, WatchFlags},
    process::{Pid, Signal, kill_process},
};
use tempfile::TempDir;

pub(crate) const AGENT: &str = env!("CARGO_BIN_EXE_phonehome-agent");

/// How long anything may take that must happen. Generous: only a failing test waits this long.
const PATIENCE: Duration = Duration::from_secs(30);

/// A directory for the containers of a pod, in which their commands run.
pub(crate) struct Pod {
    dir: TempDir,
    /// What a script waits for that says `read _ <gate`.
    pub(crate) gate: Gate,
}

impl Pod {
    /// Its graveyard is not made yet.
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let gate = Gate::new(&dir.path().join("gate"));
        Self { dir, gate }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn graveyard(&self) -> PathBuf {
        self.path("graveyard")
    }

    /// A container whose command is a shell script, and its name. No KILL of this test leaves it behind for long: what
    /// it waits for ends with the pod.
    pub(crate) fn container(&self, name: &str, options: &[&str], script: &str) -> Command {
        let mut command = self.bare(&["--name", name, "--log-level", "info"]);
        command.arg("--graveyard").arg(self.graveyard()).args(options).args(["--", "sh", "-c", script]);
        command
    }

    /// An agent in the pod's directory with nothing of ours in its environment.
    pub(crate) fn bare(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(AGENT);
        command.args(arguments).current_dir(self.dir.path());
        let is_ours = |name: &str| name.starts_with("PHONEHOME_") || name.starts_with("KUBEXIT_");
        for (name, _) in std::env::vars().filter(|(name, _)| is_ours(name)) {
            command.env_remove(name);
        }
        command
    }

    /// Starts such a container.
    pub(crate) fn start(&self, name: &str, options: &[&str], script: &str) -> Container {
        Container::start(&mut self.container(name, options, script))
    }

    /// Carves a tombstone as kubexit does: in place, with its keys alone.
    pub(crate) fn carve(&self, name: &str, text: &str) {
        fs::create_dir_all(self.graveyard()).unwrap();
        fs::write(self.graveyard().join(name), text).unwrap();
    }

    /// The tombstone as it is now.
    pub(crate) fn tombstone(&self, name: &str) -> Tombstone {
        Tombstone(fs::read_to_string(self.graveyard().join(name)).unwrap())
    }

    /// Waits for a tombstone of somebody alive that has this key.
    pub(crate) fn carved(&self, name: &str, key: &str) -> Tombstone {
        let inotify = inotify::init(CreateFlags::CLOEXEC).unwrap();
        fs::create_dir_all(self.graveyard()).unwrap();
        inotify::add_watch(&inotify, self.graveyard(), WatchFlags::MOVED_TO).unwrap();
        let limit = Timespec::try_from(PATIENCE).unwrap();
        loop {
            let text = fs::read_to_string(self.graveyard().join(name)).unwrap_or_default();
            let stone = Tombstone(text);
            if stone.value(key).is_some() && stone.value("Died").is_none() {
                return stone;
            }
            let changed = poll(&mut [PollFd::new(&inotify, PollFlags::IN)], Some(&limit)).unwrap();
            assert!(changed > 0, "no {key} for {name}: {}", stone.0);
            rustix::io::read(&inotify, &mut [0; 4096]).unwrap();
        }
    }
}

/// Something that a script waits for until the test opens it, or is over.
pub(crate) struct Gate(File);

impl Gate {
    pub(crate) fn new(path: &Path) -> Self {
        rustix::fs::mkfifoat(rustix::fs::CWD, path, rustix::fs::Mode::RWXU).unwrap();
        // Opened for both directions a FIFO blocks nobody (fifo(7)), and it keeps what is written for who comes later.
        Self(File::options().read(true).write(true).open(path).unwrap())
    }

    /// Lets one script pass, the one that waits or the next one that comes.
    pub(crate) fn open(&self) {
        (&self.0).write_all(b"\n").unwrap();
    }
}

/// What stands on a tombstone.
#[derive(Debug)]
pub(crate) struct Tombstone(pub(crate) String);

impl Tombstone {
    /// As it stands there, without the quotes of a text.
    pub(crate) fn value(&self, key: &str) -> Option<&str> {
        let values = self.0.lines().filter_map(|line| line.split_once(": "));
        values.into_iter().find(|(known, _)| *known == key).map(|(_, value)| value.trim_matches('"'))
    }

    pub(crate) fn keys(&self) -> Vec<&str> {
        self.0.lines().filter_map(|line| line.split_once(": ")).map(|(key, _)| key).collect()
    }
}

/// A running agent, which ends with its test.
pub(crate) struct Container {
    pid: Pid,
    end: Receiver<i32>,
    /// What its command prints.
    pub(crate) stdout: Lines,
    /// What the agent says, and the command complains of.
    pub(crate) log: Lines,
}

/// A container that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// As a shell says it.
    pub(crate) code: i32,
    /// What was not read before.
    pub(crate) stdout: String,
    /// All of it.
    pub(crate) log: String,
}

impl Container {
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let pid = Pid::from_raw(child.id().cast_signed()).unwrap();
        let (stdout, log) = (Lines::read(child.stdout.take().unwrap()), Lines::read(child.stderr.take().unwrap()));
        let (ended, end) = sync_channel(1);
        thread::spawn(move || {
            let status = child.wait().unwrap();
            let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap());
            ended.send(code).unwrap_or_default(); // the test may be over
        });
        Self { pid, end, stdout, log }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid, signal).unwrap();
    }

    /// Waits for its end.
    pub(crate) fn ended(mut self) -> Ended {
        let code = self.end.recv_timeout(PATIENCE);
        let code = code.unwrap_or_else(|_| panic!("it does not end: {}", self.log.so_far));
        let before = self.stdout.so_far.len();
        self.stdout.finish();
        self.log.finish();
        Ended { code, stdout: self.stdout.so_far.split_off(before), log: std::mem::take(&mut self.log.so_far) }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if self.end.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
            kill_process(self.pid, Signal::KILL).unwrap_or_default(); // it may have ended in this moment
        }
    }
}

/// Lines as they are written.
pub(crate) struct Lines {
    lines: Receiver<String>,
    so_far: String,
}

impl Lines {
    fn read(stream: impl Read + Send + 'static) -> Self {
        let (line, lines) = sync_channel(1000);
        thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            loop {
                let mut bytes = Vec::new();
                match stream.read_until(b'\n', &mut bytes) {
                    Ok(1..) if line.send(String::from_utf8_lossy(&bytes).into_owned()).is_ok() => {}
                    Ok(_) | Err(_) => break,
                }
            }
        });
        Self { lines, so_far: String::new() }
    }

    /// The next one, without its end.
    pub(crate) fn next(&mut self) -> String {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => {
                self.so_far.push_str(&line);
                line.trim_end().to_owned()
            }
            Err(why) => panic!("no further line ({why}) after: {}", self.so_far),
        }
    }

    /// Waits for a line with this text.
    pub(crate) fn shows(&mut self, text: &str) {
        while !self.next().contains(text) {}
    }

    fn finish(&mut self) {
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => self.so_far.push_str(&line),
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => panic!("somebody holds the output open: {}", self.so_far),
            }
        }
    }
}

/// A loopback address that no other test has, nor any program that binds to the usual one.
pub(crate) fn own_address() -> SocketAddr {
    let [_, _, high, low] = std::process::id().to_be_bytes();
    SocketAddr::from(([127, 77, high, low], 5432))
}

/// A program of Python's, as a command of a shell. `None` where there is no Python.
pub(crate) fn python(pod: &Pod, name: &str, program: &str) -> Option<String> {
    let works = Command::new("python3").arg("--version").output().is_ok_and(|output| output.status.success());
    if !works {
        skipped("there is no python3");
        return None;
    }
    fs::write(pod.path(name), program).unwrap();
    Some(format!("exec python3 {name}"))
}

pub(crate) fn skipped(reason: &str) {
    let test = thread::current().name().unwrap_or("a test").to_owned();
    let line = format!("skipped: {test}: {reason}\n");
    // Past the capture of test output: a test that did not run must show.
    Write::write_all(&mut std::io::stderr(), line.as_bytes()).expect("standard error is open");
}

/// Whether there is something of this name.
pub(crate) fn exists(path: impl AsRef<Path>) -> bool {
    fs::symlink_metadata(path).is_ok()
}
