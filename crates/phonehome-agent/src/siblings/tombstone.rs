//! What stands on a tombstone: a small YAML mapping with the keys of kubexit, and some more that it ignores.
//!
//! ```yaml
//! Born: "2026-11-21T08:58:44.123456Z"
//! Died: "2026-11-21T09:02:01.000001Z"
//! ExitCode: 143
//! Ready: "2026-11-21T08:58:45.000000Z"
//! Signal: "SIGTERM"
//! Reason: "main has died"
//! Attempt: 2
//! Generation: "6f0e…"
//! ```
//!
//! kubexit (v0.3, `pkg/tombstone`) writes the first three in this form, a time always quoted, and truncates the file
//! before it writes: a reader may meet an empty or a torn one. It reads with `sigs.k8s.io/yaml`, which ignores keys that
//! it does not know and the case of those that it does.

use std::fmt::{self, Write as _};

/// The life of a command, as far as it has come. An empty one says nothing yet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Tombstone {
    /// When it was started, RFC 3339.
    pub(crate) born: Option<String>,
    /// When it ended, or was given up before its start. Whoever is born again is born without.
    pub(crate) died: Option<String>,
    /// Its exit code; kubexit writes -1 for the end by a signal.
    pub(crate) exit_code: Option<i64>,
    /// When its readiness probe first passed.
    pub(crate) ready: Option<String>,
    /// The signal that ended it: `SIGKILL`.
    pub(crate) signal: Option<String>,
    /// Why it was ended or never started, for people.
    pub(crate) reason: Option<String>,
    /// How many lives it has had in this graveyard, this one included.
    pub(crate) attempt: Option<u32>,
    /// Which generation of siblings it belongs to.
    pub(crate) generation: Option<String>,
}

/// Why a text is no tombstone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Garbage {
    /// The value of a key that matters cannot be read.
    #[error("line {line}: {key} is not {expected}")]
    BadValue {
        /// Counted from 1.
        line: usize,
        /// As this program writes it.
        key: &'static str,
        /// What should be there.
        expected: &'static str,
    },
    /// A line is not `Key: value`.
    #[error("line {0} is not `Key: value`")]
    NotAMapping(usize),
    /// It is not even text.
    #[error("it is not UTF-8 text")]
    NotText,
}

const BORN: &str = "Born";
const DIED: &str = "Died";
const EXIT_CODE: &str = "ExitCode";
const READY: &str = "Ready";
const SIGNAL: &str = "Signal";
const REASON: &str = "Reason";
const ATTEMPT: &str = "Attempt";
const GENERATION: &str = "Generation";

impl Tombstone {
    /// Reads a file's contents. A last line without its end is taken only if it is certainly whole.
    ///
    /// # Errors
    ///
    /// When it is not a tombstone, whole or torn.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Garbage> {
        let text = std::str::from_utf8(bytes).map_err(|_| Garbage::NotText)?;
        let (whole, torn) = text.rsplit_once('\n').unwrap_or(("", text));
        let mut stone = Self::default();
        let mut has_key = false;
        for (at, line) in whole.lines().enumerate() {
            if has_key && line.starts_with([' ', '\t', '-']) && line != DOCUMENT_START {
                continue; // belongs to a key that was not understood
            }
            has_key |= stone.read_line(at + 1, line)?;
        }
        stone.read_torn(torn);
        Ok(stone)
    }

    /// Whether there was a key.
    fn read_line(&mut self, number: usize, line: &str) -> Result<bool, Garbage> {
        let content = line.trim();
        if content.is_empty() || content.starts_with('#') || [DOCUMENT_START, DOCUMENT_END, EMPTY].contains(&content) {
            return Ok(false);
        }
        let (key, value) = line.split_once(':').ok_or(Garbage::NotAMapping(number))?;
        if key.starts_with([' ', '\t', '-']) || !(value.is_empty() || value.starts_with([' ', '\t'])) {
            return Err(Garbage::NotAMapping(number));
        }
        self.set(key.trim(), value).map_err(|(key, expected)| Garbage::BadValue { line: number, key, expected })?;
        Ok(true)
    }

    fn read_torn(&mut self, line: &str) {
        let mut read = self.clone();
        if line.trim_end().ends_with(['"', '\'', 'Z']) && read.read_line(0, line).is_ok() {
            *self = read;
        }
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), (&'static str, &'static str)> {
        let is = |name: &str| key.eq_ignore_ascii_case(name);
        let time = |key| {
            let text = scalar(value).filter(|text| text.as_deref().is_none_or(is_time));
            text.ok_or((key, "a time such as \"2026-11-21T08:58:44Z\""))
        };
        let text = |key| scalar(value).ok_or((key, "a text"));
        if is(BORN) {
            self.born = time(BORN)?;
        } else if is(DIED) {
            self.died = time(DIED)?;
        } else if is(READY) {
            self.ready = time(READY)?;
        } else if is(EXIT_CODE) {
            self.exit_code = number(value).ok_or((EXIT_CODE, A_NUMBER))?;
        } else if is(ATTEMPT) {
            self.attempt = number(value).ok_or((ATTEMPT, A_NUMBER))?;
        } else if is(SIGNAL) {
            self.signal = text(SIGNAL)?;
        } else if is(REASON) {
            self.reason = text(REASON)?;
        } else if is(GENERATION) {
            self.generation = text(GENERATION)?;
        }
        Ok(())
    }
}

const DOCUMENT_START: &str = "---";
const DOCUMENT_END: &str = "...";
/// How kubexit's library writes a mapping without keys.
const EMPTY: &str = "{}";
const A_NUMBER: &str = "a number";

impl fmt::Display for Tombstone {
    /// As it is carved, in the order of the module's example.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::default() {
            return writeln!(f, "{EMPTY}");
        }
        let texts = |f: &mut fmt::Formatter<'_>, lines: &[(&str, &Option<String>)]| {
            let mut set = lines.iter().filter_map(|(key, value)| Some((key, value.as_deref()?)));
            set.try_for_each(|(key, value)| writeln!(f, "{key}: {}", Quoted(value)))
        };
        texts(f, &[(BORN, &self.born), (DIED, &self.died)])?;
        if let Some(code) = self.exit_code {
            writeln!(f, "{EXIT_CODE}: {code}")?;
        }
        texts(f, &[(READY, &self.ready), (SIGNAL, &self.signal), (REASON, &self.reason)])?;
        if let Some(attempt) = self.attempt {
            writeln!(f, "{ATTEMPT}: {attempt}")?;
        }
        texts(f, &[(GENERATION, &self.generation)])
    }
}

/// A double-quoted scalar on one line. Everything that some reader of YAML may not take as it is becomes an escape.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        for c in self.0.chars() {
            match c {
                '"' | '\\' => write!(f, "\\{c}")?,
                ' '..='~' => f.write_char(c)?,
                _ if c.is_alphanumeric() => f.write_char(c)?,
                _ => write!(f, "\\U{:08x}", u32::from(c))?,
            }
        }
        f.write_char('"')
    }
}

/// The value of a line; the outer `None` says that it cannot be read, the inner that it is null.
#[expect(clippy::option_option, reason = "null is a value, and no error")]
fn scalar(value: &str) -> Option<Option<String>> {
    let value = value.trim();
    if let Some(quoted) = value.strip_prefix('"') {
        return double_quoted(quoted).map(Some);
    }
    if let Some(quoted) = value.strip_prefix('\'') {
        return single_quoted(quoted).map(Some);
    }
    let plain = value.split(" #").next().unwrap_or_default().trim();
    let is_null = plain.is_empty() || plain.starts_with('#') || plain == "~" || plain.eq_ignore_ascii_case("null");
    Some((!is_null).then(|| plain.to_owned()))
}

fn double_quoted(text: &str) -> Option<String> {
    let mut out = String::new();
    let mut chars = text.chars();
    loop {
        match chars.next()? {
            '"' => break,
            '\\' => out.push(escaped(&mut chars)?),
            c => out.push(c),
        }
    }
    ends(chars.as_str()).then_some(out)
}

/// The escapes of YAML 1.2, section 5.7, but for those that no program writes.
fn escaped(chars: &mut std::str::Chars<'_>) -> Option<char> {
    let digits = match chars.next()? {
        c @ ('"' | '\\' | '/' | ' ') => return Some(c),
        'n' => return Some('\n'),
        't' => return Some('\t'),
        'r' => return Some('\r'),
        '0' => return Some('\0'),
        'a' => return Some('\x07'),
        'b' => return Some('\x08'),
        'e' => return Some('\x1b'),
        'N' => return Some('\u{85}'),
        '_' => return Some('\u{a0}'),
        'L' => return Some('\u{2028}'),
        'P' => return Some('\u{2029}'),
        'x' => 2,
        'u' => 4,
        'U' => 8,
        _ => return None,
    };
    let mut code = 0u32;
    for _ in 0..digits {
        code = code.checked_mul(16)? + chars.next()?.to_digit(16)?;
    }
    char::from_u32(code)
}

fn single_quoted(text: &str) -> Option<String> {
    let mut out = String::new();
    let mut rest = text;
    loop {
        let (part, after) = rest.split_once('\'')?;
        out.push_str(part);
        let Some(more) = after.strip_prefix('\'') else { return ends(after).then_some(out) };
        out.push('\'');
        rest = more;
    }
}

/// Whether nothing but a comment follows.
fn ends(rest: &str) -> bool {
    rest.trim().is_empty() || rest.starts_with([' ', '\t']) && rest.trim_start().starts_with('#')
}

#[expect(clippy::option_option, reason = "null is a value, and no error")]
fn number<N: std::str::FromStr>(value: &str) -> Option<Option<N>> {
    scalar(value)?.map(|text| text.parse().ok()).map_or(Some(None), |number| number.map(Some))
}

/// Whether a text has the form of a time in RFC 3339, section 5.6.
fn is_time(text: &str) -> bool {
    let Some((date, rest)) = text.split_at_checked("0000-00-00T00:00:00".len()) else { return false };
    let zone = match rest.strip_prefix('.') {
        Some(fraction) if fraction.starts_with(|c: char| c.is_ascii_digit()) => {
            fraction.trim_start_matches(|c: char| c.is_ascii_digit())
        }
        Some(_) => return false,
        None => rest,
    };
    has_form(date, "0000-00-00T00:00:00") && (zone == "Z" || has_form(zone, "+00:00") || has_form(zone, "-00:00"))
}

/// Whether a text is like another, with any digit in place of `0`.
fn has_form(text: &str, form: &str) -> bool {
    let like = |(c, like): (u8, u8)| if like == b'0' { c.is_ascii_digit() } else { c == like };
    text.len() == form.len() && text.bytes().zip(form.bytes()).all(like)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As kubexit writes them: `sigs.k8s.io/yaml` over `{"Born": …, "Died": …, "ExitCode": …}`.
    const KUBEXIT_BORN: &str = "Born: \"2026-11-21T08:58:44.123456789Z\"\n";
    const KUBEXIT_DIED: &str =
        "Born: \"2026-11-21T08:58:44.123456789+01:00\"\nDied: \"2026-11-21T09:02:01Z\"\nExitCode: -1\n";

    #[test]
    fn what_kubexit_writes_is_read() {
        assert_eq!(parse(KUBEXIT_BORN), Tombstone { born: some("2026-11-21T08:58:44.123456789Z"), ..empty() });
        let died = Tombstone {
            born: some("2026-11-21T08:58:44.123456789+01:00"),
            died: some("2026-11-21T09:02:01Z"),
            exit_code: Some(-1),
            ..empty()
        };
        assert_eq!(parse(KUBEXIT_DIED), died);
        assert_eq!(parse("{}\n"), empty());
    }

    #[test]
    fn with_its_keys_alone_a_tombstone_is_what_kubexit_would_write() {
        for text in [KUBEXIT_BORN, KUBEXIT_DIED, "{}\n"] {
            assert_eq!(parse(text).to_string(), text);
        }
    }

    #[test]
    fn all_of_it_is_frozen() {
        let stone = Tombstone {
            born: some("2026-11-21T08:58:44.123456Z"),
            died: some("2026-11-21T08:58:45.000000Z"),
            exit_code: Some(143),
            ready: some("2026-11-21T08:58:44.500000Z"),
            signal: some("SIGTERM"),
            reason: some("\"main\" has\ndied: größe…"),
            attempt: Some(2),
            generation: some("uid-7"),
        };
        let text = concat!(
            "Born: \"2026-11-21T08:58:44.123456Z\"\n",
            "Died: \"2026-11-21T08:58:45.000000Z\"\n",
            "ExitCode: 143\n",
            "Ready: \"2026-11-21T08:58:44.500000Z\"\n",
            "Signal: \"SIGTERM\"\n",
            "Reason: \"\\\"main\\\" has\\U0000000adied: größe\\U00002026\"\n",
            "Attempt: 2\n",
            "Generation: \"uid-7\"\n",
        );
        assert_eq!(stone.to_string(), text);
        assert_eq!(parse(text), stone);
    }

    #[test]
    fn every_form_of_yaml_that_people_write_is_read() {
        let text = "---\n# by hand\nborn: 2026-11-21T08:58:44Z # plain\nDIED: '2026-11-21T08:58:45Z'\n\nExitCode:  7\n\
                    Reason: 'it''s over'\nSignal: null\nReady: ~\nFuture:\n  - a: b\n  nested\n- more\nAttempt:\n...\n";
        let stone = parse(text);
        assert_eq!(stone.born, some("2026-11-21T08:58:44Z"));
        assert_eq!(stone.died, some("2026-11-21T08:58:45Z"));
        assert_eq!((stone.exit_code, stone.attempt), (Some(7), None));
        assert_eq!((stone.reason, stone.signal, stone.ready), (some("it's over"), None, None));
    }

    #[test]
    fn a_file_torn_anywhere_says_less_but_nothing_wrong() {
        let whole = parse(KUBEXIT_DIED);
        for end in 0..KUBEXIT_DIED.len() {
            let torn = Tombstone::parse(&KUBEXIT_DIED.as_bytes()[..end]).unwrap();
            assert!(torn.born.is_none() || torn.born == whole.born, "{end}");
            assert!(torn.died.is_none() || torn.died == whole.died, "{end}");
            assert!(torn.exit_code.is_none() || torn.exit_code == whole.exit_code, "{end}");
        }
        assert_eq!(parse("Died: 2026-11-21T09:02:01Z").died, some("2026-11-21T09:02:01Z"));
        assert_eq!(parse("Died: 2026-11-21T09:02:01.5").died, None);
        assert_eq!(parse("ExitCode: 13").exit_code, None);
    }

    #[test]
    fn garbage_says_what_is_wrong_with_it() {
        for (text, expected) in [
            ("Died: yes\n", "line 1: Died is not a time"),
            ("Born: \"2026-11-21T08:58:44Z\nDied:\n", "line 1: Born is not a time"),
            ("\nExitCode: seven\n", "line 2: ExitCode is not a number"),
            ("hello\n", "line 1 is not `Key: value`"),
            ("- a: b\n", "line 1 is not `Key: value`"),
            ("Reason: \"a\" b\n", "line 1: Reason is not a text"),
            ("Reason: \"\\q\"\n", "line 1: Reason is not a text"),
            ("Died: 2026-11-21T08:58:44.Z\n", "line 1: Died is not a time"),
        ] {
            let failure = Tombstone::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(failure.starts_with(expected), "{failure}");
        }
        assert_eq!(Tombstone::parse(b"Born: \xff\n"), Err(Garbage::NotText));
    }

    proptest! {
        #[test]
        fn any_text_survives_carving(reason in ".*", generation in "\\PC*") {
            let stone = Tombstone { reason: Some(reason), generation: Some(generation), ..empty() };
            let text = stone.to_string();
            prop_assert_eq!(text.lines().count(), 2);
            prop_assert_eq!(parse(&text), stone);
        }

        #[test]
        fn noise_does_not_panic(noise in prop::collection::vec(any::<u8>(), 0..200), text in "[A-Za-z:\"'\\\\ \n#]{0,80}") {
            drop((Tombstone::parse(&noise), Tombstone::parse(text.as_bytes()))); // either outcome will do
        }
    }

    fn parse(text: &str) -> Tombstone {
        Tombstone::parse(text.as_bytes()).unwrap()
    }

    fn empty() -> Tombstone {
        Tombstone::default()
    }

    #[expect(clippy::unnecessary_wraps, reason = "it is what the fields are")]
    fn some(text: &str) -> Option<String> {
        Some(text.to_owned())
    }
}
