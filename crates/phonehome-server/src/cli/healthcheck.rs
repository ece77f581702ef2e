//! `phonehome-server healthcheck`: what a container's health check runs, in an image without a shell.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, bail, ensure};
use clap::Parser;
use http::Uri;
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::ring,
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// Exits with 0 when a server answers 200
///
/// Meant for a server on the same machine: its certificate is not verified.
#[derive(Parser)]
pub(super) struct HealthcheckArgs {
    /// http:// or https:// address to ask, for example https://127.0.0.1:8443/healthz
    url: Uri,
}

/// For the whole check.
const PATIENCE: Duration = Duration::from_secs(4);

pub(super) fn run(args: &HealthcheckArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { timeout(PATIENCE, check(&args.url)).await.context("no answer in time")? })
}

async fn check(url: &Uri) -> anyhow::Result<()> {
    let host = url.host().context("the address has no host")?.trim_matches(['[', ']']).to_owned();
    let status = match url.scheme_str() {
        Some("http") => ask(connect(&host, url.port_u16().unwrap_or(80)).await?, url).await?,
        Some("https") => {
            let tcp = connect(&host, url.port_u16().unwrap_or(443)).await?;
            let name = ServerName::try_from(host)?;
            ask(tokio_rustls::TlsConnector::from(client_config()?).connect(name, tcp).await?, url).await?
        }
        _ => bail!("the address must start with http:// or https://"),
    };
    ensure!(status == "200", "the server answered {status}");
    Ok(())
}

async fn connect(host: &str, port: u16) -> anyhow::Result<TcpStream> {
    TcpStream::connect((host, port)).await.with_context(|| format!("cannot reach {host}:{port}"))
}

/// Asks and returns the status code.
async fn ask(mut stream: impl AsyncRead + AsyncWrite + Unpin, url: &Uri) -> anyhow::Result<String> {
    let host = url.authority().map_or("", |authority| authority.as_str());
    let request = format!("GET {} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n", url.path());
    stream.write_all(request.as_bytes()).await?;
    stream.flush().await?;
    let mut status_line = [0; "HTTP/1.1 200".len()];
    stream.read_exact(&mut status_line).await.context("the answer is not HTTP")?;
    let line = String::from_utf8_lossy(&status_line);
    Ok(line.split(' ').nth(1).unwrap_or_default().to_owned())
}

fn client_config() -> anyhow::Result<Arc<ClientConfig>> {
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone))
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// Believes every certificate: nothing is told to the server, and nothing it says but its status is used.
#[derive(Debug)]
struct Anyone;

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
