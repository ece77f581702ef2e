use std::{io::Write as _, path::Path, sync::Arc};

use tempfile::TempDir;
use tokio::{net::TcpListener, sync::mpsc, time::timeout};

use super::{tombstone::Tombstone, *};
use crate::{
    command::Reaper,
    config::{ExpectedExits, WaitFor},
    herald::News,
    probe::exec::Children,
};

const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::test]
async fn with_nothing_configured_nothing_is_done() {
    let dir = tempfile::tempdir().unwrap();
    let config = SiblingsConfig { graveyard: dir.path().join("graveyard"), ..nothing() };
    let mut siblings = Siblings::open(config, &Env::real(), None, runner());
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    assert_eq!(tasks(), 0);
    siblings.births().await.unwrap();
    siblings.born();
    siblings.died(&End::Exited(0), None).await;
    assert!(tasks() == 0 && !dir.path().join("graveyard").exists());
    assert!(siblings.variables().next().is_none() && siblings.take_output_watch().is_none());
}

#[tokio::test]
async fn a_life_is_carved_step_by_step() {
    let pod = Pod::new();
    let ready_when = Some("output:^up$".parse().unwrap());
    let (mut siblings, mut news) =
        pod.open(SiblingsConfig { ready_when, generation: Some("7".into()), ..named("web") });
    siblings.births().await.unwrap();
    siblings.born();
    let born = pod.wait_for("web", |stone| stone.born.is_some()).await;
    assert_eq!((born.died, born.ready, born.attempt, born.generation.as_deref()), (None, None, Some(1), Some("7")));
    siblings.take_output_watch().unwrap().feed(phonehome_proto::frame::Stream::Stdout, b"up\n");
    let ready = pod.wait_for("web", |stone| stone.ready.is_some()).await;
    assert_eq!(ready.born, born.born);
    assert_eq!(next(&mut news).await, Event::Ready(Ready { by: "output:^up$".into() }));
    siblings.died(&End::Signalled { signal: 15, core: false, oom: false }, Some("main has died")).await;
    let died = pod.tombstone("web").unwrap();
    assert_eq!((died.exit_code, died.signal.as_deref()), (Some(143), Some("SIGTERM")));
    assert_eq!(
        (died.reason.as_deref(), died.ready.is_some(), died.died.is_some()),
        (Some("main has died"), true, true)
    );
}

#[tokio::test]
async fn a_restart_is_the_next_attempt_and_ends_the_last_life() {
    let pod = Pod::new();
    for (found, generation, attempt) in [
        ("", None, 1),
        ("Born: 2026-11-21T08:58:44Z\nDied: 2026-11-21T08:58:45Z\nExitCode: 1\n", None, 2), // by kubexit
        ("Born: 2026-11-21T08:58:44Z\nReady: 2026-11-21T08:58:45Z\nAttempt: 2\n", None, 3), // its agent was killed
        ("Died: 2026-11-21T08:58:45Z\nAttempt: 6\nGeneration: \"7\"\n", Some("7"), 7),
        ("Died: 2026-11-21T08:58:45Z\nAttempt: 6\nGeneration: \"7\"\n", Some("8"), 1),
    ] {
        pod.write("web", found);
        let generation = generation.map(ToOwned::to_owned);
        let is_reborn = |stone: &Tombstone| stone.died.is_none();
        let (mut siblings, _news) = pod.open(SiblingsConfig { generation: generation.clone(), ..named("web") });
        if attempt > 1 {
            let is_next = |stone: &Tombstone| stone.attempt == Some(attempt);
            let blank = pod.wait_for("web", is_next).await;
            assert_eq!((blank.born, blank.ready, blank.died), (None, None, None), "before its start");
        }
        siblings.born();
        let born = pod.wait_for("web", |stone| stone.born.is_some() && is_reborn(stone)).await;
        assert_eq!((born.attempt, born.generation), (Some(attempt), generation), "{found}");
    }
}

#[tokio::test]
async fn a_birth_is_awaited_and_the_wait_is_told() {
    let pod = Pod::new();
    let birth_deps = vec!["db".parse().unwrap(), "cache:ready".parse().unwrap()];
    let (mut siblings, mut news) = pod.open(SiblingsConfig { birth_deps, ..named("web") });
    let births = tokio::spawn(async move { siblings.births().await });
    assert_eq!(waiting(&mut news).await, ["db to be born", "cache to be ready"]);
    pod.write("cache", BORN);
    pod.write("db", BORN);
    assert_eq!(waiting(&mut news).await, ["cache to be ready"]);
    pod.write("cache", &format!("{BORN}Ready: \"2026-11-21T08:58:46Z\"\n"));
    timeout(PATIENCE, births).await.unwrap().unwrap().unwrap();
    assert!(news.try_recv().is_err(), "nothing was told twice");
}

#[tokio::test]
async fn what_is_there_already_is_not_waited_for() {
    let pod = Pod::new();
    pod.write("db", BORN);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let wait_for = vec![wait("proxy", &format!("tcp:{}", listener.local_addr().unwrap()))];
    let birth_deps = vec!["db".parse().unwrap()];
    let (mut siblings, mut news) = pod.open(SiblingsConfig { birth_deps, wait_for, ..nothing() });
    timeout(PATIENCE, siblings.births()).await.unwrap().unwrap();
    assert!(news.try_recv().is_err(), "there was nothing to tell");
}

#[tokio::test(start_paused = true)]
async fn a_wait_in_vain_says_for_whom_and_who_was_there() {
    let pod = Pod::new();
    pod.write("web", BORN);
    pod.write("gone", &format!("{BORN}Died: \"2026-11-21T08:58:46Z\"\nExitCode: 3\n"));
    let birth_deps = vec!["db".parse().unwrap(), "gone".parse().unwrap(), "web:ready".parse().unwrap()];
    let wait_for = vec![wait("proxy", "file:/nowhere/at all")];
    let (mut siblings, _news) = pod.open(SiblingsConfig { birth_deps, wait_for, ..named("self") });
    let begun = Instant::now();
    let unborn = siblings.births().await.unwrap_err();
    assert!((Duration::from_secs(30)..Duration::from_secs(31)).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    let End::NotStarted { code: 125, reason } = unborn.end() else { panic!("{unborn:?}") };
    let expected = format!(
        "not started: waited 30s for: db to be born (no tombstone; there are: gone, web), gone to be born (it died at \
         2026-11-21T08:58:46Z with exit code 3), web to be ready (its tombstone has no Ready yet), proxy to pass \
         file:/nowhere/at all (No such file or directory (os error 2)); the graveyard is {}",
        pod.dir.path().display()
    );
    assert_eq!(reason, expected);
    siblings.died(&unborn.end(), None).await;
    let stone = pod.tombstone("self").unwrap();
    assert_eq!((stone.born, stone.exit_code, stone.reason), (None, Some(125), Some(expected)));
}

#[tokio::test(start_paused = true)]
async fn a_wait_may_have_no_limit_and_can_be_taken_up_again() {
    let pod = Pod::new();
    let birth_deps = vec!["db".parse().unwrap()];
    let (mut siblings, mut news) = pod.open(SiblingsConfig { birth_deps, birth_timeout: None, ..nothing() });
    for _ in 0..3 {
        timeout(Duration::from_secs(3600), siblings.births()).await.unwrap_err();
    }
    assert_eq!(waiting(&mut news).await, ["db to be born"]);
    assert!(news.try_recv().is_err(), "told once");
    pod.write("db", BORN);
    siblings.births().await.unwrap();
}

#[tokio::test]
async fn a_death_from_before_prevents_the_start_and_is_said_on_the_tombstone() {
    let pod = Pod::new();
    pod.write("main", &format!("{BORN}Died: \"2026-11-21T08:58:46Z\"\nExitCode: 3\n"));
    let death_deps = vec!["main".parse().unwrap()];
    let (mut siblings, _news) = pod.open(SiblingsConfig { death_deps, ..named("proxy") });
    let unborn = timeout(PATIENCE, siblings.births()).await.unwrap().unwrap_err();
    let end = unborn.end();
    assert_eq!(end, End::NotStarted { code: 143, reason: "not started: main has died with exit code 3".into() });
    assert!("143".parse::<ExpectedExits>().unwrap().allows(&end, true));
    siblings.died(&end, None).await;
    let stone = pod.tombstone("proxy").unwrap();
    assert_eq!(stone.reason.as_deref(), Some("not started: main has died with exit code 3"));
    assert_eq!((stone.born, stone.exit_code), (None, Some(143)));
}

#[tokio::test]
async fn a_death_ends_a_wait_for_births() {
    let pod = Pod::new();
    let (death_deps, birth_deps) = (vec!["main".parse().unwrap()], vec!["db".parse().unwrap()]);
    let (mut siblings, mut news) = pod.open(SiblingsConfig { death_deps, birth_deps, ..nothing() });
    let births = tokio::spawn(async move { siblings.births().await });
    waiting(&mut news).await;
    pod.write("main", DIED);
    let unborn = timeout(PATIENCE, births).await.unwrap().unwrap().unwrap_err();
    assert!(matches!(unborn, Unborn::Death(death) if death.name.as_str() == "main"));
}

#[tokio::test]
async fn a_death_while_it_runs_is_told_once() {
    let pod = Pod::new();
    let (main, other) = ("main".parse().unwrap(), "other".parse().unwrap());
    let (mut siblings, _news) = pod.open(SiblingsConfig { death_deps: vec![main, other], ..nothing() });
    siblings.births().await.unwrap();
    let mut deaths = siblings.deaths();
    assert!(timeout(Duration::from_millis(50), deaths.next()).await.is_err());
    pod.write("main", DIED);
    let begun = Instant::now();
    assert_eq!(timeout(PATIENCE, deaths.next()).await.unwrap().to_string(), "main has died with exit code 0");
    assert!(begun.elapsed() < lookout::RESCAN / 2, "it took {:?}", begun.elapsed());
    pod.write("other", DIED);
    assert!(timeout(Duration::from_millis(100), deaths.next()).await.is_err(), "one is enough");
}

#[tokio::test(start_paused = true)]
async fn a_death_is_the_last_word() {
    let pod = Pod::new();
    let sign = pod.dir.path().join("ready.sign");
    let ready_when = Some(format!("file:{}", sign.display()).parse().unwrap());
    let (mut siblings, mut news) = pod.open(SiblingsConfig { ready_when, ..named("web") });
    siblings.born();
    siblings.died(&End::Exited(0), None).await;
    let last = pod.tombstone("web").unwrap();
    std::fs::write(sign, "").unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(news.try_recv().is_err(), "it became ready after its end");
    siblings.born();
    siblings.died(&End::Exited(1), None).await;
    assert_eq!(pod.tombstone("web"), Some(last));
}

#[tokio::test]
async fn two_agents_find_each_other() {
    let pod = Pod::new();
    let (mut main, _) = pod.open(SiblingsConfig { birth_deps: vec!["proxy:ready".parse().unwrap()], ..named("main") });
    let ready_when = Some("notify".parse().unwrap());
    let death_deps = vec!["main".parse().unwrap()];
    let (mut proxy, _) = pod.open(SiblingsConfig { ready_when, death_deps, ..named("proxy") });
    proxy.births().await.unwrap();
    proxy.born();
    notify(&proxy);
    timeout(PATIENCE, main.births()).await.unwrap().unwrap();
    main.born();
    main.died(&End::Exited(7), None).await;
    assert_eq!(timeout(PATIENCE, proxy.deaths().next()).await.unwrap().to_string(), "main has died with exit code 7");
}

#[tokio::test]
async fn a_command_that_is_ready_may_go_on_telling() {
    let pod = Pod::new();
    let ready_when = Some("notify".parse().unwrap());
    let (mut siblings, _news) = pod.open(SiblingsConfig { ready_when, ..named("web") });
    siblings.born();
    notify(&siblings);
    pod.wait_for("web", |stone| stone.ready.is_some()).await;
    let command = notifier(&siblings);
    command.set_nonblocking(true).unwrap();
    let told = async {
        for _ in 0..1000 {
            while let Err(error) = command.send(b"WATCHDOG=1") {
                assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "{error}");
                tokio::task::yield_now().await; // more than a socket holds: somebody has to read
            }
        }
    };
    timeout(PATIENCE, told).await.unwrap();
    siblings.died(&End::Exited(0), None).await;
    let refused = async {
        while command.send(b"STOPPING=1").is_ok() {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, refused).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_unwritable_graveyard_is_told_once_and_used_when_it_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let graveyard = dir.path().join("a file for now");
    std::fs::write(&graveyard, "").unwrap();
    let (herald, mut news) = Herald::new(Env::real().nature);
    let config = SiblingsConfig { graveyard: graveyard.clone(), ..named("web") };
    let mut siblings = Siblings::open(config, &Env::real(), Some(herald), runner());
    siblings.births().await.unwrap();
    siblings.born();
    let Event::Error(fault) = next(&mut news).await else { panic!("another event") };
    assert!(fault.reason.starts_with("cannot write the tombstone "), "{}", fault.reason);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(news.try_recv().is_err(), "told once");
    std::fs::remove_file(&graveyard).unwrap();
    let pod = Graveyard::new(graveyard);
    let name = "web".parse().unwrap();
    while pod.find(&name).is_none() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    siblings.died(&End::Exited(0), None).await;
    assert!(matches!(pod.find(&name), Some(graveyard::Found::Tombstone(stone)) if stone.exit_code == Some(0)));
}

/// Skipped where a file system cannot be mounted.
#[tokio::test]
async fn a_full_or_read_only_graveyard_leaves_the_last_tombstone_and_ends_no_one() {
    let Some(disk) = TinyDisk::mount() else { return };
    let web = "web".parse().unwrap();
    let graveyard = Graveyard::new(disk.dir.path().to_owned());
    let born = Tombstone { born: Some("2026-11-21T08:58:44Z".into()), ..Tombstone::default() };
    graveyard.carve(&web, &born, 0).unwrap();
    let mut filler = std::fs::File::create(disk.dir.path().join("filler")).unwrap();
    while filler.write(&[0; 4096]).is_ok_and(|written| written > 0) {}
    let full = graveyard.carve(&web, &Tombstone { exit_code: Some(1), ..born.clone() }, 1).unwrap_err();
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    assert_eq!(graveyard.find(&web), Some(graveyard::Found::Tombstone(born.clone())));
    assert_eq!(std::fs::read_dir(disk.dir.path()).unwrap().count(), 2, "a draft was left");
    disk.make_read_only(filler);
    let (herald, mut news) = Herald::new(Env::real().nature);
    let config = SiblingsConfig { graveyard: disk.dir.path().to_owned(), ..named("web") };
    let mut siblings = Siblings::open(config, &Env::real(), Some(herald), runner());
    siblings.born();
    let Event::Error(fault) = next(&mut news).await else { panic!("another event") };
    assert!(fault.reason.contains("Read-only file system"), "{}", fault.reason);
    timeout(PATIENCE, siblings.died(&End::Exited(0), None)).await.unwrap();
    assert_eq!(graveyard.find(&web), Some(graveyard::Found::Tombstone(born)));
}

#[tokio::test(start_paused = true)]
async fn a_graveyard_that_hangs_holds_a_start_up_for_two_seconds_only() {
    let pod = Pod::new();
    let hung = phonehome_env::Workers::Tasks(Arc::new(|| Duration::from_secs(100_000)));
    let env = Env { workers: hung, ..Env::real() };
    let config = SiblingsConfig {
        graveyard: pod.dir.path().to_owned(),
        death_deps: vec!["main".parse().unwrap()],
        ..named("web")
    };
    let mut siblings = Siblings::open(config, &env, None, runner());
    let begun = Instant::now();
    siblings.births().await.unwrap();
    siblings.born();
    siblings.died(&End::Exited(0), None).await;
    assert_eq!(begun.elapsed().as_secs(), 4);
}

const BORN: &str = "Born: \"2026-11-21T08:58:44Z\"\n";
const DIED: &str = "Born: \"2026-11-21T08:58:44Z\"\nDied: \"2026-11-21T08:58:45Z\"\nExitCode: 0\n";

/// A graveyard.
struct Pod {
    dir: TempDir,
}

impl Pod {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn open(&self, config: SiblingsConfig) -> (Siblings, mpsc::Receiver<News>) {
        let (herald, news) = Herald::new(Env::real().nature);
        let config = SiblingsConfig { graveyard: self.dir.path().to_owned(), ..config };
        (Siblings::open(config, &Env::real(), Some(herald), runner()), news)
    }

    /// As kubexit does: in place.
    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.dir.path().join(name), text).unwrap();
    }

    fn tombstone(&self, name: &str) -> Option<Tombstone> {
        tombstone(self.dir.path(), name)
    }

    async fn wait_for(&self, name: &str, is_it: impl Fn(&Tombstone) -> bool) -> Tombstone {
        let found = async {
            loop {
                match self.tombstone(name).filter(&is_it) {
                    Some(stone) => return stone,
                    None => tokio::task::yield_now().await,
                }
            }
        };
        timeout(PATIENCE, found).await.unwrap()
    }
}

fn tombstone(dir: &Path, name: &str) -> Option<Tombstone> {
    Tombstone::parse(&std::fs::read(dir.join(name)).ok()?).ok()
}

/// A file system of 64 KiB.
struct TinyDisk {
    dir: TempDir,
}

impl TinyDisk {
    /// None where only the system's owner may mount, and this is not the one.
    fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mounted = run_mount(&["-t", "tmpfs", "-o", "size=64k", "tmpfs"], dir.path());
        if !mounted {
            // Past the capture of test output: a skipped test must show.
            std::io::stderr().write_all(b"skipped: no file system can be mounted here\n").unwrap();
        }
        mounted.then_some(Self { dir })
    }

    fn make_read_only(&self, open: std::fs::File) {
        drop(open);
        assert!(run_mount(&["-o", "remount,ro"], self.dir.path()));
    }
}

impl Drop for TinyDisk {
    fn drop(&mut self) {
        drop(std::process::Command::new("umount").arg(self.dir.path()).status());
    }
}

fn run_mount(options: &[&str], path: &Path) -> bool {
    let mut mount = std::process::Command::new("mount");
    mount.args(options).arg(path).stderr(std::process::Stdio::null());
    mount.status().is_ok_and(|status| status.success())
}

fn nothing() -> SiblingsConfig {
    SiblingsConfig {
        name: None,
        graveyard: "/nowhere".into(),
        generation: None,
        death_deps: Vec::new(),
        death_signal: 15,
        expected_exits: ExpectedExits::default(),
        birth_deps: Vec::new(),
        wait_for: Vec::new(),
        birth_timeout: Some(Duration::from_secs(30)),
        ready_when: None,
        probe_user: None,
    }
}

fn named(name: &str) -> SiblingsConfig {
    SiblingsConfig { name: Some(name.parse().unwrap()), ..nothing() }
}

fn wait(name: &str, probe: &str) -> WaitFor {
    WaitFor { name: name.parse().unwrap(), probe: probe.parse().unwrap() }
}

fn runner() -> SharedRunner {
    Arc::new(Children(Reaper::default()))
}

/// Says `READY=1` as the command would.
fn notify(siblings: &Siblings) {
    notifier(siblings).send(b"READY=1").unwrap();
}

/// What the command says it with.
fn notifier(siblings: &Siblings) -> std::os::unix::net::UnixDatagram {
    use std::os::{linux::net::SocketAddrExt, unix::net};

    let (name, value) = siblings.variables().next().unwrap();
    assert_eq!(name, "NOTIFY_SOCKET");
    let value = value.into_string().unwrap();
    let address = net::SocketAddr::from_abstract_name(value.strip_prefix('@').unwrap()).unwrap();
    let socket = net::UnixDatagram::unbound().unwrap();
    socket.connect_addr(&address).unwrap();
    socket
}

async fn next(news: &mut mpsc::Receiver<News>) -> Event {
    timeout(PATIENCE, news.recv()).await.unwrap().unwrap().event
}

async fn waiting(news: &mut mpsc::Receiver<News>) -> Vec<String> {
    let event = next(news).await;
    let Event::Waiting(waiting) = event else { panic!("{event:?}") };
    waiting.r#for
}
