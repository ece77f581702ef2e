//! Whom to believe at the other end: a pinned key, given roots, or the system's.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{
        CertificateDer, PrivateKeyDer, ServerName, UnixTime,
        pem::{self, PemObject},
    },
    server::ParsedCertificate,
};
use sha2::{Digest, Sha256};
use tokio_rustls::{TlsConnector, client::TlsStream};
use zeroize::Zeroizing;

use crate::{network::Transport, trust::Trust};

/// Makes TLS connections; reads its files and roots at the first one.
pub struct Connector {
    trust: Trust,
    ready: Option<TlsConnector>,
}

/// Why there is no encrypted connection.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file without what it is for.
    #[error("{} holds no certificate", .0.display())]
    Empty(PathBuf),
    /// A file that cannot be read, or is not PEM.
    #[error("cannot use {}", .0.display())]
    File(PathBuf, #[source] pem::Error),
    /// The connection broke, or the other side is not believed.
    #[error("the TLS handshake failed")]
    Handshake(#[source] io::Error),
    /// The address has no name that a certificate could have.
    #[error("{0:?} is not a name a certificate can be for")]
    Name(String),
    /// What the files hold does not fit together.
    #[error("the TLS settings cannot be used")]
    Settings(#[source] rustls::Error),
    /// The server is not the pinned one.
    #[error(transparent)]
    WrongKey(WrongKey),
}

impl TlsError {
    /// Whether coming back is pointless: everything but a handshake that the network may have broken.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        match self {
            Self::Handshake(error) => {
                let cause = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
                matches!(cause, Some(rustls::Error::InvalidCertificate(_)))
            }
            Self::Empty(_) | Self::File(..) | Self::Name(_) | Self::Settings(_) | Self::WrongKey(_) => true,
        }
    }
}

impl From<io::Error> for TlsError {
    /// Why a handshake failed. The verifier's own error is taken out of the library's, which would show it as code.
    fn from(error: io::Error) -> Self {
        let cause = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        let wrong_key = match cause {
            Some(rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(other)))) => {
                other.downcast_ref::<WrongKey>().cloned()
            }
            _ => None,
        };
        wrong_key.map_or_else(|| Self::Handshake(error), Self::WrongKey)
    }
}

impl Connector {
    /// Nothing is read before the first [`Self::connect`].
    #[must_use]
    pub fn new(trust: Trust) -> Self {
        Self { trust, ready: None }
    }

    /// Speaks TLS to a host, which must be who [`Trust`] says.
    ///
    /// # Errors
    ///
    /// When it is not, or the files that would tell cannot be used.
    pub async fn connect(
        &mut self,
        host: &str,
        tcp: Box<dyn Transport>,
    ) -> Result<TlsStream<Box<dyn Transport>>, TlsError> {
        let connector = match &self.ready {
            Some(connector) => connector,
            None => self.ready.insert(connector(&self.trust)?),
        };
        handshake(connector, host, tcp).await
    }
}

/// Makes TLS connections, with everything read that is needed to know the server.
///
/// # Errors
///
/// When a file cannot be used.
pub fn connector(trust: &Trust) -> Result<TlsConnector, TlsError> {
    Ok(Arc::new(client_config(trust)?).into())
}

/// Speaks TLS to a host.
///
/// # Errors
///
/// When it is not who it should be, or the connection breaks.
pub async fn handshake(
    connector: &TlsConnector,
    host: &str,
    tcp: Box<dyn Transport>,
) -> Result<TlsStream<Box<dyn Transport>>, TlsError> {
    let name = ServerName::try_from(host.to_owned()).map_err(|_| TlsError::Name(host.to_owned()))?;
    Ok(connector.connect(name, tcp).await?)
}

fn client_config(trust: &Trust) -> Result<ClientConfig, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Settings)?;
    let builder = match trust.pin {
        Some(pin) => builder.dangerous().with_custom_certificate_verifier(Arc::new(Pinned { pin, provider })),
        None => builder.with_root_certificates(roots(trust)?),
    };
    let Some((cert, key)) = &trust.client else { return Ok(builder.with_no_client_auth()) };
    let file = |path: &PathBuf| {
        let path = path.clone();
        move |error| TlsError::File(path, error)
    };
    let content = pem(key).map_err(file(key))?;
    let key = PrivateKeyDer::from_pem_slice(&content).map_err(file(key))?;
    builder.with_client_auth_cert(certificates(cert)?, key).map_err(TlsError::Settings)
}

fn pem(path: &Path) -> Result<Zeroizing<Vec<u8>>, pem::Error> {
    crate::file::read(path, MAX_PEM).map_err(pem::Error::Io)
}

/// Most bytes of a file with keys or certificates: several times what a system's whole bundle has.
const MAX_PEM: usize = 4 * 1024 * 1024;

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let file = |error| TlsError::File(path.to_owned(), error);
    let content = pem(path).map_err(file)?;
    let all: Vec<_> = CertificateDer::pem_slice_iter(&content).collect::<Result<_, _>>().map_err(file)?;
    if all.is_empty() { Err(TlsError::Empty(path.to_owned())) } else { Ok(all) }
}

/// The given file's, else the system's, else, in an image that has none, the ones built in.
fn roots(trust: &Trust) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    match &trust.ca {
        Some(path) => {
            for certificate in certificates(path)? {
                roots.add(certificate).map_err(TlsError::Settings)?;
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
            }
        }
    }
    Ok(roots)
}

/// Believes exactly one public key, whatever the certificate around it says. The handshake's signature is still
/// checked: it proves that the server has the private key.
#[derive(Debug)]
struct Pinned {
    pin: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let key = ParsedCertificate::try_from(end_entity)?.subject_public_key_info();
        if Sha256::digest(&key)[..] == self.pin {
            Ok(ServerCertVerified::assertion())
        } else {
            let other = WrongKey(phonehome_proto::id::Digest(Sha256::digest(&key).into()));
            Err(CertificateError::Other(OtherError(Arc::new(other))).into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// The server has another key than the pinned one.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the server's public key is sha256:{0}, which is not the pinned one")]
pub struct WrongKey(phonehome_proto::id::Digest);
