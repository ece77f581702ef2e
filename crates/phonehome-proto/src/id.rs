//! Checked names: what cannot be a file name, a URL segment or a log field as it is never becomes one.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Only `A-Z a-z 0-9 . _ -` may stand in a name.
    #[error("{0:?} may not stand in a name: use A-Z a-z 0-9 . _ -")]
    BadCharacter(char),
    /// A name starts with neither `.` nor `-`: it would be a hidden file or look like an option.
    #[error("a name may not start with {0:?}")]
    BadStart(char),
    /// A name has at least one character.
    #[error("a name may not be empty")]
    Empty,
    /// A name has at most [`MAX_NAME`] characters.
    #[error("a name has at most {MAX_NAME} characters, this one has {0}")]
    TooLong(usize),
}

/// Longest name, characters: with any suffix of ours it stays below the 255 bytes of a file name.
pub const MAX_NAME: usize = 128;

fn check(text: &str) -> Result<(), NameError> {
    let first = text.chars().next().ok_or(NameError::Empty)?;
    if let Some(bad) = text.chars().find(|c| !matches!(c, 'A'..='Z' | 'a'..='z' | '0'..='9' | '.' | '_' | '-')) {
        return Err(NameError::BadCharacter(bad));
    }
    if matches!(first, '.' | '-') {
        return Err(NameError::BadStart(first));
    }
    if text.len() > MAX_NAME {
        return Err(NameError::TooLong(text.len()));
    }
    Ok(())
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(transparent)]
        pub struct $name(Box<str>);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                check(text)?;
                Ok(Self(text.into()))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
                String::deserialize(input)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

name! {
    /// What somebody waits for: 1-128 characters of `A-Z a-z 0-9 . _ -`, starting with neither `.` nor `-`.
    BuildId
}

name! {
    /// One wrapped command of a build, usually one container; the same grammar as [`BuildId`].
    StepName
}

impl Default for StepName {
    /// `main`: the step of a build that has only one.
    fn default() -> Self {
        Self("main".into())
    }
}

/// Number of one life of a step's agent, from 1. Only the server makes attempts.
pub type Attempt = u32;

macro_rules! hex_bytes {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $len]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = HexError;

            fn from_str(text: &str) -> Result<Self, HexError> {
                let digits = text.as_bytes();
                if digits.len() != 2 * $len {
                    return Err(HexError { expected: 2 * $len });
                }
                let mut bytes = [0; $len];
                for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
                    let digit = |at: usize| char::from(pair[at]).to_digit(16).ok_or(HexError { expected: 2 * $len });
                    *byte = (digit(0)? * 16 + digit(1)?) as u8;
                }
                Ok(Self(bytes))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
                if output.is_human_readable() { output.collect_str(self) } else { self.0.serialize(output) }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
                if input.is_human_readable() {
                    String::deserialize(input)?.parse().map_err(serde::de::Error::custom)
                } else {
                    Ok(Self(<[u8; $len]>::deserialize(input)?))
                }
            }
        }
    };
}

hex_bytes! {
    /// Drawn at random when an agent starts: tells one life of an agent from the next.
    ProducerId, 16
}

hex_bytes! {
    /// BLAKE3 of an attempt's output bytes in record order, which is the digest of the stored raw file.
    Digest, 32
}

/// A text is not the expected number of hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected} hexadecimal digits")]
pub struct HexError {
    expected: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_their_grammar() {
        for good in ["a", "main", "Build-7.x_y", "0", &"x".repeat(128)] {
            assert_eq!(good.parse::<BuildId>().unwrap().as_str(), good);
        }
        let bad = |text: &str| text.parse::<BuildId>().unwrap_err();
        assert_eq!(bad(""), NameError::Empty);
        assert_eq!(bad(".."), NameError::BadStart('.'));
        assert_eq!(bad("-rf"), NameError::BadStart('-'));
        assert_eq!(bad("a/b"), NameError::BadCharacter('/'));
        assert_eq!(bad("a\0"), NameError::BadCharacter('\0'));
        assert_eq!(bad("ä"), NameError::BadCharacter('ä'));
        assert_eq!(bad(&"x".repeat(129)), NameError::TooLong(129));
    }

    #[test]
    fn hex_identifiers_read_what_they_print() {
        let id = ProducerId([0xa5; 16]);
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!("a5".parse::<ProducerId>().is_err());
        assert!("zz".repeat(16).parse::<ProducerId>().is_err());
        assert!("ä".repeat(16).parse::<ProducerId>().is_err());
    }
}
