//! A disk that forgets: what was not synced may be gone after a crash of the machine, in any combination.
//!
//! A file has contents as its programs see them and contents as they are on the disk, with the operations between the two
//! since the last sync. A directory's entries likewise. A crash of the machine keeps any of the operations and parts of
//! writes; a crash of a program keeps everything. A disk may also be full, fail, or end its program at a chosen operation.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io::{self, IoSlice},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};

use phonehome_env::disk::{Disk, File, Open, Volume};

use crate::chance::Chance;

/// A machine's disk, which outlives its programs.
#[derive(Debug, Clone)]
pub(crate) struct SimDisk(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    chance: Chance,
    inodes: Vec<Inode>,
    /// Names as programs see them.
    names: BTreeMap<PathBuf, Entry>,
    /// Names as they are on the disk.
    durable: BTreeMap<PathBuf, Entry>,
    faults: Faults,
    /// Operations that change something, so far.
    operations: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    Directory,
    File(usize),
}

#[derive(Debug, Default)]
struct Inode {
    contents: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Change>,
    /// A sync has failed: nothing that was pending then reaches the disk any more, whatever later ones report.
    locked: bool,
}

#[derive(Debug, Clone)]
enum Change {
    Write(usize, Vec<u8>),
    Len(usize),
}

/// What is wrong with a disk.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    /// Bytes that still fit; `None` for as many as come.
    pub(crate) room: Option<u64>,
    /// The next so many writing operations fail.
    pub(crate) errors: u64,
    /// The next so many syncs fail.
    pub(crate) sync_errors: u64,
    /// The program ends at this operation from now.
    pub(crate) fuse: Option<u64>,
    /// Set when it has.
    pub(crate) burnt: bool,
}

/// A program's way to its machine's disk. Once the program is dead, nothing it does has an effect.
#[derive(Debug, Clone)]
pub(crate) struct Mount {
    disk: SimDisk,
    dead: Arc<AtomicBool>,
}

impl SimDisk {
    pub(crate) fn new(chance: Chance) -> Self {
        Self(Arc::new(Mutex::new(State {
            chance,
            inodes: Vec::new(),
            names: BTreeMap::new(),
            durable: BTreeMap::new(),
            faults: Faults::default(),
            operations: 0,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub(crate) fn mount(&self) -> Mount {
        Mount { disk: self.clone(), dead: Arc::default() }
    }

    pub(crate) fn faults<T>(&self, change: impl FnOnce(&mut Faults) -> T) -> T {
        change(&mut self.lock().faults)
    }

    /// The machine crashes: what was not synced survives by chance.
    pub(crate) fn lose_power(&self) {
        let mut state = self.lock();
        let State { chance, inodes, names, durable, .. } = &mut *state;
        for inode in inodes.iter_mut() {
            inode.settle(chance);
        }
        // Each directory's new names are there or not, one by one; without a name a file is gone.
        let all: Vec<_> = names.keys().chain(durable.keys()).cloned().collect();
        for path in all {
            if names.get(&path) != durable.get(&path) && chance.is(50) {
                match names.get(&path) {
                    Some(entry) => durable.insert(path, *entry),
                    None => durable.remove(&path),
                };
            }
        }
        let orphans: Vec<_> = durable
            .keys()
            .filter(|path| path.parent().is_some_and(|dir| dir != Path::new("/") && !durable.contains_key(dir)))
            .cloned()
            .collect();
        durable.retain(|path, _| !orphans.contains(path));
        *names = durable.clone();
    }

    /// Flips a bit somewhere in the files whose names end so. Says where.
    pub(crate) fn rot(&self, which: impl Fn(&str) -> bool) -> Option<(PathBuf, usize)> {
        let mut state = self.lock();
        let files: Vec<_> = state
            .names
            .iter()
            .filter_map(|(path, entry)| if let Entry::File(at) = entry { Some((path.clone(), *at)) } else { None })
            .filter(|(path, _)| path.file_name().and_then(|name| name.to_str()).is_some_and(&which))
            .filter(|(_, at)| !state.inodes[*at].contents.is_empty())
            .collect();
        if files.is_empty() {
            return None;
        }
        let (path, at) = files[state.chance.below(files.len() as u64) as usize].clone();
        let position = state.chance.below(state.inodes[at].contents.len() as u64) as usize;
        let bit = 1 << state.chance.below(8);
        let inode = &mut state.inodes[at];
        inode.contents[position] ^= bit;
        if let Some(byte) = inode.durable.get_mut(position) {
            *byte ^= bit;
        }
        Some((path, position))
    }

    /// Everything is gone.
    pub(crate) fn wipe(&self) {
        let mut state = self.lock();
        state.names.clear();
        state.durable.clear();
    }

    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// A file's contents, as the next program will see them.
    pub(crate) fn contents(&self, path: &Path) -> Option<Vec<u8>> {
        let state = self.lock();
        match state.names.get(path)? {
            Entry::File(at) => Some(state.inodes[*at].contents.clone()),
            Entry::Directory => None,
        }
    }
}

impl Inode {
    fn change(&mut self, change: Change) {
        apply(&mut self.contents, &change);
        self.pending.push(change);
    }

    /// Makes what is pending durable, unless a sync fails or has failed: the pages are marked clean then, later syncs
    /// report success and write nothing of them.
    fn sync(&mut self, fails: bool) {
        self.locked |= fails;
        if !self.locked {
            for change in std::mem::take(&mut self.pending) {
                apply(&mut self.durable, &change);
            }
        }
    }

    fn settle(&mut self, chance: &Chance) {
        for change in std::mem::take(&mut self.pending) {
            if self.locked || chance.is(40) {
                continue;
            }
            let change = match change {
                Change::Write(at, bytes) if chance.is(30) => {
                    let part = chance.below(bytes.len() as u64 + 1) as usize;
                    Change::Write(at, bytes[..part].to_vec())
                }
                Change::Write(..) | Change::Len(_) => change,
            };
            apply(&mut self.durable, &change);
        }
        self.locked = false;
        self.contents = self.durable.clone();
    }
}

fn apply(contents: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write(at, bytes) => {
            let end = at + bytes.len();
            if contents.len() < end {
                contents.resize(end, 0);
            }
            contents[*at..end].copy_from_slice(bytes);
        }
        Change::Len(len) => contents.resize(*len, 0),
    }
}

impl State {
    /// What every operation that changes something passes first.
    fn admit(&mut self, dead: &AtomicBool) -> io::Result<()> {
        if dead.load(Ordering::Relaxed) {
            return Err(gone());
        }
        self.operations += 1;
        if let Some(left) = &mut self.faults.fuse {
            *left = left.saturating_sub(1);
            if *left == 0 {
                self.faults.fuse = None;
                self.faults.burnt = true;
                dead.store(true, Ordering::Relaxed);
                return Err(gone());
            }
        }
        if self.faults.errors > 0 {
            self.faults.errors -= 1;
            return Err(io::Error::other("the simulated disk fails"));
        }
        Ok(())
    }

    fn entry(&self, path: &Path) -> io::Result<Entry> {
        self.names.get(path).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

fn gone() -> io::Error {
    io::Error::other("the simulated program is dead")
}

impl Mount {
    /// The program is dead.
    pub(crate) fn kill(&self) {
        self.dead.store(true, Ordering::Relaxed);
    }

    fn changing(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.disk.lock();
        state.admit(&self.dead)?;
        Ok(state)
    }
}

impl Disk for Mount {
    fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn File>> {
        let file = |inode| Ok(Box::new(SimFile { mount: self.clone(), inode }) as Box<dyn File>);
        if let Open::Read = how {
            return match self.disk.lock().entry(path)? {
                Entry::File(inode) => file(inode),
                Entry::Directory => Err(io::ErrorKind::IsADirectory.into()),
            };
        }
        let mut state = self.changing()?;
        match (state.names.get(path), how) {
            (Some(Entry::File(inode)), Open::Write) => return file(*inode),
            (Some(_), _) => return Err(io::ErrorKind::AlreadyExists.into()),
            (None, _) => {}
        }
        if path.parent().is_none_or(|dir| state.entry(dir).is_err()) {
            return Err(io::ErrorKind::NotFound.into());
        }
        if state.faults.room == Some(0) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let inode = state.inodes.len();
        state.inodes.push(Inode::default());
        state.names.insert(path.to_owned(), Entry::File(inode));
        file(inode)
    }

    fn create_dirs(&self, path: &Path) -> io::Result<()> {
        let mut state = self.changing()?;
        for dir in path.ancestors().filter(|dir| *dir != Path::new("/")) {
            state.names.entry(dir.to_owned()).or_insert(Entry::Directory);
            if dir.parent() == Some(Path::new("/")) {
                state.durable.insert(dir.to_owned(), Entry::Directory); // where a volume is mounted
            }
        }
        Ok(())
    }

    fn private_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.changing()?;
        state.names.entry(path.to_owned()).or_insert(Entry::Directory);
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<OsString>> {
        let state = self.disk.lock();
        state.entry(path)?;
        let inside = state.names.keys().filter(|name| name.parent() == Some(path));
        Ok(inside.filter_map(|name| Some(name.file_name()?.to_owned())).collect())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.changing()?;
        let entry = state.entry(from)?;
        state.names.remove(from);
        state.names.insert(to.to_owned(), entry);
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut state = self.changing()?;
        state.entry(path)?;
        state.names.remove(path);
        Ok(())
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.changing()?;
        state.entry(path)?;
        if state.names.keys().any(|name| name.parent() == Some(path)) {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        state.names.remove(path);
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.changing()?;
        let State { names, durable, .. } = &mut *state;
        durable.retain(|name, _| name.parent() != Some(path) || names.contains_key(name));
        let inside = names.iter().filter(|(name, _)| name.parent() == Some(path));
        durable.extend(inside.map(|(name, entry)| (name.clone(), *entry)));
        Ok(())
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        Ok(self.disk.lock().names.contains_key(path))
    }

    fn volume(&self, dir: &Path) -> io::Result<Option<Box<dyn Volume>>> {
        let state = self.disk.lock();
        state.entry(dir)?;
        let worth = if state.chance.is(50) { 0 } else { 16 };
        Ok(Some(Box::new(SimVolume { mount: self.clone(), worth })))
    }
}

#[derive(Debug)]
struct SimVolume {
    mount: Mount,
    worth: usize,
}

impl Volume for SimVolume {
    fn sync(&self) -> io::Result<()> {
        let mut state = self.mount.changing()?;
        let State { inodes, names, durable, faults, .. } = &mut *state;
        let fails = faults.sync_errors > 0;
        faults.sync_errors -= u64::from(fails);
        for inode in inodes.iter_mut().filter(|inode| !inode.pending.is_empty()) {
            inode.sync(fails);
        }
        if fails {
            return Err(io::Error::other("the simulated sync fails"));
        }
        *durable = names.clone();
        Ok(())
    }

    fn worth(&self) -> usize {
        self.worth
    }
}

#[derive(Debug)]
struct SimFile {
    mount: Mount,
    inode: usize,
}

impl File for SimFile {
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        let state = self.mount.disk.lock();
        let contents = &state.inodes[self.inode].contents;
        let rest = contents.get(position as usize..).unwrap_or_default();
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }

    fn write_at(&self, slices: &[IoSlice<'_>], position: u64) -> io::Result<usize> {
        let mut state = self.mount.changing()?;
        let mut bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
        if let Some(room) = &mut state.faults.room {
            bytes.truncate(*room as usize);
            *room -= bytes.len() as u64;
            if bytes.is_empty() && slices.iter().any(|slice| !slice.is_empty()) {
                return Err(io::ErrorKind::StorageFull.into());
            }
        }
        if bytes.len() > 1 && state.chance.is(3) {
            let part = state.chance.within(1, bytes.len() as u64) as usize;
            bytes.truncate(part);
        }
        let count = bytes.len();
        state.inodes[self.inode].change(Change::Write(position as usize, bytes));
        Ok(count)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.mount.changing()?;
        state.inodes[self.inode].change(Change::Len(len as usize));
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.mount.disk.lock().inodes[self.inode].contents.len() as u64)
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.mount.changing()?;
        let fails = state.faults.sync_errors > 0;
        state.faults.sync_errors -= u64::from(fails);
        state.inodes[self.inode].sync(fails);
        if fails { Err(io::Error::other("the simulated sync fails")) } else { Ok(()) }
    }

    fn lock(&self) -> io::Result<bool> {
        Ok(true)
    }
}
