//! Places where there is nothing but the agent: no `/proc`, no `/dev`, no `/etc`, no shell.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use tempfile::TempDir;

use crate::support::{AGENT, is_gone, skipped, stderr, stdout};

#[test]
fn an_agent_is_all_that_an_agent_needs() {
    for pid_1 in [true, false] {
        let Some(place) = Place::with(&[AGENT]) else { return };
        for (command, code, text) in [
            (&["/phonehome-agent", "--version"][..], 0, "phonehome-agent "),
            (&["/phonehome-agent", "--", "/phonehome-agent", "--no-such"], 125, ""),
            (&["/no-such-command"], 127, ""),
        ] {
            let output = place.run(pid_1, &[&["--"], command].concat());
            assert_eq!(output.status.code(), Some(code), "{command:?}: {}", stderr(&output));
            assert!(stdout(&output).starts_with(text), "{}", stdout(&output));
            assert!(!stderr(&output).contains("panicked"), "{}", stderr(&output));
        }
    }
}

#[test]
fn a_server_out_of_reach_is_no_trouble() {
    let Some(place) = Place::with(&[AGENT]) else { return };
    // With a name to look up, too, although nothing there says how.
    for url in ["ws://127.0.0.1:9", "ws://localhost:9", "wss://localhost:9"] {
        let options = ["--url", url, "--build", "b", "--linger", "300ms", "--", "/phonehome-agent", "--version"];
        let output = place.run(true, &options);
        assert_eq!(output.status.code(), Some(0), "{url}: {}", stderr(&output));
        assert!(stdout(&output).starts_with("phonehome-agent "), "{}", stdout(&output));
        assert!(!stderr(&output).contains("panicked"), "{}", stderr(&output));
    }
}

#[test]
fn without_a_terminal_to_give_it_is_said_what_is_missing() {
    let Some(place) = Place::with(&[AGENT]) else { return };
    let url = ["--url", "ws://127.0.0.1:9", "--build", "b", "--linger", "0s"];
    let options = [&url[..], &["--pty", "--", "/phonehome-agent", "--version"]].concat();
    let output = place.run(true, &options);
    assert_eq!(output.status.code(), Some(125), "{}", stderr(&output));
    assert!(stderr(&output).contains("needs /dev/ptmx"), "{}", stderr(&output));
}

#[test]
fn who_is_left_is_ended_by_its_group() {
    let Some(place) = Place::with(&[AGENT, "/bin/sh", "/bin/sleep"]) else { return };
    place.put_null();
    for (script, is_killed) in [("/sleep 1000 & echo $!", false), ("trap '' TERM; /sleep 1000 & echo $!", true)] {
        let options = ["--grace-period", "300ms", "--linger", "0s", "--", "/sh", "-c", &format!("{script}; exit 3")];
        let output = place.run(false, &options);
        assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
        assert!(is_gone(stdout(&output).trim()));
        assert!(stderr(&output).contains("cannot be seen are still running"), "{}", stderr(&output));
        assert_eq!(stderr(&output).contains("killing"), is_killed, "{}", stderr(&output));
    }
}

#[test]
fn who_left_the_group_holds_nothing_up() {
    // Nobody can find it without /proc: the agent says so, and ends. The end of PID 1 is everybody's.
    let Some(place) = Place::with(&[AGENT, "/bin/sh", "/bin/sleep", "/usr/bin/setsid"]) else { return };
    place.put_null();
    let script = "/setsid /sleep 1000 & /sleep 0.2; exit 3";
    let output = place.run(true, &["--grace-period", "300ms", "--linger", "0s", "--", "/sh", "-c", script]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains("cannot be seen are still running"), "{}", stderr(&output));
}

/// A root directory with a few programs and the libraries that they need.
struct Place(TempDir);

impl Place {
    /// `None`, and said, where that cannot be done.
    fn with(programs: &[&str]) -> Option<Self> {
        let dir = tempfile::tempdir().expect("a directory can be made");
        for program in programs {
            let program = Path::new(program);
            fs::copy(program, dir.path().join(program.file_name()?)).expect("it can be copied");
            for library in libraries(program) {
                let copy = dir.path().join(library.strip_prefix("/").expect("its path is absolute"));
                fs::create_dir_all(copy.parent()?).expect("a directory can be made");
                fs::copy(&library, copy).expect("it can be copied");
            }
        }
        let place = Self(dir);
        let output = place.run(true, &["--version"]);
        if !output.status.success() {
            skipped(&format!("no root can be changed: {}", stderr(&output)));
            return None;
        }
        Some(place)
    }

    /// A shell wants it for what it starts in the background; an empty file does.
    fn put_null(&self) {
        fs::create_dir(self.0.path().join("dev")).expect("a directory can be made");
        fs::write(self.0.path().join("dev/null"), "").expect("a file can be made");
    }

    /// Runs the agent there.
    fn run(&self, pid_1: bool, arguments: &[&str]) -> Output {
        let unshare: &[&str] = if pid_1 { &["unshare", "--pid", "--fork", "--kill-child"] } else { &[] };
        let mut command = Command::new("timeout");
        command.args(["-s", "KILL", "30"]).args(unshare).arg("chroot").arg(self.0.path()).arg("/phonehome-agent");
        command.args(arguments).stdin(Stdio::null()).output().expect("a timeout can be run")
    }
}

/// What the loader would load.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let listed = Command::new("ldd").arg(program).output().map(|output| stdout(&output)).unwrap_or_default();
    listed.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}
