//! Every clock has its own verdict, its own message and its own code.

use rustix::process::Signal;

use crate::harness::{Hook, Process, Scene, arguments, builder, server, skipped};

#[tokio::test]
async fn nobody_phones_home() {
    let mut hook = Hook::wait(&["--connect-timeout", "300ms"]).await;
    let url = hook.variable("URL").to_owned();
    let ended = hook.ended().await;
    let told = ended.stderr();
    assert_eq!(ended.code, 124);
    assert!(told.contains("timed out: nobody phoned home (exit code 124)"), "{told}");
    assert!(told.contains("step main never connected"), "{told}");
    assert!(told.contains("look at: was the builder started"), "{told}");
    assert!(told.contains(&format!("can the builder reach {url}?")), "{told}");
}

#[tokio::test]
async fn a_build_that_takes_too_long_is_stopped_and_its_last_words_arrive() {
    let script = "trap 'echo stopping; exit 3' TERM; echo going; for i in $(seq 1200); do sleep 0.1; done";
    let ended = Hook::run(&["--timeout", "1s"], script).ended().await;
    let told = ended.stderr();
    assert_eq!((ended.code, ended.stdout()), (124, "going\nstopping\n".to_owned()));
    assert!(told.contains("timed out: the build took too long"), "{told}");
    assert!(told.contains("the log is complete"), "{told}");
}

#[tokio::test]
async fn a_build_that_ignores_term_is_killed_after_the_grace_period() {
    let script = "trap '' TERM; echo stubborn; for i in $(seq 1200); do sleep 0.1; done";
    let hook = &mut Hook::wait(&["--timeout", "1s", "--grace-period", "300ms"]).await;
    let mut agent = hook.agent(&[], script);
    let ended = hook.ended().await;
    assert_eq!((ended.code, ended.stdout()), (124, "stubborn\n".to_owned()));
    assert!(ended.stderr().contains("the log is complete"), "{}", ended.stderr());
    assert_eq!(agent.ended().await, 128 + 9);
}

#[tokio::test]
async fn a_build_that_writes_nothing_is_stopped_when_that_is_limited() {
    let ended = Hook::run(&["--idle-timeout", "700ms"], "echo going; exec sleep 120").ended().await;
    let told = ended.stderr();
    assert_eq!((ended.code, ended.stdout()), (124, "going\n".to_owned()));
    assert!(told.contains("timed out: the build wrote nothing for too long"), "{told}");
    assert!(told.contains("the log is complete"), "{told}");
}

#[tokio::test]
async fn a_build_that_keeps_writing_is_not_idle() {
    let script = "for i in 1 2 3 4 5 6 7 8; do echo $i; sleep 0.25; done";
    let ended = Hook::run(&["--idle-timeout", "1500ms"], script).ended().await;
    assert_eq!((ended.code, ended.stdout()), (0, "1\n2\n3\n4\n5\n6\n7\n8\n".to_owned()));
}

#[tokio::test]
async fn an_agent_that_vanished_is_lost_and_never_succeeded() {
    let mut hook = Hook::wait(&["--lost-timeout", "500ms"]).await;
    let agent = hook.agent(&["--tee", "off"], "echo going; exec sleep 120");
    hook.process.stdout.shows("going\n").await;
    agent.signal(Signal::KILL);
    let ended = hook.ended().await;
    let told = ended.stderr();
    assert_eq!((ended.code, ended.stdout()), (121, "going\n".to_owned()));
    assert!(told.contains("lost: the agent of step main vanished and did not come back (exit code 121)"), "{told}");
    assert!(told.contains("the log is not complete: step main: its end never arrived"), "{told}");
    assert!(told.contains("look at: was the builder evicted"), "{told}");
}

#[tokio::test]
async fn a_launcher_that_fails_ends_the_push_at_once() {
    let ended = Hook::launch(&[], "echo cannot pull the image >&2; exit 3").ended().await;
    let told = ended.stderr();
    assert_eq!(ended.code, 125);
    assert!(told.starts_with("cannot pull the image\n"), "{told}");
    assert!(told.contains("the launcher failed with exit status: 3 before any builder phoned home"), "{told}");
}

#[tokio::test]
async fn a_launcher_that_fails_later_stops_the_build() {
    let scene = Scene::new();
    let gate = scene.gate("gate");
    let script = "trap 'echo stopping; exit 1' TERM; echo going; for i in $(seq 1200); do sleep 0.1; done";
    let launcher = format!("{} {}; exit 9", builder(&scene, &[], script), gate.pass());
    let mut hook = Hook::launch_in(scene, &[], &launcher);
    hook.process.stdout.shows("going\n").await;
    gate.open();
    let ended = hook.ended().await;
    assert_eq!((ended.code, ended.stdout()), (125, "going\nstopping\n".to_owned()));
    assert!(ended.stderr().contains("exit status: 9 while the build was running"), "{}", ended.stderr());
}

#[tokio::test]
async fn a_launcher_that_cannot_be_started_ends_the_push_at_once() {
    let scene = Scene::new();
    let mut command = scene.command(server());
    command.args(arguments(&[])).args(["--", "/nowhere/launcher"]);
    let mut hook = Process::spawn(&mut command);
    assert_eq!(hook.ended().await, 125);
    let told = String::from_utf8(hook.stderr.all().await).unwrap();
    assert!(told.contains("/nowhere/launcher could not be started"), "{told}");
}

/// What the disk had room for is printed, and the verdict names the disk, not the agent that gave up in the end.
#[tokio::test]
async fn a_full_disk_is_the_reason_and_not_the_agent() {
    let scene = Scene::new();
    let data = scene.path("small");
    let Some(_small) = SmallDisk::mount(&data) else { return skipped("a tmpfs cannot be mounted") };
    let launcher = builder(&scene, &["--linger", "2s"], "head -c 6000000 /dev/zero");
    let data = data.to_str().unwrap();
    let options = ["--data", data, "--lost-timeout", "3s", "--grace-period", "0s"];
    let mut hook = Hook::launch_in(scene, &options, &launcher);
    let ended = hook.ended().await;
    let told = ended.stderr();
    assert_eq!(ended.code, 125, "{told}");
    assert!(told.contains("build error: the log cannot be stored"), "{told}");
    assert!(told.contains("the log is not complete"), "{told}");
    assert!(ended.stdout.iter().all(|byte| *byte == 0) && !ended.stdout.is_empty());
}

/// 3 MiB in memory, unmounted when dropped.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(path: &std::path::Path) -> Option<Self> {
        std::fs::create_dir(path).unwrap();
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=3m", "tmpfs"]).arg(path).stderr(std::process::Stdio::null());
        mount.status().is_ok_and(|status| status.success()).then(|| Self(path.to_owned()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(std::process::Command::new("umount").arg("-l").arg(&self.0).status()); // there is nothing left to do about it
    }
}
