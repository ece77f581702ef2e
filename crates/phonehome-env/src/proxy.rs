//! HTTP proxies: which one the environment names, and a way through it.

use std::io;

use base64::{Engine, prelude::BASE64_STANDARD};
use http::Uri;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{
    network::{Network, Transport},
    secret::Secret,
};

/// An HTTP proxy that is asked to CONNECT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    /// Name or IP address.
    pub host: String,
    /// Port, 80 when the URL names none.
    pub port: u16,
    /// `user:password`, as the URL has them.
    pub credentials: Option<Secret>,
}

/// What the environment says about proxies.
#[derive(Debug, Default)]
pub struct ProxySettings {
    proxy: Option<String>,
    exempt: Option<String>,
}

impl ProxySettings {
    /// Reads `HTTPS_PROXY` and `NO_PROXY`, in capitals or small letters.
    #[must_use]
    pub fn read(variable: impl Fn(&str) -> Option<String>) -> Self {
        let either = |upper: &str, lower: &str| variable(upper).or_else(|| variable(lower)).filter(|v| !v.is_empty());
        Self { proxy: either("HTTPS_PROXY", "https_proxy"), exempt: either("NO_PROXY", "no_proxy") }
    }

    /// The proxy that leads to a host, if one does.
    ///
    /// # Errors
    ///
    /// When its address is unusable.
    pub fn proxy_for(&self, host: &str) -> Result<Option<Proxy>, BadProxy> {
        let Some(proxy) = self.proxy.as_deref().filter(|_| !self.is_exempt(host)) else { return Ok(None) };
        Proxy::parse(proxy).map(Some)
    }

    /// As curl has it: a comma-separated list of hosts and domain suffixes, or `*`.
    fn is_exempt(&self, host: &str) -> bool {
        let Some(exempt) = &self.exempt else { return false };
        exempt.split(',').map(|entry| entry.trim().trim_start_matches('.')).filter(|entry| !entry.is_empty()).any(
            |entry| {
                let suffix = host.len().checked_sub(entry.len()).and_then(|at| host.get(at..));
                let whole = host.len() == entry.len()
                    || host.as_bytes().get(host.len().wrapping_sub(entry.len() + 1)) == Some(&b'.');
                entry == "*" || whole && suffix.is_some_and(|suffix| suffix.eq_ignore_ascii_case(entry))
            },
        )
    }
}

impl Proxy {
    fn parse(text: &str) -> Result<Self, BadProxy> {
        let url = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
        let uri: Uri = url.parse().map_err(|_| BadProxy)?;
        let authority = uri.authority().ok_or(BadProxy)?;
        if uri.scheme_str() != Some("http") {
            return Err(BadProxy);
        }
        let credentials = authority.as_str().rsplit_once('@').map(|(user, _)| Secret::new(user.to_owned()));
        Ok(Self { host: bare_host(&uri), port: uri.port_u16().unwrap_or(80), credentials })
    }

    /// Asks it for a way to a host (HTTP CONNECT, RFC 9110, section 9.3.6).
    ///
    /// # Errors
    ///
    /// When it cannot be reached or does not want to.
    pub async fn connect(
        &self,
        network: &dyn Network,
        host: &str,
        port: u16,
    ) -> Result<Box<dyn Transport>, ProxyError> {
        let broken = |error| ProxyError::Unreachable(format!("{}:{}", self.host, self.port), error);
        let mut stream = network.connect(&self.host, self.port).await.map_err(broken)?;
        stream.write_all(connect_request(self, host, port).as_bytes()).await.map_err(broken)?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            // One byte at a time: what follows the answer belongs to TLS.
            answer.push(stream.read_u8().await.map_err(broken)?);
            if answer.len() > MAX_ANSWER {
                return Err(ProxyError::Refused("its answer is too long".into()));
            }
        }
        let answer = String::from_utf8_lossy(&answer);
        let status = answer.lines().next().unwrap_or_default();
        if status.split(' ').nth(1).is_some_and(|code| code.starts_with('2')) {
            Ok(stream)
        } else {
            Err(ProxyError::Refused(printable(status)))
        }
    }
}

/// A host as a resolver wants it, without the brackets of an IPv6 literal.
#[must_use]
pub fn bare_host(uri: &Uri) -> String {
    let host = uri.host().unwrap_or_default();
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host).to_owned()
}

fn connect_request(proxy: &Proxy, host: &str, port: u16) -> String {
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let authority = format!("{host}:{port}");
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

/// What somebody else sent, fit for one line of a log.
fn printable(text: &str) -> String {
    text.trim().chars().take(MAX_TEXT).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Longest answer of a proxy, bytes.
const MAX_ANSWER: usize = 8 * 1024;

/// Characters of it that are shown.
const MAX_TEXT: usize = 200;

/// Why there is no way through a proxy.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// It said no.
    #[error("the proxy refused: {0}")]
    Refused(String),
    /// It did not answer.
    #[error("cannot reach {0}")]
    Unreachable(String, #[source] io::Error),
}

/// The proxy's address is unusable.
#[derive(Debug, thiserror::Error)]
#[error("HTTPS_PROXY must be http://[user:password@]host[:port]")]
pub struct BadProxy;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_proxy_names_hosts_and_domains() {
        let settings =
            ProxySettings { proxy: Some("http://p:3128".into()), exempt: Some("a.example, .b.example".into()) };
        for (host, exempt) in
            [("a.example", true), ("x.a.example", true), ("xa.example", false), ("B.example", true), ("c", false)]
        {
            assert_eq!(settings.proxy_for(host).unwrap().is_none(), exempt, "{host}");
        }
    }

    #[test]
    fn a_proxy_may_have_credentials_and_they_stay_secret() {
        let proxy = Proxy::parse("http://user:hunter2@proxy:3128").unwrap();
        assert_eq!(
            (&*proxy.host, proxy.port, proxy.credentials.as_ref().unwrap().expose()),
            ("proxy", 3128, "user:hunter2")
        );
        assert!(!format!("{proxy:?}").contains("hunter2"));
        assert!(Proxy::parse("socks5://p").is_err());
    }

    #[test]
    fn a_proxy_gets_decoded_credentials() {
        let proxy = Proxy { host: "p".into(), port: 1, credentials: Some(Secret::new("user:p%40ss%".into())) };
        let request = connect_request(&proxy, "::1", 443);
        assert!(request.starts_with("CONNECT [::1]:443 HTTP/1.1\r\n"));
        assert!(request.contains(&BASE64_STANDARD.encode("user:p@ss%")));
    }
}
