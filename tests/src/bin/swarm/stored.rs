//! What a server has stored, against what was sent.

use std::{fs, path::Path};

use super::{Result, agent::Sent};

/// Lines of all quiet builds.
#[derive(Debug, Default)]
pub(crate) struct Compared {
    pub(crate) lines: u64,
    pub(crate) lost: u64,
    pub(crate) repeated: u64,
}

/// Compares the only attempt of every quiet build, line by line.
pub(crate) fn compare(data: &Path, sent: &[Sent]) -> Result<Compared> {
    let mut all = Compared::default();
    for Sent { build, lines } in sent {
        let log = fs::read_to_string(data.join("builds").join(build.as_str()).join("main/1/log"))?;
        let numbers = log.lines().filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        let mut next = 0;
        for number in numbers {
            all.lost += number.saturating_sub(next);
            all.repeated += u64::from(number < next);
            next = next.max(number + 1);
        }
        all.lost += lines.saturating_sub(next);
        all.lines += lines;
    }
    Ok(all)
}
