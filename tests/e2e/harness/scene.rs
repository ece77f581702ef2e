//! A test's own directory, and everything that runs in it.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::process::Command;

use super::eventually;

/// A directory that is gone after the test, with every process that was started in its name.
///
/// Such a process has the variable `E2E_SCENE`, the directory's path, in its environment. It passes it on to what it
/// starts, so that nothing escapes: not a builder in a session of its own, not a hook that git started.
#[derive(Debug)]
pub(crate) struct Scene {
    dir: TempDir,
}

impl Scene {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::Builder::new().prefix("phonehome-e2e-").tempdir().unwrap() }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, contents).unwrap();
        path
    }

    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// Waits until somebody has made this file.
    pub(crate) async fn appears(&self, name: &str) {
        eventually(&format!("{name} appears"), || self.path(name).exists()).await;
    }

    /// A command that belongs to this scene, with little else in its environment.
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("LC_ALL", "C");
        command.env("HOME", self.dir()).env("TMPDIR", self.dir()).env(MARK, self.dir());
        command.current_dir(self.dir()).kill_on_drop(true);
        command
    }

    /// Something that a script waits for until the test opens it.
    pub(crate) fn gate(&self, name: &str) -> Gate {
        let path = self.path(name);
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
        // Opened for both directions a FIFO blocks nobody (fifo(7)), and it keeps what is written for who comes later.
        let fifo = File::options().read(true).write(true).open(&path).unwrap();
        Gate { fifo, name: name.to_owned() }
    }

    /// The processes of this scene whose command line contains `text`.
    pub(crate) fn processes(&self, text: &str) -> Vec<Pid> {
        let mark = [MARK.as_bytes(), b"=", self.dir().as_os_str().as_bytes(), b"\0"].concat();
        let holds = |path: PathBuf, text: &[u8]| {
            fs::read(path).is_ok_and(|bytes| bytes.windows(text.len()).any(|window| window == text))
        };
        let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| {
            let entry = entry.ok()?;
            let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
            let is_ours = holds(entry.path().join("environ"), &mark);
            (is_ours && (text.is_empty() || holds(entry.path().join("cmdline"), text.as_bytes()))).then_some(pid)
        });
        processes.collect()
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for _ in 0..ROUNDS {
            let left = self.processes("");
            if left.is_empty() {
                break;
            }
            for pid in left {
                kill_process(pid, Signal::KILL).unwrap_or(()); // it may have ended in this moment
            }
            std::thread::yield_now();
        }
    }
}

/// The variable that says to which scene a process belongs.
const MARK: &str = "E2E_SCENE";

/// How often processes are looked for: while one is being killed it may start another.
const ROUNDS: usize = 50;

/// Holds up scripts that [`Gate::pass`] it.
#[derive(Debug)]
pub(crate) struct Gate {
    fifo: File,
    name: String,
}

impl Gate {
    /// What a script says to wait here.
    pub(crate) fn pass(&self) -> String {
        format!("read -r _ <\"${MARK}/{}\"", self.name)
    }

    /// Lets one script pass, the one that waits or the next one that comes.
    pub(crate) fn open(&self) {
        (&self.fifo).write_all(b"\n").unwrap();
    }
}
