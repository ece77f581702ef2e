//! `phonehome-agent install DEST`: the agent puts a copy of itself where a builder can start it from.
//!
//! Made for an init container with an empty image: it needs no shell and no `cp`. The copy is written under another
//! name and renamed, so that DEST is the old file or the new one and never a part, also when the old one is running.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use tracing::debug;

/// Why the agent is not where it was to be installed. Nothing was changed there.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The file could not be written.
    #[error("cannot install {}", dest.display())]
    Dest {
        /// The file.
        dest: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The destination has no name that a file could have.
    #[error("cannot install {}: it is no file name", dest.display())]
    NoName {
        /// The destination.
        dest: PathBuf,
    },
    /// Something else than a file is there.
    #[error("cannot install {}: it is a device, a pipe or a socket", dest.display())]
    Special {
        /// The destination.
        dest: PathBuf,
    },
    /// The agent cannot be read.
    #[error("cannot read the agent's own program")]
    Own(#[from] io::Error),
}

/// Name of the file in a directory.
const NAME: &str = "phonehome-agent";

/// Copies the running program to `dest`, a file or a directory, and makes the directories above it.
///
/// # Errors
///
/// When it cannot be read or written; `dest` then is as it was.
pub fn install(dest: &Path) -> Result<(), InstallError> {
    let dest = file_in(dest);
    let (Some(dir), Some(name)) = (dest.parent(), dest.file_name()) else {
        return Err(InstallError::NoName { dest });
    };
    if is_special(&dest) {
        return Err(InstallError::Special { dest });
    }
    let own = open_own()?;
    let mut temporary = name.to_owned();
    temporary.push(format!(".{:016x}.new", getrandom::u64().map_err(io::Error::from)?));
    let temporary = dir.join(temporary);
    make(dir).and_then(|()| replace(own, &temporary, &dest)).map_err(|source| InstallError::Dest { dest, source })
}

/// The file meant by `dest`, which may be a directory.
fn file_in(dest: &Path) -> PathBuf {
    let is_dir = dest.as_os_str().as_bytes().ends_with(b"/") || dest.is_dir();
    if is_dir { dest.join(NAME) } else { dest.to_owned() }
}

/// Whether there is a device, a pipe or a socket, which nobody means to replace by a program.
fn is_special(dest: &Path) -> bool {
    dest.symlink_metadata().is_ok_and(|found| !(found.is_file() || found.is_symlink() || found.is_dir()))
}

/// The running program, also where no `/proc` is mounted: the kernel says what it was started as (getauxval(3),
/// `AT_EXECFN`).
fn open_own() -> io::Result<File> {
    let started_as = || Path::new(std::ffi::OsStr::from_bytes(rustix::param::linux_execfn().to_bytes()));
    File::open("/proc/self/exe").or_else(|_| File::open(started_as()))
}

/// Makes the directory and those above it.
fn make(dir: &Path) -> io::Result<()> {
    if dir.as_os_str().is_empty() { Ok(()) } else { DirBuilder::new().recursive(true).mode(0o755).create(dir) }
}

fn replace(own: File, temporary: &Path, dest: &Path) -> io::Result<()> {
    let copy = OpenOptions::new().write(true).create_new(true).mode(0o600).open(temporary)?;
    let replaced = fill(own, &copy).and_then(|()| fs::rename(temporary, dest));
    if replaced.is_err() {
        drop(fs::remove_file(temporary)); // the first failure is the one to tell
    }
    replaced.inspect(|()| sync_parent(dest))
}

/// Copies bytes and mode, down to the disk.
fn fill(mut own: File, mut copy: &File) -> io::Result<()> {
    io::copy(&mut own, &mut copy)?;
    let mode = own.metadata()?.permissions().mode() & 0o777;
    copy.set_permissions(fs::Permissions::from_mode(mode))?;
    copy.sync_all()
}

/// Makes the new name last, where the filesystem can; the file is in place already.
fn sync_parent(dest: &Path) {
    let dir = dest.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if let Err(error) = File::open(dir).and_then(|dir| dir.sync_all()) {
        debug!("{} cannot be synced: {error}", dir.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_is_a_file_or_a_directory() {
        assert_eq!(file_in(Path::new("/no/such/file")), Path::new("/no/such/file"));
        assert_eq!(file_in(Path::new("/no/such/dir/")), Path::new("/no/such/dir/phonehome-agent"));
        assert_eq!(file_in(Path::new("/")), Path::new("/phonehome-agent"));
    }

    #[test]
    fn a_destination_without_a_name_is_refused() {
        assert!(matches!(install(Path::new("")), Err(InstallError::NoName { .. })));
        assert!(matches!(install(Path::new("/no/such/..")), Err(InstallError::NoName { .. })));
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(matches!(install(&socket), Err(InstallError::Special { .. })));
    }
}
