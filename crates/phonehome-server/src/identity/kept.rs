//! A key that is made once and kept: `key.pem`, for this user alone, and beside it the certificate for those who want it.

use std::{io, path::Path};

use base64::{Engine, engine::general_purpose::STANDARD};
use phonehome_env::disk::{Disk, write_private, write_whole};
use phonehome_proto::frame::UnixMicros;
use rcgen::KeyPair;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};

use super::{IdentityError, Pair, sign};

/// Takes the key in `dir`, or makes it; and its certificate, for as long as that says what a new one would: whoever trusts
/// a copy of it goes on doing so. Pins never notice, they are those of the key.
pub(super) fn open(disk: &dyn Disk, dir: &Path, names: &[String], now: UnixMicros) -> Result<Pair, IdentityError> {
    let path = dir.join("key.pem");
    let failed = |error| IdentityError::File(path.clone(), error);
    disk.private_dir(dir).map_err(|error| IdentityError::File(dir.to_owned(), error))?;
    let key = match disk.read(&path) {
        Ok(text) => parse(&text).ok_or_else(|| IdentityError::NoKey(path.clone()))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = KeyPair::generate()?;
            write_private(disk, &path, pem("PRIVATE KEY", &key.serialize_der()).as_bytes()).map_err(failed)?;
            key
        }
        Err(error) => return Err(failed(error)),
    };
    let (pair, path) = (sign(&key, names)?, dir.join("certificate.pem"));
    if let Some(kept) = kept(disk, &path, &key).filter(|kept| kept.can_replace(&pair, now)) {
        return Ok(kept);
    }
    let certificate = pem("CERTIFICATE", pair.certified.end_entity_cert()?);
    write_whole(disk, &path, certificate.as_bytes(), false).map_err(|error| IdentityError::File(path, error))?;
    Ok(pair)
}

/// The key with the certificate of an earlier life, if that is one and of this key.
fn kept(disk: &dyn Disk, path: &Path, key: &KeyPair) -> Option<Pair> {
    let certificate = CertificateDer::from_pem_slice(&disk.read(path).ok()?).ok()?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    Pair::new(vec![certificate], key).ok()
}

fn parse(text: &[u8]) -> Option<KeyPair> {
    let key = PrivatePkcs8KeyDer::from_pem_slice(text).ok()?;
    KeyPair::try_from(key.secret_pkcs8_der()).ok()
}

/// Bytes as PEM (RFC 7468).
pub(super) fn pem(label: &str, bytes: &[u8]) -> String {
    // 48 bytes make one line of 64 characters.
    let lines: Vec<_> = bytes.chunks(48).map(|line| STANDARD.encode(line)).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use phonehome_env::disk::RealDisk;

    use super::*;

    #[test]
    fn the_key_is_for_this_user_and_the_certificate_for_everybody() {
        let dir = tempfile::tempdir().unwrap();
        let tls = dir.path().join("tls");
        let pair = open(&RealDisk, &tls, &["logs.example".into()], 0).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&tls), mode(&tls.join("key.pem"))), (0o700, 0o600));
        let certificate = CertificateDer::from_pem_file(tls.join("certificate.pem")).unwrap();
        assert_eq!(&certificate, pair.certified.end_entity_cert().unwrap());
    }

    #[test]
    fn the_certificate_is_kept_until_its_names_change_or_it_ends() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("certificate.pem");
        let life = |names: &[&str], now| {
            let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
            let pair = open(&RealDisk, dir.path(), &names, now).unwrap();
            let written = CertificateDer::from_pem_file(&file).unwrap();
            assert_eq!(&written, pair.certified.end_entity_cert().unwrap(), "what is served is what lies there");
            (written, pair.not_after.unwrap())
        };
        let (first, end) = life(&["one.example", "10.0.0.1"], 0);
        assert_eq!(life(&["one.example", "10.0.0.1"], 1).0, first);
        let (other, _) = life(&["one.example"], 2);
        assert_ne!(other, first);
        assert_ne!(life(&["one.example"], end - 1).0, other, "it is about to end");
        fs::write(&file, "damaged").unwrap();
        life(&["one.example"], 3);
    }

    #[test]
    fn a_damaged_key_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let tls = dir.path().join("tls");
        open(&RealDisk, &tls, &[], 0).unwrap();
        fs::write(tls.join("key.pem"), "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n").unwrap();
        let error = open(&RealDisk, &tls, &[], 0).unwrap_err();
        assert!(matches!(error, IdentityError::NoKey(_)), "{error}");
        assert!(fs::read_to_string(tls.join("key.pem")).unwrap().contains("AAAA"));
    }
}
