//! Connections to others.

use std::{fmt, io, net::SocketAddr, pin::Pin, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, lookup_host},
    time::timeout,
};

/// A byte stream to somebody else: TCP, or TLS over it.
pub trait Transport: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Transport for T {}

/// A connection on its way.
pub type Connecting<'a> = Pin<Box<dyn Future<Output = io::Result<Box<dyn Transport>>> + Send + 'a>>;

/// A machine's way to others.
pub trait Network: fmt::Debug + Send + Sync {
    /// Connects to a host, a name or an address without brackets.
    fn connect<'a>(&'a self, host: &'a str, port: u16) -> Connecting<'a>;
}

/// TCP.
#[derive(Debug)]
pub struct RealNetwork;

/// How long one address may take to answer. A lost SYN is sent again after 1, 3 and 7 s (RFC 6298): a new attempt after
/// 3 s finds a network that is back sooner than the next SYN of the old one would.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// How long bytes may be on their way without the peer's system confirming them (tcp(7), `TCP_USER_TIMEOUT`). Beyond
/// that the time to the next retransmission has grown to seconds, and a new connection is the faster way.
const UNCONFIRMED: Duration = Duration::from_secs(4);

impl Network for RealNetwork {
    fn connect<'a>(&'a self, host: &'a str, port: u16) -> Connecting<'a> {
        Box::pin(async move {
            let mut failure = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
            for address in lookup_host((host, port)).await? {
                match timeout(CONNECT_TIMEOUT, connect(address)).await {
                    Ok(Ok(stream)) => return Ok(Box::new(stream) as Box<dyn Transport>),
                    Ok(Err(error)) => failure = error,
                    Err(_) => failure = io::ErrorKind::TimedOut.into(),
                }
            }
            Err(failure)
        })
    }
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    prepare(&stream)?;
    Ok(stream)
}

/// Sets up a TCP connection for frames: none waits for company, and a dead way is noticed within seconds.
///
/// # Errors
///
/// When the connection is gone already.
pub fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    rustix::net::sockopt::set_tcp_user_timeout(stream, UNCONFIRMED.as_millis() as u32)?;
    Ok(())
}
