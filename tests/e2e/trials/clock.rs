//! The server's clock goes backwards.

use std::path::Path;

use serde_json::{Value, json};

use crate::harness::{Scene, Standing, skipped};

/// Where libfaketime may be: Debian's and others' places.
const LIBRARIES: [&str; 4] = [
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib/faketime/libfaketimeMT.so.1",
    "/usr/lib64/faketime/libfaketimeMT.so.1",
];

#[tokio::test]
async fn a_clock_that_goes_backwards_breaks_neither_lists_nor_the_rules() {
    let Some(library) = LIBRARIES.into_iter().find(|path| Path::new(path).exists()) else {
        return skipped("libfaketime is missing");
    };
    let scene = Scene::new();
    let clock = scene.write("clock", "+0");
    let clock = clock.to_str().unwrap().to_owned();
    let variables = [
        ("LD_PRELOAD", library),
        ("FAKETIME_TIMESTAMP_FILE", &clock),
        ("FAKETIME_NO_CACHE", "1"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
    ];
    let options = ["--keep-for", "1h", "--seal-after", "1s", "--lost-timeout", "10m"];
    let mut standing = Standing::start_in(scene, &options, &variables).await;
    let running = standing.declare_one("running").await;
    let gate = standing.scene.gate("end");
    let script = format!("echo before; {}; echo after; exit 4", gate.pass());
    let mut agent = standing.agent("running", &running, &["--tee", "off"], &script);
    standing.process.stderr.shows("\"connected\"").await;
    run(&standing, "first").await;

    standing.scene.write("clock", "-2h");
    run(&standing, "second").await;
    let (first, second) = (created(&standing, "first").await, created(&standing, "second").await);
    if first < second {
        return skipped("the clock cannot be set back");
    }
    assert_eq!(sorted(listed(&standing).await), ["first", "running", "second"]);
    // In the order of the clock, whatever it did: pages of one go through all of them, once.
    assert_eq!(paged(&standing).await, listed(&standing).await);
    assert_eq!(due(&standing).await, Vec::<String>::new(), "nothing is old");
    standing.crash().await;
    assert_eq!(sorted(listed(&standing).await), ["first", "running", "second"]);
    assert_eq!(due(&standing).await, Vec::<String>::new(), "nothing is old after a start");

    gate.open();
    assert_eq!(agent.ended().await, 4);
    let build = standing.ended("running").await;
    assert_eq!((&build["verdict"], &build["complete"]), (&json!("failed"), &json!(true)), "{build}");
    let told = standing.get("/api/v1/builds/running/log?timestamps=true&follow=true").await.text();
    assert!(told.contains(" before\n") && told.contains(" after\n"), "{told}");

    // Right again: what ended while it was wrong is two hours old by then, and nothing else.
    standing.scene.write("clock", "+0");
    standing.post("/api/v1/retention", json!({})).await;
    crate::harness::patiently("what is old goes", async {
        while listed(&standing).await != ["first"] {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    })
    .await;
}

async fn run(standing: &Standing, id: &str) {
    let token = standing.declare_one(id).await;
    assert_eq!(standing.agent(id, &token, &["--tee", "off"], "echo hello").ended().await, 0);
    assert_eq!(standing.ended(id).await["verdict"], json!("succeeded"));
}

async fn created(standing: &Standing, id: &str) -> String {
    standing.get(&format!("/api/v1/builds/{id}")).await.json()["created"].as_str().unwrap().to_owned()
}

async fn listed(standing: &Standing) -> Vec<String> {
    ids(&standing.get("/api/v1/builds").await.json()["builds"])
}

async fn due(standing: &Standing) -> Vec<String> {
    ids(&standing.post("/api/v1/retention?dry_run=true", json!({})).await.json()["expire"])
}

async fn paged(standing: &Standing) -> Vec<String> {
    let (mut found, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = standing.get(&format!("/api/v1/builds?limit=1{cursor}")).await.json();
        found.extend(ids(&page["builds"]));
        match page["next"].as_str() {
            Some(next) if found.len() < 10 => cursor = format!("&cursor={next}"),
            Some(_) | None => return found,
        }
    }
}

fn ids(builds: &Value) -> Vec<String> {
    builds.as_array().unwrap().iter().map(|build| build["id"].as_str().unwrap().to_owned()).collect()
}

fn sorted(mut ids: Vec<String>) -> Vec<String> {
    ids.sort();
    ids
}
