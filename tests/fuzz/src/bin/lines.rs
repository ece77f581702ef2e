//! A build's output as a person sees it in the end, in a terminal and through git: every line in its last state, in
//! order, whatever was drawn in between, and whenever.

#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use phonehome_fuzz::Input;
use phonehome_server::fuzzing::{SafeForm, leaves_color, sanitize};

/// A line of more than this may be torn where its carriage returns are.
const SHORT: usize = 7000;

/// What git's client puts before each line.
const REMOTE: &str = "remote: ";

/// Clears to the end of the row.
const ERASE: &str = "\x1b[K";

fuzz_target!(|input: &[u8]| {
    let mut input = Input::new(input);
    let flags = input.byte();
    let (sideband, prefix) = (flags & 1 != 0, if flags & 2 != 0 { "[t] " } else { "" });
    let interrupted = flags & 4 != 0;
    let repeat = if flags >> 4 == 15 { 16 } else { 1 }; // lines that are too long to keep
    let pattern = input.bytes(6);
    let bytes = input.rest().repeat(repeat);

    let text = sanitize(true, [&*bytes]);
    let text = str::from_utf8(&text).expect("text");
    let mut show = Show { form: SafeForm::new(true, sideband, prefix), sideband, screen: Screen::default() };
    let mut rest = &bytes[..];
    let mut pattern = pattern.iter().cycle();
    let mut next = || usize::from(pattern.next().copied().unwrap_or(255));
    while !rest.is_empty() {
        let (piece, after) = rest.split_at((1 + next() * repeat).min(rest.len()));
        show.call(piece.len(), |form, out| form.push(piece, out));
        rest = after;
        let pause = Duration::from_millis(8 * next() as u64);
        show.call(0, |form, out| form.wait(pause, out));
        if interrupted && next() & 1 != 0 {
            show.call(0, SafeForm::interrupt);
        }
    }
    show.call(0, SafeForm::finish);
    let rows = show.rows(prefix);
    if interrupted {
        // Others tear lines. What was never overwritten is still all there, and in order.
        if !text.contains('\r') {
            assert_eq!(rows.concat(), expected(text).concat());
        }
    } else if text.len() <= SHORT || !text.contains('\r') {
        assert_eq!(rows, expected(text));
    }
});

/// The safe form, and what displays it.
struct Show {
    form: SafeForm,
    sideband: bool,
    screen: Screen,
}

impl Show {
    fn call(&mut self, pushed: usize, call: impl FnOnce(&mut SafeForm, &mut Vec<u8>)) {
        let mut out = Vec::new();
        call(&mut self.form, &mut out);
        assert!(out.len() <= (32 << 10) + (pushed << 10), "{pushed} bytes became {}", out.len());
        assert!(!leaves_color(&out), "a colour is left open");
        let out = String::from_utf8(out).expect("whole characters");
        if self.sideband { self.git(&out) } else { self.screen.write(&out) }
    }

    /// What git's client does with the sideband (sideband.c, `demultiplex_sideband`), before 2.55. It shows text when
    /// its end has arrived.
    fn git(&mut self, out: &str) {
        self.screen.partial += out;
        while let Some(end) = self.screen.partial.find(['\r', '\n']) {
            let rest = self.screen.partial.split_off(end + 1);
            let shown = std::mem::replace(&mut self.screen.partial, rest);
            let (text, end) = shown.split_at(end);
            let erase = if text.is_empty() { "" } else { ERASE };
            self.screen.write(&format!("{REMOTE}{text}{erase}{end}"));
        }
    }

    /// The rows in the end, without what comes before each line.
    fn rows(mut self, prefix: &str) -> Vec<String> {
        let last = self.screen.rows.pop().expect("one is never empty");
        assert!(last.is_empty() && self.screen.partial.is_empty(), "the last line does not end");
        let before = if self.sideband { REMOTE.to_owned() + prefix } else { prefix.to_owned() };
        let rows = self.screen.rows.into_iter().map(String::from_iter);
        rows.map(|row| row.strip_prefix(&before).expect("a prefix").to_owned()).collect()
    }
}

/// A terminal of endless size that knows `\r`, `\n`, ESC[K and that a colour shows nothing.
struct Screen {
    rows: Vec<Vec<char>>,
    column: usize,
    /// What git holds back.
    partial: String,
}

impl Default for Screen {
    fn default() -> Self {
        Self { rows: vec![Vec::new()], column: 0, partial: String::new() }
    }
}

impl Screen {
    fn write(&mut self, text: &str) {
        let mut rest = text;
        while let Some(char) = rest.chars().next() {
            let mut used = char.len_utf8();
            let row = self.rows.last_mut().expect("one is never empty");
            match char {
                '\r' => self.column = 0,
                '\n' => {
                    self.column = 0;
                    self.rows.push(Vec::new());
                }
                '\x1b' if rest.starts_with(ERASE) => {
                    row.truncate(self.column);
                    used = ERASE.len();
                }
                '\x1b' => {
                    used = 1 + rest.find('m').expect("a colour");
                    let parameters = rest[..used - 1].strip_prefix("\x1b[").expect("a colour");
                    assert!(parameters.bytes().all(|byte| b"0123456789;:".contains(&byte)), "{parameters:?}");
                }
                _ => {
                    assert!(char == '\t' || !char.is_control(), "{char:?} gets through");
                    if self.column < row.len() {
                        row[self.column] = char;
                    } else {
                        row.push(char);
                    }
                    self.column += 1;
                }
            }
            rest = &rest[used..];
        }
    }
}

/// The lines that a person should have read in the end.
fn expected(text: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for line in text.split_inclusive('\n') {
        let states = line.strip_suffix('\n').unwrap_or(line).split('\r');
        let last = states.map(plain).rfind(|state| !state.is_empty()).unwrap_or_default();
        if line.ends_with('\n') || !last.is_empty() {
            lines.push(last);
        }
    }
    lines
}

/// Without colours.
fn plain(text: &str) -> String {
    let mut pieces = text.split("\x1b[");
    let mut plain = pieces.next().unwrap_or_default().to_owned();
    pieces.filter_map(|piece| piece.split_once('m')).for_each(|(_, after)| plain += after);
    plain
}
