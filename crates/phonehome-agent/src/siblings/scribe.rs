//! Carves this agent's own tombstone, on its own time: a graveyard that is slow, full or hung holds nobody up.
//!
//! What should stand on it is said at once and carved as soon as it can be; only the newest is ever carved.

use std::{
    sync::{Arc, mpsc::sync_channel},
    thread,
    time::Duration,
};

use phonehome_env::Env;
use tokio::{sync::watch, time::timeout};
use tracing::{debug, warn};

use super::{
    graveyard::{Found, Graveyard},
    lookout::is_stale,
    tombstone::Tombstone,
};
use crate::{config::SiblingName, herald::Herald};

/// Says what should stand on the tombstone. Clones say it of the same one.
#[derive(Debug, Clone)]
pub(crate) struct Scribe {
    order: Arc<watch::Sender<Order>>,
    tried: watch::Receiver<u64>,
}

/// What is wanted, and the how manieth wish it is.
#[derive(Debug, Clone, Default)]
struct Order {
    number: u64,
    stone: Tombstone,
}

/// The longest that an agent which is about to exit waits for its last words to be carved.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Between attempts at a graveyard that takes nothing.
const RETRY: Duration = Duration::from_secs(1);

impl Scribe {
    /// A scribe, and the task that carves for it.
    pub(crate) fn new(
        env: Env,
        graveyard: Graveyard,
        name: SiblingName,
        generation: Option<String>,
        herald: Option<Herald>,
    ) -> (Self, Carver) {
        let (order, orders) = watch::channel(Order::default());
        let (done, tried) = watch::channel(0);
        let carver = Carver { env, graveyard, name, generation, herald, orders, done, unique: 0, trouble: None };
        (Self { order: Arc::new(order), tried }, carver)
    }

    /// Changes what should stand there. A death is the last word.
    pub(crate) fn carve(&self, change: impl FnOnce(&mut Tombstone)) {
        self.order.send_if_modified(|order| {
            let is_open = order.stone.died.is_none();
            if is_open {
                change(&mut order.stone);
                order.number += 1;
            }
            is_open
        });
    }

    /// Waits until the newest was tried, for as long as an exit may take.
    pub(crate) async fn finish(&mut self) {
        let number = self.order.borrow().number;
        let why = match timeout(LAST_WORDS, self.tried.wait_for(|tried| *tried >= number)).await {
            Ok(Ok(_)) => return,
            Ok(Err(_)) => "nobody is left who could carve",
            Err(_) => "the graveyard does not answer",
        };
        warn!("{why}: the end of this command is not on its tombstone");
    }
}

/// The task that does it.
pub(crate) struct Carver {
    env: Env,
    graveyard: Graveyard,
    name: SiblingName,
    generation: Option<String>,
    herald: Option<Herald>,
    orders: watch::Receiver<Order>,
    /// The last wish that was tried.
    done: watch::Sender<u64>,
    /// Tells one draft from the next, and from anybody else's.
    unique: u64,
    /// What was told last, so that it is told once.
    trouble: Option<String>,
}

impl Carver {
    /// Carves until nobody is left who wants something.
    pub(crate) async fn run(mut self) {
        self.unique = random(&self.env);
        let (graveyard, name, generation) = (self.graveyard.clone(), self.name.clone(), self.generation.clone());
        let last = self.env.blocking(move || last_life(&graveyard, &name, generation.as_deref())).await;
        let attempt = attempt_after(last.as_ref());
        if last.is_some() {
            self.orders.mark_changed(); // siblings who come up now must not take the last life for this one
        }
        while self.orders.changed().await.is_ok() {
            while !self.carve_newest(attempt).await {
                if let Ok(Err(_)) = timeout(RETRY, self.orders.changed()).await {
                    return;
                }
            }
        }
    }

    /// Whether that worked.
    async fn carve_newest(&mut self, attempt: u32) -> bool {
        let Order { number, mut stone } = self.orders.borrow_and_update().clone();
        (stone.attempt, stone.generation) = (Some(attempt), self.generation.clone());
        self.unique = self.unique.wrapping_add(1);
        let (graveyard, name, unique) = (self.graveyard.clone(), self.name.clone(), self.unique);
        let carved = self.env.blocking(move || graveyard.carve(&name, &stone, unique)).await;
        self.done.send_replace(number);
        match &carved {
            Ok(()) => self.trouble = None,
            Err(error) => self.tell(error),
        }
        carved.is_ok()
    }

    fn tell(&mut self, error: &std::io::Error) {
        let path = self.graveyard.path().join(self.name.as_str());
        let reason = format!("cannot write the tombstone {}: {error}", path.display());
        if self.trouble.as_ref() == Some(&reason) {
            return;
        }
        warn!("{reason}; siblings that depend on this command will not learn of it");
        if let Some(herald) = &self.herald {
            herald.fault(reason.clone());
        }
        self.trouble = Some(reason);
    }
}

/// Tells one writer of drafts from another.
fn random(env: &Env) -> u64 {
    let mut random = [0; 8];
    if let Err(error) = env.nature.fill(&mut random) {
        debug!("drafts of tombstones have names that can be guessed: {error}");
    }
    u64::from_le_bytes(random)
}

/// The tombstone of this sibling's last life, which ended when its container was restarted.
fn last_life(graveyard: &Graveyard, name: &SiblingName, generation: Option<&str>) -> Option<Tombstone> {
    let Found::Tombstone(last) = graveyard.find(name)? else { return None };
    let counts = !is_stale(last.generation.as_deref(), generation);
    (counts && last != Tombstone::default()).then_some(last)
}

fn attempt_after(last: Option<&Tombstone>) -> u32 {
    last.map_or(1, |last| last.attempt.unwrap_or(1).saturating_add(1))
}

/// Carves a tombstone without a scribe, for an agent that has not come as far as to have one, and waits for that as long
/// as an exit may take.
pub(super) fn carve_at_once(env: &Env, graveyard: Graveyard, name: SiblingName, stone: Tombstone) {
    let unique = random(env);
    let (done, carved) = sync_channel(1);
    let carve = move || {
        let attempt = attempt_after(last_life(&graveyard, &name, stone.generation.as_deref()).as_ref());
        let stone = Tombstone { attempt: Some(attempt), ..stone };
        done.send(graveyard.carve(&name, &stone, unique)).unwrap_or_default(); // whoever waited may have given up
    };
    let why = match thread::Builder::new().spawn(carve).map(|_| carved.recv_timeout(LAST_WORDS)) {
        Ok(Ok(Ok(()))) => return,
        Ok(Ok(Err(error))) | Err(error) => error.to_string(),
        Ok(Err(_)) => "the graveyard does not answer".into(),
    };
    warn!("the end of this command is not on its tombstone: {why}");
}
