//! What a build writes is what the hook prints: every byte, in order, at once, with proof.

use std::{process::Stdio, sync::Arc};

use phonehome_server::{BuildLog, Config, Durability, Expected, ExpectedBuild, LogItem, Outcome, Server};
use tokio::{sync::Semaphore, task::JoinSet};

use crate::harness::{self, Hook, Process, Random, Scene, Stored, patiently, skipped};

#[tokio::test]
async fn every_byte_arrives_on_the_stream_it_was_written_to() {
    let scene = Scene::new();
    let (out, err) = noise(&scene);
    let launcher = harness::builder(&scene, &[], "cat \"$E2E_SCENE/out\"; cat \"$E2E_SCENE/err\" >&2; exit 9");
    let ended = Hook::launch_in(scene, &[], &launcher).ended().await;
    assert!(ended.stdout == out, "stdout differs: {} bytes of {}", ended.stdout.len(), out.len());
    let own_lines = ended.stderr.strip_prefix(&*err).expect("stderr begins with the build's");
    let own_lines = String::from_utf8(own_lines.to_vec()).unwrap();
    let proof = format!("the log is complete: {} bytes in ", out.len() + err.len());
    assert!(
        own_lines.starts_with(&format!("\nphonehome: build failed: step main: exit code 9; {proof}")),
        "{own_lines}"
    );
    assert_eq!(own_lines.lines().count(), 2, "one line: {own_lines}");
    assert_eq!(ended.code, 9);
}

#[tokio::test]
async fn files_get_the_same_bytes_as_pipes() {
    let scene = Scene::new();
    let (out, err) = noise(&scene);
    let launcher = harness::builder(&scene, &[], "cat \"$E2E_SCENE/out\"; cat \"$E2E_SCENE/err\" >&2");
    let file = |name| std::fs::File::create(scene.path(name)).unwrap();
    let mut hook = scene.command(harness::server());
    hook.args(harness::arguments(&[])).args(["--", "sh", "-c", &launcher]).stdin(Stdio::null());
    let mut hook = hook.stdout(file("stdout")).stderr(file("stderr")).spawn().unwrap();
    assert!(patiently("the hook ends", hook.wait()).await.unwrap().success());
    assert!(std::fs::read(scene.path("stdout")).unwrap() == out);
    assert!(std::fs::read(scene.path("stderr")).unwrap().starts_with(&err));
}

#[tokio::test]
async fn lines_are_printed_while_the_build_runs() {
    let scene = Scene::new();
    let gates = [scene.gate("first"), scene.gate("second")];
    let script = format!(
        "echo one; {}; printf 'no newline' >&2; {}; echo three",
        gates[0].pass(),
        gates[1].pass() // the build cannot end before the test has seen the lines
    );
    let launcher = harness::builder(&scene, &[], &script);
    let mut hook = Hook::launch_in(scene, &[], &launcher);
    hook.process.stdout.shows("one\n").await;
    gates[0].open();
    hook.process.stderr.shows("no newline").await;
    assert!(!hook.process.has_ended());
    gates[1].open();
    let ended = hook.ended().await;
    assert_eq!((ended.code, ended.stdout()), (0, "one\nthree\n".to_owned()));
}

#[tokio::test]
async fn many_short_lines_keep_their_order() {
    let script = "i=0; while [ $i -lt 20000 ]; do echo \"line $i\"; i=$((i + 1)); done";
    let ended = Hook::run(&[], script).ended().await;
    let expected: String = (0..20_000).map(|i| format!("line {i}\n")).collect();
    assert!(ended.stdout() == expected, "{} bytes of {}", ended.stdout.len(), expected.len());
    assert_eq!(ended.code, 0);
}

#[tokio::test]
async fn what_is_stored_has_the_counts_and_the_digest_of_what_was_sent() {
    let scene = Scene::new();
    let (out, err) = noise(&scene);
    let launcher = harness::builder(&scene, &[], "cat \"$E2E_SCENE/out\"; cat \"$E2E_SCENE/err\" >&2");
    let mut hook = Hook::launch_in(scene, &["--data", "data", "--build", "kept"], &launcher);
    assert_eq!(hook.ended().await.code, 0);
    let data = hook.scene.path("data");
    let stored = Stored::read(&data, "kept", "main", 1);
    stored.assert_complete();
    assert_eq!(stored.finished["finished"]["counts"]["stdout"]["bytes"], out.len());
    assert_eq!(stored.finished["finished"]["counts"]["stderr"]["bytes"], err.len());
    let verdict = Stored::verdict(&data, "kept").await;
    assert_eq!((&verdict["verdict"], verdict["incomplete"].is_null()), (&"succeeded".into(), true));
}

/// The case in which everybody else loses output: there is little of it and nobody is left to ask.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_builds_that_end_at_once_are_all_complete() {
    builds_that_end_at_once(200).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_builds_that_end_at_once_are_all_complete() {
    if std::env::var_os("PHONEHOME_SWEEP").is_none_or(|wanted| wanted != "full") {
        return skipped("two hundred do it; PHONEHOME_SWEEP=full runs it");
    }
    builds_that_end_at_once(1000).await;
}

async fn builds_that_end_at_once(count: usize) {
    let scene = Scene::new();
    let config = Config {
        listen: "127.0.0.1:0".parse().unwrap(),
        tls: false,
        data: scene.path("data"),
        durability: Durability::Os,
    };
    let server = Server::spawn(config).await.unwrap();
    let url = server.url("127.0.0.1", server.local_addr().port());
    let at_a_time = Arc::new(Semaphore::new(8));
    let mut builds = JoinSet::new();
    for number in 0..count {
        let build = server.expect(Expected::new(format!("build-{number}").parse().unwrap())).unwrap();
        let mut agent = scene.command(harness::agent());
        agent
            .args(["--tee", "off", "--url", &url, "--build", build.id().as_str()])
            .env("PHONEHOME_TOKEN", build.token());
        agent.args(["--", "sh", "-c", &format!("printf '%s' '{}'", short(number))]);
        let (data, at_a_time) = (scene.path("data"), at_a_time.clone());
        builds.spawn(async move {
            let _permit = at_a_time.acquire().await.unwrap();
            let mut agent = Process::spawn(&mut agent);
            assert_eq!(agent.ended().await, 0);
            check_short(&build, number).await;
            Stored::read(&data, build.id().as_str(), "main", 1)
        });
    }
    let mut complete = 0;
    while let Some(stored) = builds.join_next().await {
        stored.unwrap().assert_complete();
        complete += 1;
    }
    assert_eq!(complete, count);
}

/// The output of build `number`: 0 to 5 bytes without a newline.
fn short(number: usize) -> &'static str {
    ["", "1", "12", "123", "1234", "12345"][number % 6]
}

async fn check_short(build: &ExpectedBuild, number: usize) {
    let verdict = patiently("a verdict", build.verdict()).await;
    assert_eq!((verdict.outcome, verdict.incomplete), (Outcome::Succeeded, None), "build {number}");
    assert_eq!(String::from_utf8(printed(build.log()).await).unwrap(), short(number), "build {number}");
}

async fn printed(mut log: BuildLog) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some(LogItem::Record(record)) = log.next().await.unwrap() {
        if record.record.stream.is_output() {
            bytes.extend_from_slice(&record.record.payload);
        }
    }
    bytes
}

/// Two files of bytes of every value, `out` and `err`.
fn noise(scene: &Scene) -> (Vec<u8>, Vec<u8>) {
    let mut random = Random::new(1);
    let (mut out, mut err) = (random.bytes(300_001), random.bytes(200_003));
    out.push(b'x');
    err.push(b'x'); // neither ends with a newline
    scene.write("out", &out);
    scene.write("err", &err);
    (out, err)
}
