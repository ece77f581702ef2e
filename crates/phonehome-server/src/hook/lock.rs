//! One push at a time: a lock that dies with its holder.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Seek, Write},
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::{Context, bail};
use phonehome_proto::id::BuildId;
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

/// The lock, held until dropped or until the process ends, however that comes about (flock(2)). The file stays: who
/// holds it is what counts, not that it is there.
#[derive(Debug)]
pub(super) struct Lock(#[expect(dead_code, reason = "holding it is its use")] File);

impl Lock {
    /// Takes the lock or says who has it.
    pub(super) fn acquire(path: &Path, build: &BuildId) -> anyhow::Result<Self> {
        let cannot = || format!("cannot use the lock {}", path.display());
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).with_context(cannot)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                bail!("another push is being built: {}; try again when it has ended", holder(&mut file))
            }
            Err(errno) => return Err(errno).with_context(cannot),
        }
        file.set_len(0).with_context(cannot)?;
        write!(file, "build {build}, process {}", std::process::id()).with_context(cannot)?;
        Ok(Self(file))
    }
}

/// Who holds it and for how long.
fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let read = file.rewind().and_then(|()| file.take(MAX_HOLDER).read_to_string(&mut text));
    let age = file.metadata().and_then(|metadata| metadata.modified()).ok();
    let age = age.and_then(|since| SystemTime::now().duration_since(since).ok()).unwrap_or_default();
    let age = humantime::format_duration(Duration::from_secs(age.as_secs()));
    if read.is_err() || text.is_empty() {
        text = "by an unknown process".into();
    }
    format!("{}, for {age}", text.escape_debug())
}

/// Bytes of a lock file that are looked at.
const MAX_HOLDER: u64 = 512;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_push_hears_who_holds_the_lock_and_gets_it_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = Lock::acquire(&path, &"first".parse().unwrap()).unwrap();
        let refused = Lock::acquire(&path, &"second".parse().unwrap()).unwrap_err().to_string();
        assert!(refused.contains("build first, process") && refused.contains("for 0s"), "{refused}");
        drop(first);
        Lock::acquire(&path, &"second".parse().unwrap()).unwrap();
    }
}
