//! The address of a standing server.

use std::{fmt, str::FromStr};

use http::Uri;
use phonehome_env::proxy::bare_host;

/// A server's address, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Base {
    pub(crate) tls: bool,
    /// Name or IP address; an IPv6 one without its brackets.
    pub(crate) host: String,
    pub(crate) port: u16,
    /// Host and port as they were given.
    pub(crate) authority: String,
    /// What a proxy in front wants to see before every path, without a slash at its end.
    prefix: String,
}

/// Why a text is no server's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the server's address cannot be used: {0}")]
pub(crate) struct BadBase(&'static str);

impl FromStr for Base {
    type Err = BadBase;

    fn from_str(text: &str) -> Result<Self, BadBase> {
        let uri: Uri = text.trim().parse().map_err(|_| BadBase("it is not a URL"))?;
        let tls = match uri.scheme_str() {
            Some("https" | "wss") => true,
            Some("http" | "ws") => false,
            _ => return Err(BadBase("it must start with https:// or http://")),
        };
        let authority = uri.authority().ok_or(BadBase("it has no host"))?;
        if authority.as_str().contains('@') {
            return Err(BadBase("it must not carry credentials, use PHONEHOME_TOKEN or --token-file"));
        }
        if uri.query().is_some() {
            return Err(BadBase("it must not have a query"));
        }
        let port = authority.as_str().rsplit_once(':').map(|(_, port)| port).filter(|port| !port.contains(']'));
        if port.is_some_and(|port| port.parse::<u16>().map_or(true, |port| port == 0)) {
            return Err(BadBase("its port must be a number from 1 to 65535"));
        }
        let host = bare_host(&uri);
        if host.is_empty() {
            return Err(BadBase("it has no host"));
        }
        Ok(Self {
            tls,
            host,
            port: uri.port_u16().unwrap_or(if tls { 443 } else { 80 }),
            authority: authority.to_string(),
            prefix: uri.path().trim_end_matches('/').to_owned(),
        })
    }
}

impl Base {
    /// The path of something below the API: `builds/7/log?tail=3`.
    pub(crate) fn api(&self, rest: &str) -> String {
        format!("{}/api/v1/{rest}", self.prefix)
    }
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority, self.prefix)
    }
}

/// A query's value: what is not unreserved is escaped (RFC 3986, sections 2.1 and 2.3).
pub(crate) fn escaped(value: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    let escape = |byte: u8| if is_plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    value.bytes().map(escape).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_an_address_leads_to_the_api() {
        for (text, shown, host, port, path) in [
            ("https://h", "https://h", "h", 443, "/api/v1/builds"),
            ("wss://h:8443/", "https://h:8443", "h", 8443, "/api/v1/builds"),
            ("http://h/a/b/", "http://h/a/b", "h", 80, "/a/b/api/v1/builds"),
            ("ws://[::1]:9", "http://[::1]:9", "::1", 9, "/api/v1/builds"),
        ] {
            let base: Base = text.parse().unwrap();
            assert_eq!((&*base.to_string(), &*base.host, base.port), (shown, host, port));
            assert_eq!(base.api("builds"), path);
        }
    }

    #[test]
    fn what_is_no_address_is_told_and_no_secret_with_it() {
        let why = |text: &str| text.parse::<Base>().unwrap_err().to_string();
        assert!(why("h:80").contains("https://"));
        assert!(why("ftp://h").contains("https://"));
        assert!(why("https://u:hunter2@h").contains("--token-file") && !why("https://u:hunter2@h").contains("hunter2"));
        assert!(why("https://h?a=b").contains("query"));
        assert!(why("https://h:0").contains("port"));
    }

    #[test]
    fn values_are_escaped() {
        assert_eq!(escaped("a b&c=ü/~"), "a%20b%26c%3D%C3%BC%2F~");
    }
}
