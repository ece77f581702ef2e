//! What a server has stored, against what was sent.

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

use super::{Result, agent::Sent};

/// Compares the only attempt of every quiet build, line by line.
pub(crate) fn compare(data: &Path, sent: &[Sent]) -> Result<()> {
    let (mut lost, mut repeated) = (0, 0);
    for Sent { build, lines, .. } in sent {
        let log = fs::read_to_string(data.join("builds").join(build.as_str()).join("main/1/log"))?;
        let numbers = log.lines().filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        let mut next = 0;
        for number in numbers {
            lost += number.saturating_sub(next);
            repeated += u64::from(number < next);
            next = next.max(number + 1);
        }
        lost += lines.saturating_sub(next);
    }
    writeln!(io::stdout(), "{:<34}{lost:>16}\n{:<34}{repeated:>16}", "lines lost", "lines repeated")?;
    Ok(())
}
