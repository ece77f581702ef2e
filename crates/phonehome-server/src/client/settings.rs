//! Which server, and how to be known to it: what was typed, else the environment, else a file.

use std::{
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use phonehome_env::{
    file,
    proxy::ProxySettings,
    secret::Secret,
    trust::{Trust, parse_pin},
};
use serde::Deserialize;

use super::{base::Base, http::Client};

/// What is said about a server in one place.
#[derive(Debug, Clone, Default)]
pub(crate) struct Settings {
    pub(crate) server: Option<String>,
    pub(crate) token: Option<Secret>,
    pub(crate) token_file: Option<PathBuf>,
    pub(crate) ca: Option<PathBuf>,
    pub(crate) pin: Option<String>,
    pub(crate) client_cert: Option<PathBuf>,
    pub(crate) client_key: Option<PathBuf>,
}

/// `client.toml`.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct SettingsFile {
    server: Option<String>,
    token: Option<String>,
    token_file: Option<PathBuf>,
    ca: Option<PathBuf>,
    pin: Option<String>,
    client_cert: Option<PathBuf>,
    client_key: Option<PathBuf>,
}

/// Most bytes of the file, and of one with a token.
const MAX_FILE: usize = 64 * 1024;
const MAX_TOKEN: usize = 8 * 1024;

impl Settings {
    /// Reads a file of settings. One with a token in it must be its owner's alone.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let unusable = || format!("cannot use {}", path.display());
        let text = file::read_text(path, MAX_FILE).with_context(unusable)?;
        // The error of the parser repeats the line, which may hold the token.
        let parsed: SettingsFile =
            basic_toml::from_str(&text).map_err(|_| io::Error::other(FORM)).with_context(unusable)?;
        let mode = std::fs::metadata(path).with_context(unusable)?.mode();
        if parsed.token.is_some() && mode & 0o077 != 0 {
            bail!("{} holds a token and others may read it: chmod 600 it, or name a token-file", path.display());
        }
        let SettingsFile { server, token, token_file, ca, pin, client_cert, client_key } = parsed;
        let beside = |named: Option<PathBuf>| named.map(|named| path.parent().unwrap_or(Path::new("")).join(named));
        Ok(Self {
            server,
            token: token.map(Secret::new),
            token_file: beside(token_file),
            ca: beside(ca),
            pin,
            client_cert: beside(client_cert),
            client_key: beside(client_key),
        })
    }

    /// Adds what a file says. Its secrets and its trust are for its own server, and for no other.
    pub(crate) fn or_file(self, file: Self) -> anyhow::Result<Self> {
        let base = |server: &Option<String>| server.as_deref().map(str::parse::<Base>).transpose();
        let is_other = base(&self.server)?.is_some_and(|server| base(&file.server).ok().flatten() != Some(server));
        if is_other && file.server.is_some() {
            return Ok(self);
        }
        let has_token = self.token.is_some() || self.token_file.is_some();
        let has_trust = self.ca.is_some() || self.pin.is_some();
        let has_identity = self.client_cert.is_some() || self.client_key.is_some();
        Ok(Self {
            server: self.server.or(file.server),
            token: if has_token { self.token } else { file.token },
            token_file: if has_token { self.token_file } else { file.token_file },
            ca: if has_trust { self.ca } else { file.ca },
            pin: if has_trust { self.pin } else { file.pin },
            client_cert: if has_identity { self.client_cert } else { file.client_cert },
            client_key: if has_identity { self.client_key } else { file.client_key },
        })
    }

    /// The client that these make.
    pub(crate) fn client(&self, proxy: &ProxySettings) -> anyhow::Result<Client> {
        let server = self.server.as_deref().context("which server? give --server, or PHONEHOME_SERVER")?;
        let base: Base = server.parse()?;
        let trust = self.trust()?;
        let token = self.token()?;
        let proxy = if base.tls { proxy.proxy_for(&base.host)? } else { None };
        Ok(Client::new(base, token.as_ref(), &trust, proxy)?)
    }

    fn trust(&self) -> anyhow::Result<Trust> {
        let client = match (&self.client_cert, &self.client_key) {
            (Some(cert), Some(key)) => Some((cert.clone(), key.clone())),
            (None, None) => None,
            (Some(_), None) | (None, Some(_)) => bail!("--client-cert and --client-key belong together: give both"),
        };
        let pin =
            self.pin.as_deref().map(|pin| parse_pin(pin).context("--pin must be sha256: and 64 hexadecimal digits"));
        Ok(Trust { ca: self.ca.clone(), pin: pin.transpose()?, client })
    }

    /// The token, which becomes an HTTP header.
    fn token(&self) -> anyhow::Result<Option<Secret>> {
        let token = match (&self.token, &self.token_file) {
            (Some(token), _) => token.clone(),
            (None, Some(path)) => {
                let text = file::read_text(path, MAX_TOKEN);
                Secret::new(text.with_context(|| format!("cannot read {}", path.display()))?.trim().to_owned())
            }
            (None, None) => return Ok(None),
        };
        let is_header = !token.expose().is_empty() && token.expose().bytes().all(|byte| byte.is_ascii_graphic());
        ensure!(is_header, "the token must be one line of visible ASCII characters");
        Ok(Some(token))
    }
}

const FORM: &str = "it must be TOML with server, token, token-file, ca, pin, client-cert and client-key, as texts";

/// Where the file is that nobody named: below `XDG_CONFIG_HOME`, else below `HOME`.
pub(crate) fn usual_file(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let config = variable("XDG_CONFIG_HOME").filter(|path| path.is_absolute());
    let config = config.or_else(|| variable("HOME").map(|home| home.join(".config")))?;
    Some(config.join("phonehome").join("client.toml"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_token_that_others_may_read_is_refused() {
        let (_dir, path) = file("server = \"https://h\"\ntoken = \"hunter22\"\n", 0o640);
        let refused = format!("{:#}", Settings::read(&path).unwrap_err());
        assert!(refused.contains("chmod 600") && !refused.contains("hunter22"), "{refused}");
        let (_dir, path) = file("server = \"https://h\"\ntoken = \"hunter22\"\n", 0o600);
        assert_eq!(Settings::read(&path).unwrap().token.unwrap().expose(), "hunter22");
        let (_dir, path) = file("server = \"https://h\"\ntoken-file = \"token\"\n", 0o644);
        assert_eq!(Settings::read(&path).unwrap().token_file.unwrap(), path.with_file_name("token"));
    }

    #[test]
    fn a_broken_file_is_told_without_what_it_holds() {
        let (_dir, path) = file("token = hunter22\n", 0o600);
        let refused = format!("{:#}", Settings::read(&path).unwrap_err());
        assert!(refused.contains("client.toml") && !refused.contains("hunter22"), "{refused}");
        let (_dir, path) = file("tokn = \"x\"\n", 0o600);
        assert!(Settings::read(&path).is_err());
    }

    #[test]
    fn a_files_secrets_go_to_its_own_server_only() {
        let from_file = || Settings {
            server: Some("https://logs.example".into()),
            token: Some(Secret::new("of-the-file".into())),
            pin: Some("sha256:00".into()),
            ..Settings::default()
        };
        let typed = |server: &str| Settings { server: Some(server.into()), ..Settings::default() };
        let same = typed("wss://logs.example/").or_file(from_file()).unwrap();
        assert!(same.token.is_some() && same.pin.is_some());
        let other = typed("https://other.example").or_file(from_file()).unwrap();
        assert!(other.token.is_none() && other.pin.is_none());
        let none = Settings::default().or_file(from_file()).unwrap();
        assert_eq!(none.server.as_deref(), Some("https://logs.example"));
        let token = Settings { token: Some(Secret::new("typed".into())), ..Settings::default() };
        assert_eq!(token.or_file(from_file()).unwrap().token.unwrap().expose(), "typed");
    }

    #[test]
    fn the_usual_place_is_below_the_configuration_of_the_user() {
        let variable = |name: &str| match name {
            "XDG_CONFIG_HOME" => Some("relative".into()),
            "HOME" => Some("/home/me".into()),
            _ => None,
        };
        assert_eq!(usual_file(variable), Some("/home/me/.config/phonehome/client.toml".into()));
        assert_eq!(usual_file(|_| Some("/c".into())), Some("/c/phonehome/client.toml".into()));
        assert_eq!(usual_file(|_| None), None);
    }

    #[test]
    fn what_is_missing_or_wrong_is_told_with_its_option() {
        let why = |settings: Settings| match settings.client(&ProxySettings::default()) {
            Ok(_) => panic!("it is accepted"),
            Err(error) => format!("{error:#}"),
        };
        let server = || Settings { server: Some("https://h".into()), ..Settings::default() };
        assert!(why(Settings::default()).contains("PHONEHOME_SERVER"));
        assert!(why(Settings { pin: Some("abc".into()), ..server() }).contains("sha256:"));
        assert!(why(Settings { client_key: Some("k".into()), ..server() }).contains("both"));
        assert!(why(Settings { token: Some(Secret::new("a b".into())), ..server() }).contains("visible ASCII"));
        assert!(why(Settings { token_file: Some("/nowhere".into()), ..server() }).contains("/nowhere"));
    }

    fn file(text: &str, mode: u32) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("client.toml");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        (dir, path)
    }
}
