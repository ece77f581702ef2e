//! A place in the log of a whole build, as text that a reader keeps and hands back.

use std::{fmt, str::FromStr};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use phonehome_proto::{
    frame::UnixMicros,
    id::{Attempt, BuildId},
};

/// How far a reader of a build has got. Only the build it was made for understands it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cursor {
    /// Checksum of the build's name and of when it was declared: another one may have the name later.
    build: u32,
    /// Whether the end was told.
    pub(crate) ended: bool,
    /// How many of the build's reports were told.
    pub(crate) reports: u64,
    /// One per step that was begun, in the order of declaration.
    places: Vec<Place>,
}

/// How far a reader has got in one step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Place {
    /// The attempt; all before it were told. 0 before the first.
    pub(crate) attempt: Attempt,
    /// Everything of it below this sequence number was told. A number is the record's for ever; its entry in the index
    /// has another place once damage before it was taken out.
    pub(crate) next: u64,
}

/// Why a text is no cursor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CursorError {
    /// It was made for another build.
    #[error("the cursor belongs to another build")]
    Foreign,
    /// Nobody here made it.
    #[error("this is no cursor; use one as an answer had it")]
    Malformed,
}

/// First byte of every cursor; the next form gets another.
const VERSION: u8 = 1;

/// Longest cursor, characters: 256 steps far into their logs, and half of what a request's head may have.
pub(crate) const MAX_CURSOR: usize = 8 * 1024;

impl Cursor {
    /// The beginning of a build.
    pub(crate) fn start(build: &BuildId, created: UnixMicros) -> Self {
        Self { build: mark(build, created), ended: false, reports: 0, places: Vec::new() }
    }

    /// Whether it was made for this build.
    pub(crate) fn is_of(&self, build: &BuildId, created: UnixMicros) -> bool {
        self.build == mark(build, created)
    }

    /// How far the step that was declared as number `step` has got.
    pub(crate) fn place(&self, step: usize) -> Place {
        self.places.get(step).copied().unwrap_or_default()
    }

    pub(crate) fn set_place(&mut self, step: usize, place: Place) {
        if self.places.len() <= step {
            self.places.resize(step + 1, Place::default());
        }
        self.places[step] = place;
    }

    /// Reads a cursor of this build.
    pub(crate) fn parse(text: &str, build: &BuildId, created: UnixMicros) -> Result<Self, CursorError> {
        let cursor: Self = text.parse()?;
        if cursor.is_of(build, created) { Ok(cursor) } else { Err(CursorError::Foreign) }
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut wire = vec![VERSION, u8::from(self.ended)];
        wire.extend_from_slice(&self.build.to_le_bytes());
        put(&mut wire, self.reports);
        for place in &self.places {
            put(&mut wire, place.attempt.into());
            put(&mut wire, place.next);
        }
        f.write_str(&URL_SAFE_NO_PAD.encode(wire))
    }
}

impl FromStr for Cursor {
    type Err = CursorError;

    fn from_str(text: &str) -> Result<Self, CursorError> {
        if text.len() > MAX_CURSOR {
            return Err(CursorError::Malformed);
        }
        let wire = URL_SAFE_NO_PAD.decode(text).map_err(|_| CursorError::Malformed)?;
        decode(&wire).ok_or(CursorError::Malformed)
    }
}

fn decode(wire: &[u8]) -> Option<Cursor> {
    let (&[VERSION, ended @ (0 | 1)], rest) = wire.split_first_chunk()? else { return None };
    let (build, mut rest) = rest.split_first_chunk()?;
    let reports = take(&mut rest)?;
    let mut places = Vec::new();
    while !rest.is_empty() {
        let attempt = take(&mut rest)?.try_into().ok()?;
        places.push(Place { attempt, next: take(&mut rest)? });
    }
    Some(Cursor { build: u32::from_le_bytes(*build), ended: ended == 1, reports, places })
}

fn mark(build: &BuildId, created: UnixMicros) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(build.as_str().as_bytes()), &created.to_le_bytes())
}

/// Seven bits per byte, the lowest first; the highest bit says that there are more.
fn put(wire: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        wire.push(number as u8 | 0x80);
        number >>= 7;
    }
    wire.push(number as u8);
}

fn take(wire: &mut &[u8]) -> Option<u64> {
    let mut number = 0_u64;
    for shift in (0..u64::BITS).step_by(7) {
        let (&byte, rest) = wire.split_first()?;
        *wire = rest;
        let bits = u64::from(byte & 0x7f);
        if bits << shift >> shift != bits {
            return None; // more than 64 bits
        }
        number |= bits << shift;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_cursor_comes_back_from_its_text(
            ended: bool,
            reports: u64,
            places in prop::collection::vec((any::<Attempt>(), any::<u64>()), 0..8),
        ) {
            let places = places.into_iter().map(|(attempt, next)| Place { attempt, next }).collect();
            let cursor = Cursor { ended, reports, places, ..Cursor::start(&build("b"), 1) };
            let text = cursor.to_string();
            prop_assert!(text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte)));
            prop_assert_eq!(text.parse(), Ok(cursor));
        }

        #[test]
        fn noise_is_no_cursor_or_one_that_can_be_told(text in "[A-Za-z0-9_-]{0,64}") {
            if let Ok(cursor) = text.parse::<Cursor>() {
                prop_assert_eq!(cursor.to_string().parse(), Ok(cursor));
            }
        }
    }

    #[test]
    fn what_nobody_made_is_refused() {
        let good = Cursor::start(&build("b"), 1).to_string();
        let long = "A".repeat(MAX_CURSOR + 1);
        let endless = URL_SAFE_NO_PAD.encode([[1, 0, 0, 0, 0, 0].as_slice(), &[0xff; 11]].concat());
        let over = URL_SAFE_NO_PAD.encode([[1, 0, 0, 0, 0, 0].as_slice(), &[0xff; 9], &[2]].concat());
        for bad in [
            "",
            "A",
            "AQ",
            "hello",
            "../..",
            "\u{1f9ed}",
            "AgAAAAAAAA",
            &long,
            &endless,
            &over,
            good.get(..good.len() - 2).unwrap(),
        ] {
            assert_eq!(bad.parse::<Cursor>(), Err(CursorError::Malformed), "{bad:.20}");
        }
        assert_eq!(Cursor::parse(&good, &build("c"), 1), Err(CursorError::Foreign));
        assert_eq!(Cursor::parse(&good, &build("b"), 2), Err(CursorError::Foreign), "the next of its name");
        assert!(Cursor::parse(&good, &build("b"), 1).is_ok());
    }

    #[test]
    fn as_many_steps_as_a_build_may_have_fit() {
        let mut cursor = Cursor::start(&build("b"), 1);
        (0..256).for_each(|step| cursor.set_place(step, Place { attempt: 1_000_000, next: 1 << 60 }));
        let text = cursor.to_string();
        assert!(text.len() < MAX_CURSOR, "{}", text.len());
        assert_eq!(text.parse(), Ok(cursor));
    }

    fn build(name: &str) -> BuildId {
        name.parse().unwrap()
    }
}
