//! A TCP proxy that does to connections what networks do.

use std::{
    io,
    net::SocketAddr,
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Notify, watch},
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{Random, patiently};

/// Listens on a port of its own and passes everything on to one address.
#[derive(Debug)]
pub(crate) struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

/// What happens to connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Mode {
    /// A new one is broken after a random number of bytes in this range, both directions together.
    Cut(Range<u64>),
    /// Everything is passed on.
    Forward,
    /// A connection on which nothing was passed on for this long is closed, in both directions.
    Idle(Duration),
    /// A new one is reset at once.
    Refuse,
    /// So many bytes a second are passed on in each direction of a connection.
    Slow(u64),
    /// Nothing is passed on for now; new and old ones stay open.
    Stall,
}

#[derive(Debug)]
struct Shared {
    target: SocketAddr,
    mode: watch::Sender<Mode>,
    /// Connections that were accepted.
    accepted: watch::Sender<u64>,
    /// Whether anything was ever held back.
    held: watch::Sender<bool>,
    cut: AtomicU64,
    random: Mutex<Random>,
}

impl Proxy {
    /// The same `seed` breaks connections at the same bytes.
    pub(crate) async fn to(target: SocketAddr, mode: Mode, seed: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            target,
            mode: watch::Sender::new(mode),
            accepted: watch::Sender::new(0),
            held: watch::Sender::new(false),
            cut: AtomicU64::new(0),
            random: Mutex::new(Random::new(seed)),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, shared.clone()));
        Self { address, shared, _tasks: tasks }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn set(&self, mode: Mode) {
        self.shared.mode.send_replace(mode);
    }

    /// Waits until so many connections have been accepted, in all.
    pub(crate) async fn accepted(&self, count: u64) {
        let mut accepted = self.shared.accepted.subscribe();
        let event = accepted.wait_for(|accepted| *accepted >= count);
        patiently("connections arrive at the proxy", event).await.unwrap();
    }

    /// Waits until it holds something back.
    pub(crate) async fn stalled(&self) {
        let mut held = self.shared.held.subscribe();
        patiently("something is held back", held.wait_for(|held| *held)).await.unwrap();
    }

    /// How many connections were broken.
    pub(crate) fn cut(&self) -> u64 {
        self.shared.cut.load(Ordering::Relaxed)
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let mode = shared.mode.borrow().clone();
        if mode == Mode::Refuse {
            client.set_zero_linger().unwrap();
        } else {
            let connection = Connection::new(&mode, shared.clone());
            connections.spawn(async move { connection.run(client).await.unwrap_or(()) }); // broken, as it should be
        }
        shared.accepted.send_modify(|accepted| *accepted += 1);
    }
}

/// Pieces in which the bytes of one second are passed on when the way is slow.
const SLICES: u64 = 20;

/// One connection, of which so many bytes more are passed on.
struct Connection {
    shared: Arc<Shared>,
    left: AtomicU64,
    reset: bool,
    /// As it was when the connection was accepted.
    mode: Mode,
    /// Something was passed on.
    passed: Notify,
}

impl Connection {
    fn new(mode: &Mode, shared: Arc<Shared>) -> Self {
        let mut random = shared.random.lock().unwrap();
        let left = match mode {
            Mode::Cut(range) => random.within(range.clone()),
            Mode::Forward | Mode::Idle(_) | Mode::Refuse | Mode::Slow(_) | Mode::Stall => u64::MAX,
        };
        let reset = random.next().is_multiple_of(2);
        drop(random);
        Self { shared, left: AtomicU64::new(left), reset, mode: mode.clone(), passed: Notify::new() }
    }

    async fn run(self, client: TcpStream) -> io::Result<()> {
        let server = TcpStream::connect(self.shared.target).await?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        if self.reset {
            client.set_zero_linger()?;
            server.set_zero_linger()?;
        }
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = server.into_split();
        tokio::try_join!(
            self.pass(&mut from_client, &mut to_server),
            self.pass(&mut from_server, &mut to_client),
            self.watch_silence()
        )?;
        Ok(())
    }

    /// Ends with an error when nothing was passed on for as long as the mode allows.
    async fn watch_silence(&self) -> io::Result<()> {
        let Mode::Idle(limit) = self.mode else { return Ok(()) };
        while timeout(limit, self.passed.notified()).await.is_ok() {}
        self.shared.cut.fetch_add(1, Ordering::Relaxed);
        Err(io::ErrorKind::TimedOut.into())
    }

    /// Passes bytes on until the end, which is passed on too.
    async fn pass(&self, from: &mut OwnedReadHalf, to: &mut OwnedWriteHalf) -> io::Result<()> {
        let mut block = vec![0; 16 * 1024];
        let mut mode = self.shared.mode.subscribe();
        loop {
            let rate = match *mode.borrow() {
                Mode::Slow(rate) => Some(rate),
                Mode::Cut(_) | Mode::Forward | Mode::Idle(_) | Mode::Refuse | Mode::Stall => None,
            };
            let most = rate.map_or(block.len(), |rate| (rate / SLICES) as usize + 1);
            let count = from.read(&mut block[..most]).await?;
            if count == 0 {
                return to.shutdown().await;
            }
            self.shared.held.send_if_modified(|held| {
                !*held && *mode.borrow() == Mode::Stall && {
                    *held = true;
                    true
                }
            });
            mode.wait_for(|mode| *mode != Mode::Stall).await.map_err(io::Error::other)?;
            let left = self.left.load(Ordering::Relaxed);
            let passed = left.min(count as u64);
            self.left.fetch_sub(passed, Ordering::Relaxed);
            to.write_all(&block[..passed as usize]).await?;
            self.passed.notify_one();
            if let Some(rate) = rate {
                sleep(Duration::from_secs_f64(passed as f64 / rate as f64)).await; // what the way itself takes
            }
            if passed == left {
                self.shared.cut.fetch_add(1, Ordering::Relaxed);
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
        }
    }
}
