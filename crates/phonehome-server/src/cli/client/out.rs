//! What a command answers, on standard output; and what it says besides, on standard error.

use std::{
    fmt::Display,
    io::{self, Write},
};

/// Writes lines of an answer.
pub(super) fn print(text: impl Display) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    write!(stdout, "{text}")?;
    stdout.flush()
}

/// Says something besides.
pub(super) fn say(line: impl Display) {
    drop(writeln!(io::stderr(), "phonehome: {line}")); // there is nowhere left to say that this failed
}

/// So many bytes, for people.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut size = bytes as f64 / 1024.0;
    let mut units = UNITS.iter();
    let mut unit = units.next();
    while size >= 1024.0 && units.len() > 0 {
        size /= 1024.0;
        unit = units.next();
    }
    format!("{size:.1} {}", unit.copied().unwrap_or_default())
}

/// A time of the server's without its fraction of a second.
pub(super) fn to_the_second(time: &str) -> String {
    match humantime::parse_rfc3339_weak(time) {
        Ok(parsed) => humantime::format_rfc3339_seconds(parsed).to_string(),
        Err(_) => time.to_owned(),
    }
}

/// From one of the server's times to another.
pub(super) fn between(start: &str, end: &str) -> Option<String> {
    let [start, end] = [start, end].map(humantime::parse_rfc3339_weak);
    let lasted = end.ok()?.duration_since(start.ok()?).ok()?;
    let lasted = if lasted.as_secs() < 10 {
        std::time::Duration::from_millis(lasted.as_millis() as u64)
    } else {
        std::time::Duration::from_secs(lasted.as_secs())
    };
    Some(humantime::format_duration(lasted).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_short() {
        for (bytes, told) in
            [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1_572_864, "1.5 MiB"), (u64::MAX, "16384.0 PiB")]
        {
            assert_eq!(size(bytes), told);
        }
        assert_eq!(to_the_second("2026-01-02T03:04:05.000007Z"), "2026-01-02T03:04:05Z");
        assert_eq!(to_the_second("soon"), "soon");
        assert_eq!(between("2026-01-02T03:04:05.5Z", "2026-01-02T03:04:07Z").unwrap(), "1s 500ms");
        assert_eq!(between("2026-01-02T03:04:05.5Z", "2026-01-02T04:04:06Z").unwrap(), "1h");
        assert_eq!(between("2026-01-02T03:04:05Z", "2026-01-02T03:04:04Z"), None);
    }
}
