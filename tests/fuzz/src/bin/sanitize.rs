//! A build's output on its way to a terminal: nothing but text, its layout and colour gets through, however the bytes
//! are cut, and no line is lost.

#![no_main]

use libfuzzer_sys::fuzz_target;
use phonehome_fuzz::Input;
use phonehome_server::fuzzing::sanitize;

/// Longest colour that is passed on.
const MAX_SGR: usize = 64;

fuzz_target!(|input: &[u8]| {
    let mut input = Input::new(input);
    let lengths = input.bytes(4);
    let bytes = input.rest();
    let whole = sanitize(true, [bytes]);
    let text = str::from_utf8(&whole).expect("text");
    assert_eq!(sanitize(true, pieces(bytes, lengths)), whole, "a cut shows");
    let plain = without_color(text);
    assert_eq!(sanitize(false, [bytes]), plain.as_bytes(), "colour is not all that it costs to have none");
    assert_eq!(sanitize(true, [&*whole]), whole, "what is safe is changed");
    assert!(whole.len() <= 3 * bytes.len(), "more than a replacement for each byte");
    let line_feeds = |bytes: &[u8]| bytes.iter().filter(|&&byte| byte == b'\n').count();
    assert_eq!(line_feeds(&whole), line_feeds(bytes), "a line is lost");
    if let Some(bad) = plain.chars().find(|&char| drives_a_terminal(char)) {
        panic!("{bad:?} gets through");
    }
});

/// Cuts the bytes into pieces of these lengths, again and again.
fn pieces<'a>(mut bytes: &'a [u8], lengths: &[u8]) -> Vec<&'a [u8]> {
    let mut pieces = Vec::new();
    let mut lengths = lengths.iter().cycle().map(|&length| 1 + usize::from(length));
    while !bytes.is_empty() {
        let (piece, rest) = bytes.split_at(lengths.next().unwrap_or(1).min(bytes.len()));
        pieces.push(piece);
        bytes = rest;
    }
    pieces
}

/// Removes complete colours and nothing else.
fn without_color(text: &str) -> String {
    let mut pieces = text.split("\x1b[");
    let mut plain = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let (parameters, after) = piece.split_once('m').expect("a colour that ends");
        assert!(parameters.len() + 3 <= MAX_SGR, "a colour of {} bytes", parameters.len() + 3);
        assert!(parameters.bytes().all(|byte| byte.is_ascii_digit() || byte == b';' || byte == b':'), "{parameters:?}");
        plain += after;
    }
    plain
}

/// Controls but for those that lay text out, and what reorders it.
fn drives_a_terminal(char: char) -> bool {
    char.is_control() && !matches!(char, '\n' | '\r' | '\t')
        || matches!(char, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}
