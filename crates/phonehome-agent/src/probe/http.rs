//! The least of HTTP/1.1 that says whether a server is well: one GET, and the status of its answer.

use std::io;

use http::Uri;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{Endpoint, ProbeError, lookup::Lookup};

/// What to get, from where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Get {
    endpoint: Endpoint,
    request: String,
}

/// The status line of an answer is shorter than this, bytes; the rest is not read.
const MAX_STATUS_LINE: usize = 1024;

impl Get {
    /// Reads what follows `http:`.
    pub(super) fn parse(text: &str) -> Result<Self, ProbeError> {
        if text.starts_with("https:") {
            return Err(ProbeError::Https);
        }
        let rest = text.strip_prefix("http:").unwrap_or(text);
        let uri = match rest.strip_prefix("//") {
            Some(rest) => format!("http://{rest}"),
            None if rest.starts_with(|c: char| c.is_ascii_digit()) => format!("http://localhost:{rest}"),
            None => return Err(ProbeError::BadUrl),
        };
        let uri: Uri = uri.parse().map_err(|_| ProbeError::BadUrl)?;
        Self::of(&uri).ok_or(ProbeError::BadUrl)
    }

    fn of(uri: &Uri) -> Option<Self> {
        let authority = uri.authority().filter(|authority| !authority.as_str().contains('@'))?;
        let has_port = authority.as_str() != authority.host();
        let port = if has_port { authority.port_u16()? } else { 80 };
        let endpoint = Endpoint::parse(&format!("{}:{port}", authority.host()))?;
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: {authority}\r\nUser-Agent: phonehome-agent/{}\r\nAccept: */*\r\n\
             Connection: close\r\n\r\n",
            env!("CARGO_PKG_VERSION")
        );
        Some(Self { endpoint, request })
    }

    pub(super) async fn attempt(&self, lookup: &mut Lookup) -> io::Result<()> {
        let mut stream = self.endpoint.connect(lookup).await?;
        stream.write_all(self.request.as_bytes()).await?;
        let mut answer = Vec::new();
        let mut limited = stream.take(MAX_STATUS_LINE as u64);
        while !answer.contains(&b'\n') && limited.read_buf(&mut answer).await? > 0 {}
        match status(&answer) {
            Some(200..=399) => Ok(()),
            Some(status) => Err(io::Error::other(format!("status {status}"))),
            None => Err(io::Error::other("the answer is not HTTP")),
        }
    }
}

/// Of a whole status line (RFC 9112, section 4).
fn status(answer: &[u8]) -> Option<u16> {
    let line = answer.split_inclusive(|byte| *byte == b'\n').next()?;
    let line = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
    let code = line.strip_prefix("HTTP/1.")?.get(1..)?.strip_prefix(' ')?;
    let (code, rest) = code.split_at_checked(3)?;
    (code.bytes().all(|byte| byte.is_ascii_digit()) && rest.starts_with([' ', '\r']) || rest.is_empty())
        .then(|| code.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_address_leads_somewhere() {
        for (text, host, port, first_lines) in [
            ("8080", None, 8080, "GET / HTTP/1.1\r\nHost: localhost:8080\r\n"),
            ("8080/a?b", None, 8080, "GET /a?b HTTP/1.1\r\nHost: localhost:8080\r\n"),
            ("//db/x", Some("db"), 80, "GET /x HTTP/1.1\r\nHost: db\r\n"),
            ("//[::1]:81", Some("::1"), 81, "GET / HTTP/1.1\r\nHost: [::1]:81\r\n"),
            ("http://localhost:82/y", None, 82, "GET /y HTTP/1.1\r\nHost: localhost:82\r\n"),
        ] {
            let get = Get::parse(text).unwrap();
            assert_eq!(get.endpoint, Endpoint { host: host.map(Into::into), port }, "{text}");
            assert!(get.request.starts_with(first_lines), "{}", get.request);
        }
        for text in ["", "x", "70000", "//", "//a:b:c/", "//h/\r\nX: y", "//h:0/"] {
            assert_eq!(Get::parse(text), Err(ProbeError::BadUrl), "{text}");
        }
    }
}
