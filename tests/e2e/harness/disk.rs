//! A disk whose power can be cut: what was not synced is gone.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// An ext4 file system in a file, unmounted when dropped.
///
/// The file holds what the file system has given to its device; what is still in memory only is not there. So a copy of
/// the file, mounted in its place, is what a machine finds whose power was cut at this moment.
#[derive(Debug)]
pub(crate) struct MortalDisk {
    image: PathBuf,
    mount: PathBuf,
}

impl MortalDisk {
    /// Mounts a new one at `mount`; `None` when this machine does not allow it.
    pub(crate) fn new(dir: &Path, mount: &Path) -> Option<Self> {
        let image = dir.join("disk.0");
        fs::File::create(&image).and_then(|file| file.set_len(SIZE)).ok()?;
        fs::create_dir(mount).ok()?;
        let disk = Self { image, mount: mount.to_owned() };
        (run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&disk.image)) && disk.attach()).then_some(disk)
    }

    fn attach(&self) -> bool {
        // Nothing is written back by itself for a minute: only what is synced reaches the device.
        run(Command::new("mount").args(["-o", "loop,commit=60"]).arg(&self.image).arg(&self.mount))
    }

    fn detach(&self) -> bool {
        run(Command::new("umount").arg(&self.mount))
    }

    /// Cuts the power and mounts what is left. Nobody may have files open there.
    pub(crate) fn crash(&mut self) {
        let survived = self.image.with_extension("survived");
        assert!(run(Command::new("cp").arg("--sparse=always").arg(&self.image).arg(&survived)));
        assert!(self.detach(), "somebody still uses the disk");
        fs::rename(&survived, &self.image).unwrap();
        assert!(self.attach(), "what is left cannot be mounted");
    }
}

/// With a journal, and quickly copied: most of it is holes.
const SIZE: u64 = 64 * 1024 * 1024;

fn run(command: &mut Command) -> bool {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

impl Drop for MortalDisk {
    fn drop(&mut self) {
        if !self.detach() {
            run(Command::new("umount").arg("-l").arg(&self.mount)); // it was not mounted, or a process has yet to end
        }
    }
}
