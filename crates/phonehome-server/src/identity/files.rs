//! A key in files that somebody else renews: cert-manager, certbot, a mounted secret.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use phonehome_env::Env;
use rustix::fs::OFlags;
use rustls::pki_types::{PrivateKeyDer, pem::PemObject};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep},
};
use tracing::{error, info};
use zeroize::Zeroizing;

use super::{IdentityError, Keys, Pair, certificates};
use crate::builds::expiry;

/// Largest file, bytes. A long chain has some KiB.
const MAX_FILE: u64 = 1024 * 1024;

/// How often the files are looked at. They are few, and the way they are replaced differs from tool to tool.
const PERIOD: Duration = Duration::from_secs(5);

/// How often a person is told of a certificate that is about to end.
const REMINDER: Duration = Duration::from_secs(24 * 60 * 60);

/// Reads both files.
pub(super) fn load(certificates_path: &Path, key_path: &Path) -> Result<Pair, IdentityError> {
    let chain = certificates(certificates_path)?;
    let key = PrivateKeyDer::from_pem_slice(&read(key_path)?);
    let key = key.map_err(|_| IdentityError::NoKey(key_path.to_owned()))?;
    Pair::new(chain, key).map_err(|error| IdentityError::Pair(key_path.to_owned(), error))
}

/// Reads a file, also through links, which a mounted secret consists of. Nothing but a file is waited for.
pub(super) fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, IdentityError> {
    let read = || {
        let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
        let file = File::options().read(true).custom_flags(nonblocking).open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is not a file"));
        }
        let mut contents = Zeroizing::new(Vec::new());
        file.take(MAX_FILE + 1).read_to_end(&mut contents)?;
        if contents.len() as u64 > MAX_FILE {
            return Err(io::Error::other(format!("it is larger than {MAX_FILE} bytes")));
        }
        Ok(contents)
    };
    read().map_err(|error| IdentityError::File(path.to_owned(), error))
}

/// Looks after the files, and swaps the key when there is a new one.
#[derive(Debug)]
pub(crate) struct Renewal {
    certificates: PathBuf,
    key: PathBuf,
    keys: Arc<Keys>,
    /// What the files looked like when they were read last.
    loaded: Marks,
    /// What they looked like at the last look.
    seen: Marks,
}

/// What tells a file from its successor: device, inode, size and time of change.
type Mark = Option<(u64, u64, u64, i64, i64)>;
type Marks = [Mark; 2];

/// What came of a look.
#[derive(Debug)]
enum Look {
    /// The files are new and cannot be used: the key from before stays.
    Bad(IdentityError),
    /// The files are as before, or were just now being replaced.
    Same,
    /// The next handshake is with the new key.
    Swapped,
}

impl Renewal {
    pub(super) fn new(certificates: &Path, key: &Path, keys: Arc<Keys>) -> Self {
        let marks = [certificates, key].map(mark);
        let (certificates, key) = (certificates.to_owned(), key.to_owned());
        Self { certificates, key, keys, loaded: marks, seen: marks }
    }

    /// Ends only from outside. Whoever wants a look at once asks for it, and is answered after it.
    pub(crate) async fn run(mut self, env: Env, mut asks: mpsc::Receiver<oneshot::Sender<()>>) {
        let mut remind_at = Instant::now();
        loop {
            let asked = tokio::select! {
                () = sleep(PERIOD) => None,
                Some(asked) = asks.recv() => Some(asked),
                () = expiry(Some(remind_at)) => {
                    self.keys.current().warn(env.nature.now());
                    remind_at += REMINDER;
                    continue;
                }
            };
            let look;
            (self, look) = env
                .blocking({
                    let is_asked = asked.is_some();
                    move || self.look(is_asked)
                })
                .await;
            match look {
                Look::Bad(why) => {
                    let why = with_causes(&why);
                    error!("the new certificate or key cannot be used, the one from before stays: {why}");
                }
                Look::Same => {}
                Look::Swapped => {
                    info!(pin = self.keys.current().pin, "the certificate was replaced");
                    remind_at = Instant::now();
                }
            }
            if let Some(asked) = asked {
                asked.send(()).unwrap_or_default(); // who does not wait any more does not mind
            }
        }
    }

    /// Reads the files when they have changed and stay as they are from one look to the next: they are replaced one
    /// after the other. Who asks for it does not have to wait for that.
    fn look(mut self, asked: bool) -> (Self, Look) {
        let marks = [self.certificates.as_path(), &self.key].map(mark);
        let is_settled = std::mem::replace(&mut self.seen, marks) == marks;
        if !asked && (marks == self.loaded || !is_settled) {
            return (self, Look::Same);
        }
        self.loaded = marks;
        let look = match load(&self.certificates, &self.key) {
            Ok(pair) => {
                self.keys.replace(pair);
                Look::Swapped
            }
            Err(error) => Look::Bad(error),
        };
        (self, look)
    }
}

fn mark(path: &Path) -> Mark {
    let found = fs::metadata(path).ok()?;
    Some((found.dev(), found.ino(), found.size(), found.mtime(), found.mtime_nsec()))
}

/// An error with its causes.
fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::{super::tests::Authority, *};
    use crate::identity::{Identity, KeySource};

    #[test]
    fn a_renewed_pair_is_used_once_both_files_are_there() {
        let scene = Scene::new();
        let (before, mut renewal) = (scene.pin(), scene.renewal());
        let other = tempfile::tempdir().unwrap();
        scene.authority.issue(other.path(), "server", None);
        scene.take("server.pem", other.path());
        let mut look;
        (renewal, look) = renewal.look(false);
        assert!(matches!(look, Look::Same), "it may be in the middle of it: {look:?}");
        scene.take("server.key", other.path());
        (renewal, look) = renewal.look(false);
        assert!(matches!(look, Look::Same) && scene.pin() == before, "{look:?}");
        (renewal, look) = renewal.look(false);
        assert!(matches!(look, Look::Swapped) && scene.pin() != before, "{look:?}");
        assert!(matches!(renewal.look(false).1, Look::Same));
    }

    #[test]
    fn a_bad_pair_is_told_once_and_the_old_one_stays() {
        let scene = Scene::new();
        let (before, renewal) = (scene.pin(), scene.renewal());
        let other = tempfile::tempdir().unwrap();
        scene.authority.issue(other.path(), "server", None);
        scene.take("server.pem", other.path());
        let (renewal, _) = renewal.look(false);
        let (renewal, look) = renewal.look(false);
        assert!(matches!(look, Look::Bad(IdentityError::Pair(..))), "{look:?}");
        let (renewal, look) = renewal.look(false);
        assert!(matches!(look, Look::Same) && scene.pin() == before, "{look:?}");
        fs::write(scene.dir.path().join("server.pem"), "nothing").unwrap();
        let (renewal, look) = renewal.look(true);
        assert!(matches!(look, Look::Bad(IdentityError::NoCertificate(_))), "{look:?}");
        fs::remove_file(scene.dir.path().join("server.pem")).unwrap();
        let (_, look) = renewal.look(true);
        assert!(matches!(look, Look::Bad(IdentityError::File(..))) && scene.pin() == before, "{look:?}");
    }

    #[test]
    fn links_of_a_mounted_secret_are_followed() {
        let scene = Scene::new();
        let link = |name: &str| {
            let path = scene.dir.path().join(format!("link-{name}"));
            symlink(scene.dir.path().join(name), &path).unwrap();
            path
        };
        assert_eq!(load(&link("server.pem"), &link("server.key")).unwrap().pin, scene.pin());
        assert!(read(scene.dir.path()).is_err());
    }

    struct Scene {
        dir: tempfile::TempDir,
        authority: Authority,
        identity: Identity,
    }

    impl Scene {
        fn new() -> Self {
            let (dir, authority) = (tempfile::tempdir().unwrap(), Authority::new());
            let source: KeySource = authority.issue(dir.path(), "server", None).0;
            let identity = Identity::open(&Env::real(), source, None).unwrap();
            Self { dir, authority, identity }
        }

        fn renewal(&self) -> Renewal {
            self.identity.renewal().unwrap()
        }

        fn pin(&self) -> String {
            self.identity.keys.current().pin.clone()
        }

        /// Puts a new file in place of the old one, as a whole.
        fn take(&self, name: &str, from: &Path) {
            fs::rename(from.join(name), self.dir.path().join(name)).unwrap();
        }
    }
}
