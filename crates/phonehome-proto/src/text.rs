//! Texts of any length made fit for a place of limited size.

use std::borrow::Cow;

use crate::limits::MAX_TEXT;

/// At most `limit` bytes of `text`, and a sign that there was more.
#[must_use]
pub fn shortened(text: &str, limit: usize) -> Cow<'_, str> {
    const MORE: char = '…';
    if text.len() <= limit {
        return text.into();
    }
    let most = limit.saturating_sub(MORE.len_utf8());
    let start = (0..=most).rev().find_map(|end| text.get(..end)).unwrap_or_default();
    format!("{start}{MORE}").into()
}

/// Shortens it to what a frame or an event may hold, [`MAX_TEXT`].
pub(crate) fn shorten(text: &mut String) {
    if let Cow::Owned(shorter) = shortened(text, MAX_TEXT) {
        *text = shorter;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_between_characters_and_says_so() {
        assert_eq!(shortened("four", 4), "four");
        assert_eq!(shortened("fives", 4), "f…");
        assert_eq!(shortened("ééé", 5), "é…");
    }
}
