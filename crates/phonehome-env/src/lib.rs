//! What both programs ask of their machine: files, connections, chance and the wall clock.
//!
//! Everything goes through an [`Env`], so that a test can put agent and server on a simulated machine whose disk
//! forgets, whose network breaks and whose chance is a seed. [`Env::real`] is the machine as it is. Time that passes is
//! tokio's, which tests pause.

pub mod descriptor;
pub mod disk;
mod fault;
pub mod file;
pub mod network;
pub mod proxy;
pub mod secret;
#[cfg(feature = "tls")]
pub mod tls;
pub mod trust;
pub mod websocket;

use std::{
    fmt, io,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use disk::{Disk, RealDisk};
use network::{Network, RealNetwork};
use phonehome_proto::frame::UnixMicros;

/// A machine. Clones are the same one.
#[derive(Debug, Clone)]
pub struct Env {
    /// Its files.
    pub disk: Arc<dyn Disk>,
    /// Its way to others.
    pub network: Arc<dyn Network>,
    /// Its chance and its wall clock.
    pub nature: Arc<dyn Nature>,
    /// Where work goes that waits for a disk.
    pub workers: Workers,
}

impl Env {
    /// The machine this process runs on.
    #[must_use]
    pub fn real() -> Self {
        Self {
            disk: Arc::new(RealDisk),
            network: Arc::new(RealNetwork),
            nature: Arc::new(RealNature),
            workers: Workers::Threads,
        }
    }

    /// Does work that may wait for the disk, without holding up the tasks of this thread.
    ///
    /// # Panics
    ///
    /// When the work does.
    pub async fn blocking<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        match &self.workers {
            Workers::Threads => match tokio::task::spawn_blocking(work).await {
                Ok(done) => done,
                Err(failed) if failed.is_panic() => std::panic::resume_unwind(failed.into_panic()),
                Err(_) => std::future::pending().await, // the runtime is going down, and this task with it
            },
            Workers::Tasks(delay) => {
                tokio::time::sleep(delay()).await;
                work()
            }
        }
    }

    /// Evenly from 0..1, for jitter. Without a source of randomness the delay is just not spread.
    #[must_use]
    pub fn jitter(&self) -> f64 {
        let mut bits = [0; 4];
        match self.nature.fill(&mut bits) {
            Ok(()) => f64::from(u32::from_le_bytes(bits)) / f64::from(u32::MAX),
            Err(_) => 0.5,
        }
    }
}

/// Where work goes that waits for a disk.
#[derive(Clone)]
pub enum Workers {
    /// To threads of its own.
    Threads,
    /// Nowhere: it is done at once, after as long a pause as the simulated disk takes.
    Tasks(Arc<dyn Fn() -> Duration + Send + Sync>),
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Threads => "Threads",
            Self::Tasks(_) => "Tasks",
        })
    }
}

/// What cannot be foreseen.
pub trait Nature: fmt::Debug + Send + Sync {
    /// Fills a buffer with random bytes that nobody can guess.
    ///
    /// # Errors
    ///
    /// When the system has no source of randomness.
    fn fill(&self, bytes: &mut [u8]) -> io::Result<()>;

    /// The wall clock; 0 before 1970. It may jump.
    fn now(&self) -> UnixMicros;
}

/// The system's.
#[derive(Debug)]
struct RealNature;

impl Nature for RealNature {
    fn fill(&self, bytes: &mut [u8]) -> io::Result<()> {
        getrandom::fill(bytes).map_err(|error| io::Error::other(error.to_string()))
    }

    fn now(&self) -> UnixMicros {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_micros() as UnixMicros)
    }
}
