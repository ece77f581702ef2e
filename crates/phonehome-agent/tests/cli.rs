//! The agent's command line as people meet it: its own commands, its configuration, its own log.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::Value;
use tempfile::tempdir;

#[test]
fn install_copies_the_program_with_its_mode_and_makes_directories() {
    let dir = tempdir().unwrap();
    for (dest, expected) in
        [("file", "file"), ("new/dir/", "new/dir/phonehome-agent"), ("new/dir", "new/dir/phonehome-agent")]
    {
        let output = install(&dir.path().join(dest));
        assert_eq!((output.status.code(), &*output.stdout, &*output.stderr), (Some(0), &b""[..], &b""[..]), "{dest}");
        let copy = dir.path().join(expected);
        assert_eq!(mode(&copy), mode(Path::new(AGENT)));
        assert_eq!(Command::new(&copy).arg("--version").output().unwrap().status.code(), Some(0));
    }
    assert_eq!(
        (entries(dir.path()), entries(&dir.path().join("new/dir"))),
        (vec!["file".into(), "new".into()], vec!["phonehome-agent".into()])
    );
}

#[test]
fn install_needs_no_proc() {
    let dir = tempdir().unwrap();
    let script = r#"umount -l /proc && mount -t tmpfs none /proc || exit 77; exec "$1" install "$2""#;
    let mut unshare = Command::new("unshare");
    unshare.args(["-m", "sh", "-c", script, "sh", AGENT]).arg(dir.path()).stdin(Stdio::null());
    match unshare.output() {
        Ok(output) if !matches!(output.status.code(), Some(1 | 77)) => {
            assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
            assert!(fs::read(dir.path().join("phonehome-agent")).unwrap() == fs::read(AGENT).unwrap());
        }
        _ => skipped("it takes a mount"),
    }
}

#[test]
fn install_replaces_a_copy_that_is_running() {
    let dir = tempdir().unwrap();
    let dest = dir.path().join("phonehome-agent");
    assert!(install(&dest).status.success());
    let mut running = Command::new(&dest)
        .args(["--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let output = install(&dest);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    drop(running.stdin.take());
    assert_eq!(running.wait().unwrap().code(), Some(0));
    assert_eq!(entries(dir.path()), ["phonehome-agent"]);
}

#[test]
fn an_install_that_fails_says_why_and_leaves_nothing() {
    let dir = tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "old").unwrap();
    for dest in [file.join("below"), "/proc/x/y".into()] {
        let output = install(&dest);
        assert_eq!(output.status.code(), Some(125), "{}", dest.display());
        assert!(stderr(&output).contains("cannot install"), "{}", stderr(&output));
    }
    assert_eq!((fs::read(&file).unwrap(), entries(dir.path())), (b"old".to_vec(), vec!["file".to_owned()]));
}

#[test]
fn an_install_without_room_keeps_the_old_file_and_leaves_nothing_else() {
    let dir = tempdir().unwrap();
    let script = r#"mount -t tmpfs -o size=64k none "$1" || exit 77
        echo old >"$1/phonehome-agent"; "$2" install "$1"; echo "$?"; cat "$1/phonehome-agent"; ls -A "$1""#;
    let mut unshare = Command::new("unshare");
    unshare.args(["-m", "sh", "-c", script, "sh"]).arg(dir.path()).arg(AGENT).stdin(Stdio::null());
    match unshare.output() {
        Ok(output) if !matches!(output.status.code(), Some(1 | 77)) => {
            assert_eq!(String::from_utf8_lossy(&output.stdout), "125\nold\nphonehome-agent\n");
            assert!(stderr(&output).contains("No space left on device"), "{}", stderr(&output));
        }
        _ => skipped("it takes a mount"),
    }
}

#[test]
fn a_command_may_be_named_like_one_of_ours() {
    let output = agent(&["--log-level", "error", "--", "env", "PATH=", AGENT, "--", "man"]).output().unwrap();
    assert_eq!(output.status.code(), Some(127), "{}", stderr(&output));
    let output = agent(&["man", "ls"]).output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("phonehome-agent [OPTIONS] -- man"), "{}", stderr(&output));
}

#[test]
fn a_closed_pipe_is_no_crash() {
    let mut child = agent(&["man"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(!stderr(&output).contains("panicked"), "{}", stderr(&output));
}

#[test]
fn a_flag_wins_over_its_variable_and_that_over_the_file() {
    let dir = tempdir().unwrap();
    let file = config(dir.path(), "linger = \"1s\"\nmerge = true\nspool-memory = 1048576");
    let run = |arguments: &[&str], variable: Option<&str>| {
        let mut command = agent(&["--config", &file, "--print-config"]);
        command.args(arguments).envs(variable.map(|value| ("PHONEHOME_LINGER", value)));
        stdout(&command.output().unwrap())
    };
    let from_file = run(&[], None);
    for line in
        [format!("linger = \"1s\"  # {file}"), format!("merge = true  # {file}"), "start = \"now\"  # default".into()]
    {
        assert!(from_file.lines().any(|shown| shown == line), "{line} is not in {from_file}");
    }
    assert!(run(&[], Some("2s")).contains("linger = \"2s\"  # PHONEHOME_LINGER\n"));
    assert!(run(&["--linger", "3s"], Some("2s")).contains("linger = \"3s\"  # --linger\n"));
    assert!(run(&[], Some("")).contains("linger = \"1s\""), "an empty variable is one that is not set");
    let output = agent(&["--config", &file, "--print-config"]).env("PHONEHOME_MERGE", "false").output().unwrap();
    assert!(stdout(&output).contains("merge = false  # PHONEHOME_MERGE\n"));
}

#[test]
fn a_file_may_hold_the_command() {
    let dir = tempdir().unwrap();
    let file = config(dir.path(), "command = [\"sh\", \"-c\", \"exit 5\"]");
    assert_eq!(agent(&[]).env("PHONEHOME_CONFIG", &file).output().unwrap().status.code(), Some(5));
    assert_eq!(agent(&["--config", &file, "--", "sh", "-c", "exit 6"]).output().unwrap().status.code(), Some(6));
}

#[test]
fn what_is_printed_can_be_given_as_a_file() {
    let dir = tempdir().unwrap();
    let options = ["--url", "ws://h", "--build", "b", "--merge", "--trace=live:a,b", "--spool-dir", "/a b#c"];
    let command = ["--print-config", "--", "printf", "\t\\ \"\u{7f}é\n", "--merge", ""];
    let print = |command: &mut Command| stdout(&command.output().unwrap());
    let first = print(agent(&options).args(command));
    let file = config(dir.path(), &first);
    let second = print(&mut agent(&["--config", &file, "--print-config"]));
    assert_eq!(values(&second), values(&first));
    assert!(values(&first).len() > 15, "{first}");
    config(dir.path(), &second);
    assert_eq!(print(&mut agent(&["--config", &file, "--print-config"])), second);
}

#[test]
fn a_secret_is_not_shown_wherever_it_comes_from() {
    let dir = tempdir().unwrap();
    let file = config(dir.path(), "token = \"hunter2\"");
    let run = |arguments: &[&str], variable: bool| {
        let mut command = agent(arguments);
        command.args(["--url", "ws://127.0.0.1:9", "--build", "b", "--linger", "0s", "--log-level", "debug"]);
        command.envs(variable.then_some(("PHONEHOME_TOKEN", "hunter2")));
        let output = command.args(["--trace", "live", "--", "true"]).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        stdout(&output) + &stderr(&output)
    };
    for extra in [&[][..], &["--print-config"]] {
        for text in [
            run(&[extra, &["--token", "hunter2"]].concat(), false),
            run(extra, true),
            run(&[extra, &["--config", &file]].concat(), false),
        ] {
            assert!(text.contains("[secret]") && !text.contains("hunter2"), "{text}");
        }
    }
}

#[test]
fn the_stronger_of_token_and_token_file_counts() {
    let dir = tempdir().unwrap();
    let file = config(dir.path(), "token = \"from the file\"");
    let output =
        agent(&["--config", &file, "--url", "ws://h", "--build", "b", "--token-file", "/nowhere", "true"]).output();
    assert!(stderr(&output.unwrap()).contains("cannot read /nowhere"));
}

#[test]
fn an_error_says_where_the_value_was_given_and_what_would_do() {
    let dir = tempdir().unwrap();
    let check = |command: &mut Command, expected: &str| {
        let output = command.args(["--", "true"]).output().unwrap();
        assert_eq!((output.status.code(), stderr(&output)), (Some(125), format!("error: {expected}\n")));
    };
    let time = "'10 parsecs' is not a time, such as 30s or 5m";
    check(&mut agent(&["--linger", "10 parsecs"]), &format!("--linger: {time}"));
    check(agent(&[]).env("PHONEHOME_LINGER", "10 parsecs"), &format!("PHONEHOME_LINGER: {time}"));
    check(agent(&["--linger=10 parsecs"]).env("PHONEHOME_LINGER", "1s"), &format!("--linger: {time}"));
    check(agent(&["--linger=1s"]).env("PHONEHOME_TEE", "maybe"), "PHONEHOME_TEE: 'maybe' is none of on, off");
    check(&mut agent(&["--spool-memory=many"]), "--spool-memory: 'many' is not a size, such as 512KiB or 8MiB");
    check(&mut agent(&["--offline-limit=x"]), "--offline-limit: 'x' is neither off nor a time, such as 30s or 5m");
    check(&mut agent(&["--trace=on"]), "--trace: 'on' is none of off, ring, live and live:MODULE,...");
    for (text, expected) in [
        ("linger = \"10 parsecs\"", format!("linger: {time}")),
        ("tee = \"maybe\"", "tee: 'maybe' is none of on, off".into()),
        ("lingr = \"1s\"", "there is no option lingr; the nearest is linger".into()),
        ("linger = true", "linger: it is true or false, but must be a text in quotation marks".into()),
    ] {
        let file = config(dir.path(), text);
        check(&mut agent(&["--config", &file]), &format!("{file}: {expected}"));
    }
    check(&mut agent(&["--config", "/no/file"]), "cannot read /no/file: No such file or directory (os error 2)");
    check(&mut agent(&["--config", "/dev/zero"]), "cannot read /dev/zero: it is not a regular file");
}

#[test]
fn every_line_of_a_json_log_is_an_object_errors_of_usage_included() {
    for (arguments, level) in [
        (&["--log-level=debug", "--url=ws://127.0.0.1:9", "--build=b", "--linger=0s", "--", "/no/such"][..], "error"),
        (&["--no-such-option", "true"], "error"),
        (&["--linger=x", "true"], "error"),
        (&["--url=http://x", "--", "true"], "error"),
        (&["--log-level=info", "true"], "info"),
    ] {
        let output = agent(arguments).env("PHONEHOME_LOG_FORMAT", "json").output().unwrap();
        // Where nobody saw the command's bytes there is an empty line in place of the end of one.
        let text = stderr(&output);
        let lines = text.lines().filter(|line| !line.is_empty());
        let lines: Vec<Value> = lines.map(|line| serde_json::from_str(line).expect(line)).collect();
        for line in &lines {
            let all = ["time", "level", "module", "message"].iter().all(|name| line[name].is_string());
            assert!(all && line["time"].as_str().unwrap().ends_with('Z'), "{line}");
        }
        assert!(lines.iter().any(|line| line["level"] == level), "{arguments:?}: {lines:?}");
    }
}

#[test]
fn the_start_line_has_the_configuration_but_not_the_arguments() {
    let output = agent(&["--log-level=info", "--log-format=json", "--", "true", "PASSWORD=hunter2"]).output().unwrap();
    let text = stderr(&output);
    let start: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert_eq!(start["message"], concat!("phonehome-agent ", env!("CARGO_PKG_VERSION"), " started"));
    assert_eq!((&start["config"]["linger"], &start["config"]["command"]), (&"30s".into(), &"true".into()));
    assert!(!text.contains("hunter2"), "{text}");
}

#[test]
fn an_error_shows_what_led_to_it_and_only_then() {
    let run = |arguments: &[&str], command: &str| {
        let mut agent = agent(&["--url", "ws://127.0.0.1:9", "--build", "b", "--linger", "0s", "--require-delivery"]);
        stderr(&agent.args(arguments).args(["--", command]).output().unwrap())
    };
    let is_earlier =
        |line: &&str| line.starts_with("before the error: ") && line.contains(" INFO run: the command ended");
    let failed = run(&[], "true");
    let [.., last] = failed.lines().collect::<Vec<_>>()[..] else { panic!("nothing was said") };
    assert!(last.contains("ERROR") && last.contains("was not delivered"), "{failed}");
    assert_eq!(failed.lines().filter(is_earlier).count(), 1, "{failed}");
    let times: Vec<_> = failed.lines().filter_map(|line| line.strip_prefix("before the error: ")).collect();
    assert!(times.is_sorted(), "{failed}");
    assert!(!run(&["--trace=off"], "true").contains("before the error"));
    let json = run(&["--log-format=json"], "true");
    let marked = json.lines().filter(|line| serde_json::from_str::<Value>(line).expect(line)["trace"] == true);
    assert!(marked.count() > 0, "{json}");
    let quiet = agent(&["--", "true"]).output().unwrap();
    assert!(!stderr(&quiet).contains("before the error"));
}

#[test]
fn a_live_trace_shows_the_modules_that_are_asked_for() {
    let run = |trace: &str| {
        let mut agent = agent(&["--url", "ws://127.0.0.1:9", "--build", "b", "--linger", "0s", "--log-level=error"]);
        stderr(&agent.args([trace, "--", "true"]).output().unwrap())
    };
    assert!(run("--trace=live").contains(" INFO run: the command ended"));
    let some = run("--trace=live:run");
    assert!(some.contains(" INFO run: ") && some.lines().all(|line| line.contains(" run: ")), "{some}");
    assert_eq!(run("--trace=live:nothing"), "");
}

#[test]
fn own_lines_stay_out_of_a_line_on_the_same_stream() {
    let script = "printf half; sleep 0.3; printf ' of' >&2; sleep 0.3; printf ' it'; sleep 0.1; echo ' all' >&2; \
                  sleep 0.1; echo ' done'; sleep 0.1; printf end";
    let shell = r#"exec "$@" 2>&1"#;
    let mut command = Command::new("sh");
    command.args(["-c", shell, "sh", AGENT, "--url", "ws://127.0.0.1:9", "--build", "b", "--linger", "0s"]);
    let output = command.args(["--trace=live", "--", "sh", "-c", script]).stdin(Stdio::null()).output().unwrap();
    let text = stdout(&output);
    let (own, rest): (Vec<_>, Vec<_>) = text.lines().partition(|line| line.starts_with("20") && line.contains("Z "));
    assert_eq!(rest, ["half of it all", " done", "end"], "{text}");
    assert!(own.iter().any(|line| line.ends_with(" INFO run: the command ended code=0")), "{text}");
}

#[test]
fn own_lines_wait_for_the_end_of_a_command_that_nobody_observes() {
    let script = "printf half; sh -c 'sleep 0.1 &'; sleep 1; printf ' a line'"; // an orphan is a line of the trace
    let shell = r#"exec "$@" 2>&1"#;
    let mut command = Command::new("sh");
    command.args(["-c", shell, "sh", AGENT, "--trace=live", "--", "sh", "-c", script]);
    let text = stdout(&command.stdin(Stdio::null()).output().unwrap());
    let (before, after) = text.split_once("half a line").expect(&text);
    assert!(before.ends_with("runs unobserved\n"), "{text}");
    assert!(after.starts_with("\n20") && after.contains("reaped an orphan"), "{text}");
}

const AGENT: &str = env!("CARGO_BIN_EXE_phonehome-agent");

fn agent(arguments: &[&str]) -> Command {
    let mut command = Command::new("timeout");
    command.args(["-s", "KILL", "60", AGENT]).args(arguments).stdin(Stdio::null());
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("PHONEHOME_")) {
        command.env_remove(name);
    }
    command
}

fn install(dest: &Path) -> Output {
    agent(&["install"]).arg(dest).output().expect("the agent can be run")
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("it is there").permissions().mode()
}

fn entries(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("it is a directory");
    let mut names: Vec<_> =
        entries.map(|entry| entry.expect("it can be read").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Writes the file and says where.
fn config(dir: &Path, text: &str) -> String {
    let path = dir.join("phonehome.toml");
    fs::write(&path, text).expect("a file can be written");
    path.to_str().expect("it is UTF-8").to_owned()
}

/// What a printed configuration sets, without the comments.
fn values(text: &str) -> Vec<&str> {
    text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| Some(line.rsplit_once("  # ")?.0)).collect()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn skipped(reason: &str) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let line = format!("skipped: {test}: {reason}\n");
    // Past the capture of test output: a test that did not run must show.
    std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes()).expect("standard error is open");
}
