//! A new version takes the place of an old one while builds run.

use rustix::process::Signal;
use serde_json::json;

use crate::harness::{Standing, server};

#[tokio::test]
async fn builds_run_through_an_upgrade_and_notice_a_cut_at_most() {
    let mut standing = Standing::start(&[]).await;
    let mut builds = Vec::new();
    for (id, code) in [("one", 0), ("two", 3), ("three", 77)] {
        let token = standing.declare_one(id).await;
        let gate = standing.scene.gate(id);
        let burst = format!("seq -f '{id} %.0f' 1 60000");
        let script = format!("{burst}; {}; {burst}; exit {code}", gate.pass());
        let agent = standing.agent(id, &token, &["--tee", "off", "--linger", "1m"], &script);
        builds.push((id, code, gate, agent));
    }
    // The first is silent, the second writes on, and the third ends while nobody is there.
    for id in ["one", "two", "three"] {
        let log = standing.data.join(format!("builds/{id}/main/1/log"));
        crate::harness::eventually("output is stored", || std::fs::metadata(&log).is_ok_and(|found| found.len() > 0))
            .await;
    }
    builds[1].2.open();
    standing.process.signal(Signal::TERM);
    assert_eq!(standing.process.ended().await, 0, "it goes in order, although builds run");
    builds[2].2.open();
    standing.scene.write("new-version", std::fs::read(server()).unwrap()); // another file: what runs is not overwritten
    standing.start_again().await;
    builds[0].2.open();

    for (id, code, _, agent) in &mut builds {
        assert_eq!(agent.ended().await, *code, "{}", String::from_utf8_lossy(&agent.stderr.so_far()));
        let build = standing.ended(id).await;
        assert_eq!((&build["complete"], &build["exit_code"]), (&json!(true), &json!(*code)), "{build}");
        let burst: String = (1..=60000).map(|line| format!("{id} {line}\n")).collect();
        assert!(standing.stored(id, "main") == burst.repeat(2).as_bytes(), "{id}");
        let attempts = build["steps"][0]["attempts"].as_array().unwrap();
        assert_eq!(attempts.len(), 1, "no agent was started twice: {build}");
        assert!(attempts[0]["cuts"].as_u64().unwrap() <= 1, "{build}");
        let verified = standing.post(&format!("/api/v1/builds/{id}/verify"), json!({})).await.json();
        assert_eq!(verified["ok"], json!(true), "{verified}");
    }
}
