//! The address a builder is told.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};

use anyhow::{Context, ensure};
use http::{Uri, uri::Authority};

use crate::Server;

/// What was asked for, else the bound address, else the address this machine has towards its default route.
pub(super) fn advertised(wish: Option<&str>, server: &Server) -> anyhow::Result<String> {
    let bound = server.local_addr();
    match wish {
        Some(url) if url.contains("://") => whole(url),
        Some(host) => {
            let (host, port) = host_and_port(host)?;
            Ok(server.url(&host, port.unwrap_or(bound.port())))
        }
        None if !bound.ip().is_unspecified() => Ok(server.url(&bound.ip().to_string(), bound.port())),
        None => Ok(server.url(&default_route_address().to_string(), bound.port())),
    }
}

/// A whole address, of a proxy in front of this server say.
fn whole(url: &str) -> anyhow::Result<String> {
    let uri: Uri = url.parse().context("--advertise is not a URL")?;
    ensure!(matches!(uri.scheme_str(), Some("ws" | "wss")), "--advertise must start with wss:// or ws://");
    ensure!(uri.query().is_none() && !url.contains('@'), "--advertise must have neither a query nor credentials");
    Ok(url.to_owned())
}

fn host_and_port(text: &str) -> anyhow::Result<(String, Option<u16>)> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Ok((ip.to_string(), None));
    }
    let authority: Authority = text.parse().context(FORMS)?;
    let rest = text.strip_prefix(authority.host());
    ensure!(rest.is_some_and(|rest| rest.is_empty() || authority.port_u16().is_some()), FORMS);
    Ok((authority.host().trim_matches(['[', ']']).to_owned(), authority.port_u16()))
}

const FORMS: &str = "--advertise must be HOST, HOST:PORT or a wss:// address";

/// The source address of a packet to the outside. Connecting a datagram socket sends nothing (udp(7)).
fn default_route_address() -> IpAddr {
    let source = || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
        socket.connect((ANYWHERE, 9)).ok()?;
        Some(socket.local_addr().ok()?.ip())
    };
    source().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
}

/// An address that belongs to nobody (RFC 5737, TEST-NET-3) and so lies beyond the default route.
const ANYWHERE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_may_have_ports_and_brackets() {
        for (text, host, port) in [
            ("10.0.0.7", "10.0.0.7", None),
            ("10.0.0.7:81", "10.0.0.7", Some(81)),
            ("git.example", "git.example", None),
            ("::1", "::1", None),
            ("[::1]:81", "::1", Some(81)),
        ] {
            assert_eq!(host_and_port(text).unwrap(), (host.to_owned(), port));
        }
        for bad in ["a b", "host:99999", "host:", "user@host", "host:1x"] {
            assert!(host_and_port(bad).is_err(), "{bad}");
        }
        assert!(whole("https://git.example").is_err());
    }
}
