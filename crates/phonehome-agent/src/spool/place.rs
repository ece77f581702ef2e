//! Where spools are kept, and what earlier agents left there.
//!
//! `DIR/phonehome-UID/BUILD/STEP/NUMBER-PRODUCER`: containers of several users may share a volume, several steps a
//! directory, and the numbers say which attempt came first.

use std::{
    ffi::OsStr,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use phonehome_env::{Env, disk::Disk};
use phonehome_proto::{
    frame::Hello,
    id::{BuildId, ProducerId, StepName},
    sender::Sender,
};
use tracing::{debug, info, warn};

use super::{
    Home, Spool, Spooling, Usage,
    journal::{Found, Journal, at, make_dirs},
};
use crate::{labels::Labels, outbox::Outbox};

/// Where the spools of one step's agents are.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    env: Env,
    /// The user's, the build's and the step's directory.
    dirs: [PathBuf; 3],
    usage: Usage,
    /// What the next attempt's directory is called.
    number: u64,
}

/// What was found of an earlier agent.
#[derive(Debug)]
pub(crate) struct Remains {
    producer: ProducerId,
    found: Found,
}

/// What an earlier agent left, not touched yet.
#[derive(Debug)]
pub(crate) struct Left {
    pub(crate) producer: ProducerId,
    pub(crate) records: u64,
    pub(crate) finished: bool,
    pub(crate) labels: Labels,
    env: Env,
    sender: Sender,
    journal: Journal,
    memory: u64,
    usage: Usage,
}

impl Left {
    /// Makes it ready to be delivered. Not before its turn: until then it takes no memory.
    pub(crate) fn start(self) -> (Arc<Outbox>, Spooling) {
        let outbox = Arc::new(Outbox::holding(self.sender, self.memory));
        let spooling = Spool::go_on(self.env, outbox.clone(), self.journal, self.usage);
        (outbox, spooling)
    }
}

/// What an earlier attempt may take of the memory while it is delivered; the new one fills its own meanwhile.
const LEFT_SHARE: u64 = 2;

impl Place {
    /// Makes the directories, as far as they are not there, and finds what earlier agents of this step left.
    ///
    /// # Errors
    ///
    /// When they cannot be made, or somebody else may write to them.
    pub(crate) async fn open(
        env: &Env,
        dir: &Path,
        (build, step): (&BuildId, &StepName),
        limit: u64,
    ) -> io::Result<(Self, Vec<Remains>)> {
        let user = dir.join(format!("phonehome-{}", rustix::process::geteuid().as_raw()));
        let build = user.join(build.as_str());
        let dirs = [user, build.clone(), build.join(step.as_str())];
        let mut place = Self { env: env.clone(), dirs, usage: Usage::new(limit), number: 1 };
        let (disk, dir) = (env.disk.clone(), dir.to_owned());
        let look = place.clone();
        let found = env.blocking(move || {
            if !disk.exists(&dir).map_err(at(&dir))? {
                disk.create_dirs(&dir).map_err(at(&dir))?;
            }
            make_dirs(&*disk, &look.dirs)?;
            look.find(&disk)
        });
        let found = found.await?;
        place.number = found.iter().map(|(number, _)| number + 1).max().unwrap_or(1);
        Ok((place, found.into_iter().filter_map(|(_, found)| found).collect()))
    }

    /// What is there, oldest first, by number. What cannot be read is left alone, and said.
    fn find(&self, disk: &Arc<dyn Disk>) -> io::Result<Vec<(u64, Option<Remains>)>> {
        let mut all = Vec::new();
        let [_, _, step] = &self.dirs;
        for name in disk.list(step).map_err(at(step))? {
            let dir = step.join(&name);
            let Some((number, producer)) = attempt_of(&name) else {
                let text = format!("{} does not belong there; remove it", dir.display());
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
            };
            match Journal::take_up(disk.clone(), &dir, self.usage.segment()) {
                Ok(found) => all.push((number, found.map(|found| Remains { producer, found }))),
                Err(error) => {
                    warn!("what an earlier agent left in {} cannot be used: {error}", dir.display());
                    all.push((number, None));
                }
            }
        }
        all.sort_by_key(|(number, _)| *number);
        Ok(all)
    }

    /// Takes up what was found, oldest first; what is empty is removed.
    pub(crate) async fn take_up(&self, found: Vec<Remains>, memory: u64) -> Vec<Left> {
        let mut left = Vec::new();
        for Remains { producer, found: Found { finished, first, next, is_damaged, labels, journal } } in found {
            if first == next && finished.is_none() {
                if is_damaged {
                    warn!("an earlier agent left records, but none of them is whole");
                }
                drop(self.env.blocking(move || journal.remove()).await); // the next agent tries again
                continue;
            }
            let is_whole = finished.is_some();
            info!(records = journal.records(), "an earlier agent left records; they are delivered first");
            self.usage.change(0, journal.bytes());
            left.push(Left {
                producer,
                records: journal.records(),
                finished: is_whole,
                labels: Arc::new(labels),
                env: self.env.clone(),
                sender: Sender::recover(first, next, finished),
                journal,
                memory: memory / LEFT_SHARE,
                usage: self.usage.clone(),
            });
        }
        left
    }

    /// Starts the spool of this agent's own attempt.
    pub(crate) fn start(&self, outbox: Arc<Outbox>, hello: Hello) -> Spooling {
        let [_, _, step] = &self.dirs;
        let dir = step.join(format!("{:06}-{}", self.number, hello.producer));
        let home = Home { above: self.dirs.to_vec(), dir, hello };
        Spool::start(self.env.clone(), outbox, home, self.usage.clone())
    }

    /// Removes the directories, as far as nothing is in them.
    pub(crate) async fn tidy(self) {
        let (disk, dirs) = (self.env.disk.clone(), self.dirs);
        let tidied = self.env.blocking(move || dirs.iter().rev().try_for_each(|dir| disk.remove_dir(dir)));
        if let Err(in_use) = tidied.await {
            debug!("the spool's directories stay: {in_use}");
        }
    }
}

/// The number and the producer in the name of an attempt's directory.
fn attempt_of(name: &OsStr) -> Option<(u64, ProducerId)> {
    let (number, producer) = name.to_str()?.split_once('-')?;
    Some((number.parse().ok()?, producer.parse().ok()?))
}
