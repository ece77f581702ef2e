//! `phonehome-server declare`.

use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use anyhow::Context;
use clap::Parser;
use phonehome_proto::id::{BuildId, StepName};
use serde_json::{Map, Value, json};

use super::{ServerArgs, out::print, told};
use crate::{
    cli::hook_args::Limit,
    client::{http::Ask, model::Declared},
    hook::via::variables,
};

/// Declares a build, and prints what its builder has to be told
///
/// One NAME=value a line: PHONEHOME_URL, PHONEHOME_BUILD, PHONEHOME_TOKEN and, for a server that is known by its key,
/// PHONEHOME_PIN; ready for docker run --env-file, kubectl create secret --from-env-file, or a shell's set -a.
#[derive(Parser)]
#[command(after_help = "Exit code: 0; 125 when the server cannot be asked or does not want to.")]
pub(crate) struct DeclareArgs {
    /// Its name [default: the server draws one]
    id: Option<BuildId>,

    /// Its steps, separated by commas or given several times; it ends when all have [default: main]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    step: Vec<StepName>,

    /// A label, KEY=VALUE, to find it by; several may be given
    #[arg(long, value_name = "LABEL", value_parser = label)]
    label: Vec<(String, String)>,

    /// Limit for the whole build; off for none. This and the others are the server's own where they are not given
    #[arg(long, value_name = "TIME", help_heading = "Clocks")]
    timeout: Option<Limit>,

    /// Limit until a builder phones home
    #[arg(long, value_name = "TIME", help_heading = "Clocks")]
    connect_timeout: Option<Limit>,

    /// Limit without any output, although the builder lives
    #[arg(long, value_name = "TIME", help_heading = "Clocks")]
    idle_timeout: Option<Limit>,

    /// Limit until a builder that vanished comes back
    #[arg(long, value_name = "TIME", help_heading = "Clocks")]
    lost_timeout: Option<Limit>,

    /// Between TERM and KILL when the build is stopped
    #[arg(long, value_name = "TIME", value_parser = crate::cli::hook_args::duration, help_heading = "Clocks")]
    grace_period: Option<std::time::Duration>,

    /// Write the lines to this file, mode 0600, and only the build's name to standard output
    #[arg(long, value_name = "PATH")]
    env_file: Option<PathBuf>,

    #[command(flatten)]
    server: ServerArgs,
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("a label is KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

pub(super) async fn run(args: DeclareArgs) -> anyhow::Result<u8> {
    let ask = Ask::post("builds", &declaration(&args));
    let client = args.server.client()?;
    let declared: Declared = client.json(&ask).await.map_err(|error| told(&error))?;
    let id = declared.id.clone();
    let lines: String =
        variables(declared).into_iter().map(|(name, value)| format!("{name}={}\n", value.replace('\n', ""))).collect();
    match &args.env_file {
        Some(path) => {
            write(path, &lines).with_context(|| format!("build {id} is declared; cannot write {}", path.display()))?;
            print(format_args!("{id}\n"))?;
        }
        None => print(lines)?,
    }
    Ok(0)
}

fn declaration(args: &DeclareArgs) -> Value {
    let mut body = Map::new();
    body.extend(args.id.as_ref().map(|id| ("id".to_owned(), json!(id.as_str()))));
    if !args.step.is_empty() {
        let steps: Vec<_> = args.step.iter().map(StepName::as_str).collect();
        body.insert("steps".into(), json!(steps));
    }
    if !args.label.is_empty() {
        body.insert("labels".into(), json!(args.label.iter().cloned().collect::<BTreeMap<_, _>>()));
    }
    let limits = [
        ("total", args.timeout),
        ("connect", args.connect_timeout),
        ("idle", args.idle_timeout),
        ("lost", args.lost_timeout),
    ];
    let seconds = |limit: Limit| json!(limit.0.map(|limit| limit.as_secs_f64()));
    let mut timeouts: Map<_, _> =
        limits.into_iter().filter_map(|(name, limit)| Some((name.to_owned(), seconds(limit?)))).collect();
    timeouts.extend(args.grace_period.map(|grace| ("grace".to_owned(), json!(grace.as_secs_f64()))));
    if !timeouts.is_empty() {
        body.insert("timeouts".into(), timeouts.into());
    }
    body.into()
}

/// Writes the file anew, so that nobody else has it open.
fn write(path: &Path, lines: &str) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(lines.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_declaration_says_what_was_given_and_nothing_else() {
        let declared = |arguments: &[&str]| {
            declaration(&DeclareArgs::try_parse_from(std::iter::once(&"declare").chain(arguments)).unwrap())
        };
        assert_eq!(declared(&[]), json!({}));
        let given = ["b", "--step", "a,c", "--label", "k=v=w", "--timeout", "off", "--lost-timeout", "1500ms"];
        let expected = json!({
            "id": "b", "steps": ["a", "c"], "labels": {"k": "v=w"}, "timeouts": {"total": null, "lost": 1.5},
        });
        assert_eq!(declared(&given), expected);
    }
}
