//! The agent and the hook both end as the build did.

use crate::harness::{Hook, Process};

#[tokio::test]
async fn a_code_comes_through_unchanged() {
    for code in [0, 1, 7, 255] {
        let told = run(&format!("exit {code}"), code).await;
        if code == 0 {
            assert_eq!(told, format!("phonehome: build succeeded; {NOTHING}\n"));
        } else {
            assert_eq!(told, format!("phonehome: build failed: step main: exit code {code}; {NOTHING}\n"));
        }
    }
}

#[tokio::test]
async fn a_signal_is_128_more_than_its_number() {
    for (signal, number) in [("KILL", 9), ("TERM", 15), ("SEGV", 11), ("INT", 2)] {
        let told = run(&format!("ulimit -c 0; kill -{signal} $$"), 128 + number).await;
        assert!(told.contains(&format!("killed by SIG{signal} (exit code {})", 128 + number)), "{told}");
    }
}

#[tokio::test]
async fn a_command_that_does_not_exist_is_127_and_says_so() {
    let told = run_command(&["no-such-command"], 127).await;
    assert!(told.contains("cannot run no-such-command"), "{told}");
    assert!(told.contains("No such file"), "{told}");
    assert!(told.contains("the log is complete"), "{told}");
}

#[tokio::test]
async fn a_command_that_cannot_be_executed_is_126_and_says_so() {
    let told = run_command(&["/etc/passwd"], 126).await;
    assert!(told.contains("cannot run /etc/passwd"), "{told}");
    assert!(told.contains("ermission denied"), "{told}");
}

#[tokio::test]
async fn arguments_reach_the_command_untouched() {
    let hook = Hook::wait(&[]).await;
    let mut command = hook.scene.command(crate::harness::agent());
    command.envs(hook.variables()).args(["--", "printf", "%s|", "--help", "a b", "$HOME", "", "--", "-x"]);
    let mut agent = Process::spawn(&mut command);
    let mut hook = hook;
    assert_eq!(hook.ended().await.stdout(), "--help|a b|$HOME||--|-x|");
    assert_eq!(agent.ended().await, 0);
}

/// What is proven about a build without output.
const NOTHING: &str = "the log is complete: 0 bytes in 2 records, \
    BLAKE3 af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262, 0 cuts survived";

/// Runs a script, checks both exit codes and returns what the hook said.
async fn run(script: &str, code: i32) -> String {
    run_command(&["sh", "-c", script], code).await
}

async fn run_command(command: &[&str], code: i32) -> String {
    let mut hook = Hook::wait(&[]).await;
    let mut agent = hook.scene.command(crate::harness::agent());
    let mut agent = Process::spawn(agent.envs(hook.variables()).arg("--").args(command));
    let ended = hook.ended().await;
    assert_eq!(ended.code, code, "the hook, after {command:?}: {}", ended.stderr());
    assert_eq!(agent.ended().await, code, "the agent, after {command:?}");
    ended.stderr()
}
