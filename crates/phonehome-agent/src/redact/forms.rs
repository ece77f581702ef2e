//! The forms in which a value shows in the output of programs.
//!
//! The value itself; with its line ends changed or left out; each of its longer lines; and the value in base64,
//! percent-encoded and as a JSON string, the latter two also line by line. An encoder has choices, and the usual ones
//! are all here: most of them agree about most values.

use base64::{Engine, engine::general_purpose};
use zeroize::Zeroizing;

use super::MIN_VALUE;

pub(super) type Form = Zeroizing<Vec<u8>>;

/// Shortest line of a value with several that is looked for by itself, bytes without the spaces around it. Nobody chose
/// a line as a secret, so it is less likely to be one than a whole value.
const MIN_LINE: usize = 8;

/// Every form of `value` once, in order. None is shorter than [`MIN_VALUE`].
pub(super) fn of(value: &[u8]) -> Vec<Form> {
    let mut forms = vec![own(value), joined(value, b"\n"), joined(value, b"\r\n"), joined(value, b"")];
    forms.extend(base64(value));
    for text in lines(value).chain([value]) {
        forms.push(own(text));
        forms.extend(PERCENT.iter().map(|style| style.encode(text)));
        forms.extend(JSON.iter().filter_map(|style| style.encode(text)));
    }
    forms.retain(|form| form.len() >= MIN_VALUE);
    forms.sort_unstable_by(|a, b| a.as_slice().cmp(b));
    forms.dedup_by(|a, b| a == b);
    forms
}

/// Bytes of sorted forms, those counted once that a form and the one before it both begin with.
pub(super) fn size(forms: &[Form]) -> usize {
    let common = |a: &[u8], b: &[u8]| a.iter().zip(b).take_while(|(a, b)| a == b).count();
    let shared: usize = forms.windows(2).map(|pair| common(&pair[0], &pair[1])).sum();
    forms.iter().map(|form| form.len()).sum::<usize>() - shared
}

fn own(value: &[u8]) -> Form {
    Zeroizing::new(value.to_vec())
}

/// The value with other line ends.
fn joined(value: &[u8], end: &[u8]) -> Form {
    Zeroizing::new(bare_lines(value).collect::<Vec<_>>().join(end))
}

fn bare_lines(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line))
}

/// The lines of a text that are looked for by themselves: not the frames of PEM files, which say nothing and are in
/// every log.
fn lines(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    let is_frame = |line: &[u8]| line.starts_with(b"-----BEGIN ") || line.starts_with(b"-----END ");
    let text = str::from_utf8(value).unwrap_or_default();
    bare_lines(text.as_bytes())
        .map(<[u8]>::trim_ascii)
        .filter(move |line| line.len() < value.len() && line.len() >= MIN_LINE && !is_frame(line))
}

/// Line lengths of programs that break base64: base64(1) and MIME have 76, openssl and PEM 64.
const WRAPS: [usize; 2] = [76, 64];

/// The value in base64: in both alphabets, at the end of the encoded text with and without padding, and in the middle
/// of one.
///
/// Three bytes become four characters, so a value has three encodings, by the number of bytes before it. Within a text
/// those characters count that say nothing about its neighbours.
fn base64(value: &[u8]) -> Vec<Form> {
    let mut forms = Vec::new();
    for (engine, unpadded) in [
        (general_purpose::STANDARD, general_purpose::STANDARD_NO_PAD),
        (general_purpose::URL_SAFE, general_purpose::URL_SAFE_NO_PAD),
    ] {
        for before in 0..3 {
            let text = Zeroizing::new([&[0; 2][..before], value].concat());
            let first = (before * 8).div_ceil(6);
            let inner = text.len() * 8 / 6;
            let padded = Zeroizing::new(engine.encode(&*text).into_bytes());
            let bare = unpadded.encode(&*text).len();
            for end in [inner, bare, padded.len()] {
                forms.push(own(&padded[first..end]));
            }
            if before == 0 {
                let wrapped = |width| [inner, padded.len()].map(|end| wrap(&padded[..end], width));
                forms.extend(WRAPS.into_iter().flat_map(wrapped));
            }
        }
    }
    forms
}

fn wrap(text: &[u8], width: usize) -> Form {
    Zeroizing::new(text.chunks(width).collect::<Vec<_>>().join(&b'\n'))
}

/// A way to percent-encode.
struct Percent {
    /// What stays besides letters and digits.
    kept: &'static [u8],
    space: &'static [u8],
    digits: &'static [u8; 16],
}

const UPPER: &[u8; 16] = b"0123456789ABCDEF";
const LOWER: &[u8; 16] = b"0123456789abcdef";

const PERCENT: [Percent; 10] = [
    Percent { kept: b"-._~", space: b"%20", digits: UPPER }, // RFC 3986 section 2.3
    Percent { kept: b"-._~", space: b"%20", digits: LOWER },
    Percent { kept: b"-._~", space: b"+", digits: UPPER }, // Go's QueryEscape
    Percent { kept: b"-._~", space: b"+", digits: LOWER },
    Percent { kept: b"*-._", space: b"+", digits: UPPER }, // forms in browsers, Java's URLEncoder
    Percent { kept: b"!()*-._", space: b"+", digits: LOWER }, // .NET's UrlEncode
    Percent { kept: b"!'()*-._~", space: b"%20", digits: UPPER }, // JavaScript's encodeURIComponent
    Percent { kept: b"/-._~", space: b"%20", digits: UPPER }, // Python's quote
    Percent { kept: b"$&+,;=-._~", space: b"%20", digits: UPPER }, // a password in Go's URLs
    Percent { kept: b"!$&'()*+,;=-._~", space: b"%20", digits: UPPER }, // a password in RFC 3986 section 3.2.1
];

impl Percent {
    fn encode(&self, text: &[u8]) -> Form {
        let mut form = with_capacity(3 * text.len());
        for byte in text {
            match byte {
                b' ' => form.extend(self.space),
                byte if byte.is_ascii_alphanumeric() || self.kept.contains(byte) => form.push(*byte),
                byte => form.extend([b'%', self.digits[usize::from(byte >> 4)], self.digits[usize::from(byte & 15)]]),
            }
        }
        form
    }
}

/// A way to write the inside of a JSON string.
struct Json {
    /// ASCII characters written as `\u00XX` though nothing demands it.
    escaped: &'static [u8],
    /// Whether `/` becomes `\/`.
    slash: bool,
    /// Whether everything beyond ASCII is written as `\uXXXX`.
    ascii: bool,
    digits: &'static [u8; 16],
}

const JSON: [Json; 8] = [
    Json { escaped: b"", slash: false, ascii: false, digits: LOWER }, // serde_json, JSON.stringify, jq
    Json { escaped: b"", slash: false, ascii: false, digits: UPPER },
    Json { escaped: b"", slash: false, ascii: true, digits: LOWER }, // Python
    Json { escaped: b"", slash: false, ascii: true, digits: UPPER },
    Json { escaped: b"", slash: true, ascii: true, digits: LOWER }, // PHP
    Json { escaped: b"", slash: true, ascii: false, digits: LOWER },
    Json { escaped: b"<>&", slash: false, ascii: false, digits: LOWER }, // Go
    Json { escaped: b"\"&'+<>`", slash: false, ascii: true, digits: UPPER }, // .NET
];

impl Json {
    /// `None` for what is not text.
    fn encode(&self, text: &[u8]) -> Option<Form> {
        let text = str::from_utf8(text).ok()?;
        let mut form = with_capacity(6 * text.len()); // no character takes more per byte
        for letter in text.chars() {
            match u8::try_from(letter).ok().filter(u8::is_ascii) {
                Some(byte) => self.push_ascii(byte, &mut form),
                None if self.ascii => {
                    for unit in letter.encode_utf16(&mut [0; 2]) {
                        self.push_number(*unit, &mut form);
                    }
                }
                None => form.extend(letter.encode_utf8(&mut [0; 4]).bytes()),
            }
        }
        Some(form)
    }

    fn push_ascii(&self, byte: u8, form: &mut Form) {
        let short = match byte {
            _ if self.escaped.contains(&byte) => None,
            b'"' | b'\\' => Some(byte),
            b'/' if self.slash => Some(byte),
            b'\n' => Some(b'n'),
            b'\r' => Some(b'r'),
            b'\t' => Some(b't'),
            0x08 => Some(b'b'),
            0x0c => Some(b'f'),
            0..0x20 => None,
            _ => return form.push(byte),
        };
        match short {
            Some(letter) => form.extend([b'\\', letter]),
            None => self.push_number(u16::from(byte), form),
        }
    }

    fn push_number(&self, unit: u16, form: &mut Form) {
        form.extend(b"\\u");
        form.extend([12, 8, 4, 0].map(|shift| self.digits[usize::from(unit >> shift & 15)]));
    }
}

/// Never moved afterwards: what moves is not wiped.
fn with_capacity(most: usize) -> Form {
    Zeroizing::new(Vec::with_capacity(most))
}
