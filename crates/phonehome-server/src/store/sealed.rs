//! Reading a sealed file: compressed in frames that can be read one by one.
//!
//! It is zstd's seekable format: frames of [`FRAME`] bytes, each complete in itself, and behind them a table of their
//! sizes in a frame that decoders skip. So `zstd -dc` gives the plain file, and a reader that wants a few bytes
//! decompresses one frame.

use std::{
    io::{self, IoSlice},
    sync::{Mutex, PoisonError},
};

use phonehome_env::disk::File;
use zeekstd::{OffsetFrom, SEEK_TABLE_INTEGRITY_SIZE, SeekTable, Seekable, seek_table::Format};

/// A sealed file, seen as the plain one that it was.
#[derive(Debug)]
pub(super) struct SealedFile {
    file: Box<dyn File>,
    table: SeekTable,
    /// The frame that was read last. Readers go forwards, so most reads are in it.
    last: Mutex<Frame>,
}

/// A frame's plain bytes.
#[derive(Debug, Default)]
struct Frame {
    index: Option<u32>,
    bytes: Vec<u8>,
}

/// Plain bytes of a frame, the last one aside. Each open file keeps one decompressed, and a read anywhere costs the time
/// for one: 0.2 ms. Larger ones hardly gain anything: a compiler's log of 24 MB is compressed to 9.4 % of its size in
/// frames of 64 KiB and of 256 KiB, 9.3 % in frames of 1 MiB and of 4 MiB, an index to 46 %. Smaller ones make the table
/// of a log of many GiB large, which is in memory while it is open: 16 bytes for each.
pub(super) const FRAME: usize = 256 * 1024;

impl SealedFile {
    /// Takes up the table. What it says is not believed beyond what fits the file.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, or is damaged.
    pub(super) fn open(file: Box<dyn File>) -> io::Result<Self> {
        let end = file.len()?;
        let table = SeekTable::from_seekable(&mut Place { file: &*file, end, position: 0 }).map_err(damage)?;
        if table.max_frame_size_decomp() > FRAME as u64 || table.size_comp() > end {
            return Err(damage("its table is not one of a log that was sealed here"));
        }
        Ok(Self { file, table, last: Mutex::default() })
    }

    fn size(&self) -> u64 {
        self.table.size_decomp()
    }

    fn load(&self, index: u32, frame: &mut Frame) -> io::Result<()> {
        if frame.index == Some(index) {
            return Ok(());
        }
        frame.index = None;
        let position = self.table.frame_start_comp(index).map_err(damage)?;
        let (packed, plain) = (self.table.frame_size_comp(index), self.table.frame_size_decomp(index));
        let (packed, plain) = (packed.map_err(damage)? as usize, plain.map_err(damage)? as usize);
        if packed > zstd_safe::compress_bound(FRAME) {
            return Err(damage("a frame is larger than any can be"));
        }
        let mut wire = vec![0; packed];
        self.file.read_exact_at(&mut wire, position)?;
        frame.bytes.clear();
        frame.bytes.reserve_exact(plain);
        let count = zstd_safe::decompress(&mut frame.bytes, &wire);
        if count.map_err(|code| damage(zstd_safe::get_error_name(code)))? != plain {
            return Err(damage("a frame is shorter than the table says"));
        }
        frame.index = Some(index);
        Ok(())
    }
}

impl File for SealedFile {
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        if position >= self.size() || buffer.is_empty() {
            return Ok(0);
        }
        let index = self.table.frame_index_decomp(position);
        let start = self.table.frame_start_decomp(index).map_err(damage)?;
        let mut frame = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        self.load(index, &mut frame)?;
        let found = usize::try_from(position - start).ok().and_then(|at| frame.bytes.get(at..));
        let found = found.filter(|found| !found.is_empty()).ok_or_else(|| damage("its table has an empty frame"))?;
        let count = found.len().min(buffer.len());
        buffer[..count].copy_from_slice(&found[..count]);
        Ok(count)
    }

    fn write_at(&self, _: &[IoSlice<'_>], _: u64) -> io::Result<usize> {
        Err(sealed())
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        Err(sealed())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.size())
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn lock(&self) -> io::Result<bool> {
        self.file.lock()
    }
}

/// Nobody writes to a sealed file.
fn sealed() -> io::Error {
    io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "the file is sealed")
}

fn damage(why: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("a sealed file is damaged: {why}"))
}

/// A place in a file, for whoever parses the table.
struct Place<'a> {
    file: &'a dyn File,
    end: u64,
    position: u64,
}

impl Seekable for Place<'_> {
    fn set_offset(&mut self, offset: OffsetFrom) -> zeekstd::Result<u64> {
        let position = match offset {
            OffsetFrom::Start(position) => Some(position),
            OffsetFrom::End(delta) => self.end.checked_add_signed(delta),
        };
        let position = position.filter(|&position| position <= self.end);
        self.position = position.ok_or_else(|| damage("its table is larger than the file"))?;
        Ok(self.position)
    }

    fn read(&mut self, buffer: &mut [u8]) -> zeekstd::Result<usize> {
        let count = self.file.read_at(buffer, self.position)?;
        self.position += count as u64;
        Ok(count)
    }

    /// The last bytes: how many frames, a descriptor, a magic number. Room for that many frames is made at once, so the
    /// number has to fit.
    fn seek_table_integrity(&mut self, _: Format) -> zeekstd::Result<[u8; SEEK_TABLE_INTEGRITY_SIZE]> {
        let start = self.end.checked_sub(SEEK_TABLE_INTEGRITY_SIZE as u64).ok_or_else(|| damage("it has no table"))?;
        let mut wire = [0; SEEK_TABLE_INTEGRITY_SIZE];
        self.file.read_exact_at(&mut wire, start)?;
        let frames = u32::from_le_bytes([wire[0], wire[1], wire[2], wire[3]]);
        if u64::from(frames) * TABLE_ENTRY > start {
            return Err(damage("its table is larger than the file").into());
        }
        Ok(wire)
    }
}

/// Bytes of a frame in the table.
const TABLE_ENTRY: u64 = 8;
