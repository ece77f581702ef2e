//! `phonehome-server show`.

use std::fmt::Write;

use clap::Parser;
use phonehome_proto::id::BuildId;
use serde_json::Value;

use super::{
    ServerArgs,
    out::{between, print, size, to_the_second},
    told,
};
use crate::{
    client::{
        http::Ask,
        model::{Attempt, Detail},
    },
    words::OneLine,
};

/// Shows what is known about a build
#[derive(Parser)]
#[command(after_help = "Exit code: 0; 125 when the server cannot be asked or has no such build.")]
pub(crate) struct ShowArgs {
    /// The build
    build: BuildId,

    /// As JSON, as the server has it
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    server: ServerArgs,
}

pub(super) async fn run(args: ShowArgs) -> anyhow::Result<u8> {
    let client = args.server.client()?;
    let build = client.json(&Ask::get(format!("builds/{}", args.build))).await;
    let build: Value = build.map_err(|error| told(&error))?;
    if args.json {
        print(format_args!("{build}\n"))?;
    } else {
        print(describe(&serde_json::from_value(build)?))?;
    }
    Ok(0)
}

/// A build for people. Writing to a text cannot fail.
fn describe(build: &Detail) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        if !value.is_empty() {
            writeln!(text, "{name:<9} {}", OneLine(&value)).unwrap_or_default();
        }
    };
    line("build", build.id.clone());
    let code = build.exit_code().map(|code| format!(" (exit code {code})")).unwrap_or_default();
    line(if build.has_ended() { "verdict" } else { "state" }, format!("{}{code}", build.told()));
    line("log", log(build));
    line("created", to_the_second(&build.created));
    let took = build.ended.as_deref().and_then(|ended| between(&build.created, ended));
    let took = took.map(|took| format!(", after {took}")).unwrap_or_default();
    line("ended", build.ended.as_deref().map(|ended| to_the_second(ended) + &took).unwrap_or_default());
    let labels: Vec<_> = build.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    line("labels", labels.join(" "));
    for step in &build.steps {
        if step.attempts.is_empty() {
            line("step", format!("{}: no builder has phoned home", step.step));
        }
        for attempt in &step.attempts {
            line("step", format!("{} attempt {}: {}", step.step, attempt.attempt, attempt_in_words(attempt)));
        }
    }
    for report in &build.reports {
        line("reported", report.told());
    }
    text
}

fn log(build: &Detail) -> String {
    let sealed = if build.sealed { ", compressed" } else { "" };
    let stored = format!("{} stored{sealed}", size(build.bytes));
    match (build.complete, &build.incomplete) {
        (Some(true), _) => format!("complete, {stored}"),
        (Some(false), Some(reason)) => format!("not complete: {reason}; {stored}"),
        (Some(false), None) => format!("not complete, {stored}"),
        (None, _) => stored,
    }
}

fn attempt_in_words(attempt: &Attempt) -> String {
    let end = match (&attempt.reason, &attempt.signal, attempt.exit_code) {
        (Some(reason), ..) => format!("{}, {reason}", attempt.state),
        (None, Some(signal), _) => {
            let oom = if attempt.oom == Some(true) { ", out of memory" } else { "" };
            format!("killed by {signal}{oom}")
        }
        (None, None, Some(code)) => format!("exit code {code}"),
        (None, None, None) => attempt.state.clone(),
    };
    let lost = attempt.lost_records.filter(|lost| *lost > 0);
    let lost = lost.map(|lost| format!(", {lost} records lost")).unwrap_or_default();
    let took = attempt.started.as_deref().zip(attempt.ended.as_deref());
    let took = took.and_then(|(start, end)| between(start, end)).map(|took| format!(" after {took}"));
    let cuts = attempt
        .cuts
        .filter(|cuts| *cuts > 0)
        .map(|cuts| format!(", {cuts} cut{} survived", if cuts == 1 { "" } else { "s" }));
    let digest = attempt.digest.as_ref().map(|digest| format!(", BLAKE3 {digest}")).unwrap_or_default();
    let bytes = match (attempt.bytes.stdout, attempt.bytes.stderr) {
        (Some(stdout), Some(stderr)) => format!("{} on stdout, {} on stderr", size(stdout), size(stderr)),
        (None, _) | (_, None) => format!("{} so far", size(attempt.bytes.total)),
    };
    format!(
        "{end}{}; {bytes}, {} records{lost}{}{digest}",
        took.unwrap_or_default(),
        attempt.records,
        cuts.unwrap_or_default(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_is_described_line_by_line() {
        let build: Detail = serde_json::from_value(serde_json::json!({
            "id": "b", "state": "ended", "verdict": "failed", "reason": "failed: step main: exit code 3",
            "exit_code": 3, "complete": true, "created": "2026-01-02T03:04:05.5Z", "ended": "2026-01-02T03:05:05.5Z",
            "bytes": 9, "labels": {"a": "b\u{1b}"},
            "steps": [
                {"step": "main", "attempts": [{"attempt": 1, "state": "finished", "exit_code": 3, "records": 4,
                    "bytes": {"stdout": 8, "stderr": 1}, "digest": "0a0b", "cuts": 1}]},
                {"step": "test", "attempts": []},
            ],
            "reports": [{"type": "Warning", "reason": "Failed", "message": "m"}],
        }))
        .unwrap();
        let expected = "build     b\n\
            verdict   failed: step main: exit code 3 (exit code 3)\n\
            log       complete, 9 B stored\n\
            created   2026-01-02T03:04:05Z\n\
            ended     2026-01-02T03:05:05Z, after 1m\n\
            labels    a=b?\n\
            step      main attempt 1: exit code 3; 8 B on stdout, 1 B on stderr, 4 records, 1 cut survived, BLAKE3 0a0b\n\
            step      test: no builder has phoned home\n\
            reported  Failed: m\n";
        assert_eq!(describe(&build), expected);
    }
}
