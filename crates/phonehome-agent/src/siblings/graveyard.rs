//! The directory that siblings share: tombstones are put there whole or not at all, and read with care.
//!
//! Everything here waits for the file system, which may be a slow one: it belongs on a worker's thread.

use std::{
    fmt::Write as _,
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Mode, OFlags, fchmod},
    io::Errno,
};

use super::tombstone::Tombstone;
use crate::config::SiblingName;

/// The directory of tombstones.
#[derive(Debug, Clone)]
pub(crate) struct Graveyard {
    path: PathBuf,
}

/// What lies under a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    Tombstone(Tombstone),
    /// Something else, and why it is not read.
    Garbage(String),
}

/// Largest file that is read, bytes. A tombstone is a few hundred.
const MAX_SIZE: u64 = 64 * 1024;

/// Names of a directory that are told, so that a message stays one that people read.
const MAX_NAMES: usize = 16;

/// Entries of a directory that are looked at for them.
const MAX_ENTRIES: usize = 1024;

impl Graveyard {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directory if it is not there. As with kubexit, whoever shares it decides by its mask who may write.
    pub(crate) fn make(&self) -> io::Result<()> {
        std::fs::create_dir_all(&self.path)
    }

    /// Puts a tombstone in place of the one that may be there, for everybody to read. `unique` tells this write from all
    /// others.
    pub(crate) fn carve(&self, name: &SiblingName, stone: &Tombstone, unique: u64) -> io::Result<()> {
        self.make()?;
        // No name starts with a dot, and kubexit looks at the names of its dependencies only: nobody takes this for one.
        let draft = self.path.join(format!(".{name}.{unique:016x}.tmp"));
        let carved =
            write_new(&draft, &stone.to_string()).and_then(|()| std::fs::rename(&draft, self.path.join(name.as_str())));
        if carved.is_err() {
            drop(std::fs::remove_file(&draft)); // it may not even exist
        }
        carved
    }

    /// What lies under a name; `None` when nothing does.
    pub(crate) fn find(&self, name: &SiblingName) -> Option<Found> {
        match read(&self.path.join(name.as_str())) {
            Ok(bytes) => Some(match Tombstone::parse(&bytes) {
                Ok(stone) => Found::Tombstone(stone),
                Err(garbage) => Found::Garbage(garbage.to_string()),
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => Some(Found::Garbage(error.to_string())),
        }
    }

    /// Some of the names that are there, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.path).into_iter().flatten().take(MAX_ENTRIES).flatten();
        let mut names: Vec<_> = entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name.parse::<SiblingName>().is_ok())
            .collect();
        names.sort_unstable();
        names.truncate(MAX_NAMES);
        names
    }
}

fn write_new(path: &Path, text: &str) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = std::fs::File::from(rustix::fs::open(path, flags, READABLE)?);
    match fchmod(&file, READABLE) {
        Ok(()) | Err(Errno::PERM | Errno::NOTSUP) => {} // a file system without modes has its own idea of who may read
        Err(errno) => return Err(errno.into()),
    }
    file.write_all(text.as_bytes())?;
    file.sync_data()
}

/// Containers of a pod often run as different users: the mask must not keep one from reading.
const READABLE: Mode = Mode::from_raw_mode(0o644);

/// Reads a small regular file: no link is followed, and nothing that would wait is waited for.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => std::fs::File::from(file),
        Err(Errno::LOOP) => return Err(io::Error::other("it is a symbolic link")),
        Err(errno) => return Err(errno.into()),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(MAX_SIZE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_SIZE {
        return Err(io::Error::other(format!("it is larger than {} KiB", MAX_SIZE / 1024)));
    }
    Ok(bytes)
}

/// Names as people read them: `web, proxy`.
pub(crate) fn list<T: std::fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
    let mut text = String::new();
    for item in items {
        let comma = if text.is_empty() { "" } else { ", " };
        write!(text, "{comma}{item}").expect("a string takes everything");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::{PermissionsExt, symlink},
        sync::atomic::{AtomicBool, Ordering},
    };

    use super::*;

    #[test]
    fn a_tombstone_is_carved_for_everybody_and_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let graveyard = Graveyard::new(dir.path().join("made/for it"));
        let stone = Tombstone { born: Some("2026-11-21T08:58:44Z".into()), ..Tombstone::default() };
        graveyard.carve(&name("web"), &stone, 1).unwrap();
        let before = rustix::process::umask(Mode::from_raw_mode(0o077));
        graveyard.carve(&name("web"), &stone, 2).unwrap();
        rustix::process::umask(before);
        assert_eq!(graveyard.find(&name("web")), Some(Found::Tombstone(stone)));
        assert_eq!(graveyard.find(&name("db")), None);
        let mode = std::fs::metadata(graveyard.path().join("web")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o644);
        assert_eq!(std::fs::read_dir(graveyard.path()).unwrap().count(), 1, "a draft was left");
    }

    #[test]
    fn a_reader_never_meets_a_part_of_one() {
        let dir = tempfile::tempdir().unwrap();
        let graveyard = Graveyard::new(dir.path().to_owned());
        let stones = ["short".to_owned(), "long ".repeat(4000)]
            .map(|reason| Tombstone { reason: Some(reason), ..Tombstone::default() });
        graveyard.carve(&name("web"), &stones[0], 0).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut reads = 0;
                while !done.load(Ordering::Relaxed) {
                    let Some(Found::Tombstone(found)) = graveyard.find(&name("web")) else { panic!("it was away") };
                    assert!(stones.contains(&found), "{} bytes", found.reason.unwrap_or_default().len());
                    reads += 1;
                }
                reads
            });
            for at in 0..500 {
                graveyard.carve(&name("web"), &stones[at % 2], at as u64).unwrap();
            }
            done.store(true, Ordering::Relaxed);
            assert!(reader.join().unwrap() > 0);
        });
    }

    #[test]
    fn a_place_that_cannot_be_written_to_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let graveyard = Graveyard::new(file.path().join("below a file"));
        let error = graveyard.carve(&name("web"), &Tombstone::default(), 0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotADirectory);
    }

    #[test]
    fn what_is_no_regular_small_file_is_garbage_and_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let graveyard = Graveyard::new(dir.path().to_owned());
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("target"), "Born: 2026-11-21T08:58:44Z\n").unwrap();
        symlink(at("target"), at("link")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, at("fifo"), Mode::RUSR | Mode::WUSR).unwrap();
        std::fs::create_dir(at("directory")).unwrap();
        std::fs::write(at("huge"), vec![b'#'; MAX_SIZE as usize + 1]).unwrap();
        std::fs::write(at("noise"), "hello\n").unwrap();
        for (name, expected) in [
            ("link", "symbolic link"),
            ("fifo", "not a regular file"),
            ("directory", "not a regular file"),
            ("huge", "larger than 64 KiB"),
            ("noise", "line 1"),
        ] {
            let Some(Found::Garbage(why)) = graveyard.find(&name.parse().unwrap()) else { panic!("{name} was read") };
            assert!(why.contains(expected), "{why}");
        }
    }

    #[test]
    fn names_are_told_but_not_drafts() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["web", "db", ".web.0.tmp", "not a name"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        assert_eq!(list(Graveyard::new(dir.path().to_owned()).names()), "db, web");
        assert_eq!(list(Graveyard::new(dir.path().join("missing")).names()), "");
    }

    fn name(text: &str) -> SiblingName {
        text.parse().unwrap()
    }
}
