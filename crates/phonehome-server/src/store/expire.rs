//! Removing a build, so that it is there as a whole or not at all.
//!
//! Its directory gets a name that no build can have, durably, and is then removed. What a crash leaves of it is removed
//! at the next start. Whoever has a file open goes on reading it.

use std::{ffi::OsStr, io, path::Path};

use phonehome_env::disk::Disk;
use phonehome_proto::id::BuildId;

use super::attempt::is_missing;

/// What a directory is called that is being removed: no build's name starts with a dot.
const EXPIRED: &str = ".expired-";

/// Removes an ended build and everything in it; `false` when there is none. No agent may be able to write to it any more.
///
/// # Errors
///
/// When the disk fails. When the build is no longer there, [`finish_removals`] removes the rest.
pub(crate) fn remove(disk: &dyn Disk, data: &Path, build: &BuildId) -> io::Result<bool> {
    let builds = data.join("builds");
    let expired = builds.join(format!("{EXPIRED}{build}"));
    if disk.exists(&expired)? {
        remove_tree(disk, &expired)?; // of an earlier build of this name
    }
    match disk.rename(&builds.join(build.as_str()), &expired) {
        Ok(()) => {}
        Err(error) if is_missing(&error) => return Ok(false),
        Err(error) => return Err(error),
    }
    disk.sync_dir(&builds)?;
    remove_tree(disk, &expired)?;
    Ok(true)
}

/// Removes what is left of builds whose removal a crash or an error has cut short. Says how many there were.
///
/// # Errors
///
/// When the disk fails.
pub(crate) fn finish_removals(disk: &dyn Disk, data: &Path) -> io::Result<usize> {
    let builds = data.join("builds");
    let names = disk.list(&builds)?;
    let expired: Vec<_> = names.iter().filter(|name| is_expired(name)).collect();
    for name in &expired {
        remove_tree(disk, &builds.join(name))?;
    }
    Ok(expired.len())
}

fn is_expired(name: &OsStr) -> bool {
    name.to_str().is_some_and(|name| name.starts_with(EXPIRED))
}

/// Removes a directory with everything in it; links are removed, not followed.
fn remove_tree(disk: &dyn Disk, dir: &Path) -> io::Result<()> {
    for path in disk.list(dir)?.iter().map(|name| dir.join(name)) {
        match disk.remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::IsADirectory => remove_tree(disk, &path)?,
            Err(error) => return Err(error),
        }
    }
    disk.remove_dir(dir)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, path::PathBuf};

    use super::*;
    use crate::store::{
        archive,
        faulty::{FaultyDisk, tempdir},
    };

    #[test]
    fn a_build_is_there_as_a_whole_or_not_at_all() {
        for count in 0.. {
            let scene = Scene::new();
            let whole = scene.names("gone");
            scene.disk.crash_after(count);
            let removed = remove(&scene.disk, scene.data.path(), &"gone".parse().unwrap());
            scene.disk.heal();
            let there = archive::list(&scene.disk, scene.data.path()).unwrap();
            if there.len() == 2 {
                assert_eq!(scene.names("gone"), whole, "after {count} operations");
            }
            assert_eq!(
                finish_removals(&scene.disk, scene.data.path()).unwrap(),
                usize::from(removed.is_err() && there.len() == 1)
            );
            let left = fs::read_dir(scene.path("")).unwrap().count();
            assert_eq!((left, scene.names("kept")), (there.len(), whole), "after {count} operations");
            if let Ok(removed) = removed {
                assert!(removed && count > 8, "only {count} operations were tried");
                break;
            }
        }
    }

    #[test]
    fn what_is_gone_is_gone_durably_and_a_second_build_of_the_name_goes_too() {
        let scene = Scene::new();
        scene.build(".expired-gone");
        scene.disk.seen();
        assert!(remove(&scene.disk, scene.data.path(), &"gone".parse().unwrap()).unwrap());
        let seen = scene.disk.seen();
        let renamed = seen.iter().position(|seen| seen == "rename .expired-gone").unwrap();
        assert_eq!(seen[renamed + 1], "syncdir builds");
        assert!(!remove(&scene.disk, scene.data.path(), &"gone".parse().unwrap()).unwrap());
    }

    #[test]
    fn who_reads_goes_on_and_links_are_not_followed() {
        let scene = Scene::new();
        let precious = scene.data.path().join("precious");
        fs::create_dir(&precious).unwrap();
        fs::write(precious.join("file"), "kept").unwrap();
        symlink(&precious, scene.path("gone/link")).unwrap();
        let open = scene.disk.open(&scene.path("gone/main/1/log"), phonehome_env::disk::Open::Read).unwrap();
        remove(&scene.disk, scene.data.path(), &"gone".parse().unwrap()).unwrap();
        let mut found = [0; 3];
        open.read_exact_at(&mut found, 0).unwrap();
        assert_eq!((&found, fs::read(precious.join("file")).unwrap()), (b"log", b"kept".to_vec()));
    }

    struct Scene {
        data: tempfile::TempDir,
        disk: FaultyDisk,
    }

    impl Scene {
        fn new() -> Self {
            let scene = Self { data: tempdir(), disk: FaultyDisk::new() };
            scene.build("gone");
            scene.build("kept");
            scene
        }

        fn build(&self, name: &str) {
            let attempt = self.path(name).join("main/1");
            fs::create_dir_all(attempt.join("quarantine/1")).unwrap();
            fs::write(self.path(name).join("verdict.json"), "{}").unwrap();
            for file in ["log", "events", "index", "quarantine/1/log"] {
                fs::write(attempt.join(file), "log").unwrap();
            }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.data.path().join("builds").join(name)
        }

        fn names(&self, build: &str) -> Vec<std::ffi::OsString> {
            self.disk.list(&self.path(build).join("main/1")).unwrap()
        }
    }
}
