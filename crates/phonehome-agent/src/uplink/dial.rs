//! From an address to an open websocket: TCP, a proxy's CONNECT, TLS, upgrade.

use std::{
    io,
    time::{Duration, SystemTime},
};

use http::StatusCode;
use phonehome_env::{Env, network::Transport, proxy::ProxyError, websocket};
use tokio::time::timeout;
use tokio_tungstenite::{WebSocketStream, tungstenite::protocol::Role};

use super::{
    socket::{READ_BUFFER, Socket},
    upgrade::{Refusal, UpgradeError, upgrade},
};
use crate::config::{Address, Secret, Trust};

/// Opens connections to one server.
pub(crate) struct Dialler {
    env: Env,
    address: Address,
    token: Option<Secret>,
    #[cfg(feature = "tls")]
    tls: phonehome_env::tls::Connector,
}

/// Why a connection could not be opened.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    /// The server cannot be who it should be, or the files that would tell cannot be used.
    #[cfg(feature = "tls")]
    #[error(transparent)]
    Identity(phonehome_env::tls::TlsError),
    #[error("the proxy refused: {0}")]
    Proxy(String),
    #[error("the server answered {0}{1}")]
    Status(StatusCode, String, Duration),
    #[error("no answer within {} s", DIAL_TIMEOUT.as_secs())]
    TimedOut,
    #[error("cannot reach {0}")]
    Unreachable(String, #[source] io::Error),
    #[error("there is no websocket")]
    Upgrade(#[source] UpgradeError),
}

/// From the first packet to the open websocket.
const DIAL_TIMEOUT: Duration = Duration::from_secs(20);

/// Longest Retry-After that is believed.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// Longest text of an HTTP error that is shown, bytes.
const MAX_ERROR_TEXT: usize = 200;

impl DialError {
    /// Whether coming back is pointless: the request itself is wrong, or the server is not the one that was meant.
    pub(super) fn is_fatal(&self) -> bool {
        match self {
            #[cfg(feature = "tls")]
            Self::Identity(error) => error.is_fatal(),
            Self::Status(status, ..) => {
                matches!(*status, StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
            }
            Self::Proxy(_) | Self::TimedOut | Self::Unreachable(..) | Self::Upgrade(_) => false,
        }
    }

    /// Whether nobody answered at all.
    pub(super) fn is_unanswered(&self) -> bool {
        match self {
            Self::TimedOut | Self::Unreachable(..) => true,
            #[cfg(feature = "tls")]
            Self::Identity(_) => false,
            Self::Proxy(_) | Self::Status(..) | Self::Upgrade(_) => false,
        }
    }

    /// How long the server wants to be left alone.
    pub(super) fn retry_after(&self) -> Duration {
        match self {
            Self::Status(_, _, wish) => *wish,
            #[cfg(feature = "tls")]
            Self::Identity(_) => Duration::ZERO,
            Self::Proxy(_) | Self::TimedOut | Self::Unreachable(..) | Self::Upgrade(_) => Duration::ZERO,
        }
    }
}

impl Dialler {
    /// Nothing is read or connected before the first [`Self::dial`].
    pub(crate) fn new(env: Env, address: Address, token: Option<Secret>, trust: Trust) -> Self {
        #[cfg(not(feature = "tls"))]
        drop(trust);
        Self {
            env,
            address,
            token,
            #[cfg(feature = "tls")]
            tls: phonehome_env::tls::Connector::new(trust),
        }
    }

    pub(super) async fn dial(&mut self) -> Result<Socket, DialError> {
        timeout(DIAL_TIMEOUT, self.connect()).await.unwrap_or(Err(DialError::TimedOut))
    }

    async fn connect(&mut self) -> Result<Socket, DialError> {
        let tcp = match &self.address.proxy {
            Some(proxy) => proxy.connect(&*self.env.network, &self.address.host, self.address.port).await?,
            None => self.tcp(&self.address.host, self.address.port).await?,
        };
        let stream = self.encrypt(tcp).await?;
        self.upgrade(stream).await
    }

    #[cfg(feature = "tls")]
    async fn encrypt(&mut self, tcp: Box<dyn Transport>) -> Result<Box<dyn Transport>, DialError> {
        if !self.address.tls {
            return Ok(tcp);
        }
        Ok(Box::new(self.tls.connect(&self.address.host, tcp).await.map_err(DialError::Identity)?))
    }

    #[cfg(not(feature = "tls"))]
    #[expect(clippy::unused_async, reason = "the same signature as with TLS")]
    async fn encrypt(&mut self, tcp: Box<dyn Transport>) -> Result<Box<dyn Transport>, DialError> {
        Ok(tcp)
    }

    async fn upgrade(&self, mut stream: Box<dyn Transport>) -> Result<Socket, DialError> {
        let Self { env, address, token, .. } = self;
        let beginning = upgrade(&mut *stream, &address.endpoint, token.as_ref(), &*env.nature).await?;
        let config = Some(websocket::config(READ_BUFFER));
        Ok(Socket::new(WebSocketStream::from_partially_read(stream, beginning, Role::Client, config).await))
    }

    async fn tcp(&self, host: &str, port: u16) -> Result<Box<dyn Transport>, DialError> {
        let unreachable = |error| DialError::Unreachable(format!("{host}:{port}"), error);
        self.env.network.connect(host, port).await.map_err(unreachable)
    }
}

impl From<ProxyError> for DialError {
    fn from(error: ProxyError) -> Self {
        match error {
            ProxyError::Refused(why) => Self::Proxy(why),
            ProxyError::Unreachable(whom, why) => Self::Unreachable(whom, why),
        }
    }
}

impl From<UpgradeError> for DialError {
    fn from(error: UpgradeError) -> Self {
        match error {
            UpgradeError::Refused(refusal) => refused(&refusal),
            UpgradeError::Garbled | UpgradeError::Io(_) | UpgradeError::Missing(_) | UpgradeError::TooLong => {
                Self::Upgrade(error)
            }
        }
    }
}

fn refused(refusal: &Refusal) -> DialError {
    let status = refusal.status;
    let text = printable(&refusal.text);
    let wish = if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
        refusal.retry_after.as_deref().and_then(retry_after).unwrap_or_default()
    } else {
        Duration::ZERO
    };
    DialError::Status(status, if text.is_empty() { text } else { format!(": {text}") }, wish)
}

/// Seconds or a date (RFC 9110, section 10.2.3).
fn retry_after(text: &str) -> Option<Duration> {
    let wish = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(SystemTime::now()).unwrap_or_default(),
    };
    Some(wish.min(MAX_RETRY_AFTER))
}

/// What somebody else sent, fit for one line of a log.
fn printable(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(&text[..text.len().min(MAX_ERROR_TEXT)]).into_owned();
    text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_servers_wish_to_be_left_alone_is_read_and_bounded() {
        let wish = retry_after;
        assert_eq!(wish("7"), Some(Duration::from_secs(7)));
        assert_eq!(wish("86400"), Some(MAX_RETRY_AFTER));
        assert_eq!(wish("Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::ZERO));
        assert_eq!(wish("soon"), None);
    }
}
