//! From an address to an open websocket: TCP, a proxy's CONNECT, TLS, upgrade.

use std::{
    io,
    time::{Duration, SystemTime},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use http::StatusCode;
use phonehome_env::{Env, network::Transport, websocket};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};
use tokio_tungstenite::{WebSocketStream, tungstenite::protocol::Role};

use super::{
    socket::{READ_BUFFER, Socket},
    upgrade::{Refusal, UpgradeError, upgrade},
};
use crate::config::{Address, Proxy, Secret, Trust};

/// Opens connections to one server.
pub(crate) struct Dialler {
    env: Env,
    address: Address,
    token: Option<Secret>,
    #[cfg(feature = "tls")]
    tls: super::tls::Connector,
}

/// Why a connection could not be opened.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    /// The server cannot be who it should be, or the files that would tell cannot be used.
    #[cfg(feature = "tls")]
    #[error(transparent)]
    Identity(super::tls::TlsError),
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

/// Longest answer of a proxy, bytes.
const MAX_PROXY_ANSWER: usize = 8 * 1024;

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
            tls: super::tls::Connector::new(trust),
        }
    }

    pub(super) async fn dial(&mut self) -> Result<Socket, DialError> {
        timeout(DIAL_TIMEOUT, self.connect()).await.unwrap_or(Err(DialError::TimedOut))
    }

    async fn connect(&mut self) -> Result<Socket, DialError> {
        let tcp = match &self.address.proxy {
            Some(proxy) => self.through_proxy(proxy).await?,
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

    /// HTTP CONNECT (RFC 9110, section 9.3.6).
    async fn through_proxy(&self, proxy: &Proxy) -> Result<Box<dyn Transport>, DialError> {
        let mut stream = self.tcp(&proxy.host, proxy.port).await?;
        let broken = |error| DialError::Unreachable(format!("{}:{}", proxy.host, proxy.port), error);
        stream.write_all(connect_request(proxy, &self.address).as_bytes()).await.map_err(broken)?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            // One byte at a time: what follows the answer belongs to TLS.
            answer.push(stream.read_u8().await.map_err(broken)?);
            if answer.len() > MAX_PROXY_ANSWER {
                return Err(DialError::Proxy("its answer is too long".into()));
            }
        }
        let answer = String::from_utf8_lossy(&answer);
        let status = answer.lines().next().unwrap_or_default();
        if status.split(' ').nth(1).is_some_and(|code| code.starts_with('2')) {
            Ok(stream)
        } else {
            Err(DialError::Proxy(printable(status.as_bytes())))
        }
    }
}

fn connect_request(proxy: &Proxy, target: &Address) -> String {
    let host = if target.host.contains(':') { format!("[{}]", target.host) } else { target.host.clone() };
    let authority = format!("{host}:{}", target.port);
    let credentials = proxy.credentials.as_ref().map_or(String::new(), |secret| {
        format!("Proxy-Authorization: Basic {}\r\n", BASE64_STANDARD.encode(percent_decoded(secret.expose())))
    });
    format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n{credentials}\r\n")
}

/// Userinfo of a URL as bytes (RFC 3986, section 2.1). What is not an escape stays as it is.
fn percent_decoded(text: &str) -> Vec<u8> {
    let mut rest = text.as_bytes();
    let mut decoded = Vec::with_capacity(rest.len());
    while let Some((&first, tail)) = rest.split_first() {
        let escape = tail.get(..2).filter(|_| first == b'%').and_then(|hex| std::str::from_utf8(hex).ok());
        match escape.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                decoded.push(byte);
                rest = &tail[2..];
            }
            None => {
                decoded.push(first);
                rest = tail;
            }
        }
    }
    decoded
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

    #[test]
    fn a_proxy_gets_decoded_credentials() {
        let proxy = Proxy { host: "p".into(), port: 1, credentials: Some(Secret::new("user:p%40ss%".into())) };
        let target =
            Address { tls: true, host: "::1".into(), port: 443, endpoint: "wss://h/".parse().unwrap(), proxy: None };
        let request = connect_request(&proxy, &target);
        assert!(request.starts_with("CONNECT [::1]:443 HTTP/1.1\r\n"));
        assert!(request.contains(&BASE64_STANDARD.encode("user:p@ss%")));
    }
}
