//! Files of the Kubernetes Downward API with the labels or the annotations of a pod.
//!
//! The kubelet writes one `key="value"` a line, the value as Go's `strconv.Quote` has it (`FormatMap` in
//! `pkg/fieldpath/fieldpath.go`: `fmt.Sprintf("%v=%q\n", key, value)`, without the last line feed). Keys are qualified
//! names and have no `=`. What is read back is what `strconv.Unquote` takes.

use std::collections::BTreeMap;

/// What a file says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Parsed {
    pub(super) labels: BTreeMap<String, String>,
    /// Lines that cannot be read: their numbers and what is wrong with them, no more than [`MOST_TOLD`].
    pub(super) bad: Vec<(usize, &'static str)>,
    /// How many there are in all.
    pub(super) bad_lines: usize,
}

/// Bad lines that are told one by one. Who sees that many has the wrong file.
const MOST_TOLD: usize = 5;

impl Parsed {
    /// Reads a file's contents. A line that cannot be read is left out.
    pub(super) fn read(contents: &[u8]) -> Self {
        let mut parsed = Self::default();
        for (number, line) in (1..).zip(contents.split(|byte| *byte == b'\n')) {
            let line = line.trim_ascii();
            if line.is_empty() {
                continue;
            }
            match parse_line(line) {
                Ok((key, value)) => drop(parsed.labels.insert(key, value)),
                Err(why) => parsed.note_bad(number, why),
            }
        }
        parsed
    }

    fn note_bad(&mut self, number: usize, why: &'static str) {
        self.bad_lines += 1;
        if self.bad.len() < MOST_TOLD {
            self.bad.push((number, why));
        }
    }
}

fn parse_line(line: &[u8]) -> Result<(String, String), &'static str> {
    let line = str::from_utf8(line).map_err(|_| "it is not UTF-8")?;
    let (key, quoted) = line.split_once('=').ok_or("it is not key=\"value\"")?;
    if key.is_empty() {
        return Err("it has no key");
    }
    let inner = quoted.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).ok_or("its value is not in quotes")?;
    Ok((key.to_owned(), unquote(inner)?))
}

/// Undoes `strconv.Quote`, between the quotes. Escaped bytes that are no UTF-8 become replacement characters.
fn unquote(inner: &str) -> Result<String, &'static str> {
    let mut bytes = Vec::with_capacity(inner.len());
    let mut chars = inner.chars();
    while let Some(next) = chars.next() {
        match next {
            '"' => return Err("there is a quote inside its value"),
            '\\' => unescape(&mut chars, &mut bytes)?,
            plain => push(&mut bytes, plain),
        }
    }
    Ok(String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
}

/// One escape, behind its backslash.
fn unescape(chars: &mut std::str::Chars<'_>, bytes: &mut Vec<u8>) -> Result<(), &'static str> {
    let byte = match chars.next().ok_or("its value ends in a backslash")? {
        'a' => 0x07,
        'b' => 0x08,
        'f' => 0x0c,
        'n' => b'\n',
        'r' => b'\r',
        't' => b'\t',
        'v' => 0x0b,
        '\\' => b'\\',
        '"' => b'"',
        'x' => number(chars, 2, 16)? as u8,
        digit @ '0'..='7' => octal(digit, chars)?,
        'u' => return character(chars, 4, bytes),
        'U' => return character(chars, 8, bytes),
        _ => return Err("its value has an escape that Go does not know"),
    };
    bytes.push(byte);
    Ok(())
}

/// Three digits, the first of which is known.
fn octal(first: char, chars: &mut std::str::Chars<'_>) -> Result<u8, &'static str> {
    let high = first.to_digit(8).ok_or(DIGITS)?;
    u8::try_from(64 * high + number(chars, 2, 8)?).map_err(|_| "its value has an octal escape above \\377")
}

fn character(chars: &mut std::str::Chars<'_>, digits: u32, bytes: &mut Vec<u8>) -> Result<(), &'static str> {
    let found = char::from_u32(number(chars, digits, 16)?).ok_or("its value has an escape of no character")?;
    push(bytes, found);
    Ok(())
}

/// Exactly so many digits, at most eight of base 16.
fn number(chars: &mut std::str::Chars<'_>, digits: u32, base: u32) -> Result<u32, &'static str> {
    (0..digits).try_fold(0, |sum, _| {
        let digit = chars.next().and_then(|next| next.to_digit(base)).ok_or(DIGITS)?;
        Ok(sum * base + digit)
    })
}

const DIGITS: &str = "its value has an escape with too few digits";

fn push(bytes: &mut Vec<u8>, character: char) {
    bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_kubernetes_writes_is_read() {
        let file = concat!(
            "app.kubernetes.io/name=\"shop\"\n",
            "empty=\"\"\n",
            "equal=\"a=b\"\n",
            r#"escapes="\a\b\f\n\r\t\v\\\" \x7f \u200b \U0010ffff größe""#,
            "\n",
            r#"last-applied="{\"kind\":\"Pod\"}\n""#,
        );
        let expected = [
            ("app.kubernetes.io/name", "shop"),
            ("empty", ""),
            ("equal", "a=b"),
            ("escapes", "\x07\x08\x0c\n\r\t\x0b\\\" \x7f \u{200b} \u{10ffff} größe"),
            ("last-applied", "{\"kind\":\"Pod\"}\n"),
        ];
        let parsed = Parsed::read(file.as_bytes());
        assert_eq!(parsed.labels, expected.map(|(key, value)| (key.to_owned(), value.to_owned())).into());
        assert_eq!(parsed.bad_lines, 0);
    }

    #[test]
    fn bytes_are_put_together_and_what_is_no_text_is_replaced() {
        let read = |quoted: &str| Parsed::read(format!("k={quoted}").as_bytes()).labels["k"].clone();
        assert_eq!(read(r#""\xc3\xb6 \303\266""#), "ö ö");
        assert_eq!(read(r#""\xff\000\377""#), "\u{fffd}\0\u{fffd}");
    }

    #[test]
    fn a_bad_line_is_left_out_and_told_by_its_number() {
        let good = "a=\"1\"\n\n";
        for (line, expected) in [
            (&b"no pair"[..], "not key"),
            (b"=\"v\"", "no key"),
            (b"k=v", "not in quotes"),
            (b"k=\"", "not in quotes"),
            (b"k=\"a\"b\"", "quote inside"),
            (b"k=\"a\\\"", "ends in a backslash"),
            (b"k=\"\\'\"", "does not know"),
            (b"k=\"\\8\"", "does not know"),
            (b"k=\"\\x1\"", "too few digits"),
            (b"k=\"\\12\"", "too few digits"),
            (b"k=\"\\400\"", "above"),
            (b"k=\"\\ud800\"", "no character"),
            (b"k=\"\\Uffffffff\"", "no character"),
            (b"k=\"\xff\"", "UTF-8"),
        ] {
            let file = [good.as_bytes(), line, b"\nz=\"2\""].concat();
            let parsed = Parsed::read(&file);
            assert_eq!(parsed.labels.keys().collect::<Vec<_>>(), ["a", "z"], "{}", line.escape_ascii());
            let [(3, why)] = parsed.bad[..] else { panic!("{parsed:?}") };
            assert!(why.contains(expected), "{why} for {}", line.escape_ascii());
        }
    }

    #[test]
    fn of_many_bad_lines_some_are_told_and_all_are_counted() {
        let parsed = Parsed::read("x\n".repeat(1000).as_bytes());
        assert_eq!((parsed.bad.len(), parsed.bad_lines), (MOST_TOLD, 1000));
    }

    /// `strconv.Quote`, for characters that it escapes and for those that it prints.
    fn quote(text: &str) -> String {
        let escaped: String = text
            .chars()
            .map(|found| match found {
                '"' | '\\' => format!("\\{found}"),
                '\n' => "\\n".into(),
                '\0'..=' ' | '\x7f' => format!("\\x{:02x}", u32::from(found)),
                'à'..='ï' => format!("\\u{:04x}", u32::from(found)),
                '\u{10000}'.. => format!("\\U{:08x}", u32::from(found)),
                _ => found.to_string(),
            })
            .collect();
        format!("\"{escaped}\"")
    }

    proptest! {
        #[test]
        fn what_go_quotes_comes_back(value in any::<String>()) {
            let parsed = Parsed::read(format!("k={}", quote(&value)).as_bytes());
            prop_assert_eq!(parsed.labels.get("k"), Some(&value));
        }

        #[test]
        fn nothing_makes_it_panic(file in proptest::collection::vec(any::<u8>(), 0..200)) {
            Parsed::read(&file);
        }

        #[test]
        fn nor_does_what_looks_like_a_file(file in "(k=\"(\\\\[abfnrtvxuU0-9\"']|[0-9a-fé\"\n=])*\"?\n?){0,4}") {
            Parsed::read(file.as_bytes());
        }
    }
}
