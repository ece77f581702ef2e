//! From a build's output to what the pusher's terminal may be sent.
//!
//! ```text
//! bytes of one stream --Sanitizer--> text, \n \t \r, colour --LinePrinter--> lines, and redraws of the last one
//! ```
//!
//! Both are pure: bytes and the time go in, bytes are appended to a buffer. Every (step, stream) has its own pair.
//! Choosing the descriptor, writing to it and the hook's own lines are left to the caller, who calls
//! [`LinePrinter::interrupt`] on the others before one of them, or the hook, writes to a terminal they share.

mod lines;
mod sanitize;

use std::ops::Range;

pub(crate) use self::{lines::LinePrinter, sanitize::Sanitizer};

/// How output reaches the person who pushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Render {
    /// Byte for byte, as a file or a pipe wants it.
    Raw,
    /// Through a [`Sanitizer`] and a [`LinePrinter`].
    Safe(Style),
}

/// What displays the safe form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    /// A terminal: it shows every byte when it arrives.
    Terminal,
    /// git's sideband: the pusher's git shows text when `\n` or `\r` ends it, as `remote: text`, clears what was
    /// longer on the screen, and leaves the screen alone where `\n` or `\r` ends nothing.
    Sideband,
}

/// The colours and attributes in force in a stream, as the sequences that bring them back.
///
/// One sequence per attribute, so that `ESC[31m` ... `ESC[39m` leaves nothing behind, however often it is repeated.
/// Codes of no known attribute are not remembered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Sgr {
    /// One complete sequence each, or nothing.
    attributes: [Vec<u8>; ATTRIBUTES],
}

impl Sgr {
    /// The complete SGR sequence that `bytes` start with.
    fn prefix_of(bytes: &[u8]) -> Option<&[u8]> {
        let parameters = bytes.strip_prefix(CSI)?;
        let length = parameters.iter().take(MAX_SGR - CSI.len()).position(|&byte| !is_sgr_parameter(byte))?;
        (parameters.get(length) == Some(&b'm')).then(|| &bytes[..=CSI.len() + length])
    }

    /// Takes in a complete SGR sequence.
    fn apply(&mut self, sequence: &[u8]) {
        let mut rest = Some(&sequence[CSI.len()..sequence.len() - 1]);
        while let Some(parameters) = rest {
            let length = first_length(parameters);
            self.apply_one(&parameters[..length]);
            rest = parameters.get(length + 1..);
        }
    }

    /// Takes in one parameter of a sequence, with those that belong to it.
    fn apply_one(&mut self, parameter: &[u8]) {
        match effect(parameter) {
            Effect::Set(slot) => {
                self.attributes[slot].clear();
                for part in [CSI, parameter, b"m"] {
                    self.attributes[slot].extend_from_slice(part);
                }
            }
            Effect::Clear(slots) => self.attributes[slots].iter_mut().for_each(Vec::clear),
            Effect::None => {}
        }
    }

    /// Whether anything but the terminal's default is in force.
    fn is_open(&self) -> bool {
        self.attributes.iter().any(|attribute| !attribute.is_empty())
    }

    /// Writes what brings the colours back after [`RESET`].
    fn restore(&self, out: &mut Vec<u8>) {
        self.attributes.iter().for_each(|attribute| out.extend_from_slice(attribute));
    }

    /// Ends every colour, if there is one.
    fn close(&self, out: &mut Vec<u8>) {
        if self.is_open() {
            out.extend_from_slice(RESET);
        }
    }
}

/// Whether a terminal goes on in another colour than its own.
#[cfg(fuzzing)]
pub(crate) fn leaves_color(output: &[u8]) -> bool {
    let mut sgr = Sgr::default();
    for (at, _) in output.iter().enumerate().filter(|&(_, &byte)| byte == CSI[0]) {
        Sgr::prefix_of(&output[at..]).into_iter().for_each(|sequence| sgr.apply(sequence));
    }
    sgr.is_open()
}

/// What one parameter does to the attributes.
enum Effect {
    /// This one now has this value.
    Set(usize),
    /// These go back to the default.
    Clear(Range<usize>),
    /// None that is known.
    None,
}

/// ECMA-48, 8.3.117, and what xterm adds to it.
fn effect(parameter: &[u8]) -> Effect {
    if parameter == b"4:0" {
        return Effect::Clear(3..4);
    }
    match code(parameter) {
        0 => Effect::Clear(0..ATTRIBUTES),
        1 => Effect::Set(0),
        2 => Effect::Set(1),
        22 => Effect::Clear(0..2),
        3 | 20 => Effect::Set(2),
        23 => Effect::Clear(2..3),
        4 | 21 => Effect::Set(3),
        24 => Effect::Clear(3..4),
        5 | 6 => Effect::Set(4),
        25 => Effect::Clear(4..5),
        7 => Effect::Set(5),
        27 => Effect::Clear(5..6),
        8 => Effect::Set(6),
        28 => Effect::Clear(6..7),
        9 => Effect::Set(7),
        29 => Effect::Clear(7..8),
        11..=19 => Effect::Set(8),
        10 => Effect::Clear(8..9),
        30..=38 | 90..=97 => Effect::Set(9),
        39 => Effect::Clear(9..10),
        40..=48 | 100..=107 => Effect::Set(10),
        49 => Effect::Clear(10..11),
        53 => Effect::Set(11),
        55 => Effect::Clear(11..12),
        58 => Effect::Set(12),
        59 => Effect::Clear(12..13),
        _ => Effect::None,
    }
}

/// The number a parameter starts with; none is zero.
fn code(parameter: &[u8]) -> u32 {
    let digits = parameter.iter().take_while(|byte| byte.is_ascii_digit());
    digits.fold(0, |code: u32, digit| code.saturating_mul(10).saturating_add(u32::from(digit - b'0')))
}

/// How far the first of `parameters` reaches: `38;5;n` and `38;2;r;g;b` are one.
fn first_length(parameters: &[u8]) -> usize {
    let mut fields = parameters.split(|&byte| byte == b';');
    let count = match (fields.next(), fields.next()) {
        (Some(b"38" | b"48" | b"58"), Some(b"5")) => 3,
        (Some(b"38" | b"48" | b"58"), Some(b"2")) => 5,
        _ => 1,
    };
    let mut ends = parameters.iter().enumerate().filter(|&(_, &byte)| byte == b';');
    ends.nth(count - 1).map_or(parameters.len(), |(at, _)| at)
}

/// What may stand between [`CSI`] and the `m` of an SGR sequence.
fn is_sgr_parameter(byte: u8) -> bool {
    byte.is_ascii_digit() || byte == b';' || byte == b':'
}

/// Where the first byte is that `wanted` accepts, or the length.
///
/// Looks at whole blocks first, which the compiler turns into vector code: most text has nothing special for long.
fn find(bytes: &[u8], wanted: impl Fn(u8) -> bool) -> usize {
    let blocks = bytes.chunks(BLOCK);
    let plain = blocks.take_while(|block| !block.iter().fold(false, |any, &byte| any | wanted(byte))).count() * BLOCK;
    let start = plain.min(bytes.len());
    bytes[start..].iter().position(|&byte| wanted(byte)).map_or(bytes.len(), |at| start + at)
}

/// Starts a control sequence.
const CSI: &[u8] = b"\x1b[";

/// Ends every colour and attribute.
const RESET: &[u8] = b"\x1b[0m";

/// Longest SGR sequence that is passed on: two 24-bit colours and a few attributes. More is no colour.
const MAX_SGR: usize = 64;

/// Attributes that [`effect`] tells apart.
const ATTRIBUTES: usize = 13;

/// Bytes looked at together by [`find`].
const BLOCK: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_that_were_closed_are_forgotten() {
        let cases = [
            ("", ""),
            ("\x1b[m", ""),
            ("\x1b[31m", "\x1b[31m"),
            ("\x1b[31m\x1b[0m", ""),
            ("\x1b[31m\x1b[m", ""),
            ("\x1b[31m\x1b[39m", ""),
            ("\x1b[31m\x1b[32m", "\x1b[32m"),
            ("\x1b[1;31m", "\x1b[1m\x1b[31m"),
            ("\x1b[01;31m\x1b[K", "\x1b[01m\x1b[31m"),
            ("\x1b[31;0m", ""),
            ("\x1b[31;m", ""),
            ("\x1b[0;32m", "\x1b[32m"),
            ("\x1b[1m\x1b[2m\x1b[22m", ""),
            ("\x1b[38;5;0m", "\x1b[38;5;0m"),
            ("\x1b[38;2;0;0;0;1m", "\x1b[1m\x1b[38;2;0;0;0m"),
            ("\x1b[48:2::1:2:3m", "\x1b[48:2::1:2:3m"),
            ("\x1b[38;5m", "\x1b[38;5m"),
            ("\x1b[4:3m", "\x1b[4:3m"),
            ("\x1b[4:3m\x1b[4:0m", ""),
            ("\x1b[99999999999m", ""),
        ];
        for (input, left) in cases {
            let sgr = after(input.as_bytes());
            let mut restored = Vec::new();
            sgr.restore(&mut restored);
            assert_eq!(String::from_utf8(restored).unwrap(), left, "after {input:?}");
            assert_eq!(sgr.is_open(), !left.is_empty(), "after {input:?}");
        }
    }

    #[test]
    fn what_is_restored_is_what_was_in_force() {
        let sgr = after(b"\x1b[1;4;31;48;5;17m");
        let mut restored = Vec::new();
        sgr.restore(&mut restored);
        assert_eq!(after(&restored), sgr);
    }

    #[test]
    fn only_complete_and_short_colours_are_colours() {
        let longest = format!("\x1b[{}m", "1".repeat(MAX_SGR - 3));
        let longer = format!("\x1b[{}m", "1".repeat(MAX_SGR - 2));
        for (input, length) in [
            ("\x1b[m", Some(3)),
            ("\x1b[1m and text", Some(4)),
            (&longest, Some(MAX_SGR)),
            (&longer, None),
            ("\x1b[1", None),
            ("\x1b[1K", None),
            ("\x1b[>1m", None),
            ("m", None),
        ] {
            assert_eq!(Sgr::prefix_of(input.as_bytes()).map(<[u8]>::len), length, "{input:?}");
        }
    }

    #[test]
    fn a_byte_is_found_wherever_it_is() {
        for length in 0..3 * BLOCK {
            let mut bytes = vec![b'x'; length];
            assert_eq!(find(&bytes, |byte| byte == b'!'), length);
            for at in (0..length).rev() {
                bytes[at] = b'!';
                assert_eq!(find(&bytes, |byte| byte == b'!'), at);
            }
        }
    }

    fn after(mut bytes: &[u8]) -> Sgr {
        let mut sgr = Sgr::default();
        while let Some(sequence) = Sgr::prefix_of(bytes) {
            sgr.apply(sequence);
            bytes = &bytes[sequence.len()..];
        }
        sgr
    }
}
