//! Columns that stand one below the other, and end where the terminal does.

use std::fmt::Write;

use rustix::{stdio, termios::tcgetwinsize};

use crate::words::OneLine;

/// The columns of standard output's terminal; `None` when it is none.
pub(super) fn terminal_width() -> Option<usize> {
    tcgetwinsize(stdio::stdout()).ok().map(|size| usize::from(size.ws_col)).filter(|columns| *columns > 0)
}

/// Between two columns.
const GAP: usize = 2;

/// A table whose last column takes what is left of `width`. Texts of any origin are made fit to be shown.
pub(super) fn table<const N: usize>(head: [&str; N], rows: &[[String; N]], width: Option<usize>) -> String {
    let rows = rows.iter().map(|row| row.each_ref().map(|cell| OneLine(cell).to_string()));
    let rows: Vec<[String; N]> = std::iter::once(head.map(str::to_owned)).chain(rows).collect();
    let length = |cell: &String| cell.chars().count();
    let widths: [usize; N] =
        std::array::from_fn(|column| rows.iter().map(|row| length(&row[column])).max().unwrap_or_default());
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            // Writing to a text cannot fail.
            write!(line, "{cell:width$}{:GAP$}", "").unwrap_or_default();
        }
        text.push_str(&cut(line.trim_end(), width));
        text.push('\n');
    }
    text
}

fn cut(line: &str, width: Option<usize>) -> String {
    match width {
        Some(width) if line.chars().count() > width => {
            line.chars().take(width.saturating_sub(1)).chain(['…']).collect()
        }
        Some(_) | None => line.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_end_with_the_terminal() {
        let rows =
            [["a".into(), "größe".into(), "k=v other=thing".into()], ["bb".into(), "x\x1b".into(), String::new()]];
        let wide = "ID  SIZE   LABELS\na   größe  k=v other=thing\nbb  x?\n";
        assert_eq!(table(["ID", "SIZE", "LABELS"], &rows, None), wide);
        let narrow = "ID  SIZE   L…\na   größe  k…\nbb  x?\n";
        assert_eq!(table(["ID", "SIZE", "LABELS"], &rows, Some(13)), narrow);
    }
}
