//! What becomes of builds after their end: compressed after a while, and removed by the rules.

use std::{io, sync::Arc, time::Duration};

use phonehome_proto::id::BuildId;
use tokio::time::sleep;
use tracing::{info, warn};

use crate::{
    retention::{self, Expiry, Policy, Rule},
    serve::{Standing, enter, entry},
    store::{expire, seal},
};

/// The rules.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Care {
    /// How long after the end logs are compressed; `None` never does.
    pub(crate) seal_after: Option<Duration>,
    pub(crate) policy: Policy,
}

/// Looks after ended builds as long as the server runs.
#[derive(Debug)]
pub(crate) struct Keeper {
    standing: Arc<Standing>,
}

/// Pause between two rounds.
const ROUND: Duration = Duration::from_secs(2);

/// Why a build is not removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RemoveError {
    #[error("the build has no verdict yet: cancel it first")]
    Running,
    #[error("there is no such build")]
    Unknown,
    #[error("the build cannot be removed")]
    Storage(#[from] io::Error),
}

impl Keeper {
    pub(crate) fn new(standing: Arc<Standing>) -> Self {
        Self { standing }
    }

    pub(crate) async fn run(self) {
        let shutdown = self.standing.shared.shutdown.clone();
        shutdown
            .run_until_cancelled(async {
                loop {
                    sleep(ROUND).await;
                    if let Err(error) = self.round().await {
                        warn!("cannot look after ended builds: {error}");
                    }
                }
            })
            .await;
    }

    async fn round(&self) -> io::Result<()> {
        for expiry in self.standing.due().await? {
            let why = told(expiry.rule);
            match self.standing.remove(&expiry.id, why).await {
                Ok(()) => {
                    let meter = self.standing.shared.store.meter();
                    meter.builds_expired.add(1);
                    meter.bytes_expired.add(expiry.bytes);
                    info!(build = %expiry.id, bytes = expiry.bytes, rule = why, "expired");
                }
                Err(RemoveError::Unknown) => self.standing.strike_out(&expiry.id).await?,
                Err(error) => warn!(build = %expiry.id, "cannot expire it: {error}"),
            }
        }
        for id in self.standing.unsealed().await? {
            if let Err(error) = self.standing.seal(&id).await {
                warn!(build = %id, "cannot seal it: {error}");
            }
        }
        Ok(())
    }
}

/// The rule in a word.
pub(crate) fn told(rule: Rule) -> &'static str {
    match rule {
        Rule::Age => "age",
        Rule::Bytes => "bytes",
        Rule::Count => "count",
    }
}

impl Standing {
    /// What the rules remove at this moment.
    pub(crate) async fn due(&self) -> io::Result<Vec<Expiry>> {
        let (catalogue, policy) = (self.catalogue.clone(), self.settings.care.policy);
        let now = self.shared.env.nature.now();
        if policy == Policy::default() {
            return Ok(Vec::new());
        }
        self.shared.env.blocking(move || Ok(retention::plan(catalogue.ended(None)?.into_iter(), &policy, now))).await
    }

    /// Ended builds whose time has come to be sealed, and that no agent can ask about any more.
    async fn unsealed(&self) -> io::Result<Vec<BuildId>> {
        let Some(after) = self.settings.care.seal_after else { return Ok(Vec::new()) };
        let before = self.shared.env.nature.now().saturating_sub(after.as_micros() as u64);
        let catalogue = self.catalogue.clone();
        let found = self.shared.env.blocking(move || catalogue.ended(Some(before))).await?;
        Ok(found.into_iter().map(|ended| ended.id).filter(|id| self.shared.builds.find(id).is_none()).collect())
    }

    /// Takes out the row of a build that is gone: somebody has removed its directory, or a crash its verdict.
    async fn strike_out(&self, id: &BuildId) -> io::Result<()> {
        let turn = self.turn().await;
        if self.find(id).await?.is_some() {
            return Ok(()); // another one has its name by now
        }
        warn!(build = %id, "it is in the catalogue, and not on the disk with a verdict");
        let (catalogue, id) = (self.catalogue.clone(), id.clone());
        let struck = move || {
            let _turn = turn;
            catalogue.remove(id.as_str())
        };
        self.shared.env.blocking(struck).await
    }

    /// Compresses everything of an ended build.
    async fn seal(&self, id: &BuildId) -> io::Result<()> {
        let Some(build) = self.find(id).await? else { return Ok(()) };
        let (disk, to_seal) = (self.shared.store.disk().clone(), build.clone());
        let sealed = move || {
            let (mut before, mut after) = (0, 0);
            for (files, _) in to_seal.attempts() {
                if to_seal.removed.is_cancelled() {
                    break; // what has its name now is another build's
                }
                let sealed = seal::seal(&*disk, &files.dir, &mut |_, _| {})?;
                before += sealed.before;
                after += sealed.after;
            }
            Ok::<_, io::Error>((before, after))
        };
        let (before, after) = self.shared.env.blocking(sealed).await?;
        let (turn, catalogue) = (self.turn().await, self.catalogue.clone());
        self.shared.env.blocking(move || enter(&turn, &catalogue, &build)).await?;
        self.shared.store.meter().bytes_sealed.add(before);
        info!(build = %id, before, after, "sealed");
        Ok(())
    }

    /// Removes an ended build with everything that is stored of it. Its row goes first: as soon as the directory is gone
    /// there may be another build of that name, with a row of its own.
    pub(crate) async fn remove(&self, id: &BuildId, why: &'static str) -> Result<(), RemoveError> {
        let turn = self.turn().await; // before it is looked up: nobody else removes it meanwhile
        let build = self.find(id).await?.ok_or(RemoveError::Unknown)?;
        if build.known_verdict().is_none() {
            return Err(RemoveError::Running);
        }
        build.removed.cancel();
        self.let_go(&build).await;
        let (store, catalogue, id) = (self.shared.store.clone(), self.catalogue.clone(), id.clone());
        let now = self.shared.env.nature.now();
        let removed = move || {
            let _turn = turn;
            catalogue.expire(&id, why, now)?;
            let removed = expire::remove(&**store.disk(), store.data(), &id);
            if removed.is_err()
                && let Ok(entry) = entry(&build)
            {
                drop(catalogue.put(&entry)); // it is there still, and the error that counts is the first
            }
            removed.map(drop)
        };
        Ok(self.shared.env.blocking(removed).await?)
    }
}
