//! `phonehome-server prune`.

use clap::Parser;
use serde::Deserialize;
use serde_json::Value;

use super::{
    ServerArgs,
    out::{print, size, to_the_second},
    progress::Progress,
    table::{table, terminal_width},
    told,
};
use crate::client::http::Ask;

/// Removes builds that the server's --keep-for, --keep-builds and --keep-bytes do not want to keep
#[derive(Parser)]
#[command(
    after_help = "Exit code: 0, also when there was nothing to remove; 125 when the server cannot be asked. Needs an admin token."
)]
pub(crate) struct PruneArgs {
    /// Say what would be removed, and remove nothing
    #[arg(long)]
    dry_run: bool,

    /// As JSON, as the server has it
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Pruned {
    expire: Vec<Expired>,
    bytes: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Expired {
    id: String,
    bytes: u64,
    ended: Option<String>,
    rule: String,
}

/// Many builds take their time.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(600);

pub(super) async fn run(args: PruneArgs) -> anyhow::Result<u8> {
    let client = args.server.client()?;
    let ask = Ask::post(format!("retention?dry_run={}", args.dry_run), &serde_json::json!({})).taking(PATIENCE);
    let mut progress = Progress::new();
    progress.show(|| "the server looks through its builds".into());
    let answer: Value = client.json(&ask).await.map_err(|error| told(&error))?;
    drop(progress);
    if args.json {
        print(format_args!("{answer}\n"))?;
        return Ok(0);
    }
    let pruned: Pruned = serde_json::from_value(answer)?;
    let rows: Vec<_> = pruned.expire.iter().map(row).collect();
    print(table(["BUILD", "ENDED", "SIZE", "RULE"], &rows, terminal_width()))?;
    let done = if args.dry_run { "would be removed" } else { "removed" };
    print(format_args!("{} builds, {} {done}\n", rows.len(), size(pruned.bytes)))?;
    Ok(0)
}

fn row(Expired { id, bytes, ended, rule }: &Expired) -> [String; 4] {
    [id.clone(), ended.as_deref().map(to_the_second).unwrap_or_default(), size(*bytes), rule.clone()]
}
