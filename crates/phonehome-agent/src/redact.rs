//! Secrets that may not leave: the values to look for in output, and their replacement by [`MARKER`].
//!
//! A [`Redactor`] knows the values in every form in which programs usually write them ([`forms`]). A [`Masker`] carries
//! one stream past it, block by block. What it writes does not depend on where the blocks end: every byte that belongs
//! to any occurrence of any form is left out, also where occurrences overlap, and each run of such bytes becomes one
//! marker.

mod automaton;
mod forms;
mod masker;
mod skip;
#[cfg(test)]
mod tests;

use std::{borrow::Cow, fmt, sync::Arc};

use phonehome_proto::event::Event;
use serde_json::Value;
use tokio::time::Instant;
use zeroize::Zeroizing;

pub use self::masker::{IDLE, Masker};
use self::{automaton::Automaton, skip::Skip};

/// What stands in place of a secret.
pub const MARKER: &str = "[redacted]";

/// Shortest value that is looked for, bytes. Shorter ones are words of every log, such as `true`, `main` or `admin`.
pub const MIN_VALUE: usize = 6;

/// Longest value, bytes: eight times a large private key.
pub const MAX_VALUE: usize = 64 * 1024;

/// Most values.
pub const MAX_VALUES: usize = 256;

/// Most bytes of all forms of all values, a common beginning counted once: each of them takes 17 bytes of memory.
pub const MAX_FORMS: usize = 4 << 20;

/// Finds secrets. Its clones share one memory, which is wiped with the last of them.
#[derive(Clone)]
pub struct Redactor(Arc<Index>);

/// All that is looked for.
struct Index {
    values: usize,
    automaton: Automaton,
    skip: Skip,
}

/// Why values cannot all be looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the values to redact are too large: all their encoded forms take more than 4 MiB")]
pub struct TooLarge;

impl Redactor {
    /// Looks for `values`. Those shorter than [`MIN_VALUE`] are left out, so that nothing shorter is ever masked; with
    /// no other there is no redactor.
    ///
    /// # Errors
    ///
    /// When they would take too much memory.
    pub fn new(values: impl IntoIterator<Item = Zeroizing<Vec<u8>>>) -> Result<Option<Self>, TooLarge> {
        let mut values: Vec<_> = values.into_iter().filter(|value| value.len() >= MIN_VALUE).collect();
        values.sort_unstable_by(|a, b| a.as_slice().cmp(b));
        values.dedup();
        let (mut patterns, mut size) = (Vec::new(), 0);
        for value in &values {
            let forms = forms::of(value);
            size += forms::size(&forms);
            if size > MAX_FORMS {
                return Err(TooLarge);
            }
            patterns.extend(forms);
        }
        let mut patterns: Vec<&[u8]> = patterns.iter().map(|pattern| pattern.as_slice()).collect();
        patterns.sort_unstable();
        patterns.dedup();
        Ok((!patterns.is_empty()).then(|| Self::of_patterns(values.len(), &patterns)))
    }

    /// `patterns` are sorted, and no two are equal.
    fn of_patterns(values: usize, patterns: &[&[u8]]) -> Self {
        Self(Arc::new(Index { values, automaton: Automaton::new(patterns), skip: Skip::new(patterns) }))
    }

    /// How many values are looked for.
    #[must_use]
    pub fn values(&self) -> usize {
        self.0.values
    }

    /// `text` without secrets, when it is whole: one that is cut off shows what is there of it.
    #[must_use]
    pub fn mask_text<'text>(&self, text: &'text str) -> Cow<'text, str> {
        let mut masked = Vec::new();
        let mut masker = Masker::new(self);
        let mut keep = |piece: &[u8]| masked.extend_from_slice(piece);
        masker.mask(text.as_bytes(), Instant::now(), &mut keep);
        masker.finish(&mut keep);
        if masker.replaced() == 0 { Cow::Borrowed(text) } else { String::from_utf8_lossy(&masked).into_owned().into() }
    }
}

impl Redactor {
    /// Masks the texts of a value, and nothing else of it.
    pub(crate) fn mask_value(&self, value: &mut Value) {
        match value {
            Value::Array(items) => items.iter_mut().for_each(|item| self.mask_value(item)),
            Value::Object(members) => members.values_mut().for_each(|member| self.mask_value(member)),
            Value::String(text) => self.mask_in_place(text),
            Value::Bool(_) | Value::Null | Value::Number(_) => {}
        }
    }

    /// Masks what an event says. It stays an event of the same kind: only texts are masked.
    pub(crate) fn mask_event(&self, event: &mut Event) {
        event.edit_texts(|text| self.mask_in_place(text));
    }

    pub(crate) fn mask_in_place(&self, text: &mut String) {
        if let Cow::Owned(masked) = self.mask_text(text) {
            *text = masked;
        }
    }
}

impl fmt::Debug for Redactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redactor").field("values", &self.0.values).finish_non_exhaustive()
    }
}
