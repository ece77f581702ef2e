//! Files that options name, read with care: whatever somebody has put there, reading it ends.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use rustix::fs::OFlags;
use zeroize::Zeroizing;

/// Opens a regular file. A named pipe nobody writes to is not waited for, and what is no file might never end.
///
/// # Errors
///
/// When it cannot be opened, or is something else.
pub fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is not a regular file")) }
}

/// The content of a regular file of at most `limit` bytes.
///
/// # Errors
///
/// When it cannot be read, is something else than a regular file, or is larger.
pub fn read(path: &Path, limit: usize) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut content = Zeroizing::new(Vec::with_capacity(limit.min(MOST_AT_ONCE)));
    open(path)?.take(limit as u64 + 1).read_to_end(&mut content)?;
    if content.len() > limit { Err(io::Error::other(format!("it is larger than {limit} bytes"))) } else { Ok(content) }
}

/// Read without moving what was read already: a secret leaves no copy behind.
const MOST_AT_ONCE: usize = 16 * 1024;

/// The same as text.
///
/// # Errors
///
/// As [`read`], and when it is not UTF-8.
pub fn read_text(path: &Path, limit: usize) -> io::Result<Zeroizing<String>> {
    let content = read(path, limit)?;
    let text = std::str::from_utf8(&content).map_err(|_| io::Error::other("it is not UTF-8"))?;
    Ok(Zeroizing::new(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    #[test]
    fn what_is_no_file_or_too_large_is_an_error_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let (file, pipe) = (dir.path().join("file"), dir.path().join("pipe"));
        std::fs::write(&file, "12345").unwrap();
        mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        assert_eq!(*read_text(&file, 5).unwrap(), "12345");
        assert!(read(&file, 4).unwrap_err().to_string().contains("larger than 4 bytes"));
        for other in [&*pipe, dir.path(), Path::new("/dev/zero")] {
            assert!(read(other, 5).unwrap_err().to_string().contains("not a regular file"), "{other:?}");
        }
        assert_eq!(read(&dir.path().join("none"), 5).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
