//! Files, by position and by whole: what a durable log is made of.

use std::{
    ffi::OsString,
    fmt,
    fs::{self, DirBuilder, OpenOptions},
    io::{self, IoSlice},
    os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt},
    path::Path,
};

use rustix::{
    fs::{FlockOperation, OFlags, flock, fstatfs, statvfs, syncfs},
    io::Errno,
    process::geteuid,
    system::{Uname, uname},
};

use crate::fault;

/// A machine's files.
///
/// What is written is with the operating system and outlives this process; what is synced outlives the machine's
/// crash. A file's name is durable once its directory is synced, whatever was synced of its contents.
pub trait Disk: fmt::Debug + Send + Sync {
    /// Opens a file; never through a symbolic link.
    ///
    /// # Errors
    ///
    /// When it cannot be opened, or exists already ([`Open::New`]), or does not ([`Open::Read`]).
    fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn File>>;

    /// Makes a directory and those above it, as far as they are not there.
    ///
    /// # Errors
    ///
    /// When that is not possible.
    fn create_dirs(&self, path: &Path) -> io::Result<()>;

    /// Makes a directory that nobody else may enter, or checks that one which is there is such: a directory and no link,
    /// owned by this user, not writable by others. The directory it is in is no link either.
    ///
    /// # Errors
    ///
    /// When it cannot be made or is not such.
    fn private_dir(&self, path: &Path) -> io::Result<()>;

    /// The names in a directory, sorted.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    fn list(&self, path: &Path) -> io::Result<Vec<OsString>>;

    /// Gives a file another name; one that has it already is replaced, at once and as a whole.
    ///
    /// # Errors
    ///
    /// When that is not possible.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    ///
    /// When that is not possible.
    fn remove_file(&self, path: &Path) -> io::Result<()>;

    /// Removes an empty directory.
    ///
    /// # Errors
    ///
    /// When that is not possible.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;

    /// Makes the names in a directory durable.
    ///
    /// # Errors
    ///
    /// When the disk fails.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// Reads a small file whole.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let file = self.open(path, Open::Read)?;
        let mut contents = vec![0; file.len()? as usize];
        file.read_exact_at(&mut contents, 0)?;
        Ok(contents)
    }

    /// Bytes that may still be written to the file system a directory is on. A disk that does not know says that there
    /// is no end to them.
    ///
    /// # Errors
    ///
    /// When that cannot be found out.
    fn free(&self, _dir: &Path) -> io::Result<u64> {
        Ok(u64::MAX)
    }

    /// Whether there is something of this name.
    ///
    /// # Errors
    ///
    /// When that cannot be found out.
    fn exists(&self, path: &Path) -> io::Result<bool>;

    /// A hold on the file system that a directory is on, to sync all of it at once; `None` where that does not promise
    /// what [`File::sync`] does.
    ///
    /// # Errors
    ///
    /// When the directory cannot be opened.
    fn volume(&self, _dir: &Path) -> io::Result<Option<Box<dyn Volume>>> {
        Ok(None)
    }
}

/// A file system. It hears of every write error there since it was taken hold of, whoever wrote.
pub trait Volume: fmt::Debug + Send + Sync {
    /// Makes everything on it durable: contents, sizes and names. After an error nobody knows of which file, and as with
    /// [`File::sync`] a later call would report success.
    ///
    /// # Errors
    ///
    /// When the disk fails, or has failed since the last call.
    fn sync(&self) -> io::Result<()>;

    /// How many files one had better sync one by one.
    fn worth(&self) -> usize;
}

/// What a file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Open {
    /// To read what is there.
    Read,
    /// To write as well; made when it is not there.
    Write,
    /// To write, made new and for this user alone.
    New,
}

/// An open file. It has no position of its own: any number of threads may use it.
pub trait File: fmt::Debug + Send + Sync {
    /// Reads at a position; 0 bytes at the end.
    ///
    /// # Errors
    ///
    /// When the disk fails.
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize>;

    /// Writes some bytes of the slices, in order, at a position.
    ///
    /// # Errors
    ///
    /// When the disk is full or fails. Nothing, or a part, may have been written.
    fn write_at(&self, slices: &[IoSlice<'_>], position: u64) -> io::Result<usize>;

    /// Cuts or extends the file.
    ///
    /// # Errors
    ///
    /// When the disk fails.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Its size, bytes.
    ///
    /// # Errors
    ///
    /// When the disk fails.
    fn len(&self) -> io::Result<u64>;

    /// Whether it has no bytes.
    ///
    /// # Errors
    ///
    /// When the disk fails.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Makes contents and size durable. After an error nobody knows what is: a later call would report success for
    /// pages that were dropped.
    ///
    /// # Errors
    ///
    /// When the disk fails.
    fn sync(&self) -> io::Result<()>;

    /// Takes the file for this process until it is closed, unless another process has it. Says whether it did (flock(2)).
    ///
    /// # Errors
    ///
    /// When the file system has no locks.
    fn lock(&self) -> io::Result<bool>;
}

impl dyn File + '_ {
    /// Fills a buffer.
    ///
    /// # Errors
    ///
    /// When the file ends before, or the disk fails.
    pub fn read_exact_at(&self, mut buffer: &mut [u8], mut position: u64) -> io::Result<()> {
        while !buffer.is_empty() {
            match self.read_at(buffer, position) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    buffer = &mut buffer[count..];
                    position += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes all of the slices.
    ///
    /// # Errors
    ///
    /// When the disk is full or fails. A part may have been written.
    pub fn write_all_at(&self, mut slices: &mut [IoSlice<'_>], mut position: u64) -> io::Result<()> {
        IoSlice::advance_slices(&mut slices, 0); // empty ones would look like a file that takes nothing
        while !slices.is_empty() {
            match self.write_at(&slices[..slices.len().min(MAX_SLICES)], position) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    IoSlice::advance_slices(&mut slices, count);
                    position += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Slices one system call takes (pwritev(2), `IOV_MAX`).
const MAX_SLICES: usize = 1024;

/// Writes a small file so that a reader sees all of it or what was there before (rename(2)), durably when asked to.
///
/// # Errors
///
/// When the disk is full or fails; what was there before is there still.
pub fn write_whole(disk: &dyn Disk, path: &Path, contents: &[u8], durable: bool) -> io::Result<()> {
    write_beside(disk, path, contents, durable)?;
    name_whole(disk, path)?;
    match path.parent() {
        Some(dir) if durable => disk.sync_dir(dir),
        Some(_) | None => Ok(()),
    }
}

/// The first half of [`write_whole`] for many files at once. When the file system was synced, [`name_whole`] is the
/// second; once it was synced again, the file is as durable as if it had been written alone.
///
/// # Errors
///
/// When the disk is full or fails; what was there before is there still.
pub fn stage_whole(disk: &dyn Disk, path: &Path, contents: &[u8]) -> io::Result<()> {
    write_beside(disk, path, contents, false)
}

/// Puts what was staged in its place.
///
/// # Errors
///
/// When nothing was staged, or the disk fails.
pub fn name_whole(disk: &dyn Disk, path: &Path) -> io::Result<()> {
    disk.rename(&path.with_extension("tmp"), path)
}

fn write_beside(disk: &dyn Disk, path: &Path, contents: &[u8], durable: bool) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let written = (|| {
        let file = disk.open(&temporary, Open::Write)?;
        file.set_len(0)?;
        file.write_all_at(&mut [IoSlice::new(contents)], 0)?;
        if durable { file.sync() } else { Ok(()) }
    })();
    written.inspect_err(|_| drop(disk.remove_file(&temporary))) // it may not even be there; the first error counts
}

/// Writes a small file that only this user may read, durably, so that a reader sees all of it or what was there before.
///
/// # Errors
///
/// When the disk is full or fails; what was there before is there still.
pub fn write_private(disk: &dyn Disk, path: &Path, contents: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    drop(disk.remove_file(&temporary)); // left by a process that was killed, and of its mode, whatever that is
    let written = (|| {
        let file = disk.open(&temporary, Open::New)?;
        file.write_all_at(&mut [IoSlice::new(contents)], 0)?;
        file.sync()
    })();
    if let Err(error) = written.and_then(|()| disk.rename(&temporary, path)) {
        drop(disk.remove_file(&temporary)); // it may not even be there; the error that counts is the first
        return Err(error);
    }
    path.parent().map_or(Ok(()), |dir| disk.sync_dir(dir))
}

/// Whether an error says that there is no room: the file system is full, or a quota is.
#[must_use]
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// The system's files. In debug builds `PHONEHOME_FAULT` makes chosen operations fail, see `fault`.
#[derive(Debug)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn File>> {
        let mut options = OpenOptions::new();
        // Neither a link nor a pipe that waits for its other end: only files are opened.
        options.read(true).custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed());
        match how {
            Open::Read => {}
            Open::Write => {
                fault::point("open", path)?;
                options.write(true).create(true).truncate(false);
            }
            Open::New => {
                fault::point("open", path)?;
                options.write(true).create_new(true).mode(0o600);
            }
        }
        let file = options.open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
        }
        Ok(Box::new(RealFile { file, name: fault::Name::of(path) }))
    }

    fn create_dirs(&self, path: &Path) -> io::Result<()> {
        fault::point("mkdir", path)?;
        fs::create_dir_all(path)
    }

    fn private_dir(&self, path: &Path) -> io::Result<()> {
        fault::point("mkdir", path)?;
        let refuse = |why| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        if let Some(parent) = path.parent()
            && fs::symlink_metadata(parent)?.is_symlink()
        {
            return refuse("the directory it is in is a symbolic link; name the one that is meant");
        }
        match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        let found = fs::symlink_metadata(path)?;
        if found.is_symlink() {
            return refuse("it is a symbolic link; remove it");
        }
        if !found.is_dir() {
            return refuse("it is not a directory; remove it");
        }
        if found.uid() != geteuid().as_raw() {
            return refuse("it belongs to another user; remove it");
        }
        if found.mode() & 0o022 != 0 {
            return refuse("others may write to it; use chmod 700");
        }
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<OsString>> {
        let mut names = fs::read_dir(path)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>()?;
        names.sort_unstable();
        Ok(names)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fault::point("rename", to)?;
        fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fault::point("remove", path)?;
        fs::remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fault::point("remove", path)?;
        fs::remove_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        fault::point("syncdir", path)?;
        fs::File::open(path)?.sync_all()
    }

    fn free(&self, dir: &Path) -> io::Result<u64> {
        let found = statvfs(dir)?;
        Ok(found.f_bavail.saturating_mul(found.f_frsize))
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        path.try_exists()
    }

    fn volume(&self, dir: &Path) -> io::Result<Option<Box<dyn Volume>>> {
        let name = fault::Name::of(dir);
        let dir = fs::File::open(dir)?;
        let is_known = WHOLE.contains(&(fstatfs(&dir)?.f_type as u64)) && reports_write_errors(&uname());
        Ok(is_known.then(|| Box::new(RealVolume { dir, name }) as Box<dyn Volume>))
    }
}

/// On ext4, syncfs(2) is the faster from eight files that have grown on, for 128 by a factor of 20 to 40, for 2,000 by
/// more than 60 (`cargo bench -p phonehome-tests --bench commit`). But it waits for what other programs have written as
/// well, which a few files on a busy machine should not.
const WORTH: usize = 16;

/// File systems whose syncfs(2) waits for everything and tells what could not be written, by the magic numbers of
/// statfs(2): ext4, XFS, Btrfs, F2FS and tmpfs. An overlay does not hear of errors below it, and FUSE does not wait.
const WHOLE: [u64; 5] = [0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010, 0x0102_1994];

/// Whether this system's syncfs(2) tells what could not be written: since Linux 5.8.
fn reports_write_errors(system: &Uname) -> bool {
    let release = system.release().to_string_lossy();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(5), Some(8))
}

/// A file system of the system. Its descriptor stays open: it is what remembers which errors were told.
#[derive(Debug)]
struct RealVolume {
    dir: fs::File,
    name: fault::Name,
}

impl Volume for RealVolume {
    fn sync(&self) -> io::Result<()> {
        self.name.point("syncfs")?;
        Ok(syncfs(&self.dir)?)
    }

    fn worth(&self) -> usize {
        WORTH
    }
}

/// A file of the system.
#[derive(Debug)]
struct RealFile {
    file: fs::File,
    name: fault::Name,
}

impl File for RealFile {
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        self.file.read_at(buffer, position)
    }

    fn write_at(&self, slices: &[IoSlice<'_>], position: u64) -> io::Result<usize> {
        self.name.write_point(|| {
            self.file.write_at(slices.first().map_or(&[][..], |slice| &slice[..slice.len() / 2]), position)
        })?;
        match slices {
            [slice] => self.file.write_at(slice, position),
            _ => Ok(rustix::io::pwritev(&self.file, slices, position)?),
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.name.point("truncate")?;
        self.file.set_len(len)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn sync(&self) -> io::Result<()> {
        self.name.point("sync")?;
        self.file.sync_data()
    }

    fn lock(&self) -> io::Result<bool> {
        match flock(&self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn many_slices_are_written_in_order_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let file = RealDisk.open(&dir.path().join("file"), Open::Write).unwrap();
        let texts: Vec<_> = (0..3000).map(|at| format!("{at},")).collect();
        let mut slices: Vec<_> = texts.iter().map(|text| IoSlice::new(text.as_bytes())).collect();
        slices.insert(0, IoSlice::new(b""));
        file.write_all_at(&mut slices, 5).unwrap();
        let whole = texts.concat();
        let mut found = vec![0; whole.len()];
        file.read_exact_at(&mut found, 5).unwrap();
        assert_eq!(found, whole.as_bytes());
        assert!(file.read_exact_at(&mut [0], whole.len() as u64 + 5).is_err());
    }

    #[test]
    fn a_whole_file_replaces_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("verdict.json");
        for (text, durable) in [("a longer first one", true), ("second", false)] {
            write_whole(&RealDisk, &path, text.as_bytes(), durable).unwrap();
            assert_eq!(RealDisk.read(&path).unwrap(), text.as_bytes());
        }
        assert_eq!(RealDisk.list(dir.path()).unwrap(), ["verdict.json"]);
    }

    #[test]
    fn a_private_file_is_private_whatever_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens.json");
        for leftover in [&path, &dir.path().join("tokens.tmp")] {
            fs::write(leftover, "for all to see").unwrap();
        }
        write_private(&RealDisk, &path, b"secret").unwrap();
        assert_eq!(RealDisk.read(&path).unwrap(), b"secret");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(RealDisk.list(dir.path()).unwrap(), ["tokens.json"]);
    }

    #[test]
    fn no_link_is_followed_and_a_new_file_is_new() {
        let dir = tempfile::tempdir().unwrap();
        let (target, link) = (dir.path().join("target"), dir.path().join("link"));
        fs::write(&target, "precious").unwrap();
        symlink(&target, &link).unwrap();
        for how in [Open::Read, Open::Write, Open::New] {
            assert!(RealDisk.open(&link, how).is_err(), "{how:?}");
        }
        assert!(RealDisk.open(&target, Open::New).is_err());
        RealDisk.open(&dir.path().join("own"), Open::New).unwrap();
        assert_eq!(fs::metadata(dir.path().join("own")).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_whole_file_system_is_synced_where_that_can_be_relied_upon() {
        let dir = tempfile::tempdir().unwrap();
        if let Some(volume) = RealDisk.volume(dir.path()).unwrap() {
            volume.sync().unwrap();
        }
        assert!(RealDisk.volume(Path::new("/proc")).unwrap().is_none(), "nothing is ever written there");
        RealDisk.volume(&dir.path().join("missing")).unwrap_err();
    }

    #[test]
    fn a_private_directory_is_made_or_checked() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("own");
        RealDisk.private_dir(&own).unwrap();
        assert_eq!(fs::metadata(&own).unwrap().mode() & 0o777, 0o700);
        RealDisk.private_dir(&own).unwrap();
        fs::set_permissions(&own, fs::Permissions::from_mode(0o770)).unwrap();
        assert!(RealDisk.private_dir(&own).unwrap_err().to_string().contains("chmod 700"));
        let link = dir.path().join("link");
        symlink(&own, &link).unwrap();
        assert!(RealDisk.private_dir(&link).unwrap_err().to_string().contains("symbolic link"));
        assert!(RealDisk.private_dir(&link.join("in")).unwrap_err().to_string().contains("symbolic link"));
        assert!(!own.join("in").exists());
    }
}
