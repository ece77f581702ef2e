//! What several of the programs in `src/bin` share.

pub mod disk;
pub mod memory;

/// Reads decisions off the front of what the fuzzer made up. At its end everything is zero.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// From the first byte on.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    /// A number below `end`, which is at least 1.
    pub fn below(&mut self, end: u8) -> u8 {
        self.byte() % end
    }

    /// The next bytes, fewer at the end.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    /// A number close to `usual`, or close to where numbers end, or any.
    pub fn near(&mut self, usual: u64) -> u64 {
        match self.byte() {
            tag @ 0..=200 => usual.wrapping_add(u64::from(tag & 7)),
            tag @ 201..=240 => usual.wrapping_sub(u64::from(tag & 7)),
            tag @ 241..=252 => u64::MAX - u64::from(tag & 7),
            253..=255 => {
                let mut number = [0; 8];
                let bytes = self.bytes(8);
                number[..bytes.len()].copy_from_slice(bytes);
                u64::from_le_bytes(number)
            }
        }
    }

    /// Everything that is left.
    pub fn rest(self) -> &'a [u8] {
        self.0
    }
}
