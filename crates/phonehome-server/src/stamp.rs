//! Points of the wall clock as people and JSON have them.

use std::{
    fmt,
    str::FromStr,
    time::{Duration, UNIX_EPOCH},
};

use phonehome_proto::frame::UnixMicros;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A time in UTC as RFC 3339 has it, with microseconds: `2026-11-21T12:00:00.000000Z`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Stamp(pub(crate) UnixMicros);

/// 9999-12-31T23:59:59.999999Z, beyond which a year has more than four digits.
const LAST: UnixMicros = 253_402_300_799_999_999;

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = Duration::from_micros(self.0.min(LAST)); // agents tell times, any of them
        humantime::format_rfc3339_micros(UNIX_EPOCH + since).fmt(f)
    }
}

impl FromStr for Stamp {
    type Err = humantime::TimestampError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let time = humantime::parse_rfc3339(text)?;
        Ok(Self(time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as UnixMicros)))
    }
}

impl Serialize for Stamp {
    fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
        output.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Stamp {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        String::deserialize(input)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_read_as_it_is_written() {
        for (micros, text) in
            [(0, "1970-01-01T00:00:00.000000Z"), (1_700_000_000_123_456, "2023-11-14T22:13:20.123456Z")]
        {
            assert_eq!(Stamp(micros).to_string(), text);
            assert_eq!(text.parse(), Ok(Stamp(micros)));
        }
        assert_eq!(Stamp(u64::MAX).to_string(), "9999-12-31T23:59:59.999999Z");
    }
}
