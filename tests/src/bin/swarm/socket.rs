//! Connections to the server under load.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use phonehome_env::{
    network::{self, Transport},
    websocket,
};
use phonehome_proto::codec::Codec;
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::ring,
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::net::TcpSocket;
use tokio_rustls::TlsConnector;
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{
        client::IntoClientRequest,
        http::header::{AUTHORIZATION, SEC_WEBSOCKET_PROTOCOL},
    },
};

use super::Result;

/// Where the server is.
pub(crate) struct Target {
    address: SocketAddr,
    tls: Option<TlsConnector>,
}

/// An agent's way to its server.
pub(crate) type Socket = WebSocketStream<Box<dyn Transport>>;

/// Read buffer of a socket, bytes: acknowledgements are small.
const READ_BUFFER: usize = 1024;

impl Target {
    /// From `http://ADDRESS:PORT` or `https://ADDRESS:PORT`.
    pub(crate) fn parse(url: &str) -> Result<Self> {
        let (scheme, address) = url.split_once("://").ok_or("the server is http://ADDRESS:PORT or https://…")?;
        let tls = match scheme {
            "http" => None,
            "https" => Some(connector()?),
            other => return Err(format!("{other}: only http and https").into()),
        };
        Ok(Self { address: address.parse()?, tls })
    }

    /// Connects from an address of the caller's own, where this machine has that many: to its loopback.
    pub(crate) async fn dial(&self, number: usize) -> Result<Box<dyn Transport>> {
        let socket = if self.address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        if self.address.ip() == IpAddr::V4(Ipv4Addr::LOCALHOST) {
            let [.., high, low] = (number as u32).to_be_bytes();
            socket.bind((Ipv4Addr::new(127, 1, high, low), 0).into())?;
        }
        let tcp = socket.connect(self.address).await?;
        network::prepare(&tcp)?;
        Ok(match &self.tls {
            None => Box::new(tcp),
            Some(connector) => Box::new(connector.connect(ServerName::from(self.address.ip()), tcp).await?),
        })
    }

    pub(crate) async fn connect(&self, number: usize, token: &str) -> Result<Socket> {
        let stream = self.dial(number).await?;
        let mut request = format!("ws://{}/v1/agent", self.address).into_client_request()?;
        let headers = request.headers_mut();
        headers.insert(AUTHORIZATION, format!("Bearer {token}").parse()?);
        headers.insert(SEC_WEBSOCKET_PROTOCOL, Codec::Binary.subprotocol().parse()?);
        let config = Some(websocket::config(READ_BUFFER));
        let (socket, _) = client_async_with_config(request, stream, config).await?;
        Ok(socket)
    }
}

/// Trusts every server: it proves nothing about the server, only what it costs.
fn connector() -> Result<TlsConnector> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_no_client_auth();
    config.resumption = Resumption::disabled(); // every agent is a stranger
    Ok(TlsConnector::from(Arc::new(config)))
}

#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
