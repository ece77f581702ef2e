//! How to know a server, as it is told.

use std::path::PathBuf;

use phonehome_proto::id::Digest;

/// How to know the server, and be known to it. Ignored without TLS.
#[derive(Debug, Clone, Default)]
pub struct Trust {
    /// Roots in place of the system's.
    pub ca: Option<PathBuf>,
    /// SHA-256 of the server's public key.
    pub pin: Option<[u8; 32]>,
    /// Certificate and key of this client.
    pub client: Option<(PathBuf, PathBuf)>,
}

/// Reads `sha256:HEX`.
#[must_use]
pub fn parse_pin(text: &str) -> Option<[u8; 32]> {
    text.strip_prefix("sha256:")?.parse::<Digest>().ok().map(|digest| digest.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_is_a_digest_that_says_which() {
        let hex = "0a".repeat(32);
        assert_eq!(parse_pin(&format!("sha256:{hex}")), Some([10; 32]));
        for bad in [&*hex, "sha256:", "sha256:0a", &format!("sha512:{hex}")] {
            assert_eq!(parse_pin(bad), None, "{bad}");
        }
    }
}
