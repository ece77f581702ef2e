//! The server's key: made for one life, made once and kept, or in files that somebody else renews. Agents know it by its
//! pin, which is that of the key and not of the certificate.

mod files;
mod kept;
mod validity;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use phonehome_env::Env;
use phonehome_proto::{frame::UnixMicros, id::Digest};
use rcgen::{CertificateParams, KeyPair};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject},
    server::{ClientHello, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier, danger::ClientCertVerifier},
    sign::CertifiedKey,
};
use sha2::{Digest as _, Sha256};
use tracing::warn;

pub(crate) use self::files::Renewal;

/// Where a server's key comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySource {
    /// Two PEM files, read again when they change.
    Files {
        /// The server's certificate and those between it and its root.
        certificates: PathBuf,
        /// Its private key: PKCS#8, PKCS#1 or SEC1, not encrypted.
        key: PathBuf,
    },
    /// Made when there is none and kept in this directory, so that its pin stays the same.
    Kept {
        /// For nobody else to enter; made when it is not there.
        dir: PathBuf,
        /// What the certificate says the server is called, for clients that look.
        names: Vec<String>,
    },
    /// Made at the start and never written down.
    New,
}

/// Whether callers have to show a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientAuth {
    /// PEM file of those who may have signed it, read at the start.
    pub ca: PathBuf,
    /// Whether who has none is turned away; one that was not signed by them is turned away in any case.
    pub required: bool,
}

/// A key with its certificate, and what agents are told to expect.
pub(crate) struct Identity {
    pub(crate) config: Arc<ServerConfig>,
    /// `sha256:HEX` of the SubjectPublicKeyInfo at the start.
    pub(crate) pin: String,
    pub(crate) keys: Arc<Keys>,
    source: KeySource,
}

/// There is no key to serve with.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// No certificate could be made.
    #[error("cannot make a certificate")]
    Certificate(#[from] rcgen::Error),
    /// A file cannot be read, or a kept key not be written.
    #[error("cannot use {}", .0.display())]
    File(PathBuf, #[source] io::Error),
    /// The file has no certificate that can be read.
    #[error("{} holds no certificate in PEM", .0.display())]
    NoCertificate(PathBuf),
    /// The file has no key that can be read.
    #[error("{} holds no private key in PEM that is not encrypted", .0.display())]
    NoKey(PathBuf),
    /// Both are there, and TLS cannot be spoken with them.
    #[error("the key of {} cannot be used with the certificate", .0.display())]
    Pair(PathBuf, #[source] rustls::Error),
    /// By the TLS library.
    #[error("cannot set up TLS")]
    Tls(#[from] rustls::Error),
    /// The certificates of clients cannot be verified.
    #[error("cannot verify clients with {}", .0.display())]
    Verifier(PathBuf, #[source] rustls::server::VerifierBuilderError),
}

impl Identity {
    /// Makes a new one for this life.
    pub(crate) fn generate() -> Result<Self, IdentityError> {
        Self::open(&Env::real(), KeySource::New, None)
    }

    /// Makes, finds or reads a key, which waits for the disk.
    pub(crate) fn open(env: &Env, source: KeySource, clients: Option<&ClientAuth>) -> Result<Self, IdentityError> {
        let pair = match &source {
            KeySource::Files { certificates, key } => files::load(certificates, key)?,
            KeySource::Kept { dir, names } => kept::open(&*env.disk, dir, names, env.nature.now())?,
            KeySource::New => sign(&KeyPair::generate()?, &[])?,
        };
        let pin = pair.pin.clone();
        let keys = Arc::new(Keys(RwLock::new(Arc::new(pair))));
        let config = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
        let config = match clients {
            Some(clients) => config.with_client_cert_verifier(verifier(clients)?),
            None => config.with_no_client_auth(),
        };
        let config = Arc::new(config.with_cert_resolver(keys.clone()));
        Ok(Self { config, pin, keys, source })
    }

    /// Who has to look after the key while the server runs; `None` when nothing can change.
    pub(crate) fn renewal(&self) -> Option<Renewal> {
        match &self.source {
            KeySource::Files { certificates, key } => Some(Renewal::new(certificates, key, self.keys.clone())),
            KeySource::Kept { .. } | KeySource::New => None,
        }
    }
}

/// The key that is in use, which may be another one at the next handshake.
#[derive(Debug)]
pub(crate) struct Keys(RwLock<Arc<Pair>>);

impl Keys {
    pub(crate) fn current(&self) -> Arc<Pair> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn replace(&self, pair: Pair) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(pair);
    }
}

impl ResolvesServerCert for Keys {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current().certified.clone())
    }
}

/// A key and its certificate.
#[derive(Debug)]
pub(crate) struct Pair {
    certified: Arc<CertifiedKey>,
    /// `sha256:HEX` of the SubjectPublicKeyInfo.
    pub(crate) pin: String,
    /// When the certificate ends.
    pub(crate) not_after: Option<UnixMicros>,
}

impl Pair {
    /// The certificate of a server, those above it, and its key.
    fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<Self, rustls::Error> {
        let certified = CertifiedKey::from_der(chain, key, &provider())?;
        let certificate = certified.end_entity_cert()?;
        let pin = pin(&ParsedCertificate::try_from(certificate)?.subject_public_key_info());
        let not_after = validity::not_after(certificate);
        Ok(Self { pin, not_after, certified: Arc::new(certified) })
    }

    /// Whether it says what `new` says, and not for a short while only.
    fn can_replace(&self, new: &Self, now: UnixMicros) -> bool {
        let extensions = |pair: &Self| {
            let certificate = pair.certified.end_entity_cert().ok()?;
            validity::extensions(certificate).map(<[u8]>::to_vec) // its names, and whatever else is in every new one
        };
        let is_same = extensions(self).is_some_and(|own| Some(own) == extensions(new));
        is_same && self.not_after.is_some_and(|end| end > now) && self.warning(now).is_none()
    }

    /// What a person should know about the certificate's end.
    pub(crate) fn warning(&self, now: UnixMicros) -> Option<String> {
        let left = self.not_after?.saturating_sub(now);
        let days = left / DAY;
        match left {
            0 => Some("the certificate has expired: clients that verify it do not connect any more".into()),
            _ if days < WARN_DAYS => Some(format!("the certificate expires in {days} days: renew it")),
            _ => None,
        }
    }

    /// Says it.
    pub(crate) fn warn(&self, now: UnixMicros) {
        if let Some(warning) = self.warning(now) {
            warn!("{warning}");
        }
    }
}

/// How long before a certificate's end a person is told, days: two weeks are enough to renew it by hand, and automatic
/// renewal is due a month before.
const WARN_DAYS: u64 = 14;

const DAY: UnixMicros = Duration::from_secs(24 * 60 * 60).as_micros() as UnixMicros;

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn pin(public_key_info: &[u8]) -> String {
    format!("sha256:{}", Digest(Sha256::digest(public_key_info).into()))
}

/// A certificate by the key itself.
fn sign(key: &KeyPair, names: &[String]) -> Result<Pair, IdentityError> {
    let names = std::iter::once("phonehome".to_owned()).chain(names.iter().cloned());
    let certificate = CertificateParams::new(names.collect::<Vec<_>>())?.self_signed(key)?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    Ok(Pair::new(vec![certificate.der().clone()], key)?)
}

fn verifier(clients: &ClientAuth) -> Result<Arc<dyn ClientCertVerifier>, IdentityError> {
    let mut roots = RootCertStore::empty();
    for root in certificates(&clients.ca)? {
        roots.add(root)?;
    }
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
    let builder = if clients.required { builder } else { builder.allow_unauthenticated() };
    builder.build().map_err(|error| IdentityError::Verifier(clients.ca.clone(), error))
}

/// All certificates of a PEM file, of which there is at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let text = files::read(path)?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    all.ok().filter(|all| !all.is_empty()).ok_or_else(|| IdentityError::NoCertificate(path.to_owned()))
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, IsCa, Issuer};
    use rustls::{ClientConfig, ClientConnection, ServerConnection, pki_types::ServerName};

    use super::*;

    #[test]
    fn a_kept_key_has_the_same_pin_in_every_life() {
        let dir = tempfile::tempdir().unwrap();
        let source = KeySource::Kept { dir: dir.path().join("tls"), names: vec!["logs.example".into()] };
        let open = || Identity::open(&Env::real(), source.clone(), None).unwrap().pin;
        assert_eq!(open(), open());
        assert_ne!(open(), Identity::generate().unwrap().pin);
    }

    #[test]
    fn the_pin_of_a_file_is_that_of_its_key() {
        let (dir, authority) = (tempfile::tempdir().unwrap(), Authority::new());
        let (files, key) = authority.issue(dir.path(), "server", None);
        let identity = Identity::open(&Env::real(), files, None).unwrap();
        assert_eq!(identity.pin, pin(&rcgen::PublicKeyData::subject_public_key_info(&key)));
    }

    #[test]
    fn clients_without_a_certificate_are_turned_away_only_where_one_is_required() {
        let (dir, ours, theirs) = (tempfile::tempdir().unwrap(), Authority::new(), Authority::new());
        let ca = dir.path().join("ca.pem");
        std::fs::write(&ca, kept::pem("CERTIFICATE", ours.certificate.der())).unwrap();
        let serve = |required| {
            let clients = ClientAuth { ca: ca.clone(), required };
            let identity = Identity::open(&Env::real(), ours.issue(dir.path(), "server", None).0, Some(&clients));
            identity.unwrap().config
        };
        let (required, optional) = (serve(true), serve(false));
        assert!(ours.calls(&required, Some(&ours)).is_ok());
        assert!(ours.calls(&required, None).is_err());
        assert!(ours.calls(&optional, None).is_ok());
        assert!(ours.calls(&optional, Some(&theirs)).is_err());
    }

    #[test]
    fn a_person_is_told_of_the_end_in_time() {
        let (dir, authority) = (tempfile::tempdir().unwrap(), Authority::new());
        let (files, _) = authority.issue(dir.path(), "server", Some((2030, 1, 31)));
        let pair = Identity::open(&Env::real(), files, None).unwrap().keys.current();
        let end = pair.not_after.unwrap();
        assert_eq!(pair.warning(end - 15 * DAY), None);
        assert_eq!(pair.warning(end - 13 * DAY - 1).unwrap(), "the certificate expires in 13 days: renew it");
        assert!(pair.warning(end).unwrap().contains("has expired"));
    }

    /// Signs certificates.
    pub(super) struct Authority {
        certificate: rcgen::Certificate,
        issuer: Issuer<'static, KeyPair>,
    }

    impl Authority {
        pub(super) fn new() -> Self {
            let mut params = CertificateParams::new(Vec::new()).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let key = KeyPair::generate().unwrap();
            let certificate = params.self_signed(&key).unwrap();
            Self { certificate, issuer: Issuer::new(params, key) }
        }

        /// Writes NAME.pem, with the authority's own certificate behind it, and NAME.key.
        pub(super) fn issue(&self, dir: &Path, name: &str, end: Option<(i32, u8, u8)>) -> (KeySource, KeyPair) {
            let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
            if let Some((year, month, day)) = end {
                params.not_after = rcgen::date_time_ymd(year, month, day);
            }
            let key = KeyPair::generate().unwrap();
            let certificate = params.signed_by(&key, &self.issuer).unwrap();
            let (certificates, path) = (dir.join(format!("{name}.pem")), dir.join(format!("{name}.key")));
            let chain = [&certificate, &self.certificate].map(|one| kept::pem("CERTIFICATE", one.der()));
            std::fs::write(&certificates, chain.concat()).unwrap();
            std::fs::write(&path, kept::pem("PRIVATE KEY", &key.serialize_der())).unwrap();
            (KeySource::Files { certificates, key: path }, key)
        }

        /// A handshake of somebody who trusts this authority and has a certificate by `signer`.
        fn calls(&self, server: &Arc<ServerConfig>, signer: Option<&Self>) -> Result<(), rustls::Error> {
            let mut roots = RootCertStore::empty();
            roots.add(self.certificate.der().clone()).unwrap();
            let config = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
            let config = config.with_root_certificates(roots);
            let config = match signer {
                Some(signer) => {
                    let key = KeyPair::generate().unwrap();
                    let params = CertificateParams::new(vec!["agent".to_owned()]).unwrap();
                    let certificate = params.signed_by(&key, &signer.issuer).unwrap();
                    let key = PrivatePkcs8KeyDer::from(key.serialize_der());
                    config.with_client_auth_cert(vec![certificate.der().clone()], key.into())?
                }
                None => config.with_no_client_auth(),
            };
            let name = ServerName::try_from("localhost").unwrap();
            let mut client = ClientConnection::new(Arc::new(config), name)?;
            let mut server = ServerConnection::new(server.clone())?;
            for _ in 0..4 {
                let mut wire = Vec::new();
                client.write_tls(&mut wire).unwrap();
                server.read_tls(&mut &wire[..]).unwrap();
                server.process_new_packets()?;
                wire.clear();
                server.write_tls(&mut wire).unwrap();
                client.read_tls(&mut &wire[..]).unwrap();
                client.process_new_packets()?;
            }
            assert!(!client.is_handshaking() && !server.is_handshaking());
            Ok(())
        }
    }
}
