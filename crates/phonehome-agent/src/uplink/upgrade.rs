//! From HTTP to a websocket (RFC 6455, section 4).
//!
//! It is written here because the request carries the token: its one copy is wiped when it is sent, which a library's
//! buffers are not.

use std::io;

use base64::{Engine, prelude::BASE64_STANDARD};
use http::{StatusCode, Uri};
use phonehome_env::{Nature, network::Transport};
use phonehome_proto::codec::Codec;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use zeroize::Zeroizing;

use crate::config::Secret;

/// An answer that was no upgrade.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) retry_after: Option<String>,
    /// The beginning of what it says.
    pub(super) text: Vec<u8>,
}

/// Why there is no websocket.
#[derive(Debug, thiserror::Error)]
pub(super) enum UpgradeError {
    #[error("its answer cannot be read as HTTP")]
    Garbled,
    #[error("the connection broke during the websocket handshake")]
    Io(#[from] io::Error),
    #[error("the answer to the websocket handshake has no proper {0}")]
    Missing(&'static str),
    #[error("refused")]
    Refused(Refusal),
    #[error("its answer is too long")]
    TooLong,
}

/// Longest head of an answer with those of interim ones before it, bytes.
const MAX_HEAD: usize = 16 * 1024;

/// Headers of an answer at most.
const MAX_HEADERS: usize = 64;

/// Longest text of a refusal that is read, bytes.
const MAX_TEXT: usize = 200;

/// Asks for the upgrade. Returns what the server has sent after its answer: the beginning of the first frame.
pub(super) async fn upgrade(
    stream: &mut dyn Transport,
    endpoint: &Uri,
    token: Option<&Secret>,
    nature: &dyn Nature,
) -> Result<Vec<u8>, UpgradeError> {
    let mut nonce = [0; 16];
    nature.fill(&mut nonce)?;
    let key = BASE64_STANDARD.encode(nonce);
    stream.write_all(request(endpoint, token, &key).as_bytes()).await?;
    stream.flush().await?;
    let (head, mut rest) = read_head(stream).await?;
    if head.status == StatusCode::SWITCHING_PROTOCOLS {
        head.check(&key)?;
        return Ok(rest);
    }
    let wanted = head.content_length.unwrap_or_default().min(MAX_TEXT);
    while rest.len() < wanted && stream.read_buf(&mut rest).await? > 0 {}
    rest.truncate(MAX_TEXT);
    Err(UpgradeError::Refused(Refusal { status: head.status, retry_after: head.retry_after, text: rest }))
}

/// The head of the answer, and what has come after it. Interim answers before it say nothing (RFC 9110, section 15.2).
async fn read_head(stream: &mut dyn Transport) -> Result<(Head, Vec<u8>), UpgradeError> {
    let (mut answer, mut interim) = (Vec::new(), 0);
    loop {
        while let Some((head, length)) = Head::parse(&answer[interim..])? {
            interim += length;
            if !head.is_interim() {
                return Ok((head, answer.split_off(interim)));
            }
        }
        if answer.len() > MAX_HEAD {
            return Err(UpgradeError::TooLong);
        }
        if stream.read_buf(&mut answer).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
    }
}

fn request(endpoint: &Uri, token: Option<&Secret>, key: &str) -> Zeroizing<String> {
    let path = endpoint.path();
    let host = endpoint.authority().map(http::uri::Authority::as_str).unwrap_or_default();
    let protocol = Codec::Binary.subprotocol();
    let secret = token.map(Secret::expose).unwrap_or_default();
    // All at once: a text that grows would leave copies behind.
    let mut request = Zeroizing::new(String::with_capacity(512 + path.len() + host.len() + secret.len()));
    request.push_str("GET ");
    request.push_str(path);
    request.push_str(" HTTP/1.1\r\nHost: ");
    request.push_str(host);
    request
        .push_str("\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: ");
    request.push_str(key);
    request.push_str("\r\nSec-WebSocket-Protocol: ");
    request.push_str(protocol);
    if token.is_some() {
        request.push_str("\r\nAuthorization: Bearer ");
        request.push_str(secret);
    }
    request.push_str("\r\n\r\n");
    request
}

/// What matters of an answer's head.
#[derive(Debug)]
struct Head {
    status: StatusCode,
    upgrade: Option<String>,
    connection: Option<String>,
    accept: Option<String>,
    protocol: Option<String>,
    extensions: Option<String>,
    retry_after: Option<String>,
    content_length: Option<usize>,
}

impl Head {
    /// The head and its length; `None` as long as it is not there to its end.
    fn parse(answer: &[u8]) -> Result<Option<(Self, usize)>, UpgradeError> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut parsed = httparse::Response::new(&mut headers);
        let httparse::Status::Complete(length) = parsed.parse(answer).map_err(|_| UpgradeError::Garbled)? else {
            return Ok(None);
        };
        let status = parsed.code.and_then(|code| StatusCode::from_u16(code).ok()).ok_or(UpgradeError::Garbled)?;
        let header = |name: &str| {
            let found = parsed.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
            Some(String::from_utf8_lossy(found.value).trim().to_owned())
        };
        let head = Self {
            status,
            upgrade: header("Upgrade"),
            connection: header("Connection"),
            accept: header("Sec-WebSocket-Accept"),
            protocol: header("Sec-WebSocket-Protocol"),
            extensions: header("Sec-WebSocket-Extensions"),
            retry_after: header("Retry-After"),
            content_length: header("Content-Length").and_then(|length| length.parse().ok()),
        };
        Ok(Some((head, length)))
    }

    fn is_interim(&self) -> bool {
        self.status.is_informational() && self.status != StatusCode::SWITCHING_PROTOCOLS
    }

    /// What a client has to look at (RFC 6455, section 4.1).
    fn check(&self, key: &str) -> Result<(), UpgradeError> {
        let is = |value: &Option<String>, expected: &str| {
            value.as_ref().is_some_and(|value| value.split(',').any(|it| it.trim().eq_ignore_ascii_case(expected)))
        };
        let proper = [
            ("Upgrade", is(&self.upgrade, "websocket")),
            ("Connection", is(&self.connection, "Upgrade")),
            ("Sec-WebSocket-Accept", self.accept.as_deref() == Some(&derive_accept_key(key.as_bytes()))),
            ("Sec-WebSocket-Protocol", self.protocol.as_deref() == Some(Codec::Binary.subprotocol())),
            ("Sec-WebSocket-Extensions", self.extensions.is_none()), // none was offered
        ];
        proper
            .into_iter()
            .find(|(_, is_proper)| !is_proper)
            .map_or(Ok(()), |(name, _)| Err(UpgradeError::Missing(name)))
    }
}

#[cfg(test)]
mod tests {
    use phonehome_env::Env;
    use tokio::io::{DuplexStream, duplex};

    use super::*;

    const PROPER: &str = "HTTP/1.1 101 Switching Protocols\r\nupgrade: WebSocket\r\nconnection: keep-alive, upgrade\r\n\
                          sec-websocket-accept: ACCEPT\r\nsec-websocket-protocol: phonehome.v1\r\n\r\n";

    #[tokio::test]
    async fn a_proper_answer_is_an_upgrade_and_what_follows_it_is_kept() {
        for piece in [1, 7, 10_000] {
            let (request, upgraded) = answered(&format!("{PROPER}first frame"), piece).await;
            assert!("first frame".as_bytes().starts_with(&upgraded.unwrap()));
            let lines: Vec<_> = request.split("\r\n").collect();
            assert_eq!(lines[..2], ["GET /ci/v1/agent HTTP/1.1", "Host: h:81"]);
            assert!(lines.contains(&"Authorization: Bearer a-token"), "{request}");
        }
    }

    #[tokio::test]
    async fn interim_answers_are_passed_over() {
        let interim = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </style.css>\r\n\r\n";
        for piece in [1, 7, 10_000] {
            let (_, upgraded) = answered(&format!("{interim}{PROPER}first frame"), piece).await;
            assert!("first frame".as_bytes().starts_with(&upgraded.unwrap()));
            let (_, refused) = answered(&format!("{interim}HTTP/1.1 401 x\r\n\r\n"), piece).await;
            assert!(matches!(refused, Err(UpgradeError::Refused(refusal)) if refusal.status.as_u16() == 401));
        }
    }

    #[tokio::test]
    async fn an_answer_that_is_not_proper_says_what_is_wrong() {
        for (wrong, right, name) in [
            ("upgrade: h2c", "upgrade: WebSocket", "Upgrade"),
            ("connection: close", "connection: keep-alive, upgrade", "Connection"),
            ("sec-websocket-accept: x", "sec-websocket-accept: ACCEPT", "Sec-WebSocket-Accept"),
            ("sec-websocket-protocol: phonehome.v9", "sec-websocket-protocol: phonehome.v1", "Sec-WebSocket-Protocol"),
            ("sec-websocket-extensions: permessage-deflate\r\nx: y", "x: y", "Sec-WebSocket-Extensions"),
        ] {
            let answer = PROPER.replace("\r\n\r\n", "\r\nx: y\r\n\r\n").replace(right, wrong);
            let error = answered(&answer, 10_000).await.1.unwrap_err();
            assert!(matches!(error, UpgradeError::Missing(missing) if missing == name), "{error:?}");
        }
    }

    #[tokio::test]
    async fn a_refusal_has_its_status_its_wish_and_its_text() {
        let answer = "HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 9\r\n\r\nnot today";
        for piece in [1, 10_000] {
            let UpgradeError::Refused(refusal) = answered(answer, piece).await.1.unwrap_err() else { panic!() };
            assert_eq!((refusal.status.as_u16(), refusal.retry_after.as_deref()), (503, Some("7")));
            assert_eq!(refusal.text, b"not today");
        }
    }

    #[tokio::test]
    async fn whatever_else_comes_is_an_error_and_bounded() {
        let endless = format!("HTTP/1.1 101 x\r\nx: {}", "y".repeat(2 * MAX_HEAD));
        let many = format!("HTTP/1.1 101 x\r\n{}\r\n", "x: y\r\n".repeat(MAX_HEADERS + 1));
        let interim = "HTTP/1.1 100 x\r\n\r\n".repeat(MAX_HEAD);
        for answer in [&endless, &many, &interim, "SSH-2.0-OpenSSH_9.2\r\n\r\n", "HTTP/1.1 101 x\r\n", ""] {
            assert!(answered(answer, 10_000).await.1.is_err());
        }
    }

    /// A server that gives this answer in pieces, and what the client has asked and got.
    async fn answered(answer: &str, piece: usize) -> (String, Result<Vec<u8>, UpgradeError>) {
        let (mut client, server) = duplex(64 * 1024);
        let server = tokio::spawn(serve(server, answer.to_owned(), piece));
        let endpoint = "ws://h:81/ci/v1/agent".parse().unwrap();
        let token = Secret::new("a-token".into());
        let upgraded = upgrade(&mut client, &endpoint, Some(&token), &*Env::real().nature).await;
        drop(client);
        (server.await.unwrap(), upgraded)
    }

    async fn serve(mut stream: DuplexStream, answer: String, piece: usize) -> String {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            stream.read_buf(&mut request).await.unwrap();
        }
        let request = String::from_utf8(request).unwrap();
        let key = request.split("Sec-WebSocket-Key: ").nth(1).unwrap().split("\r\n").next().unwrap();
        let answer = answer.replace("ACCEPT", &derive_accept_key(key.as_bytes()));
        for piece in answer.as_bytes().chunks(piece) {
            if stream.write_all(piece).await.is_err() {
                break; // the client has heard enough
            }
        }
        request
    }
}
