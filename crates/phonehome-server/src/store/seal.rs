//! Compressing the files of an attempt that nobody writes to any more.
//!
//! Each file by itself: it is compressed to `NAME.zst.tmp`, synced, read back and compared, and gets its name `NAME.zst`;
//! when that name is durable, the plain file is removed. So at any instant one of the two is whole. While both are there
//! the plain one counts, and sealing begins again. Whoever has the plain file open goes on reading it.

use std::{
    io::{self, IoSlice},
    path::{Path, PathBuf},
};

use phonehome_env::disk::{Disk, File, Open};
use zeekstd::SeekTable;
use zstd_safe::{CCtx, CParameter};

use super::{
    log::NAMES,
    quarantine,
    sealed::{FRAME, SealedFile},
};

/// What sealing has brought, bytes on the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Sealed {
    /// Of the plain files.
    pub(crate) before: u64,
    /// Of those in their place.
    pub(crate) after: u64,
}

/// The level that is zstd's own default. Logs are compressed once, on a machine that has other work.
const LEVEL: i32 = 3;

/// Seals an attempt that nobody will write to. `progress` hears how many bytes of how many are done. What is sealed
/// already stays so.
///
/// # Errors
///
/// When the disk fails or is full, or what was compressed does not read back: the plain file is there still.
pub(crate) fn seal(disk: &dyn Disk, dir: &Path, progress: &mut dyn FnMut(u64, u64)) -> io::Result<Sealed> {
    quarantine::complete(disk, dir)?;
    let (mut sum, total) = (Sealed::default(), plain_bytes(disk, dir)?);
    let mut done = 0;
    for name in NAMES {
        let plain = dir.join(name);
        if disk.exists(&plain)? {
            seal_file(disk, &plain, &mut |bytes| {
                done += bytes;
                progress(done, total);
            })?;
        }
        let file = disk.open(&sealed_path(&plain), Open::Read)?;
        sum.after += file.len()?;
        sum.before += SealedFile::open(file)?.len()?;
    }
    Ok(sum)
}

/// Whether nothing of an attempt is left to seal.
pub(crate) fn is_sealed(disk: &dyn Disk, dir: &Path) -> io::Result<bool> {
    for path in NAMES.map(|name| dir.join(name)) {
        if disk.exists(&path)? || !disk.exists(&sealed_path(&path))? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Where a file is when it is sealed.
pub(super) fn sealed_path(plain: &Path) -> PathBuf {
    suffixed(plain, ".zst")
}

fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn plain_bytes(disk: &dyn Disk, dir: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for path in NAMES.map(|name| dir.join(name)) {
        if disk.exists(&path)? {
            bytes += disk.open(&path, Open::Read)?.len()?;
        }
    }
    Ok(bytes)
}

fn seal_file(disk: &dyn Disk, plain: &Path, progress: &mut dyn FnMut(u64)) -> io::Result<()> {
    let (sealed, temporary) = (sealed_path(plain), suffixed(plain, ".zst.tmp"));
    if disk.exists(&temporary)? {
        disk.remove_file(&temporary)?; // its sync may have failed: then it is no file to write to again
    }
    let source = disk.open(plain, Open::Read)?;
    let written = compress(disk, &*source, &temporary, progress).and_then(|written| {
        let read_back = digest(&SealedFile::open(disk.open(&temporary, Open::Read)?)?)?;
        if read_back == written && source.len()? == written.bytes { Ok(()) } else { Err(mismatch(plain)) }
    });
    if let Err(error) = written {
        drop(disk.remove_file(&temporary)); // it may not even be there; the error that counts is the first
        return Err(error);
    }
    disk.rename(&temporary, &sealed)?;
    if let Some(dir) = plain.parent() {
        disk.sync_dir(dir)?;
    }
    disk.remove_file(plain)
}

fn mismatch(plain: &Path) -> io::Error {
    let told = format!("{} does not read back as it was written, or somebody writes to it: it stays", plain.display());
    io::Error::new(io::ErrorKind::InvalidData, told)
}

/// What a file holds.
#[derive(Debug, PartialEq, Eq)]
struct Contents {
    bytes: u64,
    digest: blake3::Hash,
}

/// Writes the sealed form of a file, and makes it durable.
fn compress(disk: &dyn Disk, source: &dyn File, to: &Path, progress: &mut dyn FnMut(u64)) -> io::Result<Contents> {
    let target = disk.open(to, Open::Write)?;
    target.set_len(0)?;
    let mut context = context()?;
    let (mut table, mut position) = (SeekTable::new(), 0);
    let mut packed = Vec::with_capacity(zstd_safe::compress_bound(FRAME));
    let contents = each_block(source, |block| {
        packed.clear();
        context.compress2(&mut packed, block).map_err(failed)?;
        target.write_all_at(&mut [IoSlice::new(&packed)], position)?;
        table.log_frame(packed.len() as u32, block.len() as u32).map_err(io::Error::other)?;
        position += packed.len() as u64;
        progress(block.len() as u64);
        Ok(())
    })?;
    let mut table = table.into_serializer();
    let mut wire = vec![0; table.encoded_len()];
    let count = table.write_into(&mut wire);
    target.write_all_at(&mut [IoSlice::new(&wire[..count])], position)?;
    target.sync()?;
    Ok(contents)
}

/// One that writes each frame's checksum.
fn context() -> io::Result<CCtx<'static>> {
    let mut context = CCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?;
    context.set_parameter(CParameter::CompressionLevel(LEVEL)).map_err(failed)?;
    context.set_parameter(CParameter::ChecksumFlag(true)).map_err(failed)?;
    Ok(context)
}

fn failed(code: zstd_safe::ErrorCode) -> io::Error {
    io::Error::other(format!("cannot compress: {}", zstd_safe::get_error_name(code)))
}

fn digest(file: &dyn File) -> io::Result<Contents> {
    each_block(file, |_| Ok(()))
}

/// Reads a file from its beginning to its end, a frame's worth at a time. Where it ends is asked once: one that grows is
/// not followed.
fn each_block(file: &dyn File, mut work: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<Contents> {
    let (mut hasher, mut block, len) = (blake3::Hasher::new(), vec![0; FRAME], file.len()?);
    for position in (0..len).step_by(FRAME) {
        let count = usize::try_from(len - position).map_or(FRAME, |rest| rest.min(FRAME));
        file.read_exact_at(&mut block[..count], position)?;
        hasher.update(&block[..count]);
        work(&block[..count])?;
    }
    Ok(Contents { bytes: len, digest: hasher.finalize() })
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        fs,
        process::{Command, Stdio},
        sync::Arc,
    };

    use phonehome_env::disk::RealDisk;
    use phonehome_proto::frame::{FinishedAck, Stream};
    use proptest::prelude::*;

    use super::*;
    use crate::store::{
        AttemptReader, Durability, Found, archive,
        attempt::AttemptFiles,
        faulty::{Agent, FaultyDisk, tempdir},
        log::{AttemptLog, Batch},
        recover,
    };

    #[test]
    fn a_sealed_attempt_is_read_as_before() {
        let scene = Scene::filled(9);
        let (files, plain) = (scene.files(), NAMES.map(|name| fs::read(scene.path(name)).unwrap()));
        let mut early = AttemptReader::open(files.clone()).unwrap();
        let (first, mut told) = (early.next().unwrap(), Vec::new());
        let sealed = seal(&scene.disk, &scene.dir(), &mut |done, total| told.push((done, total))).unwrap();
        let bytes = plain.iter().map(|bytes| bytes.len() as u64).sum();
        assert_eq!((sealed.before, told.last()), (bytes, Some(&(bytes, bytes))));
        assert!(is_sealed(&scene.disk, &scene.dir()).unwrap() && sealed.after < sealed.before);
        assert_eq!(scene.names(), ["attempt.json", "events.zst", "finished.json", "index.zst", "log.zst"]);
        assert_eq!(scene.read(), (first.into_iter().chain(rest(&mut early)).collect(), 9 * 2));
        for (name, plain) in NAMES.into_iter().zip(plain) {
            assert!(digest(&*files.open(name).unwrap()).unwrap().digest == blake3::hash(&plain), "{name}");
        }
        assert_eq!(files.checksums([5]), BTreeMap::from([(5, scene.agent.records[5].crc)]));
        assert_eq!(seal(&scene.disk, &scene.dir(), &mut |_, _| panic!("nothing is left to do")).unwrap(), sealed);
    }

    #[test]
    fn a_failure_at_any_operation_leaves_a_readable_attempt_and_sealing_goes_on() {
        let whole = Scene::filled(2).read();
        for crash in [false, true] {
            for count in 0.. {
                let scene = Scene::filled(2);
                if crash {
                    scene.disk.crash_after(count);
                } else {
                    let mut left = count + 1;
                    scene.disk.fail(move |_| {
                        left = left.saturating_sub(1);
                        (left == 0).then(|| {
                            left = usize::MAX;
                            io::ErrorKind::StorageFull
                        })
                    });
                }
                let survived = seal(&scene.disk, &scene.dir(), &mut |_, _| {}).is_ok();
                scene.disk.heal();
                assert_eq!(scene.read(), whole, "after {count} operations, crash: {crash}");
                seal(&scene.disk, &scene.dir(), &mut |_, _| {}).unwrap();
                assert_eq!(scene.read(), whole, "sealed again after {count} operations, crash: {crash}");
                assert_eq!(scene.names(), ["attempt.json", "events.zst", "finished.json", "index.zst", "log.zst"]);
                if survived {
                    assert!(count > 20, "only {count} operations were tried");
                    break;
                }
            }
        }
    }

    #[test]
    fn the_sealed_file_is_durable_before_the_plain_one_goes() {
        let scene = Scene::filled(1);
        scene.disk.seen();
        seal(&scene.disk, &scene.dir(), &mut |_, _| {}).unwrap();
        let seen = scene.disk.seen();
        let steps = ["sync log.zst.tmp", "rename log.zst", "syncdir 1", "remove log"];
        let places = steps.map(|step| seen.iter().position(|seen| seen == step).expect(step));
        assert!(places.is_sorted(), "{seen:?}");
    }

    #[test]
    fn what_does_not_read_back_is_not_put_in_place() {
        let scene = Scene::filled(3);
        let whole = scene.read();
        let path = scene.path("log");
        // Somebody writes while it is being sealed.
        let refused = seal(&scene.disk, &scene.dir(), &mut |_, _| {
            let mut longer = fs::read(&path).unwrap();
            longer.push(b'!');
            fs::write(&path, longer).unwrap();
        });
        assert!(refused.unwrap_err().to_string().contains("it stays"));
        assert_eq!(scene.read(), whole);
        assert_eq!(scene.names(), ["attempt.json", "events", "finished.json", "index", "log"]);
    }

    #[test]
    fn empty_files_are_sealed_too() {
        let scene = Scene::new();
        seal(&scene.disk, &scene.dir(), &mut |_, _| {}).unwrap();
        assert_eq!(scene.read(), (Vec::new(), 0));
        assert_eq!(scene.files().open("log").unwrap().read_at(&mut [0; 9], 0).unwrap(), 0);
    }

    #[test]
    fn nobody_goes_on_with_a_sealed_attempt_or_hides_it() {
        let scene = Scene::filled(2);
        let whole = scene.read();
        seal(&scene.disk, &scene.dir(), &mut |_, _| {}).unwrap();
        let disk: Arc<dyn Disk> = Arc::new(scene.disk.clone());
        let refused = recover::open(&disk, &scene.dir(), Durability::Fsync, false).unwrap_err();
        assert!(refused.to_string().contains("is sealed"), "{refused}");
        assert_eq!(scene.read(), whole);
    }

    #[test]
    fn damage_of_a_sealed_file_is_never_served_as_good() {
        let scene = Scene::filled(2);
        let whole = scene.read().0;
        seal(&scene.disk, &scene.dir(), &mut |_, _| {}).unwrap();
        for name in ["log.zst", "events.zst", "index.zst"] {
            let good = fs::read(scene.path(name)).unwrap();
            for at in 0..good.len() {
                for flip in [true, false] {
                    let mut bytes = good.clone();
                    if flip {
                        bytes[at] ^= 1
                    } else {
                        bytes.truncate(at)
                    }
                    fs::write(scene.path(name), bytes).unwrap();
                    let found = scene.try_read();
                    assert!(found.iter().zip(&whole).all(|(found, whole)| found == whole), "{name} at {at}");
                }
            }
            fs::write(scene.path(name), good).unwrap();
        }
    }

    /// Text that does not fit one frame, and a reader that jumps.
    #[test]
    fn any_place_of_a_file_of_many_frames_is_found() {
        let dir = tempdir();
        let path = dir.path().join("log");
        let text: Vec<u8> = (0..3 * FRAME as u64 / 7).flat_map(|n| format!("{n:>6}\n").into_bytes()).collect();
        fs::write(&path, &text).unwrap();
        seal_file(&RealDisk, &path, &mut |_| {}).unwrap();
        let file = open_sealed(&path);
        assert_eq!(file.len().unwrap(), text.len() as u64);
        proptest!(|(at in 0..text.len(), len in 0..2 * FRAME)| {
            let end = text.len().min(at + len);
            let mut found = vec![0; end - at];
            file.read_exact_at(&mut found, at as u64).unwrap();
            prop_assert!(found == text[at..end]);
        });
        assert!(file.read_exact_at(&mut [0; 2], text.len() as u64 - 1).is_err());
        assert!(file.write_at(&[IoSlice::new(b"x")], 0).is_err() && file.set_len(0).is_err());
    }

    /// Exactly one frame, and one byte less or more.
    #[test]
    fn zstd_gives_the_plain_bytes() {
        if Command::new("zstd").arg("--version").stdout(Stdio::null()).status().is_err() {
            return drop(io::Write::write_all(&mut io::stderr(), b"skipped: there is no zstd\n"));
        }
        for len in [0, 1, FRAME - 1, FRAME, FRAME + 1, 5 * FRAME] {
            let dir = tempdir();
            let path = dir.path().join("log");
            let text: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
            fs::write(&path, &text).unwrap();
            seal_file(&RealDisk, &path, &mut |_| {}).unwrap();
            let out = Command::new("zstd").arg("-dc").arg(sealed_path(&path)).stdin(Stdio::null()).output().unwrap();
            assert!(
                out.status.success() && out.stdout == text,
                "{len} bytes: {}",
                String::from_utf8_lossy(&out.stderr)
            );
            assert_eq!(digest(&*open_sealed(&path)).unwrap().bytes, len as u64);
        }
    }

    proptest! {
        #[test]
        fn noise_is_no_sealed_file_and_does_no_harm(noise in proptest::collection::vec(any::<u8>(), 0..200), tail: bool, frames in 0..40u32) {
            let dir = tempdir();
            let path = dir.path().join("log.zst");
            let mut bytes = noise;
            if tail {
                bytes.extend_from_slice(&frames.to_le_bytes());
                bytes.extend_from_slice(b"\0\xb1\xea\x92\x8f");
            }
            fs::write(&path, bytes).unwrap();
            if let Ok(file) = SealedFile::open(RealDisk.open(&path, Open::Read).unwrap()) {
                drop(digest(&file));
            }
        }
    }

    fn open_sealed(plain: &Path) -> Box<dyn File> {
        Box::new(SealedFile::open(RealDisk.open(&sealed_path(plain), Open::Read).unwrap()).unwrap())
    }

    struct Scene {
        dir: tempfile::TempDir,
        disk: FaultyDisk,
        agent: Agent,
    }

    impl Scene {
        /// An attempt without anything in it.
        fn new() -> Self {
            let (dir, disk, agent) = (tempdir(), FaultyDisk::new(), Agent::new(1));
            let scene = Self { dir, disk, agent };
            scene.create();
            scene
        }

        fn filled(rounds: usize) -> Self {
            let mut scene = Self::new();
            let mut log = scene.create();
            for round in 0..rounds {
                let output =
                    scene.agent.write(Stream::Stdout, &format!("round {round}: {}\n", "compiling ".repeat(40)));
                let records = vec![output, scene.agent.write(Stream::Event, r#"{"event":"x"}"#)];
                log.append(&[Batch { records, tally: scene.agent.tally.clone() }]).unwrap();
            }
            log.sync().and_then(|()| log.finish(scene.agent.finished(), FinishedAck::Complete)).unwrap();
            scene
        }

        fn create(&self) -> AttemptLog {
            let disk = Arc::new(self.disk.clone());
            AttemptLog::create(disk, &self.dir(), &self.agent.owner(), Durability::Fsync).unwrap()
        }

        fn dir(&self) -> PathBuf {
            self.dir.path().join("builds/b/main/1")
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir().join(name)
        }

        fn names(&self) -> Vec<String> {
            let names = self.disk.list(&self.dir()).unwrap();
            names.into_iter().map(|name| name.into_string().unwrap()).collect()
        }

        fn files(&self) -> Arc<AttemptFiles> {
            let disk: Arc<dyn Disk> = Arc::new(self.disk.clone());
            let found = archive::load(&disk, self.dir.path(), &"b".parse().unwrap()).unwrap();
            found.unwrap().attempts.remove(0).files
        }

        /// All records and the number behind them.
        fn read(&self) -> (Vec<Found>, u64) {
            let files = self.files();
            let next = files.progress.borrow().next;
            (rest(&mut AttemptReader::open(files).unwrap()), next)
        }

        /// As much as can be read.
        fn try_read(&self) -> Vec<Found> {
            let disk: Arc<dyn Disk> = Arc::new(self.disk.clone());
            let Ok(found) = archive::load(&disk, self.dir.path(), &"b".parse().unwrap()) else { return Vec::new() };
            let Ok(mut reader) = AttemptReader::open(found.unwrap().attempts.remove(0).files) else {
                return Vec::new();
            };
            std::iter::from_fn(|| reader.next().ok()?).collect()
        }
    }

    fn rest(reader: &mut AttemptReader) -> Vec<Found> {
        std::iter::from_fn(|| reader.next().unwrap()).collect()
    }
}
