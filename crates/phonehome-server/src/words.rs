//! What agents say, made fit for one line that a person reads.

use std::fmt::{self, Write};

/// A text of any origin on one line of bounded length, without anything that acts on a terminal or hides in it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OneLine<'a>(pub(crate) &'a str);

/// Characters that are shown of one text. Reasons are sentences; what is longer is read in the log.
const MOST_SHOWN: usize = 500;

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut chars = self.0.trim().chars();
        for shown in chars.by_ref().take(MOST_SHOWN) {
            f.write_char(if is_hostile(shown) { '?' } else { shown })?;
        }
        f.write_str(if chars.next().is_some() { "..." } else { "" })
    }
}

/// Controls, and what breaks a line, reorders it on the screen or is not seen there.
fn is_hostile(char: char) -> bool {
    let is_unseen = matches!(char, '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}');
    char.is_control() || is_unseen || matches!(char, '\u{2060}'..='\u{206f}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_words_stay_as_they_are() {
        for text in ["no such file or directory", "größe: \"5\" µm, it's \\ here", "日本 🦀"] {
            assert_eq!(OneLine(text).to_string(), text);
        }
    }

    #[test]
    fn nothing_leaves_the_line_or_acts_on_the_terminal() {
        let told = OneLine("\n a\x1b[2J\r\nb\u{9b}31m\u{202e}c\u{2028}d\x7f\t ").to_string();
        assert_eq!(told, "a?[2J??b?31m?c?d?");
        for unseen in "\u{ad}\u{61c}\u{200b}\u{200e}\u{200f}\u{2060}\u{2066}\u{2069}\u{feff}".chars() {
            assert_eq!(OneLine(&format!("a{unseen}b")).to_string(), "a?b", "{unseen:?}");
        }
    }

    #[test]
    fn a_long_text_is_cut() {
        let told = OneLine(&"ß".repeat(501)).to_string();
        assert_eq!(told, format!("{}...", "ß".repeat(500)));
        assert_eq!(OneLine(&"ß".repeat(500)).to_string(), "ß".repeat(500));
    }
}
