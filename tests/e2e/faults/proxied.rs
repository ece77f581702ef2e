//! A proxy between agent and server cuts, stalls, slows and closes what is silent; a process stands still.

use std::time::Duration;

use rustix::process::Signal;
use tokio::time::{Instant, sleep};

use crate::{
    faults::{LINGER, at_each, is_full, long_or},
    harness::{Life, Lines, Mode, Process, Proxy, Random, Site, eventually},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_cuts_every_connection_loses_nothing() {
    let scene = Scene::new(Mode::Cut(500..20_000)).await;
    let cuts = long_or(12, 60);
    eventually("connections are cut", || scene.proxy.cut() >= cuts).await;
    scene.proxy.set(Mode::Forward);
    scene.ends_whole().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_stalls_again_and_again_loses_nothing() {
    let scene = Scene::new(Mode::Forward).await;
    let mut random = Random::new(9);
    for _ in 0..long_or(5, 40) {
        scene.proxy.set(Mode::Stall);
        sleep(Duration::from_millis(random.within(100..long_or(400, 8000)))).await; // that long it stalls
        let before = scene.site.stored(1);
        scene.proxy.set(Mode::Forward);
        eventually("the log goes on", || scene.site.stored(1) > before).await;
    }
    scene.ends_whole().await;
}

/// Slower than the build writes, so that its output gathers in the agent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_slows_loses_nothing() {
    let scene = Scene::new(Mode::Slow(4000)).await;
    let before = scene.site.stored(1);
    eventually("it gets on slowly", || scene.site.stored(1) >= before + long_or(6_000, 100_000)).await;
    assert!((Lines::written(&scene.site.scene).len() as u64) > scene.site.stored(1), "it is no bottleneck");
    scene.proxy.set(Mode::Forward);
    scene.ends_whole().await;
}

/// The build is silent for longer than the proxy waits, so that every connection is closed when it has said its piece.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_closes_silent_connections_loses_nothing() {
    let site = Site::new();
    let collector = site.started().await;
    let proxy = Proxy::to(site.address, Mode::Idle(Duration::from_millis(200)), 3).await;
    let lines = Lines::prepare(&site.scene, 12);
    let script = "while read -r line; do echo \"$line\"; sleep 0.5; done <lines; exit 7";
    let mut agent = site.agent_through(&proxy, &LINGER, script);
    let life = Life::of(collector).await;
    assert_eq!(agent.ended().await, 7);
    site.assert_whole(1, lines.all(), 7, &[life]);
    assert!(proxy.cut() >= 2, "{} connections were closed", proxy.cut());
}

/// The other side has heartbeats and time limits, and time goes on for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_stands_still_goes_on_where_it_stood() {
    // Only the longer one outlasts the 45 s after which a silent peer is taken for dead: it belongs to the full sweep.
    let stands = Duration::from_secs(if is_full() { 60 } else { 5 });
    at_each([false, true], |stop_the_server| async move {
        let scene = Scene::new(Mode::Forward).await;
        let stopped = if stop_the_server { &scene.collector } else { &scene.agent };
        stopped.signal(Signal::STOP);
        sleep(stands).await; // that long it stands still
        let before = scene.site.stored(1);
        stopped.signal(Signal::CONT);
        let begun = Instant::now();
        eventually("the log goes on", || scene.site.stored(1) > before).await;
        assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
        scene.ends_whole().await;
    })
    .await;
}

/// A build whose agent reaches its server through a proxy.
struct Scene {
    site: Site,
    proxy: Proxy,
    agent: Process,
    collector: Process,
}

impl Scene {
    /// Waits until the log grows.
    async fn new(mode: Mode) -> Self {
        let site = Site::new();
        Lines::prepare(&site.scene, 60_000);
        let collector = site.started().await;
        let proxy = Proxy::to(site.address, mode, 11).await;
        let agent = site.agent_through(&proxy, &LINGER, Lines::UNTIL_ENOUGH);
        eventually("the log begins", || site.stored(1) > 0).await;
        Self { site, proxy, agent, collector }
    }

    async fn ends_whole(mut self) {
        self.site.scene.write("enough", "");
        let life = Life::of(self.collector).await;
        assert_eq!(self.agent.ended().await, 7);
        self.site.assert_whole(1, &Lines::written(&self.site.scene), 7, &[life]);
    }
}
