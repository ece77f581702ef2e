//! What to redact: the secrets that options name, read.

use std::{
    ffi::{OsStr, OsString},
    fmt,
    io::{self, Read},
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use clap::Args;
use tracing::warn;
use zeroize::Zeroizing;

use super::Secret;
use crate::redact::{MAX_VALUE, MAX_VALUES, MIN_VALUE, Redactor, TooLarge};

/// Secrets that may not leave.
#[derive(Default, Args)]
pub struct RedactArgs {
    /// Variables whose values are secret: wherever output shows one, also encoded, a marker takes its place
    #[arg(
        long,
        env = "PHONEHOME_REDACT_ENV",
        value_name = "NAME,…",
        value_delimiter = ',',
        help_heading = "Redaction"
    )]
    pub redact_env: Vec<OsString>,

    /// Files whose contents are secret likewise, each as one value; of a directory, every file in it
    #[arg(
        long,
        env = "PHONEHOME_REDACT_FILE",
        value_name = "PATH,…",
        value_delimiter = ',',
        help_heading = "Redaction"
    )]
    pub redact_file: Vec<PathBuf>,
}

/// Where a value is from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A file.
    File(PathBuf),
    /// A variable.
    Variable(OsString),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file {} (--redact-file)", path.display()),
            Self::Variable(name) => write!(f, "variable {} (--redact-env)", name.display()),
        }
    }
}

/// Why values cannot be redacted. None of these texts repeats one.
#[derive(Debug, thiserror::Error)]
pub enum RedactError {
    /// It is larger than [`MAX_VALUE`].
    #[error("{0} holds more than 64 KiB; name only what is secret")]
    Long(Origin),
    /// There are more than [`MAX_VALUES`].
    #[error("--redact-env and --redact-file name more than {MAX_VALUES} values; name fewer")]
    Many,
    /// It is shorter than [`MIN_VALUE`].
    #[error(
        "{0} holds fewer than {MIN_VALUE} bytes: to redact that would hide ordinary text as well; use a longer secret \
         or do not name it"
    )]
    Short(Origin),
    /// Together they are too large.
    #[error("{0}; name fewer or smaller ones")]
    TooLarge(#[from] TooLarge),
    /// A file or directory cannot be read.
    #[error("cannot read {0}")]
    Unreadable(Origin, #[source] io::Error),
}

impl RedactArgs {
    /// Reads what they name. When that is anything, the token of this agent is not shown either; by itself it is not looked
    /// for: the command never gets it, and looking costs a copy of the output.
    pub(super) fn redactor(
        &self,
        token: Option<&Secret>,
        variable: impl Fn(&OsStr) -> Option<OsString>,
    ) -> Result<Option<Redactor>, RedactError> {
        let mut values = Values::default();
        for name in self.redact_env.iter().filter(|name| !name.is_empty()) {
            let value = variable(name).map(OsString::into_vec).unwrap_or_default();
            values.add(Origin::Variable(name.clone()), Zeroizing::new(value))?;
        }
        for path in self.redact_file.iter().filter(|path| !path.as_os_str().is_empty()) {
            values.add_path(path)?;
        }
        if values.0.is_empty() {
            return Ok(None);
        }
        values.0.extend(token.map(|token| Zeroizing::new(token.expose().as_bytes().to_vec())));
        Ok(Redactor::new(values.0)?)
    }
}

/// Longest file, bytes: a value with a line end.
const MAX_FILE: usize = MAX_VALUE + 2;

/// The values read so far.
#[derive(Default)]
struct Values(Vec<Zeroizing<Vec<u8>>>);

impl Values {
    /// Line ends at the value's own end are not part of it, as in a shell's `$(…)`. One that is empty is left out: the
    /// same image also runs where there is no such secret.
    fn add(&mut self, origin: Origin, mut value: Zeroizing<Vec<u8>>) -> Result<(), RedactError> {
        let len = value.iter().rposition(|byte| !b"\r\n".contains(byte)).map_or(0, |last| last + 1);
        value.truncate(len);
        match len {
            0 => warn!("{origin} is empty or not set: nothing is redacted for it"),
            1..MIN_VALUE => return Err(RedactError::Short(origin)),
            _ if len > MAX_VALUE => return Err(RedactError::Long(origin)),
            _ if self.0.len() == MAX_VALUES => return Err(RedactError::Many),
            _ => self.0.push(value),
        }
        Ok(())
    }

    fn add_path(&mut self, path: &Path) -> Result<(), RedactError> {
        let unreadable = |error| RedactError::Unreadable(Origin::File(path.to_owned()), error);
        if !path.metadata().map_err(unreadable)?.is_dir() {
            return self.add_file(path);
        }
        for file in files_in(path).map_err(unreadable)? {
            self.add_file(&file)?;
        }
        Ok(())
    }

    fn add_file(&mut self, path: &Path) -> Result<(), RedactError> {
        let origin = Origin::File(path.to_owned());
        match read(path) {
            Ok(value) if value.len() > MAX_FILE => Err(RedactError::Long(origin)),
            Ok(value) => self.add(origin, value),
            Err(error) => Err(RedactError::Unreadable(origin, error)),
        }
    }
}

/// The files of a directory, in order. Kubernetes mounts a secret as links to files in a directory behind the link
/// `..data`; names that begin so are its own.
fn files_in(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in directory.read_dir()? {
        let entry = entry?;
        if !entry.file_name().as_bytes().starts_with(b"..") && entry.path().metadata()?.is_file() {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

/// Reads a file, or its beginning, which is longer than a file may be.
fn read(path: &Path) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut value = Zeroizing::new(Vec::with_capacity(2 * MAX_VALUE)); // never moved: what moves is not wiped
    phonehome_env::file::open(path)?.take(MAX_FILE as u64 + 1).read_to_end(&mut value)?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn variables_and_files_are_read_and_the_token_is_one_more() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("key");
        std::fs::write(&file, "from a file\r\n\n").unwrap();
        let redaction = read_args(&["A", "", "B"], &[&file], Some("the-token")).unwrap().unwrap();
        assert_eq!(redaction.values(), 4);
        for value in ["value of A", "value of B", "from a file", "the-token"] {
            assert_eq!(redaction.mask_text(&format!("{value}\n")), "[redacted]\n");
        }
        assert!(read_args(&[], &[], Some("the-token")).unwrap().is_none());
        assert!(read_args(&[], &[], None).unwrap().is_none());
    }

    #[test]
    fn a_mounted_secret_is_every_file_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let hidden = dir.path().join("..2026_11_21");
        std::fs::create_dir_all(hidden.join("not-looked-into")).unwrap();
        symlink("..2026_11_21", dir.path().join("..data")).unwrap();
        for (name, text) in [("user", "somebody"), ("password", "correct horse\n")] {
            std::fs::write(hidden.join(name), text).unwrap();
            symlink(format!("..data/{name}"), dir.path().join(name)).unwrap();
        }
        std::fs::create_dir(dir.path().join("directory")).unwrap();
        let redaction = read_args(&[], &[dir.path()], None).unwrap().unwrap();
        assert_eq!(redaction.values(), 2);
        assert_eq!(redaction.mask_text("somebody: correct horse"), "[redacted]: [redacted]");
    }

    #[test]
    fn what_cannot_be_redacted_is_said_without_its_value() {
        let dir = tempfile::tempdir().unwrap();
        let (long, large, missing) = (dir.path().join("long"), dir.path().join("large"), dir.path().join("missing"));
        std::fs::write(&long, [b"secret".to_vec(), vec![b'\n'; MAX_VALUE], b"x".to_vec()].concat()).unwrap();
        std::fs::write(&large, [vec![b'x'; MAX_VALUE], b"\r\n".to_vec()].concat()).unwrap();
        assert!(read_args(&[], &[&large], None).is_ok());
        let many: Vec<_> = (0..=MAX_VALUES).map(|at| format!("NAME{at}")).collect();
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        for (names, files, expected) in [
            (&["SHORT"][..], &[][..], "variable SHORT (--redact-env) holds fewer than 6 bytes"),
            (&[], &[long.as_path()], "long (--redact-file) holds more than 64 KiB"),
            (&[], &[missing.as_path()], "missing (--redact-file)"),
            (&[], &[Path::new("/dev/null")], "cannot read file /dev/null"),
            (&many, &[], "more than 256 values"),
        ] {
            let failure = read_args(names, files, None).unwrap_err().to_string();
            assert!(failure.contains(expected) && !failure.contains("tiny"), "{failure}");
        }
    }

    #[test]
    fn what_is_not_there_is_left_out() {
        assert!(read_args(&["UNSET", "EMPTY"], &[], None).unwrap().is_none());
    }

    fn read_args(names: &[&str], files: &[&Path], token: Option<&str>) -> Result<Option<Redactor>, RedactError> {
        let args = RedactArgs {
            redact_env: names.iter().map(OsString::from).collect(),
            redact_file: files.iter().map(PathBuf::from).collect(),
        };
        let token = token.map(|token| Secret::new(token.to_owned()));
        args.redactor(token.as_ref(), |name| match name.to_str()? {
            "UNSET" => None,
            "EMPTY" => Some("\n".into()),
            "SHORT" => Some("tiny\n".into()),
            name => Some(format!("value of {name}").into()),
        })
    }
}
