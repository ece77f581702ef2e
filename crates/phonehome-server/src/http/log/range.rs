//! The `Range` header (RFC 9110, section 14.2), as far as a log needs it: one range of bytes.

use std::ops::Range;

/// What a header asks for of a log with a certain length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wanted {
    /// All of it: nothing is asked for that is understood here, or several ranges, which may be answered so.
    Everything,
    /// These bytes.
    Part(Range<u64>),
    /// Nothing that there is.
    Unsatisfiable,
}

pub(super) fn wanted(header: &str, len: u64) -> Wanted {
    match parse(header) {
        None => Wanted::Everything,
        Some(Spec::From(first, _)) if first >= len => Wanted::Unsatisfiable,
        Some(Spec::From(first, last)) => Wanted::Part(first..last.saturating_add(1).min(len)),
        Some(Spec::Last(count)) if count == 0 || len == 0 => Wanted::Unsatisfiable,
        Some(Spec::Last(count)) => Wanted::Part(len.saturating_sub(count)..len),
    }
}

enum Spec {
    /// From one byte to another, both included.
    From(u64, u64),
    /// So many at the end.
    Last(u64),
}

/// One range; what is malformed is ignored, as a server may.
fn parse(header: &str) -> Option<Spec> {
    let (unit, range) = header.split_once('=')?;
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return None;
    }
    let (first, last) = range.trim().split_once('-')?;
    match (first, last) {
        ("", count) => Some(Spec::Last(number(count)?)),
        (first, "") => Some(Spec::From(number(first)?, u64::MAX)),
        (first, last) => {
            let (first, last) = (number(first)?, number(last)?);
            (first <= last).then_some(Spec::From(first, last))
        }
    }
}

/// Digits only; what is larger than any file is as good as the largest number.
fn number(text: &str) -> Option<u64> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| text.parse().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_what_the_rfc_says() {
        let part = |from, to| Wanted::Part(from..to);
        for (header, expected) in [
            ("bytes=0-0", part(0, 1)),
            ("bytes=0-", part(0, 10)),
            ("bytes=3-5", part(3, 6)),
            ("bytes=9-9", part(9, 10)),
            ("bytes=5-99999999999999999999999", part(5, 10)),
            ("bytes=5-18446744073709551615", part(5, 10)),
            ("bytes=-3", part(7, 10)),
            ("bytes=-30", part(0, 10)),
            ("Bytes=1-1", part(1, 2)),
            ("bytes=10-", Wanted::Unsatisfiable),
            ("bytes=10-12", Wanted::Unsatisfiable),
            ("bytes=-0", Wanted::Unsatisfiable),
            ("bytes=5-3", Wanted::Everything),
            ("bytes=0-1,3-4", Wanted::Everything),
            ("bytes=a-", Wanted::Everything),
            ("bytes=+1-2", Wanted::Everything),
            ("bytes=-", Wanted::Everything),
            ("bytes=", Wanted::Everything),
            ("lines=1-2", Wanted::Everything),
            ("", Wanted::Everything),
        ] {
            assert_eq!(wanted(header, 10), expected, "{header:?}");
        }
        for header in ["bytes=0-", "bytes=-1"] {
            assert_eq!(wanted(header, 0), Wanted::Unsatisfiable, "{header:?}");
        }
    }
}
