//! A server and its tasks: one listener, one task per connection, one clock per build.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use phonehome_env::{Env, network::Transport};
use phonehome_proto::id::{BuildId, StepName};
use tokio::{
    net::TcpListener,
    sync::{Notify, Semaphore},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::{
    builds::{Build, BuildLog, Builds, Clocks, Verdict, hash_token},
    declaration::Declaration,
    identity::{Identity, IdentityError},
    listener::{Front, Listener, Visitor},
    store::{Durability, Store, StoreSettings},
    strangers::{StrangerLimits, Strangers},
    tasks::Tasks,
};

/// Where and how to serve.
#[derive(Debug, Clone)]
pub struct Config {
    /// Address to bind; port 0 lets the system choose.
    pub listen: SocketAddr,
    /// Whether to speak TLS with a key made for this server alone. Without it the way must be trusted, or encrypted by
    /// somebody in front.
    pub tls: bool,
    /// Where logs are kept.
    pub data: PathBuf,
    /// What an acknowledgement promises.
    pub durability: Durability,
}

/// Why a server could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address is not available.
    #[error("cannot listen on {0}")]
    Bind(SocketAddr, #[source] io::Error),
    /// There is no key.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The lifecycle log cannot be opened.
    #[error("cannot write the lifecycle log")]
    Lifecycle(#[source] io::Error),
    /// The data directory cannot be used.
    #[error("cannot use {}", .0.display())]
    Store(PathBuf, #[source] io::Error),
    /// Another process serves from the data directory.
    #[error("another server uses {}: stop it first, or use another directory", .0.display())]
    Taken(PathBuf),
    /// The tokens of people and tools cannot be used.
    #[cfg(feature = "http")]
    #[error(transparent)]
    Tokens(#[from] crate::tokens::TokenError),
}

/// What every task of a server shares.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) builds: Builds,
    pub(crate) store: Store,
    pub(crate) env: Env,
    /// Connections that have said hello, for dividing the windows.
    pub(crate) agents: std::sync::atomic::AtomicU64,
    pub(crate) shutdown: CancellationToken,
    pub(crate) strangers: Strangers,
    /// One for each agent that may still connect.
    pub(crate) places: Arc<Semaphore>,
    /// Fires before `shutdown`: agents are told to look for another server, and requests are still answered.
    pub(crate) draining: CancellationToken,
    /// Told when an agent has left.
    pub(crate) left: Notify,
    #[cfg(feature = "http")]
    pub(crate) lifecycle: std::sync::OnceLock<crate::lifecycle::Lifecycle>,
    refusals: Mutex<Option<Refusals>>,
}

impl Shared {
    /// Somebody who called was turned away.
    pub(crate) fn note_refusal(&self, kind: impl Into<String>, reason: &str) {
        self.store.meter().refusals.add(kind.into());
        let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        let count = refusals.take().map_or(0, |refusals| refusals.count) + 1;
        *refusals = Some(Refusals { count, last: reason.trim().to_owned() });
    }
}

/// Callers that were turned away before they became anybody's agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusals {
    /// How many.
    pub count: u64,
    /// Why, the last time.
    pub last: String,
}

/// A running server. Dropping it stops its tasks without waiting for them; [`Server::shutdown`] is the polite way.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    tasks: Tasks,
    address: SocketAddr,
    pin: Option<String>,
}

/// A build to wait for.
#[derive(Debug, Clone)]
pub struct Expected {
    /// Its name.
    pub id: BuildId,
    /// Its steps; the build ends when all have.
    pub steps: Vec<StepName>,
    /// Its time limits.
    pub clocks: Clocks,
    /// The secret its agents need, to go on with a build after a restart; `None` draws one.
    pub token: Option<String>,
    /// Bytes per second that are taken from it in the long run: beyond, its agents wait, and its commands with them.
    /// `None` is no limit.
    pub rate: Option<u64>,
}

impl Expected {
    /// A build with the one step `main` and the default clocks.
    #[must_use]
    pub fn new(id: BuildId) -> Self {
        Self { id, steps: vec![StepName::default()], clocks: Clocks::default(), token: None, rate: None }
    }
}

/// Why a build cannot be expected.
#[derive(Debug, thiserror::Error)]
pub enum ExpectError {
    /// The data directory holds its verdict.
    #[error("build {0} has its verdict already, see its verdict.json; use another build id")]
    Ended(BuildId),
    /// There is one of that name already.
    #[error("build {0} is expected already")]
    Known(BuildId),
    /// A build has at least one step.
    #[error("a build needs at least one step")]
    NoSteps,
    /// There is no source of randomness for a token.
    #[error("cannot draw a token")]
    Random(#[source] io::Error),
}

/// A build that this server waits for.
#[derive(Debug, Clone)]
pub struct ExpectedBuild {
    build: Arc<Build>,
    token: Arc<str>,
}

/// How long connections get to end by themselves when the server shuts down.
const DRAIN: Duration = Duration::from_secs(2);

impl Server {
    /// Binds, opens the store and starts to serve.
    ///
    /// # Errors
    ///
    /// When address, data directory or key cannot be had.
    pub async fn spawn(config: Config) -> Result<Self, StartError> {
        let bind = |error| StartError::Bind(config.listen, error);
        let socket = TcpListener::bind(config.listen).await.map_err(bind)?;
        let address = socket.local_addr().map_err(bind)?;
        let identity = config.tls.then(Identity::generate).transpose()?;
        let (tls, pin) = identity.map_or((None, None), |identity| (Some(identity.config), Some(identity.pin)));
        let mut server = Self::deaf(Env::real(), &config)?;
        (server.address, server.pin) = (address, pin);
        server.listen(socket, tls, Front::default());
        Ok(server)
    }

    /// Starts to accept connections.
    fn listen(&self, socket: TcpListener, tls: Option<Arc<rustls::ServerConfig>>, front: Front) {
        self.tasks.spawn(Listener::new(socket, tls, self.shared.clone(), self.tasks.clone(), front).run());
    }

    /// Binds, opens the store, takes up the builds in it, and starts to serve agents and the API.
    ///
    /// # Errors
    ///
    /// When address, data directory or key cannot be had.
    #[cfg(feature = "http")]
    pub(crate) async fn stand(
        config: Config,
        settings: crate::serve::Settings,
        outfit: crate::serve::Outfit,
    ) -> Result<crate::serve::Stood, StartError> {
        use crate::{lifecycle::Lifecycle, tokens::Tokens};
        let store = |error| StartError::Store(config.data.clone(), error);
        let bind = |error| StartError::Bind(config.listen, error);
        let socket = TcpListener::bind(config.listen).await.map_err(bind)?;
        let env = Env::real();
        let lock = crate::serve::lock(&*env.disk, &config.data).map_err(store)?;
        let lock = lock.ok_or_else(|| StartError::Taken(config.data.clone()))?;
        let identity = outfit.key.map(|key| Identity::open(&env, key, outfit.clients.as_ref())).transpose()?;
        let (tokens, new_tokens) = Tokens::open(&env, &config.data, outfit.tokens)?;
        let stored = StoreSettings { durability: config.durability, min_free: settings.min_free };
        let mut server = Self::open(env.clone(), &config, stored)?;
        server.address = socket.local_addr().map_err(bind)?;
        server.pin = identity.as_ref().map(|identity| identity.pin.clone());
        server.shared.strangers.limit(outfit.strangers);
        server.shared.places.forget_permits(Semaphore::MAX_PERMITS.saturating_sub(settings.max_agents));
        if let Some((destination, form)) = outfit.lifecycle {
            let lifecycle = Lifecycle::open(&env, destination, form).map_err(StartError::Lifecycle)?;
            server.shared.lifecycle.get_or_init(|| lifecycle);
        }
        let (shared, tasks) = (server.shared.clone(), server.tasks.clone());
        let opened = crate::serve::Standing::open(shared, tasks, settings, tokens, identity.as_ref(), lock);
        let standing = opened.await.map_err(store)?;
        let router = crate::http::router(standing.clone());
        let renewal = identity.as_ref().and_then(Identity::renewal);
        let tls = identity.map(|identity| identity.config);
        server.listen(socket, tls, Front { standing: Some((standing.clone(), router)) });
        Ok(crate::serve::Stood { server, standing, new_tokens, renewal })
    }

    /// A server that does not listen, on a machine of the caller's making: what reaches it comes through
    /// [`Self::serve`]. Its [`Self::local_addr`] is nobody's.
    ///
    /// # Errors
    ///
    /// When the data directory cannot be had.
    #[doc(hidden)]
    pub fn deaf(env: Env, config: &Config) -> Result<Self, StartError> {
        Self::open(env, config, config.durability)
    }

    fn open(env: Env, config: &Config, settings: impl Into<StoreSettings>) -> Result<Self, StartError> {
        let tasks = Tasks::default();
        let store = Store::open(&env, &config.data, settings, &tasks)
            .map_err(|error| StartError::Store(config.data.clone(), error))?;
        let shutdown = CancellationToken::new();
        let shared = Arc::new(Shared {
            builds: Builds::default(),
            store,
            env,
            agents: std::sync::atomic::AtomicU64::new(0),
            draining: shutdown.child_token(),
            shutdown,
            left: Notify::new(),
            #[cfg(feature = "http")]
            lifecycle: std::sync::OnceLock::new(),
            strangers: Strangers::new(StrangerLimits::default()),
            places: Arc::new(Semaphore::new(Semaphore::MAX_PERMITS)),
            refusals: Mutex::new(None),
        });
        let address = SocketAddr::from(([0, 0, 0, 0], 0));
        Ok(Self { shared, tasks, address, pin: None })
    }

    /// The address that was bound.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// The pin agents need, `sha256:HEX`; `None` without TLS.
    #[must_use]
    pub fn pin(&self) -> Option<&str> {
        self.pin.as_deref()
    }

    /// The address for agents that can reach this server as `host`.
    #[must_use]
    pub fn url(&self, host: &str, port: u16) -> String {
        let scheme = if self.pin.is_some() { "wss" } else { "ws" };
        let host = if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host.to_owned() };
        format!("{scheme}://{host}:{port}")
    }

    /// Serves a connection that was accepted elsewhere, on a unix socket say. Nothing is encrypted here.
    pub fn serve(&self, stream: impl Transport + 'static) {
        let visitor = self.visitor();
        self.tasks.spawn(async move {
            if let Err(error) = visitor.serve_http(stream).await {
                debug!("the connection ended before it was one: {error}");
            }
        });
    }

    /// Somebody who was let in elsewhere.
    pub(crate) fn visitor(&self) -> Visitor {
        Visitor {
            tls: None,
            shared: self.shared.clone(),
            tasks: self.tasks.clone(),
            front: Front::default(),
            stranger: None,
        }
    }

    /// Callers that were turned away so far: what to look at when a build never connects.
    #[must_use]
    pub fn refusals(&self) -> Option<Refusals> {
        self.shared.refusals.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Starts to wait for a build: draws its token and starts its clocks.
    ///
    /// # Errors
    ///
    /// When the build is known already, has its verdict in the data directory or has no steps, or no token can be drawn.
    pub fn expect(&self, expected: Expected) -> Result<ExpectedBuild, ExpectError> {
        if expected.steps.is_empty() {
            return Err(ExpectError::NoSteps);
        }
        if self.shared.store.has_verdict(expected.id.as_str()) {
            return Err(ExpectError::Ended(expected.id));
        }
        let Expected { id, steps, clocks, token, rate } = expected;
        let token = token.map_or_else(|| draw_token(&self.shared.env), Ok).map_err(ExpectError::Random)?;
        let (created, hash) = (self.shared.env.nature.now(), hash_token(&token));
        let declaration = Declaration { created, steps, labels: BTreeMap::new(), timeouts: clocks, token: hash };
        let build = Build::new(id.clone(), declaration, Duration::ZERO, self.shared.store.clone()).with_rate(rate);
        let build = Arc::new(build);
        if !self.shared.builds.insert(build.clone()) {
            return Err(ExpectError::Known(id));
        }
        let (watched, shutdown) = (build.clone(), self.shared.shutdown.clone());
        self.tasks.spawn(async move { watched.watch_clocks(&shutdown).await });
        Ok(ExpectedBuild { build, token: token.into() })
    }

    /// Tells every agent to look for another server, and turns new ones away; requests are answered still. Returns when
    /// all agents have left.
    #[cfg(feature = "http")]
    pub(crate) async fn drain(&self) {
        self.shared.draining.cancel();
        loop {
            let left = self.shared.left.notified();
            if self.shared.agents.load(std::sync::atomic::Ordering::Relaxed) == 0 {
                return;
            }
            left.await;
        }
    }

    /// Waits, at most for `patience`, until every finished agent has seen that its log was accepted, then closes all
    /// connections and ends every task.
    pub async fn shutdown(self, patience: Duration) {
        let confirmed = async {
            for build in self.shared.builds.all() {
                build.confirmed().await;
            }
        };
        drop(timeout(patience, confirmed).await); // whoever did not hear it in time will say so itself
        self.shared.shutdown.cancel();
        drop(timeout(DRAIN, self.tasks.ended()).await); // what has not ended by then ends where it stands
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.tasks.stop();
    }
}

impl ExpectedBuild {
    /// Its name.
    #[must_use]
    pub fn id(&self) -> &BuildId {
        &self.build.id
    }

    /// The secret its agents need.
    #[must_use]
    pub fn token(&self) -> &str {
        &self.token
    }

    /// Its log from the beginning. Every call gives a cursor of its own.
    #[must_use]
    pub fn log(&self) -> BuildLog {
        self.build.log()
    }

    /// Waits for its verdict, which is stored then. One that cannot be stored is told all the same, after
    /// [`Clocks::lost`] or a second [`Self::cancel`]; the server's log says so.
    pub async fn verdict(&self) -> Verdict {
        self.build.verdict().await
    }

    /// Whether any agent has said hello.
    #[must_use]
    pub fn was_connected(&self) -> bool {
        self.build.was_connected()
    }

    /// Whether it was told to stop, or has ended.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.build.is_cancelled()
    }

    /// Stops it: TERM to the command, KILL after the grace period. A second call does not wait for that.
    pub fn cancel(&self, reason: &str) {
        self.build.cancel(reason);
    }

    /// Stops it because something around it failed, its launcher say.
    pub fn fail(&self, reason: &str) {
        self.build.fail(reason);
    }
}

/// 256 random bits behind a prefix that secret scanners can look for.
pub(crate) fn draw_token(env: &Env) -> io::Result<String> {
    let mut secret = [0; 32];
    env.nature.fill(&mut secret)?;
    Ok(format!("{TOKEN_PREFIX}{}", phonehome_proto::id::Digest(secret)))
}

pub(crate) const TOKEN_PREFIX: &str = "phonehome_build_";
