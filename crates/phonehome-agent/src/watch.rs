//! Says when something in a directory changes, so that nobody has to look again and again.

use std::{io, mem::MaybeUninit, os::fd::OwnedFd, path::Path};

use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags},
    io::Errno,
};
use tokio::io::unix::AsyncFd;
use tracing::debug;

use crate::command::readable;

/// Watches the names in one directory, and what is written to the files behind them.
///
/// It is a hint, not a promise: some file systems, network ones above all, tell nothing. Look once after it was made,
/// whenever [`Self::changed`] completes, and now and then.
#[derive(Debug)]
pub(crate) struct Watch {
    inotify: AsyncFd<OwnedFd>,
    /// The directory, as inotify numbers it.
    dir: i32,
}

/// What makes a name mean something else than before: files written in place, also by somebody who keeps them open, and
/// files or links put in place by a rename, as Kubernetes does with the `..data` of its volumes.
const CHANGES: WatchFlags = WatchFlags::CLOSE_WRITE
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::CREATE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ONLYDIR);

/// What says that the directory is another one now, or none.
const GONE: ReadFlags = ReadFlags::IGNORED.union(ReadFlags::MOVE_SELF).union(ReadFlags::UNMOUNT);

/// Bytes of events read at once. One takes 16 and its name, of up to 256.
const BUFFER: usize = 4096;

impl Watch {
    /// Begins to watch a directory, which has to be there. Looking for it may wait for a disk, or a network.
    ///
    /// # Errors
    ///
    /// When it is not, or the user has no watches left (`fs.inotify.max_user_instances`).
    pub(crate) fn new(dir: &Path) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let dir = inotify::add_watch(&inotify, dir, CHANGES)?;
        Ok(Self { inotify: readable(inotify)?, dir })
    }

    /// Goes over to the directory that has this path now, should it be another one than before.
    ///
    /// # Errors
    ///
    /// When there is none. The one from before stays watched then.
    pub(crate) fn follow(&mut self, dir: &Path) -> io::Result<()> {
        let before = std::mem::replace(&mut self.dir, inotify::add_watch(&self.inotify, dir, CHANGES)?);
        if before != self.dir
            && let Err(errno) = inotify::remove_watch(&self.inotify, before)
        {
            debug!("the directory that was there before has taken its watch with it: {errno}");
        }
        Ok(())
    }

    /// Waits for a change since the last call. Any number of them may be one. Cancel safe.
    ///
    /// # Errors
    ///
    /// When the directory has gone, or is another one now: there is nothing more to come, make a new watch.
    pub(crate) async fn changed(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.inotify.readable().await?;
            match ready.try_io(|inotify| drain(inotify.get_ref(), self.dir)) {
                Ok(drained) => return drained,
                Err(_nothing_there) => {}
            }
        }
    }
}

/// Takes all events there are, at least one. An error when they say that `dir` has gone.
fn drain(inotify: &OwnedFd, dir: i32) -> io::Result<()> {
    let mut buffer = [MaybeUninit::uninit(); BUFFER];
    let mut events = Reader::new(inotify, &mut buffer);
    let is_end = |event: inotify::Event<'_>| event.wd() == dir && event.events().intersects(GONE);
    let mut is_gone = is_end(events.next()?);
    loop {
        match events.next() {
            Ok(event) => is_gone |= is_end(event),
            Err(Errno::WOULDBLOCK) => break,
            Err(failed) => return Err(failed.into()),
        }
    }
    if is_gone { Err(io::ErrorKind::NotFound.into()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::{fs, future::poll_fn, os::unix::fs::symlink, time::Duration};

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn every_way_to_change_what_a_name_means_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let mut watch = Watch::new(dir.path()).unwrap();
        fs::write(at("file"), "one").unwrap();
        noticed(&mut watch).await.unwrap();
        fs::write(at("file"), "two").unwrap();
        noticed(&mut watch).await.unwrap();
        symlink("elsewhere", at("..data_tmp")).unwrap();
        noticed(&mut watch).await.unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        noticed(&mut watch).await.unwrap();
        fs::remove_file(at("file")).unwrap();
        noticed(&mut watch).await.unwrap();
        assert_quiet(&mut watch).await;
    }

    #[tokio::test]
    async fn many_changes_are_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut watch = Watch::new(dir.path()).unwrap();
        (0..1000).for_each(|number| fs::write(dir.path().join(format!("{number:0>200}")), "").unwrap());
        noticed(&mut watch).await.unwrap();
        assert_quiet(&mut watch).await;
    }

    #[tokio::test]
    async fn reading_is_no_change() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "one").unwrap();
        let mut watch = Watch::new(dir.path()).unwrap();
        fs::read(dir.path().join("file")).unwrap();
        assert_quiet(&mut watch).await;
    }

    #[tokio::test]
    async fn a_directory_that_goes_ends_its_watch() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        for go in [|inner: &Path| fs::remove_dir(inner), |inner: &Path| fs::rename(inner, inner.with_extension("old"))]
        {
            fs::create_dir(&inner).unwrap();
            let mut watch = Watch::new(&inner).unwrap();
            go(&inner).unwrap();
            noticed(&mut watch).await.unwrap_err();
        }
        Watch::new(&inner).unwrap_err();
    }

    #[tokio::test]
    async fn it_follows_a_path_to_another_directory() {
        let dir = tempfile::tempdir().unwrap();
        let (path, old) = (dir.path().join("here"), dir.path().join("old"));
        fs::create_dir_all(path.join("inner")).unwrap();
        let inner = path.join("inner");
        let mut watch = Watch::new(&inner).unwrap();
        watch.follow(&inner).unwrap();
        assert_quiet(&mut watch).await;
        fs::rename(&path, &old).unwrap(); // nothing happens to the directory itself
        assert_quiet(&mut watch).await;
        watch.follow(&inner).unwrap_err();
        fs::create_dir_all(&inner).unwrap();
        watch.follow(&inner).unwrap();
        noticed(&mut watch).await.expect("the end of the old one is no end");
        fs::write(old.join("inner/file"), "").unwrap();
        assert_quiet(&mut watch).await;
        fs::write(inner.join("file"), "").unwrap();
        noticed(&mut watch).await.unwrap();
    }

    /// An event is in the queue before the call that made it returns.
    async fn noticed(watch: &mut Watch) -> io::Result<()> {
        timeout(Duration::from_secs(30), watch.changed()).await.expect("the change is noticed")
    }

    async fn assert_quiet(watch: &mut Watch) {
        tokio::task::yield_now().await; // the driver gets to say what there is
        let mut changed = std::pin::pin!(watch.changed());
        let is_pending = poll_fn(|context| std::task::Poll::Ready(changed.as_mut().poll(context).is_pending())).await;
        assert!(is_pending);
    }
}
