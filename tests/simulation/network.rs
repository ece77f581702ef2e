//! A network of one server: connections with a latency that are cut, held and halved.

use std::{
    collections::VecDeque,
    fmt, io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, Waker},
    time::Duration,
};

use phonehome_env::network::{Connecting, Network, Transport};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::mpsc,
    time::{Instant, Sleep, sleep},
};

use crate::chance::Chance;

/// The network. Clones are the same one.
#[derive(Debug, Clone)]
pub(crate) struct SimNetwork(Arc<Mutex<Links>>);

#[derive(Debug)]
struct Links {
    chance: Chance,
    links: Vec<Arc<Mutex<Link>>>,
    /// Where new connections arrive; `None` while no server runs.
    listener: Option<mpsc::Sender<SimStream>>,
    /// Nothing gets through before this.
    partition: Option<Instant>,
}

/// One connection. Index 0 is the agent's side, 1 the server's; a pipe is named for who writes into it.
#[derive(Debug)]
struct Link {
    pipes: [Pipe; 2],
    latency: Duration,
    chance: Chance,
}

/// One direction.
#[derive(Debug, Default)]
struct Pipe {
    chunks: VecDeque<(Instant, Vec<u8>)>,
    size: usize,
    /// No byte arrives before this.
    held: Option<Instant>,
    /// The writer has closed.
    ended: bool,
    /// Both ends see an error.
    reset: bool,
    /// What is written goes nowhere, and nobody is told.
    void: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// Bytes that a direction takes before its writer has to wait.
const CAPACITY: usize = 128 * 1024;

/// How long a connection attempt into nothing takes, as on the real network.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// How long bytes may be unconfirmed, as on the real network.
const UNCONFIRMED: Duration = Duration::from_secs(4);

impl SimNetwork {
    pub(crate) fn new(chance: Chance) -> Self {
        Self(Arc::new(Mutex::new(Links { chance, links: Vec::new(), listener: None, partition: None })))
    }

    fn lock(&self) -> MutexGuard<'_, Links> {
        self.0.lock().unwrap()
    }

    /// A server starts to listen.
    pub(crate) fn listen(&self) -> mpsc::Receiver<SimStream> {
        let (arrivals, listener) = mpsc::channel(64);
        self.lock().listener = Some(arrivals);
        listener
    }

    /// Nobody listens any more.
    pub(crate) fn stop_listening(&self) {
        self.lock().listener = None;
    }

    /// Breaks every connection. With `quietly` neither side is told.
    pub(crate) fn cut(&self, quietly: bool) {
        for link in self.lock().links.drain(..) {
            let mut link = link.lock().unwrap();
            for pipe in &mut link.pipes {
                if quietly { pipe.void() } else { pipe.reset() }
            }
        }
    }

    /// Breaks every connection for one side only: the other learns nothing.
    pub(crate) fn halve(&self, told: usize) {
        for link in self.lock().links.drain(..) {
            let mut link = link.lock().unwrap();
            // What is written towards the side that is told shows the break; the other's input just dries up.
            link.pipes[1 - told].reset();
            link.pipes[told].void();
        }
    }

    /// Nothing gets through for a while, in existing connections and for new ones.
    pub(crate) fn partition(&self, time: Duration) {
        let until = Instant::now() + time;
        let mut links = self.lock();
        links.partition = Some(until);
        links.links.retain(|link| Arc::strong_count(link) > 1);
        for link in &links.links {
            let mut link = link.lock().unwrap();
            link.pipes.iter_mut().for_each(|pipe| pipe.hold(until));
            // Systems give up on bytes that are not confirmed.
            if time >= UNCONFIRMED {
                link.pipes.iter_mut().filter(|pipe| pipe.size > 0).for_each(Pipe::reset);
            }
        }
    }

    /// Holds what is under way, in existing connections only.
    pub(crate) fn hold(&self, time: Duration) {
        let until = Instant::now() + time;
        for link in &self.lock().links {
            link.lock().unwrap().pipes.iter_mut().for_each(|pipe| pipe.hold(until));
        }
    }

    fn open(&self) -> Option<SimStream> {
        let mut links = self.lock();
        let chance = links.chance.fork();
        let latency = chance.millis(0, chance.pick(&[0, 1, 5, 80]));
        let link = Arc::new(Mutex::new(Link { pipes: Default::default(), latency, chance }));
        let arrivals = links.listener.as_ref()?;
        arrivals.try_send(SimStream::new(link.clone(), 1)).ok()?;
        links.links.push(link.clone());
        Some(SimStream::new(link, 0))
    }
}

impl Network for SimNetwork {
    fn connect<'a>(&'a self, _host: &'a str, _port: u16) -> Connecting<'a> {
        Box::pin(async move {
            let (pause, partition) = {
                let links = self.lock();
                (links.chance.millis(0, 20), links.partition.filter(|until| *until > Instant::now()))
            };
            if let Some(until) = partition {
                if until - Instant::now() >= CONNECT_TIMEOUT {
                    sleep(CONNECT_TIMEOUT).await;
                    return Err(io::ErrorKind::TimedOut.into());
                }
                tokio::time::sleep_until(until).await;
            }
            sleep(pause).await;
            match self.open() {
                Some(stream) => Ok(Box::new(stream) as Box<dyn Transport>),
                None => Err(io::ErrorKind::ConnectionRefused.into()),
            }
        })
    }
}

impl Pipe {
    fn reset(&mut self) {
        self.reset = true;
        self.wake();
    }

    fn void(&mut self) {
        self.void = true;
        self.chunks.clear();
        self.size = 0;
        self.wake();
    }

    fn hold(&mut self, until: Instant) {
        self.held = self.held.max(Some(until));
    }

    fn wake(&mut self) {
        self.reader.take().into_iter().chain(self.writer.take()).for_each(Waker::wake);
    }
}

/// One end of a connection. Dropping it ends it, as the end of its process would.
pub(crate) struct SimStream {
    link: Arc<Mutex<Link>>,
    side: usize,
    timer: Option<Pin<Box<Sleep>>>,
}

impl fmt::Debug for SimStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimStream({})", self.side)
    }
}

impl SimStream {
    fn new(link: Arc<Mutex<Link>>, side: usize) -> Self {
        Self { link, side, timer: None }
    }
}

impl AsyncRead for SimStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            let wait = {
                let mut link = this.link.lock().unwrap();
                let Link { pipes, chance, .. } = &mut *link;
                let pipe = &mut pipes[1 - this.side];
                if pipe.reset {
                    return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
                }
                let now = Instant::now();
                let due = pipe.chunks.front().map(|(at, _)| (*at).max(pipe.held.unwrap_or(*at)));
                match due {
                    Some(at) if at <= now => {
                        let (at, mut chunk) = pipe.chunks.pop_front().unwrap();
                        // A read gets any part of what has arrived.
                        let most = chunk.len().min(buffer.remaining());
                        let count = if chance.is(20) { chance.within(1, most.max(1) as u64) as usize } else { most };
                        buffer.put_slice(&chunk[..count.min(most)]);
                        pipe.size -= count.min(most);
                        if count < chunk.len() {
                            pipe.chunks.push_front((at, chunk.split_off(count)));
                        }
                        pipe.writer.take().into_iter().for_each(Waker::wake);
                        return Poll::Ready(Ok(()));
                    }
                    None if pipe.ended && !pipe.void => return Poll::Ready(Ok(())),
                    due => {
                        pipe.reader = Some(context.waker().clone());
                        due
                    }
                }
            };
            let Some(at) = wait else { return Poll::Pending };
            let mut timer = Box::pin(tokio::time::sleep_until(at));
            if timer.as_mut().poll(context).is_pending() {
                this.timer = Some(timer);
                return Poll::Pending;
            }
        }
    }
}

impl AsyncWrite for SimStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut link = self.link.lock().unwrap();
        let latency = link.latency;
        let pipe = &mut link.pipes[self.side];
        if pipe.reset {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if pipe.void {
            return Poll::Ready(Ok(bytes.len()));
        }
        if pipe.size >= CAPACITY {
            pipe.writer = Some(context.waker().clone());
            return Poll::Pending;
        }
        let count = bytes.len().min(CAPACITY - pipe.size);
        pipe.chunks.push_back((Instant::now() + latency, bytes[..count].to_vec()));
        pipe.size += count;
        pipe.reader.take().into_iter().for_each(Waker::wake);
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut link = self.link.lock().unwrap();
        let pipe = &mut link.pipes[self.side];
        pipe.ended = true;
        pipe.reader.take().into_iter().for_each(Waker::wake);
        Poll::Ready(Ok(()))
    }
}

impl Drop for SimStream {
    fn drop(&mut self) {
        let mut link = self.link.lock().unwrap();
        let side = self.side;
        // What is on its way arrives. What the other side writes from now on meets nobody.
        link.pipes[side].ended = true;
        link.pipes[side].reader.take().into_iter().for_each(Waker::wake);
        if !link.pipes[1 - side].void {
            link.pipes[1 - side].reset = true;
            link.pipes[1 - side].writer.take().into_iter().for_each(Waker::wake);
        }
    }
}
