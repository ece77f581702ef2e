//! Where to phone home, and through which proxy.

use http::Uri;

use super::{ConfigError, Secret};

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

    fn proxy_for(&self, host: &str) -> Result<Option<Proxy>, ConfigError> {
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
    fn parse(text: &str) -> Result<Self, ConfigError> {
        let url = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
        let uri: Uri = url.parse().map_err(|_| ConfigError::BadProxy)?;
        let authority = uri.authority().ok_or(ConfigError::BadProxy)?;
        if uri.scheme_str() != Some("http") {
            return Err(ConfigError::BadProxy);
        }
        let credentials = authority.as_str().rsplit_once('@').map(|(user, _)| Secret::new(user.to_owned()));
        Ok(Self { host: bare_host(&uri), port: uri.port_u16().unwrap_or(80), credentials })
    }
}

/// A host as a resolver wants it, without the brackets of an IPv6 literal.
fn bare_host(uri: &Uri) -> String {
    let host = uri.host().unwrap_or_default();
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host).to_owned()
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
            proxy: if tls { proxy.proxy_for(&host)? } else { None },
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
}
