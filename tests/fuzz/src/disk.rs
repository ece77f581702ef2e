//! A disk in memory, without faults, that anybody may look at and change.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io::{self, IoSlice},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use phonehome_env::disk::{Disk, File, Open};

/// Clones are the same disk.
#[derive(Debug, Clone, Default)]
pub struct MemoryDisk(Arc<Mutex<Names>>);

type Names = BTreeMap<PathBuf, Entry>;

/// A file keeps its contents when its name goes to another.
#[derive(Debug, Clone)]
enum Entry {
    Directory,
    File(MemoryFile),
}

#[derive(Debug, Clone, Default)]
struct MemoryFile(Arc<Mutex<Vec<u8>>>);

/// Every file's contents.
pub type Contents = BTreeMap<PathBuf, Vec<u8>>;

impl MemoryDisk {
    fn lock(&self) -> MutexGuard<'_, Names> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every file.
    #[must_use]
    pub fn contents(&self) -> Contents {
        self.below(Path::new("/"))
    }

    /// Every file below a directory.
    #[must_use]
    pub fn below(&self, dir: &Path) -> Contents {
        let files = self.lock();
        let below = files.iter().filter(|(path, _)| path.starts_with(dir));
        let contents = below.filter_map(|(path, entry)| match entry {
            Entry::Directory => None,
            Entry::File(file) => Some((path.clone(), file.lock().clone())),
        });
        contents.collect()
    }

    /// Puts a file there, with the directories above it.
    pub fn put(&self, path: &Path, contents: Vec<u8>) {
        let mut names = self.lock();
        path.ancestors().skip(1).for_each(|dir| drop(names.insert(dir.to_owned(), Entry::Directory)));
        names.insert(path.to_owned(), Entry::File(MemoryFile(Arc::new(Mutex::new(contents)))));
    }

    /// Takes a file away, if it is there.
    pub fn take(&self, path: &Path) {
        self.lock().remove(path);
    }
}

impl MemoryFile {
    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Disk for MemoryDisk {
    fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn File>> {
        let mut names = self.lock();
        match (names.get(path), how) {
            (Some(Entry::File(file)), Open::Read | Open::Write) => return Ok(Box::new(file.clone())),
            (Some(Entry::Directory), Open::Read | Open::Write) => return Err(io::ErrorKind::IsADirectory.into()),
            (Some(_), Open::New) => return Err(io::ErrorKind::AlreadyExists.into()),
            (None, Open::Read) => return Err(io::ErrorKind::NotFound.into()),
            (None, Open::Write | Open::New) => {}
        }
        if !matches!(path.parent().and_then(|dir| names.get(dir)), Some(Entry::Directory)) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let file = MemoryFile::default();
        names.insert(path.to_owned(), Entry::File(file.clone()));
        Ok(Box::new(file))
    }

    fn create_dirs(&self, path: &Path) -> io::Result<()> {
        let mut names = self.lock();
        path.ancestors().for_each(|dir| drop(names.insert(dir.to_owned(), Entry::Directory)));
        Ok(())
    }

    fn private_dir(&self, path: &Path) -> io::Result<()> {
        self.create_dirs(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<OsString>> {
        let names = self.lock();
        if !names.contains_key(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let inside = names.keys().filter(|name| name.parent() == Some(path));
        Ok(inside.filter_map(|name| Some(name.file_name()?.to_owned())).collect())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut names = self.lock();
        let entry = names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        names.insert(to.to_owned(), entry);
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut names = self.lock();
        match names.get(path) {
            Some(Entry::File(_)) => drop(names.remove(path)),
            Some(Entry::Directory) => return Err(io::ErrorKind::IsADirectory.into()),
            None => return Err(io::ErrorKind::NotFound.into()),
        }
        Ok(())
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let mut names = self.lock();
        if names.keys().any(|name| name.parent() == Some(path)) {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        names.remove(path).map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        Ok(self.lock().contains_key(path))
    }
}

impl File for MemoryFile {
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        if i64::try_from(position).is_err() {
            return Err(io::ErrorKind::InvalidInput.into()); // as pread(2) does
        }
        let contents = self.lock();
        let rest = contents.get(position as usize..).unwrap_or_default();
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }

    fn write_at(&self, slices: &[IoSlice<'_>], position: u64) -> io::Result<usize> {
        let mut contents = self.lock();
        let start = position as usize;
        let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
        let end = start + bytes.len();
        assert!(end <= LARGEST, "a file of {end} bytes");
        if contents.len() < end {
            contents.resize(end, 0);
        }
        contents[start..end].copy_from_slice(&bytes);
        Ok(bytes.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        assert!(len <= LARGEST as u64, "a file of {len} bytes");
        self.lock().resize(len as usize, 0);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.lock().len() as u64)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn lock(&self) -> io::Result<bool> {
        Ok(true)
    }
}

/// No input makes a file as large as this, bytes.
const LARGEST: usize = 16 * 1024 * 1024;
