//! What builds write: numbered lines of one length, so that each byte is known by its place.

use std::{
    fs::File,
    io::{self, Read, Write},
    path::Path,
};

use super::Result;

/// Bytes of a line.
pub(super) const LINE: u64 = 80;

/// Lines in a block of not quite 64 KiB.
pub(super) const BLOCK: u64 = 64 * 1024 / LINE;

/// Digits of a line's number.
const DIGITS: usize = 12;

/// Writes so many bytes, `lines` lines at a time.
pub(super) fn write(lines: u64, bytes: u64, out: &mut impl Write) -> io::Result<()> {
    let mut block = blank(lines);
    for first in (0..bytes / LINE).step_by(lines as usize) {
        number(&mut block, first);
        out.write_all(&block)?;
    }
    Ok(())
}

/// Compares a file with what [`write()`] wrote.
pub(super) fn verify(path: &Path, bytes: u64) -> Result<()> {
    let mut file = File::open(path)?;
    let stored = file.metadata()?.len();
    if stored != bytes {
        return Err(format!("{stored} bytes are stored, {bytes} were written").into());
    }
    let (mut expected, mut found) = (blank(BLOCK), Vec::new());
    for first in (0..bytes / LINE).step_by(BLOCK as usize) {
        number(&mut expected, first);
        found.clear();
        Read::by_ref(&mut file).take(BLOCK * LINE).read_to_end(&mut found)?;
        if !expected.starts_with(&found) {
            return Err(format!("what is stored differs from what was written, behind line {first}").into());
        }
    }
    Ok(())
}

/// Lines without their numbers.
fn blank(lines: u64) -> Vec<u8> {
    let mut line: Vec<u8> = (0..LINE).map(|at| b'a' + (at * 7 % 26) as u8).collect();
    line[DIGITS] = b' ';
    line[LINE as usize - 1] = b'\n';
    line.repeat(lines as usize)
}

/// Gives each line its number.
fn number(block: &mut [u8], first: u64) {
    for (line, number) in block.chunks_exact_mut(LINE as usize).zip(first..) {
        let mut rest = number;
        for digit in line[..DIGITS].iter_mut().rev() {
            *digit = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
    }
}
