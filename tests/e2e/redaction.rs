//! Secrets that are named are nowhere: not in what is stored, not in what is copied or spooled, not in what is told.

use std::{fs, path::Path};

use crate::harness::{Hook, Process, Site, Stored};

const PASSWORD: &str = "correct horse/battery+staple";

/// What `base64` makes of it.
const ENCODED: &str = "Y29ycmVjdCBob3JzZS9iYXR0ZXJ5K3N0YXBsZQ";

const PEM: &str = "-----BEGIN PRIVATE KEY-----\n\
                   MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgq3kXuJ0r5vYwL9Zt\n\
                   kM2nB1cT7oXeDfV4HsPjQyGzRaUWiC8xI6bEKNhLdSmOvFpAY5gtRwZqJuhTlknB\n\
                   -----END PRIVATE KEY-----\n";

/// Parts of its lines.
const LINES: [&str; 2] = ["AgEAMBMGByqGSM49", "T7oXeDfV4HsPjQyG"];

/// Prints all of them, each in several ways and by several programs.
const PRINT: &str = r#"printf 'plain %s\n' "$PASSWORD"
    printf 'encoded '; printf %s "$PASSWORD" | base64
    printf 'in two '; printf 'correct horse'; sleep 0.1; printf '/battery+staple\n'
    cat key
    printf 'from elsewhere '; sed "s/\$/$(printf '\r')/" key
    printf 'token %s\n' "$(cat token)""#;

/// The terminal leaves line ends as they are.
const PRINTED: &str = "plain [redacted]\nencoded [redacted]\nin two [redacted]\n[redacted]\nfrom elsewhere [redacted]\r\n\
                       token [redacted]\n";

#[tokio::test]
async fn what_is_named_is_masked_wherever_output_and_facts_go() {
    for terminal in [false, true] {
        let mut hook = Hook::wait(&["--data", "data", "--build", "secret"]).await;
        let token = hook.variable("TOKEN").to_owned();
        hook.scene.write("key", PEM);
        hook.scene.write("token", &token);
        let options =
            ["--redact-env", "PASSWORD", "--redact-file", "key", "--spool-dir", "spool", "--log-level", "trace"];
        fs::create_dir(hook.scene.path("spool")).unwrap();
        let mut command = hook.agent_command(&[&options[..], &["--pty"][..usize::from(terminal)]].concat(), PRINT);
        let mut agent = Process::spawn(command.env("PASSWORD", PASSWORD));
        let ended = hook.ended().await;
        assert_eq!((ended.code, agent.ended().await), (0, 0), "{}", ended.stderr());
        let data = hook.scene.path("data");
        let stored = Stored::read(&data, "secret", "main", 1);
        assert_eq!(String::from_utf8_lossy(&stored.log), PRINTED);
        stored.assert_complete();
        assert!(agent.stdout.all().await == stored.log, "the copy is the same");
        let events = Stored::events(&data.join("builds/secret/main/1"));
        let account = &events.iter().find(|(_, event)| event["event"] == "redaction").unwrap().1;
        assert_eq!((&account["values"], &account["replaced"]), (&3.into(), &6.into()), "{account}");
        let secrets = [PASSWORD, ENCODED, LINES[0], LINES[1], &token];
        assert_unseen(&data, &secrets);
        assert_unseen(&hook.scene.path("spool"), &secrets);
        assert_hidden("the agent's lines", &agent.stderr.all().await, &secrets);
        assert_hidden("the pusher's lines", &[ended.stdout, ended.stderr].concat(), &secrets);
    }
}

/// The program's name is a fact, and so is why it cannot be run.
#[tokio::test]
async fn a_command_with_a_secret_in_its_name_is_told_without_it() {
    for (is_there, code) in [(true, 3), (false, 127)] {
        let mut hook = Hook::wait(&["--data", "data", "--build", "secret"]).await;
        let program = hook.scene.path("run-hunter2-now");
        if is_there {
            std::os::unix::fs::symlink("/bin/sh", &program).unwrap();
        }
        let mut command = hook.scene.command(crate::harness::agent());
        command.envs(hook.variables()).env("PASSWORD", "hunter2");
        let options =
            ["--redact-env", "PASSWORD", "--log-level", "trace", "--name", "main", "--graveyard", "graveyard"];
        command.args(options).arg("--").arg(&program).args(["-c", "exit 3"]);
        let mut agent = Process::spawn(&mut command);
        let ended = hook.ended().await;
        assert_eq!((ended.code, agent.ended().await), (code, code), "{}", ended.stderr());
        let data = hook.scene.path("data");
        let told = String::from_utf8(fs::read(data.join("builds/secret/main/1/events")).unwrap()).unwrap();
        assert!(told.contains("run-[redacted]-now"), "{told}");
        assert_unseen(&data, &["hunter2"]);
        assert_unseen(&hook.scene.path("graveyard"), &["hunter2"]);
        assert_hidden("the agent's lines", &agent.stderr.all().await, &["hunter2"]);
        assert_hidden("the pusher's lines", &[ended.stdout, ended.stderr].concat(), &["hunter2"]);
    }
}

#[tokio::test]
async fn what_is_spooled_while_the_server_is_away_is_masked_too() {
    let site = Site::new();
    site.scene.write("password", PASSWORD);
    site.scene.write("key", PEM);
    site.scene.write("token", "of-every-life");
    fs::create_dir(site.scene.path("spool")).unwrap();
    let options = ["--redact-file", "password,key", "--spool-dir", "spool", "--linger", "0s"];
    let script = format!("PASSWORD=$(cat password); {PRINT}; exit 7");
    assert_eq!(site.agent(&options, &script).ended().await, 7);
    let secrets = [PASSWORD, ENCODED, LINES[0], LINES[1], "of-every-life"];
    let files = assert_unseen(&site.scene.path("spool"), &secrets);
    assert!(files.windows(15).any(|part| part == b"plain [redacted"), "the log is in the spool");

    let mut collector = site.started().await;
    let _next = site.agent(&["--spool-dir", "spool"], "exit 0");
    collector.ended().await;
    let stored = Stored::read(&site.data, "kept", "main", 1);
    stored.assert_complete();
    assert_eq!(String::from_utf8_lossy(&stored.log), PRINTED);
    assert_unseen(&site.data, &secrets);
}

/// Goes through all files below a directory, and returns what they hold.
fn assert_unseen(dir: &Path, secrets: &[&str]) -> Vec<u8> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let path = entry.path();
        let bytes = if path.is_dir() { assert_unseen(&path, secrets) } else { fs::read(&path).unwrap() };
        assert_hidden(&path.display().to_string(), &bytes, secrets);
        all.extend(bytes);
    }
    all
}

fn assert_hidden(place: &str, bytes: &[u8], secrets: &[&str]) {
    for secret in secrets {
        let shows = bytes.windows(secret.len()).any(|part| part == secret.as_bytes());
        assert!(!shows, "{place} shows {secret}: {}", bytes.escape_ascii());
    }
}
