//! The network between two machines: packets vanish, in both directions or in one, and connections are reset.

use std::{io::Write, net::SocketAddr, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep};

use crate::{
    faults::{LINGER, at_each, long_or},
    harness::{End, Life, Lines, Link, Process, Random, Site, eventually, skipped},
};

/// From the moment at which packets get through again to the first new byte on the server's disk.
const RESUMES_WITHIN: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_partition_the_log_goes_on_within_five_seconds() {
    if Link::new().is_none() {
        return skipped(NO_LINK);
    }
    let lengths = long_or(&[2, 6, 12, 20][..], &[1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 30, 45, 60, 90]);
    at_each(lengths, |seconds| async move {
        let scene = Scene::new().await;
        scene.link.drop_towards(End::Server);
        scene.link.drop_towards(End::Agent);
        sleep(Duration::from_secs(*seconds)).await; // that long it lasts; nothing is waited for
        let resumed = scene.heal().await;
        report(&format!("after {seconds} s without a packet"), resumed);
        assert!(resumed <= RESUMES_WITHIN, "{resumed:?} after {seconds} s");
        scene.ends_whole().await;
    })
    .await;
}

/// One side sends into nothing and hears the other, or hears nothing: a connection that only half exists.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packets_that_vanish_in_one_direction_only_lose_nothing() {
    if Link::new().is_none() {
        return skipped(NO_LINK);
    }
    let lengths = long_or(&[8][..], &[2, 5, 10, 20, 50, 70]);
    let places = lengths.iter().flat_map(|seconds| [(End::Server, *seconds), (End::Agent, *seconds)]);
    at_each(places, |(towards, seconds)| async move {
        let scene = Scene::new().await;
        scene.link.drop_towards(towards);
        sleep(Duration::from_secs(seconds)).await; // that long it lasts
        let resumed = scene.heal().await;
        report(&format!("after {seconds} s without a packet towards the {towards:?}"), resumed);
        assert!(resumed <= RESUMES_WITHIN, "{resumed:?} after {seconds} s towards {towards:?}");
        scene.ends_whole().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_are_reset_at_any_moment_lose_nothing() {
    if Link::new().is_none() {
        return skipped(NO_LINK);
    }
    let scene = Scene::new().await;
    let mut random = Random::new(5);
    for _ in 0..long_or(6, 40) {
        sleep(Duration::from_millis(random.within(0..400))).await; // any moment
        scene.link.reset();
        sleep(Duration::from_millis(random.within(50..300))).await;
        scene.heal().await;
    }
    scene.ends_whole().await;
}

const NO_LINK: &str = "network namespaces cannot be made here, or ip or nft is missing";

/// What was measured, shown past the capture of test output.
fn report(when: &str, resumed: Duration) {
    let line = format!("measured: the log went on {:.1} s {when}\n", resumed.as_secs_f64());
    std::io::stderr().write_all(line.as_bytes()).unwrap();
}

/// A build whose agent and server are on different machines.
struct Scene {
    site: Site,
    link: Arc<Link>,
    agent: Process,
    collector: Process,
}

impl Scene {
    /// Waits until the log grows.
    async fn new() -> Self {
        let link = Arc::new(Link::new().expect("there was one before"));
        let address = SocketAddr::from((End::Server.address(), 4443));
        let site = Site { address, ..Site::new() };
        Lines::prepare(&site.scene, 60_000);
        let collector = site.start(&link.at(End::Server), "");
        collector.stderr.shows("listening on").await;
        let agent = site.agent_in(&link.at(End::Agent), &LINGER, Lines::UNTIL_ENOUGH);
        eventually("the log begins", || site.stored(1) > 2000).await;
        Self { site, link, agent, collector }
    }

    /// Lets packets through again and measures how long the log takes to go on.
    async fn heal(&self) -> Duration {
        let before = self.site.stored(1);
        self.link.heal();
        let healed = Instant::now();
        eventually("the log goes on", || self.site.stored(1) > before).await;
        healed.elapsed()
    }

    async fn ends_whole(mut self) {
        self.site.scene.write("enough", "");
        assert_eq!(self.agent.ended().await, 7);
        let life = Life::of(self.collector).await;
        self.site.assert_whole(1, &Lines::written(&self.site.scene), 7, &[life]);
    }
}
