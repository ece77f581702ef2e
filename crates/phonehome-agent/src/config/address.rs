//! Where to phone home, and through which proxy.

use http::Uri;
use phonehome_env::proxy::{Proxy, ProxySettings, bare_host};

use super::ConfigError;

/// A phone-home address, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Whether to use TLS.
    pub tls: bool,
    /// Name or IP address; an IPv6 one without its brackets.
    pub host: String,
    /// Port, 443 or 80 when the URL names none.
    pub port: u16,
    /// The agent endpoint: `wss://host:port/prefix/v1/agent`.
    pub endpoint: Uri,
    /// The proxy to go through.
    pub proxy: Option<Proxy>,
}

impl Address {
    pub(super) fn parse(url: &str, proxy: &ProxySettings) -> Result<Self, ConfigError> {
        let bad = |why| ConfigError::BadUrl { why };
        let uri: Uri = url.parse().map_err(|_| bad("it is not a URL"))?;
        let tls = match uri.scheme_str() {
            Some("wss") => true,
            Some("ws") => false,
            _ => return Err(bad("it must start with wss:// or ws://")),
        };
        if tls && cfg!(not(feature = "tls")) {
            return Err(bad("this agent was built without TLS, only ws:// works"));
        }
        let authority = uri.authority().ok_or(bad("it has no host"))?;
        if authority.as_str().contains('@') {
            return Err(bad("it must not carry credentials, use --token-file"));
        }
        if uri.query().is_some() {
            return Err(bad("it must not have a query"));
        }
        let port = authority.as_str().rsplit_once(':').map(|(_, port)| port).filter(|port| !port.contains(']'));
        if port.is_some_and(|port| port.parse::<u16>().map_or(true, |port| port == 0)) {
            return Err(bad("its port must be a number from 1 to 65535"));
        }
        let prefix = uri.path().trim_end_matches('/');
        let endpoint = format!("{}://{authority}{prefix}/v1/agent", uri.scheme_str().unwrap_or_default());
        let host = bare_host(&uri);
        if host.is_empty() {
            return Err(bad("it has no host"));
        }
        Ok(Self {
            tls,
            proxy: if tls { proxy.proxy_for(&host).map_err(|_| ConfigError::BadProxy)? } else { None },
            host,
            port: uri.port_u16().unwrap_or(if tls { 443 } else { 80 }),
            endpoint: endpoint.parse().map_err(|_| bad("its path is not valid"))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_becomes_an_endpoint() {
        let address = |url| Address::parse(url, &ProxySettings::default()).unwrap();
        for (url, endpoint, host, port) in [
            ("ws://h", "ws://h/v1/agent", "h", 80),
            ("ws://h:81/", "ws://h:81/v1/agent", "h", 81),
            ("ws://h/a/b/", "ws://h/a/b/v1/agent", "h", 80),
            ("ws://[::1]:9", "ws://[::1]:9/v1/agent", "::1", 9),
        ] {
            let parsed = address(url);
            assert_eq!((parsed.endpoint.to_string().as_str(), &*parsed.host, parsed.port), (endpoint, host, port));
        }
    }

    #[test]
    fn bad_addresses_say_what_is_wrong() {
        let why = |url| Address::parse(url, &ProxySettings::default()).unwrap_err().to_string();
        assert!(why("http://h").contains("must start with wss://"));
        assert!(why("ws://u:p@h").contains("credentials"));
        assert!(!why("ws://u:hunter2@h").contains("hunter2"));
        assert!(why("ws://h?x=1").contains("query"));
        assert!(why("ws://").contains("not a URL"));
        assert!(why("ws://h:70000").contains("port") && why("ws://h:0").contains("port"));
    }
}
