//! When a certificate ends and what it extends to: things that TLS libraries check and do not tell.

use phonehome_proto::frame::UnixMicros;

/// The end of a certificate's validity (RFC 5280, section 4.1); `None` when it is not one.
pub(super) fn not_after(certificate: &[u8]) -> Option<UnixMicros> {
    let mut validity = Der(from_validity(certificate)?.take(SEQUENCE)?);
    validity.any()?; // not before
    match validity.any()? {
        (UTC_TIME, text) => time(text, 2),
        (GENERALIZED_TIME, text) => time(text, 4),
        _ => None,
    }
}

/// The extensions as they are written, its names among them; `None` when there are none.
pub(super) fn extensions(certificate: &[u8]) -> Option<&[u8]> {
    let mut rest = from_validity(certificate)?;
    rest.take(SEQUENCE)?; // validity
    rest.take(SEQUENCE)?; // subject
    rest.take(SEQUENCE)?; // its public key
    rest.take(EXTENSIONS) // nobody writes the unique identifiers that might stand before them
}

/// What is signed, from the validity on.
fn from_validity(certificate: &[u8]) -> Option<Der<'_>> {
    let mut certificate = Der(Der(certificate).take(SEQUENCE)?);
    let mut signed = Der(certificate.take(SEQUENCE)?);
    signed.skip_optional(VERSION);
    signed.take(INTEGER)?; // serial number
    signed.take(SEQUENCE)?; // algorithm of the signature
    signed.take(SEQUENCE)?; // issuer
    Some(signed)
}

const EXTENSIONS: u8 = 0xa3;
const INTEGER: u8 = 0x02;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const SEQUENCE: u8 = 0x30;
const VERSION: u8 = 0xa0;

/// Values one after the other, each with a tag and a length (X.690, section 8.1).
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    /// The next value and its tag.
    fn any(&mut self) -> Option<(u8, &'a [u8])> {
        let (&[tag, first], rest) = self.0.split_first_chunk()?;
        let (len, rest) = match first {
            0..=0x7f => (usize::from(first), rest),
            0x81..=0x84 => {
                let (bytes, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
                (bytes.iter().fold(0, |len, byte| len << 8 | usize::from(*byte)), rest)
            }
            _ => return None,
        };
        let (value, rest) = rest.split_at_checked(len)?;
        self.0 = rest;
        Some((tag, value))
    }

    /// The next value, which has this tag.
    fn take(&mut self, tag: u8) -> Option<&'a [u8]> {
        self.any().filter(|(found, _)| *found == tag).map(|(_, value)| value)
    }

    fn skip_optional(&mut self, tag: u8) {
        if self.0.first() == Some(&tag) {
            self.any();
        }
    }
}

/// `YYMMDDHHMMSSZ` or `YYYYMMDDHHMMSSZ` (RFC 5280, section 4.1.2.5).
fn time(text: &[u8], year_digits: usize) -> Option<UnixMicros> {
    let (year, rest) = text.split_at_checked(year_digits)?;
    let year = match (number(year)?, year_digits) {
        (short @ 50.., 2) => short + 1900,
        (short, 2) => short + 2000,
        (year, _) => year,
    };
    let mut pairs = rest.strip_suffix(b"Z").filter(|digits| digits.len() == 10)?.chunks(2).map(number);
    let mut next = || pairs.next().flatten();
    let (month, day, hour, minute, second) = (next()?, next()?, next()?, next()?, next()?);
    let days = days_since_1970(year, month, day)?;
    (((days * 24 + hour) * 60 + minute) * 60 + second).checked_mul(1_000_000)
}

fn number(digits: &[u8]) -> Option<u64> {
    str::from_utf8(digits).ok()?.parse().ok()
}

/// Days of the Gregorian calendar from 1970-01-01; `None` before it.
fn days_since_1970(year: u64, month: u64, day: u64) -> Option<u64> {
    if !(1970..=9999).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // Years that begin in March have their leap day at the end.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let before = year * 365 + year / 4 - year / 100 + year / 400;
    Some(before + (153 * month + 2) / 5 + day - 1 - DAYS_TO_1970)
}

/// From 0000-03-01.
const DAYS_TO_1970: u64 = 719_468;

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::*;

    #[test]
    fn both_ways_to_write_a_year_are_read() {
        for (year, month, day) in [(1999, 12, 31), (2024, 2, 29), (2049, 3, 1), (2050, 1, 1), (4096, 2, 28)] {
            let mut params = CertificateParams::new(vec!["x".to_owned()]).unwrap();
            let expected = date_time_ymd(year, month, day);
            (params.not_before, params.not_after) = (date_time_ymd(1975, 1, 1), expected);
            let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
            let end = expected.unix_timestamp().cast_unsigned() * 1_000_000;
            assert_eq!(not_after(certificate.der()), Some(end), "{expected}");
        }
    }

    #[test]
    fn what_is_no_certificate_ends_never_and_breaks_nothing() {
        let certificate = CertificateParams::new(vec!["x".to_owned()]).unwrap();
        let whole = certificate.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec();
        for len in 0..whole.len().min(200) {
            not_after(&whole[..len]);
        }
        assert_eq!(not_after(&whole[..whole.len() - 1]), None);
        for text in [&b"300229000000Z"[..], b"991301000000Z", b"20300101000000+0100", b"2030", b"+1+1+1+1+1+1Z"] {
            time(text, 2);
            time(text, 4);
        }
        assert_eq!(time(b"20300101000000", 4), None);
    }
}
