//! A key that is made once and kept: `key.pem`, for this user alone, and beside it the certificate for those who want it.

use std::{io, path::Path};

use base64::{Engine, engine::general_purpose::STANDARD};
use phonehome_env::disk::{Disk, write_private, write_whole};
use rcgen::KeyPair;
use rustls::pki_types::{PrivatePkcs8KeyDer, pem::PemObject};

use super::{IdentityError, Pair, sign};

/// Takes the key in `dir`, or makes it. The certificate is made anew in each life, with the names of that life: pins and
/// whoever trusts an earlier one do not notice.
pub(super) fn open(disk: &dyn Disk, dir: &Path, names: &[String]) -> Result<Pair, IdentityError> {
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
    let pair = sign(&key, names)?;
    let certificate = pem("CERTIFICATE", pair.certified.end_entity_cert()?);
    write_whole(disk, &dir.join("certificate.pem"), certificate.as_bytes(), false).map_err(failed)?;
    Ok(pair)
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
    use rustls::pki_types::CertificateDer;

    use super::*;

    #[test]
    fn the_key_is_for_this_user_and_the_certificate_for_everybody() {
        let dir = tempfile::tempdir().unwrap();
        let tls = dir.path().join("tls");
        let pair = open(&RealDisk, &tls, &["logs.example".into()]).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&tls), mode(&tls.join("key.pem"))), (0o700, 0o600));
        let certificate = CertificateDer::from_pem_file(tls.join("certificate.pem")).unwrap();
        assert_eq!(&certificate, pair.certified.end_entity_cert().unwrap());
    }

    #[test]
    fn a_damaged_key_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let tls = dir.path().join("tls");
        open(&RealDisk, &tls, &[]).unwrap();
        fs::write(tls.join("key.pem"), "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n").unwrap();
        let error = open(&RealDisk, &tls, &[]).unwrap_err();
        assert!(matches!(error, IdentityError::NoKey(_)), "{error}");
        assert!(fs::read_to_string(tls.join("key.pem")).unwrap().contains("AAAA"));
    }
}
