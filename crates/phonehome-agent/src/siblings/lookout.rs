//! Keeps an eye on the tombstones of others.
//!
//! Each round first watches the directory and then looks, so that nothing can happen in between; the next round comes
//! with a change, or after a while without one: a watch can miss what another machine writes to a shared file system,
//! and the directory itself may be replaced.

use std::{collections::BTreeMap, time::Duration};

use phonehome_env::Env;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use super::{
    graveyard::{Found, Graveyard},
    tombstone::Tombstone,
};
use crate::{config::SiblingName, watch::Watch};

/// The task that looks.
pub(crate) struct Lookout {
    env: Env,
    graveyard: Graveyard,
    names: Vec<SiblingName>,
    generation: Option<String>,
    /// `None` where there is nothing to watch, or no way to.
    watch: Option<Watch>,
    view: watch::Sender<View>,
}

/// What is seen of the siblings that matter.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct View {
    /// Whether anybody has looked yet.
    pub(crate) is_real: bool,
    /// By name, those that have something in the graveyard.
    pub(crate) stones: BTreeMap<SiblingName, Seen>,
    /// Some names that are in the graveyard, for messages.
    pub(crate) present: Vec<String>,
}

/// What is seen of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Seen {
    Tombstone(Tombstone),
    /// It belongs to another generation, and says nothing about this one.
    Stale,
    /// It is something else.
    Garbage(String),
}

/// The longest time between two looks.
pub(crate) const RESCAN: Duration = Duration::from_secs(1);

/// Least time between two looks: changes that come closer together are seen at once.
const GATHER: Duration = Duration::from_millis(10);

impl Lookout {
    /// For these names, and what it sees.
    pub(crate) fn new(
        env: Env,
        graveyard: Graveyard,
        names: Vec<SiblingName>,
        generation: Option<String>,
    ) -> (Self, watch::Receiver<View>) {
        let (view, seen) = watch::channel(View::default());
        (Self { env, graveyard, names, generation, watch: None, view }, seen)
    }

    /// Looks until nobody wants to know any more.
    pub(crate) async fn run(mut self) {
        while !self.view.is_closed() {
            let view = self.look().await;
            self.tell_garbage(&view);
            self.view.send_if_modified(|last| {
                let is_new = *last != view;
                *last = view;
                is_new
            });
            sleep(GATHER).await;
            drop(timeout(RESCAN, self.changed()).await); // nothing new: then it is time for a look all the same
        }
    }

    async fn look(&mut self) -> View {
        let (graveyard, names) = (self.graveyard.clone(), self.names.clone());
        let before = self.watch.take();
        let work = move || {
            let watch = watched(before, &graveyard);
            let found = names.into_iter().filter_map(|name| Some((name.clone(), graveyard.find(&name)?)));
            (watch, found.collect::<Vec<_>>(), graveyard.names())
        };
        let (watch, found, present) = self.env.blocking(work).await;
        self.watch = watch;
        let stones = found.into_iter().map(|(name, found)| (name, self.judge(found))).collect();
        View { is_real: true, stones, present }
    }

    fn judge(&self, found: Found) -> Seen {
        match found {
            Found::Tombstone(stone) if is_stale(stone.generation.as_deref(), self.generation.as_deref()) => Seen::Stale,
            Found::Tombstone(stone) => Seen::Tombstone(stone),
            Found::Garbage(why) => Seen::Garbage(why),
        }
    }

    /// Once for each kind of garbage under a name.
    fn tell_garbage(&self, view: &View) {
        let last = self.view.borrow();
        for (name, seen) in &view.stones {
            if let Seen::Garbage(why) = seen
                && last.stones.get(name) != Some(seen)
            {
                warn!("{} is not read as a tombstone: {why}", self.graveyard.path().join(name.as_str()).display());
            }
        }
    }

    /// Completes with a change in the directory that is watched.
    async fn changed(&mut self) {
        let Some(watch) = &mut self.watch else { return std::future::pending().await };
        if watch.changed().await.is_err() {
            self.watch = None; // it has gone; the next look finds what has its path now
        }
    }
}

/// A watch on the directory that is the graveyard now, which is made if it is missing so that there is something to watch.
fn watched(before: Option<Watch>, graveyard: &Graveyard) -> Option<Watch> {
    let followed = before.and_then(|mut watch| watch.follow(graveyard.path()).is_ok().then_some(watch));
    followed.or_else(|| {
        graveyard.make().ok()?; // a failure is told when it matters
        let watch = Watch::new(graveyard.path());
        watch.inspect_err(|error| debug!("the graveyard is looked at every second, but not watched: {error}")).ok()
    })
}

/// Whether a tombstone says nothing about the generation that is ours. Those without one, as kubexit's are, always count.
pub(crate) fn is_stale(generation: Option<&str>, ours: Option<&str>) -> bool {
    matches!((generation, ours), (Some(generation), Some(ours)) if generation != ours)
}

#[cfg(test)]
mod tests {
    use tokio::{task::JoinHandle, time::Instant};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_death_from_before_is_seen_at_once() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("main"), DIED).unwrap();
        let (mut seen, _task) = spawn(lookout(dir.path(), None));
        assert!(is_dead(&seen.wait_for(|view| !view.stones.is_empty()).await.unwrap()));
    }

    #[tokio::test]
    async fn changes_are_seen_long_before_the_next_look() {
        let dir = tempfile::tempdir().unwrap();
        let (mut seen, _task) = spawn(lookout(dir.path(), None));
        seen.changed().await.ok();
        for (round, died) in [(0, false), (1, true), (2, false), (3, true)] {
            let begun = Instant::now();
            let text = if died { DIED } else { BORN };
            if round < 2 {
                std::fs::write(dir.path().join("main"), text).unwrap(); // in place, as kubexit does
            } else {
                std::fs::write(dir.path().join("draft"), text).unwrap();
                std::fs::rename(dir.path().join("draft"), dir.path().join("main")).unwrap();
            }
            let wanted = |view: &View| !view.stones.is_empty() && is_dead(view) == died;
            timeout(PATIENCE, seen.wait_for(wanted)).await.unwrap().unwrap();
            assert!(begun.elapsed() < RESCAN / 2, "round {round} took {:?}", begun.elapsed());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_watch_misses_is_seen_with_the_next_look() {
        let dir = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        // Written to by another name, in a directory that nobody watches.
        let file = elsewhere.path().join("other name");
        std::fs::write(&file, BORN).unwrap();
        std::fs::hard_link(&file, dir.path().join("main")).unwrap();
        let (mut seen, _task) = spawn(lookout(dir.path(), None));
        seen.wait_for(|view| !view.stones.is_empty()).await.unwrap();
        std::fs::write(&file, DIED).unwrap();
        let begun = Instant::now();
        seen.wait_for(is_dead).await.unwrap();
        let took = begun.elapsed();
        assert!(took > RESCAN / 2 && took <= RESCAN + 2 * GATHER, "{took:?}");
    }

    #[tokio::test]
    async fn a_missing_directory_is_made_and_a_replaced_one_is_watched_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("graveyard");
        let (mut seen, _task) = spawn(lookout(&path, None));
        while !path.exists() {
            tokio::task::yield_now().await;
        }
        std::fs::rename(&path, dir.path().join("moved away")).unwrap();
        std::fs::create_dir_all(&path).unwrap();
        std::fs::write(path.join("main"), DIED).unwrap();
        timeout(PATIENCE, seen.wait_for(is_dead)).await.unwrap().unwrap();
        std::fs::remove_dir_all(&path).unwrap();
        timeout(PATIENCE, seen.wait_for(|view| view.stones.is_empty())).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn another_generation_is_stale_and_an_unknown_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("main"), format!("{DIED}Generation: \"old\"\n")).unwrap();
        let (mut seen, _task) = spawn(lookout(dir.path(), Some("new")));
        let view = seen.wait_for(|view| !view.stones.is_empty()).await.unwrap().clone();
        assert_eq!(view.stones[&name()], Seen::Stale);
        for (theirs, ours, expected) in [
            (Some("a"), Some("b"), true),
            (Some("a"), Some("a"), false),
            (None, Some("a"), false),
            (Some("a"), None, false),
        ] {
            assert_eq!(is_stale(theirs, ours), expected, "{theirs:?} {ours:?}");
        }
    }

    #[tokio::test]
    async fn it_ends_when_nobody_wants_to_know() {
        let dir = tempfile::tempdir().unwrap();
        let (seen, task) = spawn(lookout(dir.path(), None));
        drop(seen);
        timeout(PATIENCE, task).await.unwrap().unwrap();
    }

    const BORN: &str = "Born: \"2026-11-21T08:58:44Z\"\n";
    const DIED: &str = "Born: \"2026-11-21T08:58:44Z\"\nDied: \"2026-11-21T08:58:45Z\"\nExitCode: 0\n";

    fn lookout(dir: &std::path::Path, generation: Option<&str>) -> (Lookout, watch::Receiver<View>) {
        Lookout::new(Env::real(), Graveyard::new(dir.to_owned()), vec![name()], generation.map(Into::into))
    }

    fn spawn((lookout, seen): (Lookout, watch::Receiver<View>)) -> (watch::Receiver<View>, JoinHandle<()>) {
        (seen, tokio::spawn(lookout.run()))
    }

    fn is_dead(view: &View) -> bool {
        matches!(view.stones.get(&name()), Some(Seen::Tombstone(stone)) if stone.died.is_some())
    }

    fn name() -> SiblingName {
        "main".parse().unwrap()
    }
}
