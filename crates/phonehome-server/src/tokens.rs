//! Named tokens of people and tools: who may do what with the API.
//!
//! A token is 256 random bits behind a prefix that secret scanners can look for. It is shown once, when it is made;
//! `tokens.json` in the data directory keeps its SHA-256, which is enough to know it again and worth nothing to whoever
//! reads the file. Tokens given by the environment live in memory only. Tokens of builds are not kept here.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Duration,
};

use phonehome_env::{
    Env,
    disk::{Disk, write_private},
};
use phonehome_proto::{frame::UnixMicros, id::Digest};
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;

use crate::{builds::hash_token, secret::Secret, stamp::Stamp};

/// What somebody wants to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Manage tokens, delete builds, apply retention.
    Administer,
    /// Declare, cancel and report on builds.
    Launch,
    /// Look at builds, logs and metrics.
    Read,
}

/// What a token is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Scope {
    /// Everything.
    Admin,
    /// Declaring, cancelling and reporting, and reading.
    Launch,
    /// Reading.
    Read,
}

impl Scope {
    /// Whether a token of this scope may do that.
    pub(crate) fn allows(self, action: Action) -> bool {
        match action {
            Action::Administer => self == Self::Admin,
            Action::Launch => matches!(self, Self::Admin | Self::Launch),
            Action::Read => true,
        }
    }

    /// Its name, as JSON and the text of a token have it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Launch => "launch",
            Self::Read => "read",
        }
    }
}

/// What may be known of a token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TokenInfo {
    /// Names it to [`Tokens::revoke`]; tells nothing about its text.
    pub(crate) id: String,
    /// What people call it.
    pub(crate) name: String,
    /// What it is good for.
    pub(crate) scope: Scope,
    /// When it was made; `None` for one from the environment.
    pub(crate) created: Option<Stamp>,
    /// When it ends; `None` for never.
    pub(crate) expires: Option<Stamp>,
    /// When it was revoked.
    pub(crate) revoked: Option<Stamp>,
}

impl TokenInfo {
    fn is_valid(&self, now: Stamp) -> bool {
        self.revoked.is_none() && self.expires.is_none_or(|expires| now < expires)
    }
}

/// Tokens from the environment, which are never written down.
#[derive(Debug, Default)]
pub(crate) struct GivenTokens {
    pub(crate) admin: Option<Secret>,
    pub(crate) read: Option<Secret>,
}

/// A token that was just made: the only time that its text is there.
#[derive(Debug)]
pub(crate) struct NewToken {
    pub(crate) info: TokenInfo,
    pub(crate) secret: Secret,
}

/// Why tokens cannot be used, or one not be made.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file is there, and it is not what was written.
    #[error("{} is damaged: {why}; restore it, or move it away to begin without any token", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// It is a token that cannot be revoked here.
    #[error("token {0} comes from the environment of the server: change it there and start the server again")]
    Given(String),
    /// There is no source of randomness.
    #[error("cannot draw a token")]
    Random(#[source] io::Error),
    /// The disk fails or is full.
    #[error("cannot use {}", .0.display())]
    Storage(PathBuf, #[source] io::Error),
    /// There is no room for another one.
    #[error("there are {MAX_TOKENS} tokens; revoke those that nobody needs")]
    TooMany,
    /// There is none of this id.
    #[error("there is no token {0}")]
    Unknown(String),
    /// It cannot be told apart from what anybody might try.
    #[error("the {0} token is too weak or not usable: it needs {MIN_GIVEN} or more visible ASCII characters")]
    Unfit(&'static str),
    /// The name cannot be shown.
    #[error("a token's name has 1 to {MAX_NAME} characters, and no control characters")]
    UnfitName,
}

/// Every token but those of builds.
#[derive(Debug)]
pub(crate) struct Tokens {
    env: Env,
    path: PathBuf,
    given: Vec<Stored>,
    stored: RwLock<Arc<Vec<Stored>>>,
    /// Held while the file changes, so that nobody who only checks a token waits for the disk.
    changing: Mutex<()>,
}

/// A token as it is kept.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Stored {
    #[serde(flatten)]
    info: TokenInfo,
    sha256: Digest,
}

/// `tokens.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenFile {
    version: u32,
    tokens: Vec<Stored>,
}

/// Version of the file.
const VERSION: u32 = 1;

/// Tokens in the file: every request is compared with all of them.
const MAX_TOKENS: usize = 1000;

/// Characters of a name.
const MAX_NAME: usize = 128;

/// Characters of a token from the environment: with fewer it could be guessed.
const MIN_GIVEN: usize = 16;

impl Tokens {
    /// Opens the tokens of a data directory, which is there. When nobody could administer, or nobody read, without a new
    /// token, that is made: it is told this one time.
    ///
    /// # Errors
    ///
    /// When a given token is unfit, or the file cannot be read, is damaged, or cannot be written.
    pub(crate) fn open(env: &Env, dir: &Path, given: GivenTokens) -> Result<(Self, Vec<NewToken>), TokenError> {
        let given = [(Scope::Admin, given.admin), (Scope::Read, given.read)];
        let given = given.into_iter().filter_map(|(scope, secret)| Some(Stored::given(scope, &secret?)));
        let path = dir.join("tokens.json");
        let tokens = Self {
            given: given.collect::<Result<_, _>>()?,
            stored: RwLock::new(Arc::new(read(&*env.disk, &path)?)),
            changing: Mutex::new(()),
            env: env.clone(),
            path,
        };
        let mut made = Vec::new();
        for scope in [Scope::Admin, Scope::Read] {
            if !tokens.has(scope) {
                made.push(tokens.create(scope.name(), scope, None)?);
            }
        }
        Ok((tokens, made))
    }

    /// Whether there is a valid token of just this scope.
    fn has(&self, scope: Scope) -> bool {
        let now = self.now();
        self.given.iter().chain(&*self.all()).any(|token| token.info.scope == scope && token.info.is_valid(now))
    }

    /// Makes a token. It is on the disk when this returns, which waits for it.
    ///
    /// # Errors
    ///
    /// When its name is unfit, there are too many, or it cannot be stored.
    pub(crate) fn create(
        &self,
        name: &str,
        scope: Scope,
        expires_in: Option<Duration>,
    ) -> Result<NewToken, TokenError> {
        let is_shown = !name.chars().any(char::is_control) && (1..=MAX_NAME).contains(&name.chars().count());
        if !is_shown {
            return Err(TokenError::UnfitName);
        }
        let now = self.now();
        let expires = expires_in.map(|time| Stamp(now.0.saturating_add(time.as_micros() as UnixMicros)));
        let (id, secret) = draw(&self.env, scope).map_err(TokenError::Random)?;
        let (name, created) = (name.to_owned(), Some(now));
        let info = TokenInfo { id, name, scope, created, expires, revoked: None };
        let stored = Stored { info: info.clone(), sha256: hash_token(secret.expose()) };
        self.change(|tokens| {
            make_room(tokens, now)?;
            tokens.push(stored);
            Ok(())
        })?;
        Ok(NewToken { info, secret })
    }

    /// All of them, those of the environment first, then the oldest first.
    pub(crate) fn list(&self) -> Vec<TokenInfo> {
        self.given.iter().chain(&*self.all()).map(|token| token.info.clone()).collect()
    }

    /// Takes what it is good for from a token, for ever. That is on the disk when this returns, which waits for it.
    ///
    /// # Errors
    ///
    /// When there is no such token, or that cannot be stored.
    pub(crate) fn revoke(&self, id: &str) -> Result<(), TokenError> {
        if self.given.iter().any(|token| token.info.id == id) {
            return Err(TokenError::Given(id.to_owned()));
        }
        let now = self.now();
        self.change(|tokens| {
            let found = tokens.iter_mut().find(|token| token.info.id == id);
            let found = found.ok_or_else(|| TokenError::Unknown(id.to_owned()))?;
            found.info.revoked.get_or_insert(now);
            Ok(())
        })
    }

    /// The token of this text, if it is valid now. All are compared, by their hashes and in constant time.
    pub(crate) fn check(&self, secret: &str, now: UnixMicros) -> Option<TokenInfo> {
        let hash = hash_token(secret);
        let all = self.all();
        let found =
            self.given.iter().chain(&*all).fold(None, |found, token| if token.is(&hash) { Some(token) } else { found });
        found.filter(|token| token.info.is_valid(Stamp(now))).map(|token| token.info.clone())
    }

    fn now(&self) -> Stamp {
        Stamp(self.env.nature.now())
    }

    fn all(&self) -> Arc<Vec<Stored>> {
        self.stored.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes the file first, and what is known after it.
    fn change(&self, change: impl FnOnce(&mut Vec<Stored>) -> Result<(), TokenError>) -> Result<(), TokenError> {
        let _alone = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut tokens = (*self.all()).clone();
        change(&mut tokens)?;
        let file = TokenFile { version: VERSION, tokens };
        let text = serde_json::to_vec_pretty(&file).expect("tokens are plain data");
        write_private(&*self.env.disk, &self.path, &text)
            .map_err(|error| TokenError::Storage(self.path.clone(), error))?;
        *self.stored.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(file.tokens);
        Ok(())
    }
}

impl Stored {
    fn given(scope: Scope, secret: &Secret) -> Result<Self, TokenError> {
        let text = secret.expose();
        if text.len() < MIN_GIVEN || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(TokenError::Unfit(scope.name()));
        }
        let name = format!("{} from the environment", scope.name());
        let id = format!("given-{}", scope.name());
        let info = TokenInfo { id, name, scope, created: None, expires: None, revoked: None };
        Ok(Self { info, sha256: hash_token(text) })
    }

    fn is(&self, hash: &Digest) -> bool {
        self.sha256.0.ct_eq(&hash.0).into()
    }
}

/// Those that are worth nothing any more go when there is no room, the oldest first.
fn make_room(tokens: &mut Vec<Stored>, now: Stamp) -> Result<(), TokenError> {
    if tokens.len() < MAX_TOKENS {
        return Ok(());
    }
    let worthless = tokens.iter().position(|token| !token.info.is_valid(now)).ok_or(TokenError::TooMany)?;
    tokens.remove(worthless);
    Ok(())
}

/// A token's id and its text.
fn draw(env: &Env, scope: Scope) -> io::Result<(String, Secret)> {
    let (mut id, mut secret) = ([0; 8], [0; 32]);
    env.nature.fill(&mut id)?;
    env.nature.fill(&mut secret)?;
    let text = format!("phonehome_{}_{}", scope.name(), Digest(secret));
    Ok((format!("t{:016x}", u64::from_be_bytes(id)), Secret::new(text)))
}

fn read(disk: &dyn Disk, path: &Path) -> Result<Vec<Stored>, TokenError> {
    let damaged = |why: String| TokenError::Damaged { path: path.to_owned(), why };
    let text = match disk.read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(TokenError::Storage(path.to_owned(), error)),
    };
    let file: TokenFile = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
    if file.version != VERSION {
        return Err(damaged(format!("its version is {}, not {VERSION}", file.version)));
    }
    Ok(file.tokens)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn scopes_allow_what_they_say() {
        let allowed =
            |scope: Scope| [Action::Administer, Action::Launch, Action::Read].map(|action| scope.allows(action));
        assert_eq!(allowed(Scope::Admin), [true, true, true]);
        assert_eq!(allowed(Scope::Launch), [false, true, true]);
        assert_eq!(allowed(Scope::Read), [false, false, true]);
    }

    #[test]
    fn what_is_missing_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let made = open(&dir).1;
        let scopes: Vec<_> = made.iter().map(|token| token.info.scope).collect();
        assert_eq!(scopes, [Scope::Admin, Scope::Read]);
        let (tokens, again) = open(&dir);
        assert!(again.is_empty());
        for token in made {
            let text = token.secret.expose();
            assert!(text.starts_with(&format!("phonehome_{}_", token.info.scope.name())) && text.len() > 64, "{text}");
            assert_eq!(tokens.check(text, tokens.now().0), Some(token.info));
        }
    }

    #[test]
    fn the_file_is_private_and_has_no_secret() {
        let dir = tempfile::tempdir().unwrap();
        let made = open(&dir).1;
        let path = dir.path().join("tokens.json");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let text = fs::read_to_string(&path).unwrap();
        for token in &made {
            let secret = token.secret.expose().rsplit('_').next().unwrap();
            assert!(!text.contains(secret) && text.contains(&token.info.id), "{text}");
            assert!(!format!("{token:?}").contains(secret));
        }
    }

    #[test]
    fn given_tokens_are_known_never_stored_and_not_revoked() {
        let dir = tempfile::tempdir().unwrap();
        let secret = |text: &str| Some(Secret::new(text.into()));
        let given = GivenTokens { admin: secret("correct-horse-battery"), read: secret("another-horse-battery") };
        let (tokens, made) = Tokens::open(&Env::real(), dir.path(), given).unwrap();
        assert!(made.is_empty() && !dir.path().join("tokens.json").exists());
        let found = tokens.check("correct-horse-battery", 0).unwrap();
        assert_eq!(found.scope, Scope::Admin);
        assert!(matches!(tokens.revoke(&found.id), Err(TokenError::Given(_))));
    }

    #[test]
    fn a_weak_or_unusable_token_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "short", "with a blank in it somewhere", "größer-als-sechzehn"] {
            let given = GivenTokens { admin: Some(Secret::new(text.into())), read: None };
            let error = Tokens::open(&Env::real(), dir.path(), given).unwrap_err();
            assert!(matches!(error, TokenError::Unfit("admin")), "{error}");
        }
    }

    #[test]
    fn a_token_ends_when_it_expires_or_is_revoked_and_stays_so() {
        let dir = tempfile::tempdir().unwrap();
        let (tokens, _) = open(&dir);
        let ci = tokens.create("ci", Scope::Launch, Some(Duration::from_secs(60))).unwrap();
        let expires = ci.info.expires.unwrap().0;
        assert!(tokens.check(ci.secret.expose(), expires - 1).is_some());
        assert!(tokens.check(ci.secret.expose(), expires).is_none());
        tokens.revoke(&ci.info.id).unwrap();
        let later = open(&dir).0;
        assert!(later.check(ci.secret.expose(), expires - 1).is_none());
        assert!(later.list().iter().any(|info| info.id == ci.info.id && info.revoked.is_some()));
        assert!(matches!(later.revoke("t0"), Err(TokenError::Unknown(_))));
    }

    #[test]
    fn unknown_text_opens_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (tokens, made) = open(&dir);
        let text = made[0].secret.expose();
        for wrong in ["", "phonehome_admin_", text.strip_suffix(char::is_alphanumeric).unwrap(), &format!("{text}0")] {
            assert!(tokens.check(wrong, tokens.now().0).is_none(), "{wrong}");
        }
    }

    #[test]
    fn a_damaged_file_is_an_error_and_stays_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens.json");
        for text in ["", "{", "[]", r#"{"version":2,"tokens":[]}"#, r#"{"version":1,"tokens":[{"id":"t1"}]}"#] {
            fs::write(&path, text).unwrap();
            let error = Tokens::open(&Env::real(), dir.path(), GivenTokens::default()).unwrap_err();
            assert!(error.to_string().contains("is damaged"), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }

    #[test]
    fn what_could_not_be_stored_is_not_known() {
        let dir = tempfile::tempdir().unwrap();
        let (tokens, _) = open(&dir);
        let (before, gone) = (tokens.list(), dir.path().to_owned());
        drop(dir);
        assert!(!gone.exists());
        assert!(matches!(tokens.create("ci", Scope::Read, None), Err(TokenError::Storage(..))));
        assert_eq!(tokens.list(), before);
    }

    #[test]
    fn names_are_for_people() {
        let dir = tempfile::tempdir().unwrap();
        let (tokens, _) = open(&dir);
        for name in ["", "a\nb", &"x".repeat(MAX_NAME + 1)] {
            assert!(matches!(tokens.create(name, Scope::Read, None), Err(TokenError::UnfitName)), "{name:?}");
        }
    }

    #[test]
    fn worthless_tokens_make_room_and_valid_ones_do_not() {
        let now = Stamp(5);
        let token = |id: usize, expires| Stored {
            info: TokenInfo {
                id: id.to_string(),
                name: "x".into(),
                scope: Scope::Read,
                created: None,
                expires,
                revoked: None,
            },
            sha256: Digest([0; 32]),
        };
        let mut tokens: Vec<_> = (0..MAX_TOKENS).map(|id| token(id, (id == 7).then_some(Stamp(5)))).collect();
        make_room(&mut tokens, now).unwrap();
        assert!(tokens.len() == MAX_TOKENS - 1 && tokens.iter().all(|token| token.info.id != "7"));
        tokens.push(token(7, None));
        assert!(matches!(make_room(&mut tokens, now), Err(TokenError::TooMany)));
    }

    fn open(dir: &tempfile::TempDir) -> (Tokens, Vec<NewToken>) {
        Tokens::open(&Env::real(), dir.path(), GivenTokens::default()).unwrap()
    }
}
