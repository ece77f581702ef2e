//! `phonehome-server builds`.

use clap::Parser;
use serde::Deserialize;
use serde_json::Value;

use super::{
    ServerArgs,
    out::{between, print, size, to_the_second},
    table::{table, terminal_width},
    told,
};
use crate::client::{
    base::escaped,
    http::{Ask, Client},
    model::Summary,
};

/// Lists builds, the newest first
#[derive(Parser)]
#[command(after_help = "Exit code: 0, also for an empty list; 125 when the server cannot be asked.")]
pub(crate) struct BuildsArgs {
    /// Only builds with this label, KEY or KEY=VALUE; several mean all of them
    #[arg(long, value_name = "LABEL")]
    label: Vec<String>,

    /// Only these verdicts, separated by commas: running, succeeded, failed, cancelled, timed-out, lost, error
    #[arg(long, value_name = "VERDICT,...")]
    verdict: Option<String>,

    /// Only builds declared after this: a time such as 2026-01-02T03:04:05Z, or how long ago, such as 24h
    #[arg(long, value_name = "WHEN")]
    since: Option<String>,

    /// Only builds declared before this
    #[arg(long, value_name = "WHEN")]
    until: Option<String>,

    /// At most so many
    #[arg(long, value_name = "N", default_value = "50", conflicts_with = "all")]
    limit: usize,

    /// All of them
    #[arg(long)]
    all: bool,

    /// One JSON object per line, as the server has it
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    server: ServerArgs,
}

/// Most that one answer has.
const MOST_AT_ONCE: usize = 500;

/// One page of a list.
#[derive(Deserialize)]
struct Page {
    builds: Vec<Value>,
    next: Option<String>,
}

pub(super) async fn run(args: BuildsArgs) -> anyhow::Result<u8> {
    let filter = filter(&args);
    let (json, limit) = (args.json, if args.all { usize::MAX } else { args.limit });
    let client = args.server.client()?;
    let mut rows = Vec::new();
    let (mut left, mut cursor) = (limit, None);
    while left > 0 {
        let page = fetch(&client, &filter, left.min(MOST_AT_ONCE), cursor.as_deref()).await?;
        left = left.saturating_sub(page.builds.len());
        for build in &page.builds {
            if json {
                print(format_args!("{build}\n"))?;
            } else {
                rows.push(row(&serde_json::from_value(build.clone())?));
            }
        }
        match page.next {
            Some(next) if !page.builds.is_empty() => cursor = Some(next),
            Some(_) | None => break,
        }
    }
    if !json {
        let head = ["BUILD", "VERDICT", "CODE", "LOG", "CREATED", "TOOK", "SIZE", "LABELS"];
        print(table(head, &rows, terminal_width()))?;
    }
    Ok(0)
}

/// What is asked for, as a query.
fn filter(args: &BuildsArgs) -> String {
    let mut query = String::new();
    for label in &args.label {
        query.push_str(&format!("&label={}", escaped(label)));
    }
    for (name, value) in [("verdict", &args.verdict), ("since", &args.since), ("until", &args.until)] {
        query.extend(value.iter().map(|value| format!("&{name}={}", escaped(value))));
    }
    query
}

async fn fetch(client: &Client, filter: &str, limit: usize, cursor: Option<&str>) -> anyhow::Result<Page> {
    let cursor = cursor.map(|cursor| format!("&cursor={}", escaped(cursor))).unwrap_or_default();
    let page = client.json(&Ask::get(format!("builds?limit={limit}{filter}{cursor}"))).await;
    page.map_err(|error| told(&error))
}

fn row(build: &Summary) -> [String; 8] {
    let labels: Vec<_> = build.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let log = match build.complete {
        Some(true) => "complete",
        Some(false) => "incomplete",
        None => "",
    };
    [
        build.id.clone(),
        build.verdict.clone().unwrap_or_else(|| build.state.clone()),
        build.exit_code.map(|code| code.to_string()).unwrap_or_default(),
        log.into(),
        to_the_second(&build.created),
        build.ended.as_deref().and_then(|ended| between(&build.created, ended)).unwrap_or_default(),
        size(build.bytes),
        labels.join(" "),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::canned::{Canned, answer};

    #[tokio::test]
    async fn pages_are_followed_with_every_filter() {
        let first = answer("200 OK", r#"{"builds":[{"id":"b2"}],"next":"x y"}"#);
        let mut server = Canned::start([first]).await;
        let args =
            BuildsArgs::try_parse_from(["builds", "--label", "a=b&c", "--label", "d", "--since", "24h"]).unwrap();
        let client = server.client("");
        let page = fetch(&client, &filter(&args), 7, Some("x y")).await.unwrap();
        assert_eq!((page.builds.len(), page.next.as_deref()), (1, Some("x y")));
        let asked = server.asked().await;
        let expected = "GET /api/v1/builds?limit=7&label=a%3Db%26c&label=d&since=24h&cursor=x%20y HTTP";
        assert!(asked.starts_with(expected), "{asked}");
    }

    #[test]
    fn a_build_is_a_row() {
        let build: Summary = serde_json::from_value(serde_json::json!({
            "id": "b", "state": "ended", "verdict": "failed", "exit_code": 3, "complete": false, "bytes": 2048,
            "created": "2026-01-02T03:04:05.5Z", "ended": "2026-01-02T03:05:05.5Z", "labels": {"a": "b", "c": ""},
        }))
        .unwrap();
        assert_eq!(row(&build), ["b", "failed", "3", "incomplete", "2026-01-02T03:04:05Z", "1m", "2.0 KiB", "a=b c="]);
        let running = Summary { id: "r".into(), state: "running".into(), ..Summary::default() };
        assert_eq!(row(&running)[1..4], ["running", "", ""]);
    }
}
