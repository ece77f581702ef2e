//! A disk that is full for a while.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::json;

use crate::harness::{Scene, Standing, server, skipped};

#[tokio::test]
async fn agents_wait_while_the_disk_is_full_and_complete_when_there_is_room() {
    let scene = Scene::new();
    let Some(disk) = SmallDisk::mount(&scene.path("data"), "6m") else { return skipped("a tmpfs cannot be mounted") };
    let standing = Standing::start_in(scene, &allowed_to_fill_it(), &[]).await;
    let mut builds = Vec::new();
    for id in ["one", "two", "three"] {
        let token = standing.declare_one(id).await;
        let agent = standing.agent(id, &token, &["--tee", "off", "--linger", "1m"], "seq -f '%063.0f' 1 65536; exit 5");
        builds.push((id, agent));
    }
    let token = standing.declare_one("cancelled").await;
    let mut cancelled = standing.agent("cancelled", &token, &["--tee", "off"], "echo begun; sleep 600");
    standing.process.stderr.shows("no room left").await;

    // Whoever reads is answered, and the end of a build fits although its log's rest does not.
    assert_eq!(standing.get("/healthz").await.status, 200);
    assert_eq!(standing.get("/api/v1/builds/one/log?tail=1").await.status, 200);
    assert_eq!(standing.post("/api/v1/builds/cancelled/cancel", json!({})).await.status, 202);
    assert_eq!(cancelled.ended().await, 143);
    let verdict = standing.ended("cancelled").await;
    assert_eq!(verdict["verdict"], json!("cancelled"), "{verdict}");
    assert!(standing.data.join("builds/cancelled/verdict.json").exists());
    for (id, agent) in &mut builds {
        let build = standing.get(&format!("/api/v1/builds/{id}")).await.json();
        assert_eq!(build["state"], json!("running"), "{build}");
        assert!(!agent.has_ended());
    }

    assert!(disk.resize("64m"));
    for (id, agent) in &mut builds {
        assert_eq!(agent.ended().await, 5, "{}", String::from_utf8_lossy(&agent.stderr.so_far()));
        let build = standing.ended(id).await;
        assert_eq!((&build["complete"], &build["exit_code"]), (&json!(true), &json!(5)), "{build}");
        let expected: String = (1..=65536).map(|number| format!("{number:063}\n")).collect();
        assert!(standing.stored(id, "main") == expected.as_bytes(), "{id}");
    }
    standing.process.stderr.shows("there is room again").await;
}

/// The options by which a server does not stop long before the disk is full, when there are such.
fn allowed_to_fill_it() -> Vec<&'static str> {
    let help = Command::new(server()).args(["serve", "--help"]).output().unwrap();
    if String::from_utf8_lossy(&help.stdout).contains("--min-free") { vec!["--min-free", "0"] } else { Vec::new() }
}

/// A file system in memory, unmounted when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(path: &Path, size: &str) -> Option<Self> {
        std::fs::create_dir(path).unwrap();
        let options = format!("size={size}");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(path))
            .then(|| Self(path.to_owned()))
    }

    fn resize(&self, size: &str) -> bool {
        run(Command::new("mount").args(["-o", &format!("remount,size={size}")]).arg(&self.0))
    }
}

fn run(command: &mut Command) -> bool {
    command.stdin(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        run(Command::new("umount").arg("-l").arg(&self.0)); // there is nothing left to do about it
    }
}
