//! Output of a build made safe for a person's terminal: text, line breaks, tabs and colour, nothing else.

use super::{CSI, MAX_SGR, find, is_sgr_parameter};

/// Takes one stream's bytes, cut anywhere, and passes on what cannot drive a terminal.
///
/// What comes out is valid UTF-8 and does not depend on where the input was cut. Every push passes on whole characters
/// and whole colour sequences.
#[derive(Debug)]
pub(crate) struct Sanitizer {
    /// Whether colours are passed on.
    color: bool,
    state: State,
    /// Bytes of the current escape sequence, to give up at [`MAX_SEQUENCE`].
    length: usize,
    /// The start of a character, or of a control sequence that may yet be a colour; at most [`MAX_SGR`] bytes.
    held: Vec<u8>,
}

/// Where in the input the next byte is (ECMA-48, 5.3 to 5.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// In text, perhaps within a character.
    Text,
    /// After ESC.
    Escape,
    /// After ESC and an intermediate byte, as in `ESC ( B`.
    Intermediate,
    /// In a control sequence, after `ESC [`.
    Control,
    /// In a string: OSC, DCS, APC, PM, SOS.
    String,
}

impl Sanitizer {
    /// At the start of a stream; without `color`, colours are removed as well.
    pub(crate) fn new(color: bool) -> Self {
        Self { color, state: State::Text, length: 0, held: Vec::with_capacity(MAX_SGR) }
    }

    /// Appends to `out` what is safe in `bytes`.
    pub(crate) fn push(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        let mut rest = bytes;
        while let Some(&byte) = rest.first() {
            let used = match self.state {
                State::Text => self.text(byte, rest, out),
                State::Escape => self.escape(byte),
                State::Intermediate => self.intermediate(byte),
                State::Control => self.control(byte, out),
                State::String => self.string(rest),
            };
            rest = &rest[used..];
        }
    }

    /// Ends the stream: an unfinished character becomes U+FFFD, an unfinished sequence nothing.
    pub(crate) fn finish(&mut self, out: &mut Vec<u8>) {
        if self.state == State::Text && !self.held.is_empty() {
            out.extend_from_slice(REPLACEMENT);
        }
        self.leave(0);
    }

    /// Takes text up to the next control byte, or that byte. Says how many bytes it used, as do the methods for the
    /// other states: none when the sequence ends before `byte`.
    fn text(&mut self, byte: u8, rest: &[u8], out: &mut Vec<u8>) -> usize {
        if !self.held.is_empty() {
            return self.complete(byte, out);
        }
        let run = find(rest, is_control);
        if run > 0 {
            self.copy(&rest[..run], out);
            return run;
        }
        if byte == ESC {
            self.state = State::Escape;
        }
        1
    }

    /// Goes on with the character that the last push ended in.
    fn complete(&mut self, byte: u8, out: &mut Vec<u8>) -> usize {
        self.held.push(byte);
        let used = match str::from_utf8(&self.held) {
            Ok(text) => {
                copy_allowed(text, out);
                1
            }
            Err(error) if error.error_len().is_none() => return 1,
            Err(_) => {
                out.extend_from_slice(REPLACEMENT);
                0
            }
        };
        self.held.clear();
        used
    }

    /// Copies a run without control bytes. Its last character may be unfinished: what comes next decides.
    fn copy(&mut self, run: &[u8], out: &mut Vec<u8>) {
        if run.is_ascii() {
            return out.extend_from_slice(run);
        }
        let mut left = run.len();
        for chunk in run.utf8_chunks() {
            copy_allowed(chunk.valid(), out);
            left -= chunk.valid().len() + chunk.invalid().len();
            if left == 0 && is_unfinished(chunk.invalid()) {
                self.held.extend_from_slice(chunk.invalid());
            } else if !chunk.invalid().is_empty() {
                out.extend_from_slice(REPLACEMENT);
            }
        }
    }

    /// Takes the byte that says what kind of sequence this is.
    fn escape(&mut self, byte: u8) -> usize {
        self.state = match byte {
            b'[' => {
                self.held.extend_from_slice(CSI);
                State::Control
            }
            // `ESC k` starts a title in screen and tmux
            b']' | b'P' | b'X' | b'^' | b'_' | b'k' => State::String,
            b' '..=b'/' => State::Intermediate,
            b'0'..=b'~' => return self.leave(1),
            _ => return self.leave(0),
        };
        1
    }

    /// Takes a byte on the way to the final one.
    fn intermediate(&mut self, byte: u8) -> usize {
        match byte {
            b' '..=b'/' => self.stay(1),
            b'0'..=b'~' => self.leave(1),
            _ => self.leave(0),
        }
    }

    /// Takes a byte of a control sequence.
    fn control(&mut self, byte: u8, out: &mut Vec<u8>) -> usize {
        match byte {
            b' '..=b'?' => {
                self.hold_parameter(byte);
                self.stay(1)
            }
            b'm' => {
                self.pass_color(out);
                self.leave(1)
            }
            b'@'..=b'~' => self.leave(1),
            _ => self.leave(0),
        }
    }

    /// Keeps a possible colour together; an empty `held` means that it is none.
    fn hold_parameter(&mut self, byte: u8) {
        if self.held.is_empty() {
            return;
        }
        if is_sgr_parameter(byte) && self.held.len() < MAX_SGR - 1 {
            self.held.push(byte);
        } else {
            self.held.clear();
        }
    }

    /// Passes on a sequence that ends in `m`, if it is a colour.
    fn pass_color(&mut self, out: &mut Vec<u8>) {
        if self.color && !self.held.is_empty() {
            self.held.push(b'm');
            out.extend_from_slice(&self.held);
        }
    }

    /// A string ends with ST (`ESC \`) or BEL. It also ends at a line feed: one that nobody closes costs a line.
    fn string(&mut self, rest: &[u8]) -> usize {
        let room = rest.len().min(MAX_SEQUENCE - self.length);
        let run = find(&rest[..room], |byte| matches!(byte, BEL | b'\n' | CAN | SUB | ESC));
        if run < room { self.leave(run) } else { self.stay(run) }
    }

    /// The sequence goes on after `used` more bytes, unless it is too long to be one.
    fn stay(&mut self, used: usize) -> usize {
        self.length += used;
        if self.length >= MAX_SEQUENCE { self.leave(used) } else { used }
    }

    /// The sequence ends after `used` more bytes.
    fn leave(&mut self, used: usize) -> usize {
        self.state = State::Text;
        self.length = 0;
        self.held.clear();
        used
    }
}

/// Copies text without what is invisible and acts on what is visible.
fn copy_allowed(text: &str, out: &mut Vec<u8>) {
    text.split(is_forbidden).for_each(|piece| out.extend_from_slice(piece.as_bytes()));
}

/// C1 controls, which some terminals obey in this form too, and what reorders text on the screen: the line a person
/// reads would not be the line that was written.
fn is_forbidden(char: char) -> bool {
    matches!(char, '\u{80}'..='\u{9f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// C0 controls and DEL, but for those that lay text out.
fn is_control(byte: u8) -> bool {
    (byte < b' ') & (byte != b'\n') & (byte != b'\t') & (byte != b'\r') | (byte == DEL)
}

/// Whether more bytes could make this a character.
fn is_unfinished(invalid: &[u8]) -> bool {
    str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none())
}

/// Ends a string, as xterm has it.
const BEL: u8 = 0x07;
/// Aborts a sequence.
const CAN: u8 = 0x18;
/// Aborts a sequence.
const SUB: u8 = 0x1a;
/// Starts a sequence.
const ESC: u8 = 0x1b;
/// Deletes nothing on a terminal.
const DEL: u8 = 0x7f;

/// U+FFFD, in the place of bytes that are not UTF-8.
const REPLACEMENT: &[u8] = "\u{fffd}".as_bytes();

/// Longest escape sequence that is believed to be one: titles and links are far shorter, and when nothing ends it, this
/// much of the log is lost. What follows is text.
const MAX_SEQUENCE: usize = 4 << 10;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What comes in and what goes out, with colour.
    const CASES: &[(&[u8], &str)] = &[
        // text
        (b"", ""),
        (b"plain text\n\tcolumns\r\n", "plain text\n\tcolumns\r\n"),
        ("h\u{e9}llo \u{65e5}\u{672c} \u{1f680}".as_bytes(), "h\u{e9}llo \u{65e5}\u{672c} \u{1f680}"),
        (b"10%\r20%\r", "10%\r20%\r"),
        (b"a\0b\x07c\x08d\x0be\x0cf\x0eg\x7fh\x05", "abcdefgh"),
        // colour
        (b"\x1b[31mred\x1b[0m \x1b[m", "\x1b[31mred\x1b[0m \x1b[m"),
        (b"\x1b[1;38;2;255;0;0m\x1b[4:3m", "\x1b[1;38;2;255;0;0m\x1b[4:3m"),
        (b"a\x1b[>4;2mb\x1b[?1mc\x1b[1 md", "abcd"),
        (b"a\x1b[\x1b[31mb", "a\x1b[31mb"),
        // control sequences
        (b"a\x1b[2Jb\x1b[1;1Hc\x1b[Kd\x1b[8De", "abcde"),
        (b"a\x1b[?1049hb\x1b[?25lc\x1b[6nd\x1b[!pe\x1b[200~f", "abcdef"),
        (b"a\x1b[1;2\nb", "a\nb"),
        (b"a\x1b[31\x07mb", "amb"),
        ("a\x1b[3\u{e9}b".as_bytes(), "a\u{e9}b"),
        (b"a\x1b[31\x18mb\x1b[31\x1amc", "ambmc"),
        (b"a\x1b[12", "a"),
        // strings
        (b"a\x1b]0;title\x07b\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "ablink"),
        (b"a\x1b]52;c;ZXZpbA==\x07b", "ab"),
        (b"a\x1bPq#0;2;0;0;0~-\x1b\\b\x1b_Gi=1;AAAA\x1b\\c\x1b^pm\x1b\\d\x1bXsos\x1b\\e", "abcde"),
        (b"a\x1bktmux title\x1b\\b", "ab"),
        (b"a\x1b]0;\xff\xc2\x9c\xe9 title\x07b", "ab"),
        (b"a\x1b]0;never closed\nb", "a\nb"),
        (b"a\x1b]0;cancelled\x18b\x1bPsubstituted\x1ac", "abc"),
        (b"a\x1b]0;title\x1b[31mb", "a\x1b[31mb"),
        (b"a\x1b]0;title\x1b", "a"),
        (b"a\x1bPtmux;\x1b\x1b]52;c;eA==\x07\x1b\\b", "ab"),
        // other escapes
        (b"a\x1b(Bb\x1b)0c\x1b#8d\x1b%Ge\x1b Ff", "abcdef"),
        (b"a\x1b7b\x1b8c\x1bcd\x1b=e\x1b>f\x1bMg\x1bNh", "abcdefgh"),
        (b"a\x1b\x1b[31mb", "a\x1b[31mb"),
        (b"a\x1b\nb\x1b(\nc", "a\nb\nc"),
        ("a\x1b\u{e9}b".as_bytes(), "a\u{e9}b"),
        (b"a\x1b\x7f[31mb", "a[31mb"),
        (b"a\x1b", "a"),
        // C1 in both forms
        (b"a\x9b31mb\x9d0;title\x07c\x90q\x9cd", "a\u{fffd}31mb\u{fffd}0;titlec\u{fffd}q\u{fffd}d"),
        ("a\u{9b}31mb\u{85}c\u{9d}0;t\u{9c}d\u{80}\u{9f}".as_bytes(), "a31mbc0;td"),
        // not UTF-8
        (b"a\xffb\xc3(c\xe2\x82", "a\u{fffd}b\u{fffd}(c\u{fffd}"),
        (
            b"\xf0\x90\x80\xed\xa0\x80\xc0\xaf\xf4\x90\x80\x80",
            "\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}",
        ),
        (b"\xe2\x82\x1b[31m\xe2\x82\n", "\u{fffd}\x1b[31m\u{fffd}\n"),
        // order of text
        ("if admin\u{202e} \u{2066}// check\u{2069} \u{2066}begin\u{202c}".as_bytes(), "if admin // check begin"),
        ("\u{202a}\u{202b}\u{202d}\u{2067}\u{2068}\u{200f}\u{2065}\u{206a}".as_bytes(), "\u{200f}\u{2065}\u{206a}"),
    ];

    #[test]
    fn hostile_input_comes_out_safe() {
        for (input, output) in CASES {
            assert_eq!(sanitize(true, &[input]), *output, "from {:?}", input.escape_ascii().to_string());
            check_safe(output);
        }
    }

    #[test]
    fn every_cut_gives_the_same() {
        for (input, output) in CASES {
            let single: Vec<_> = input.chunks(1).collect();
            assert_eq!(sanitize(true, &single), *output);
            for at in 0..input.len() {
                let (head, tail) = input.split_at(at);
                assert_eq!(
                    sanitize(true, &[head, tail]),
                    *output,
                    "cut at {at} of {:?}",
                    input.escape_ascii().to_string()
                );
            }
        }
    }

    #[test]
    fn without_colour_there_is_none() {
        for (input, output) in CASES {
            assert_eq!(sanitize(false, &[input]), without_color(output));
        }
    }

    #[test]
    fn a_sequence_is_removed_up_to_the_limit() {
        for (start, end) in [("\x1b]", "\x07"), ("\x1bP", "\x1b\\"), ("\x1b[", "m"), ("\x1b[", "H")] {
            let at_limit = format!("a{start}{}{end}b", "1".repeat(MAX_SEQUENCE - 1));
            assert_eq!(sanitize(true, &[at_limit.as_bytes()]), "ab");
            let beyond = format!("a{start}{}text{end}", "1".repeat(MAX_SEQUENCE));
            assert!(sanitize(true, &[beyond.as_bytes()]).starts_with("atext"));
        }
    }

    #[test]
    fn the_limit_is_for_one_sequence_not_for_all() {
        let sequences = "\x1b]0;title\x07\x1b(B\x1b[2K".repeat(MAX_SEQUENCE);
        assert_eq!(sanitize(true, &[sequences.as_bytes()]), "");
    }

    #[test]
    fn a_string_that_nobody_closes_costs_a_line_or_the_limit() {
        let text = "line\n".repeat(10_000);
        assert_eq!(sanitize(true, &[b"\x1b]0;", text.as_bytes()]), text.split_at(4).1);
        let text = "x".repeat(10_000);
        assert_eq!(sanitize(true, &[b"\x1b]", text.as_bytes()]), text.split_at(MAX_SEQUENCE).1);
        let blanks = " ".repeat(10_000);
        assert_eq!(sanitize(true, &[b"\x1b(", blanks.as_bytes()]), blanks.split_at(MAX_SEQUENCE).1);
    }

    #[test]
    fn a_colour_is_passed_on_up_to_its_limit() {
        for (length, passes) in [(MAX_SGR, true), (MAX_SGR + 1, false)] {
            let color = format!("\x1b[{}m", "1".repeat(length - 3));
            assert_eq!(sanitize(true, &[color.as_bytes()]), if passes { &*color } else { "" });
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_come_out_safe_however_they_are_cut(chunks in chunks()) {
            let chunks: Vec<&[u8]> = chunks.iter().map(Vec::as_slice).collect();
            let output = sanitize(true, &chunks);
            check_safe(&output);
            prop_assert_eq!(&output, &sanitize(true, &[&chunks.concat()]));
            prop_assert_eq!(sanitize(false, &chunks), without_color(&output));
        }

        #[test]
        fn what_is_safe_stays_as_it_is(chunks in chunks()) {
            let output = sanitize(true, &[&chunks.concat()]);
            prop_assert_eq!(&sanitize(true, &[output.as_bytes()]), &output);
        }

        #[test]
        fn ordinary_text_is_not_touched(text in "[ -~\n\r\t\u{a0}-\u{2029}\u{2070}-\u{d7ff}\u{e000}-\u{10ffff}]*") {
            prop_assert_eq!(sanitize(true, &[text.as_bytes()]), text);
        }

        #[test]
        fn text_around_a_sequence_survives(parameters in "[0-?]{0,99}", body in "[ -~\u{a0}-\u{10ffff}\r\t]{0,999}") {
            for sequence in [
                format!("\x1b[{parameters}H"),
                format!("\x1b[{parameters}$r"),
                format!("\x1b]{body}\x07"),
                format!("\x1b_{body}\x1b\\"),
            ] {
                prop_assert_eq!(sanitize(true, &[format!("before{sequence}after").as_bytes()]), "beforeafter");
            }
        }
    }

    fn sanitize(color: bool, chunks: &[&[u8]]) -> String {
        let (mut sanitizer, mut out) = (Sanitizer::new(color), Vec::new());
        for chunk in chunks {
            sanitizer.push(chunk, &mut out);
            assert!(sanitizer.held.len() <= MAX_SGR && sanitizer.held.capacity() == MAX_SGR);
            assert!(str::from_utf8(&out).is_ok(), "a push ended within a character");
        }
        sanitizer.finish(&mut out);
        String::from_utf8(out).unwrap()
    }

    fn check_safe(output: &str) {
        let text = without_color(output);
        let unsafe_char = text.chars().find(|&char| {
            char.is_control() && !"\n\t\r".contains(char)
                || "\u{202a}\u{202b}\u{202c}\u{202d}\u{202e}\u{2066}\u{2067}\u{2068}\u{2069}".contains(char)
        });
        assert_eq!(unsafe_char, None, "in {output:?}");
    }

    /// Removes complete SGR sequences and nothing else.
    fn without_color(text: &str) -> String {
        let mut pieces = text.split("\x1b[");
        let mut rest = pieces.next().unwrap().to_owned();
        for piece in pieces {
            let (parameters, after) = piece.split_once('m').expect("an SGR sequence that ends");
            assert!(parameters.len() <= 61 && parameters.chars().all(|char| "0123456789;:".contains(char)));
            rest += after;
        }
        rest
    }

    /// Arbitrary bytes, and the ingredients of sequences more often than chance has them.
    fn chunks() -> impl Strategy<Value = Vec<Vec<u8>>> {
        let special = proptest::sample::select(
            b"\x1b\x1b\x1b[[[]]PX^_k\\\x07\x18\x1a;:0123mH?( \n\r\t\x9b\x9c\xc2\xe2\x80\xaa\xae\xa6\x7f",
        );
        let byte = prop_oneof![3 => special, 1 => any::<u8>()];
        proptest::collection::vec(proptest::collection::vec(byte, 0..12), 0..24)
    }
}
