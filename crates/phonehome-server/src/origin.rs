//! Which page a browser says a request comes from. No browser sends a token on its own; this keeps pages of others out
//! all the same when they got hold of one.

use http::{
    HeaderMap, Uri,
    header::{HOST, ORIGIN},
    uri::Authority,
};

/// Why such a request is turned away.
pub(crate) const REFUSED: &str = "the request comes from a page of another origin";

/// Whether a request comes from a page that this server did not send: one of neither the address that was asked for nor
/// the one that is told to others.
pub(crate) fn is_foreign(headers: &HeaderMap, advertised: Option<&str>) -> bool {
    let mut origins = headers.get_all(ORIGIN).iter();
    let Some(origin) = origins.next() else { return false }; // no browser, or one that asks for no page
    let Some(origin) = origin.to_str().ok().and_then(Place::of_url).filter(|_| origins.next().is_none()) else {
        return true; // `null` is a page that hides where it is from
    };
    let asked = headers.get(HOST).and_then(|host| host.to_str().ok());
    let asked = asked.and_then(|host| Place::of_host(host, origin.port_without));
    !asked.into_iter().chain(advertised.and_then(Place::of_url)).any(|own| own.is_same(&origin))
}

/// A host and a port.
struct Place {
    host: String,
    port: u16,
    /// The port of its scheme.
    port_without: u16,
}

impl Place {
    fn of_url(url: &str) -> Option<Self> {
        let url: Uri = url.parse().ok()?;
        let port_without = match url.scheme_str()? {
            "http" | "ws" => 80,
            "https" | "wss" => 443,
            _ => return None,
        };
        Self::of_host(url.authority()?.as_str(), port_without)
    }

    fn of_host(host: &str, port_without: u16) -> Option<Self> {
        let authority: Authority = host.parse().ok()?;
        let port = authority.port_u16().unwrap_or(port_without);
        Some(Self { host: authority.host().to_ascii_lowercase(), port, port_without })
    }

    fn is_same(&self, other: &Self) -> bool {
        (&self.host, self.port) == (&other.host, other.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_server_itself_is_no_stranger() {
        for (origins, host, advertised, expected) in [
            (&[][..], "logs.example", None, false),
            (&["https://logs.example"], "logs.example", None, false),
            (&["https://logs.example"], "LOGS.example:443", None, false),
            (&["http://logs.example:8080"], "logs.example:8080", None, false),
            (&["http://[::1]:8080"], "[::1]:8080", None, false),
            (&["https://public.example"], "10.0.0.7:8443", Some("wss://public.example"), false),
            (&["https://public.example:444"], "10.0.0.7:8443", Some("wss://public.example"), true),
            (&["http://logs.example"], "logs.example:8080", None, true),
            (&["https://evil.example"], "logs.example", Some("wss://public.example"), true),
            (&["https://logs.example.evil.example"], "logs.example", None, true),
            (&["null"], "logs.example", None, true),
            (&["file://logs.example"], "logs.example", None, true),
            (&[""], "logs.example", None, true),
            (&["https://logs.example", "https://evil.example"], "logs.example", None, true),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(HOST, host.parse().unwrap());
            for origin in origins {
                headers.append(ORIGIN, origin.parse().unwrap());
            }
            assert_eq!(is_foreign(&headers, advertised), expected, "{origins:?} at {host}, {advertised:?}");
        }
    }
}
