//! Faults on demand, for tests of the real programs: a chosen disk operation fails or ends the process.
//!
//! `PHONEHOME_FAULT=ACTION@N:OPERATION:NAME` acts on the Nth operation of that kind on files of that name, counted
//! from 1 over the life of the process; `N+` acts on it and on every later one. Several are separated by commas.
//!
//! | part | values |
//! |---|---|
//! | action | `kill` (SIGKILL to this process), `torn` (half of a write, then `kill`), `eio`, `enospc` |
//! | operation | `open` (to write), `write`, `sync`, `truncate`, `rename` (NAME is the new one), `remove`, `mkdir`, `syncdir`, `syncfs` |
//! | name | a file's or directory's last component, or `*` for any |
//!
//! Only debug builds look at it; in release builds every point is nothing.

#[cfg(debug_assertions)]
pub(crate) use on::{Name, point};

#[cfg(not(debug_assertions))]
pub(crate) use off::{Name, point};

#[cfg(not(debug_assertions))]
mod off {
    use std::{io, path::Path};

    #[inline]
    pub(crate) fn point(_operation: &str, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    #[derive(Debug)]
    pub(crate) struct Name;

    impl Name {
        #[inline]
        pub(crate) fn of(_path: &Path) -> Self {
            Self
        }

        #[inline]
        pub(crate) fn point(&self, _operation: &str) -> io::Result<()> {
            Ok(())
        }

        #[inline]
        pub(crate) fn write_point(&self, _half: impl FnOnce() -> io::Result<usize>) -> io::Result<()> {
            Ok(())
        }
    }
}

#[cfg(debug_assertions)]
mod on {
    use std::{
        env,
        ffi::{OsStr, OsString},
        io,
        path::Path,
        sync::{
            OnceLock,
            atomic::{AtomicU64, Ordering},
        },
    };

    use rustix::{
        io::Errno,
        process::{Signal, getpid, kill_process},
    };

    /// The last component of an open file's path.
    #[derive(Debug)]
    pub(crate) struct Name(OsString);

    impl Name {
        pub(crate) fn of(path: &Path) -> Self {
            Self(path.file_name().unwrap_or_default().to_owned())
        }

        pub(crate) fn point(&self, operation: &str) -> io::Result<()> {
            check(operation, &self.0, || Ok(0))
        }

        pub(crate) fn write_point(&self, half: impl FnOnce() -> io::Result<usize>) -> io::Result<()> {
            check("write", &self.0, half)
        }
    }

    pub(crate) fn point(operation: &str, path: &Path) -> io::Result<()> {
        check(operation, path.file_name().unwrap_or_default(), || Ok(0))
    }

    fn check(operation: &str, name: &OsStr, half: impl FnOnce() -> io::Result<usize>) -> io::Result<()> {
        static FAULTS: OnceLock<Vec<Fault>> = OnceLock::new();
        let faults = FAULTS.get_or_init(|| {
            let text = env::var("PHONEHOME_FAULT").unwrap_or_default();
            text.split(',').filter(|fault| !fault.is_empty()).map(parse).collect()
        });
        match faults.iter().filter(|fault| fault.is_hit(operation, name)).map(|fault| fault.action).next() {
            Some(action) => action.take(half),
            None => Ok(()),
        }
    }

    #[derive(Debug)]
    struct Fault {
        action: Action,
        at: u64,
        and_later: bool,
        operation: String,
        name: String,
        seen: AtomicU64,
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Action {
        Fail(Errno),
        Kill,
        Torn,
    }

    impl Fault {
        fn is_hit(&self, operation: &str, name: &OsStr) -> bool {
            if self.operation != operation || self.name != "*" && *self.name != *name {
                return false;
            }
            let seen = self.seen.fetch_add(1, Ordering::Relaxed) + 1;
            seen == self.at || self.and_later && seen > self.at
        }
    }

    impl Action {
        fn take(self, half: impl FnOnce() -> io::Result<usize>) -> io::Result<()> {
            match self {
                Self::Fail(errno) => Err(errno.into()),
                Self::Kill => die(),
                Self::Torn => half().and_then(|_| die()),
            }
        }
    }

    fn die() -> io::Result<()> {
        kill_process(getpid(), Signal::KILL)?;
        Ok(())
    }

    /// # Panics
    ///
    /// When the text is not a fault: a test that misses its fault would prove nothing.
    fn parse(text: &str) -> Fault {
        let parts = || {
            let (action, rest) = text.split_once('@')?;
            let mut rest = rest.splitn(3, ':');
            let (at, operation, name) = (rest.next()?, rest.next()?, rest.next()?);
            let action = match action {
                "kill" => Action::Kill,
                "torn" => Action::Torn,
                "eio" => Action::Fail(Errno::IO),
                "enospc" => Action::Fail(Errno::NOSPC),
                _ => return None,
            };
            let (operation, name) = (operation.to_owned(), name.to_owned());
            let (at, and_later) = at.strip_suffix('+').map_or((at, false), |at| (at, true));
            Some(Fault { action, at: at.parse().ok()?, and_later, operation, name, seen: AtomicU64::new(0) })
        };
        parts().unwrap_or_else(|| panic!("PHONEHOME_FAULT: {text} is not ACTION@N:OPERATION:NAME"))
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_fault_hits_its_operation_its_file_and_its_turn() {
            let fault = parse("eio@2:sync:index");
            let hits: Vec<_> =
                [("sync", "index"), ("sync", "log"), ("write", "index"), ("sync", "index"), ("sync", "index")]
                    .into_iter()
                    .map(|(operation, name)| fault.is_hit(operation, OsStr::new(name)))
                    .collect();
            assert_eq!(hits, [false, false, false, true, false]);
            let fault = parse("enospc@1+:write:*");
            assert!(fault.is_hit("write", OsStr::new("a")) && fault.is_hit("write", OsStr::new("b")));
            assert_eq!(fault.action.take(|| Ok(0)).unwrap_err().raw_os_error(), Some(Errno::NOSPC.raw_os_error()));
        }
    }
}
