//! What becomes of builds after their end: compressed after a while, and removed by the rules.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::Arc,
    time::Duration,
};

use phonehome_proto::id::BuildId;
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use crate::{
    retention::{self, Ended, Expiry, Policy, Rule},
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

/// Pause between two looks for builds to be sealed.
const SEAL_ROUND: Duration = Duration::from_secs(2);

/// Pause between two applications of the rules, which look at every ended build.
const RETENTION_ROUND: Duration = Duration::from_secs(60);

/// Pause before a build is sealed again that could not be, doubled with each failure up to the second.
const SEAL_RETRY: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(3600));

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
        shutdown.run_until_cancelled(async { tokio::join!(self.seal_in_rounds(), self.apply_rules_in_rounds()) }).await;
    }

    /// Beside the rules: what is sealed may be long, and a full disk does not wait for it.
    async fn seal_in_rounds(&self) {
        let mut failures = Failures::default();
        loop {
            sleep(SEAL_ROUND).await;
            if let Err(error) = self.seal_all(&mut failures).await {
                warn!("cannot look for builds to be sealed: {error}");
            }
        }
    }

    async fn apply_rules_in_rounds(&self) {
        loop {
            sleep(RETENTION_ROUND).await;
            if let Err(error) = self.apply_rules().await {
                warn!("cannot apply the rules to ended builds: {error}");
            }
        }
    }

    async fn apply_rules(&self) -> io::Result<()> {
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
        Ok(())
    }

    async fn seal_all(&self, failures: &mut Failures) -> io::Result<()> {
        let unsealed = self.standing.unsealed().await?;
        failures.retain(&unsealed);
        for Ended { id, bytes, .. } in unsealed {
            if !failures.is_due(&id, Instant::now()) {
                continue;
            }
            match self.standing.seal(&id, bytes).await {
                Ok(()) => failures.forget(&id),
                Err(error) => {
                    let pause = failures.note(&id, Instant::now());
                    warn!(build = %id, "cannot seal it, trying again in {} s: {error}", pause.as_secs());
                }
            }
        }
        Ok(())
    }
}

/// Builds that could not be sealed, each with its next try. There are no more than ended builds.
#[derive(Debug, Default)]
struct Failures(BTreeMap<BuildId, Failure>);

#[derive(Debug)]
struct Failure {
    pause: Duration,
    retry_at: Instant,
}

impl Failures {
    fn is_due(&self, id: &BuildId, now: Instant) -> bool {
        self.0.get(id).is_none_or(|failure| now >= failure.retry_at)
    }

    /// It has failed once more: how long it is let alone.
    fn note(&mut self, id: &BuildId, now: Instant) -> Duration {
        let (first, longest) = SEAL_RETRY;
        let pause = self.0.get(id).map_or(first, |failure| (failure.pause * 2).min(longest));
        self.0.insert(id.clone(), Failure { pause, retry_at: now + pause });
        pause
    }

    fn forget(&mut self, id: &BuildId) {
        self.0.remove(id);
    }

    /// Forgets those that are not there any more.
    fn retain(&mut self, unsealed: &[Ended]) {
        if !self.0.is_empty() {
            let left: BTreeSet<_> = unsealed.iter().map(|ended| &ended.id).collect();
            self.0.retain(|id, _| left.contains(id));
        }
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
        self.shared.env.blocking(move || Ok(retention::plan(catalogue.ended()?.into_iter(), &policy, now))).await
    }

    /// Ended builds whose time has come to be sealed, and that no agent can ask about any more.
    async fn unsealed(&self) -> io::Result<Vec<Ended>> {
        let Some(after) = self.settings.care.seal_after else { return Ok(Vec::new()) };
        let before = self.shared.env.nature.now().saturating_sub(after.as_micros() as u64);
        let catalogue = self.catalogue.clone();
        let found = self.shared.env.blocking(move || catalogue.unsealed(before)).await?;
        Ok(found.into_iter().filter(|ended| self.shared.builds.find(&ended.id).is_none()).collect())
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

    /// Compresses everything of an ended build, which takes `bytes`. What is to stay free of output stays free of this too.
    async fn seal(&self, id: &BuildId, bytes: u64) -> io::Result<()> {
        let Some(build) = self.find(id).await? else { return Ok(()) };
        let (disk, to_seal) = (self.shared.store.disk().clone(), build.clone());
        let (data, min_free) = (self.shared.store.data().to_owned(), self.settings.min_free);
        let sealed = move || {
            if disk.free(&data)? < min_free.saturating_add(bytes) {
                return Err(io::Error::new(io::ErrorKind::StorageFull, "there is no room for its compressed form"));
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_sealed_is_let_alone_for_longer_and_longer() {
        let (bad, other) = ("bad".parse().unwrap(), "other".parse().unwrap());
        let (mut failures, mut now, mut pauses) = (Failures::default(), Instant::now(), Vec::new());
        for _ in 0..11 {
            assert!(failures.is_due(&bad, now));
            let pause = failures.note(&bad, now);
            assert!(!failures.is_due(&bad, now + pause - Duration::from_millis(1)) && failures.is_due(&other, now));
            now += pause;
            pauses.push(pause.as_secs());
        }
        assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 3600, 3600]);
        failures.retain(&[Ended { id: bad.clone(), ended: 0, bytes: 0 }]);
        assert_eq!(failures.0.len(), 1);
        failures.retain(&[]);
        assert!(failures.0.is_empty());
        failures.note(&bad, now);
        failures.forget(&bad);
        assert!(failures.is_due(&bad, now), "a success forgets what was");
    }
}
