//! Secrets that are named do not leave the agent as a process. No server is needed for that.

use std::process::{Command, Output, Stdio};

#[test]
fn the_copy_of_the_output_is_masked_across_writes_and_in_both_streams() {
    let file = tempfile::NamedTempFile::new().expect("a file can be made");
    std::fs::write(file.path(), "from a file\n").expect("it can be written");
    let script = r#"printf 'a hunt'; sleep 0.1; printf 'er2 b'; printf %s "$PASSWORD" | base64; cat "$0" >&2"#;
    let path = file.path().to_str().expect("its name is text");
    let options = ["--redact-env", "PASSWORD,UNSET", "--redact-file", path];
    let output = run(agent(&options).args(["--", "sh", "-c", script, path]).env("PASSWORD", "hunter2"));
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "a [redacted] b[redacted]\n");
    let stderr = stderr(&output);
    assert!(stderr.contains("[redacted]\n") && !stderr.contains("from a file"), "{stderr}");
    assert!(stderr.contains("variable UNSET (--redact-env) is empty or not set"), "{stderr}");
}

#[test]
fn options_can_be_variables_and_the_token_is_one_more_value() {
    let mut agent = agent(&["--", "sh", "-c", "echo $ONE $TWO the-own-token"]);
    agent.envs([("ONE", "value-one"), ("TWO", "value-two"), ("PHONEHOME_TOKEN", "the-own-token")]);
    let output = run(agent.env("PHONEHOME_REDACT_ENV", "ONE,TWO"));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "[redacted] [redacted] [redacted]\n");
}

#[test]
fn what_cannot_be_redacted_keeps_the_command_from_starting() {
    for (options, expected) in [
        (["--redact-env", "PASSWORD"], "variable PASSWORD (--redact-env) holds fewer than 6 bytes"),
        (["--redact-file", "/no/such/file"], "cannot read file /no/such/file (--redact-file): No such file"),
    ] {
        let output = run(agent(&options).args(["--", "echo", "started"]).env("PASSWORD", "q7z"));
        assert_eq!((output.status.code(), &*output.stdout), (Some(125), &b""[..]));
        let text = stderr(&output);
        assert!(text.contains(expected) && !text.contains("q7z"), "{text}");
    }
}

#[test]
fn what_is_said_of_a_command_shows_no_secret_either() {
    for options in [&[][..], &["--url", "ws://127.0.0.1:9", "--build", "b", "--linger", "0s"]] {
        let mut agent = Command::new(env!("CARGO_BIN_EXE_phonehome-agent"));
        agent.args(["--redact-env", "SECRET"]).args(options).args(["--", "/nowhere/hunter2-hunter2/make"]);
        let output = run(agent.env("SECRET", "hunter2-hunter2"));
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(127));
        assert!(said.contains("cannot run /nowhere/[redacted]/make") && !said.contains("hunter2"), "{said}");
    }
}

/// The agent with a server that is not there, for at most 20 s: port 9 of loopback refuses.
fn agent(options: &[&str]) -> Command {
    let mut command = Command::new("timeout");
    command.args(["-s", "KILL", "20", env!("CARGO_BIN_EXE_phonehome-agent")]);
    command.args(["--url", "ws://127.0.0.1:9", "--build", "b", "--linger", "0s"]).args(options).stdin(Stdio::null());
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("PHONEHOME_")) {
        command.env_remove(name);
    }
    command
}

fn run(command: &mut Command) -> Output {
    command.output().expect("the agent can be run")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
