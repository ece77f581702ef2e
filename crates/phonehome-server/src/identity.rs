//! The server's key for one life: made at the start, known to its agents by its pin, and never written down.

use std::sync::Arc;

use phonehome_proto::id::Digest;
use rcgen::{CertificateParams, KeyPair, PublicKeyData};
use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use sha2::{Digest as _, Sha256};

/// A key pair with a certificate of its own, and what agents are told to expect.
pub(crate) struct Identity {
    pub(crate) config: Arc<ServerConfig>,
    /// `sha256:HEX` of the SubjectPublicKeyInfo.
    pub(crate) pin: String,
}

/// No key could be made.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// By the certificate library.
    #[error("cannot make a certificate")]
    Certificate(#[from] rcgen::Error),
    /// By the TLS library.
    #[error("cannot set up TLS")]
    Tls(#[from] rustls::Error),
}

impl Identity {
    /// Makes a new one.
    pub(crate) fn generate() -> Result<Self, IdentityError> {
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(vec!["phonehome".to_owned()])?.self_signed(&key)?;
        let pin = format!("sha256:{}", Digest(Sha256::digest(key.subject_public_key_info()).into()));
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)?;
        Ok(Self { config: Arc::new(config), pin })
    }
}
