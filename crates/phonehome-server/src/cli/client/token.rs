//! `phonehome-server token`.

use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use http::Method;
use serde_json::{Value, json};

use super::{
    ServerArgs,
    out::{print, say, to_the_second},
    table::{table, terminal_width},
    told,
};
use crate::{
    cli::hook_args::duration,
    client::{base::escaped, http::Ask},
};

/// Makes, lists and revokes named tokens; needs an admin token
#[derive(Subcommand)]
pub(crate) enum TokenCommand {
    Create(CreateArgs),
    List(ListArgs),
    Revoke(RevokeArgs),
}

/// Makes a token and prints it, once: the server keeps its hash only
///
/// The token alone goes to standard output, everything else to standard error.
#[derive(Parser)]
#[command(after_help = "Exit code: 0; 125 when the server cannot be asked or does not want to.")]
pub(crate) struct CreateArgs {
    /// What it is for, for those who look at the list
    name: String,

    /// What it may do
    #[arg(long, value_name = "SCOPE")]
    scope: Scope,

    /// How long it is valid [default: until it is revoked]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    expires_in: Option<Duration>,

    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scope {
    /// Everything.
    Admin,
    /// Declare, cancel, report and read.
    Launch,
    /// Read.
    Read,
}

impl Scope {
    fn name(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Launch => "launch",
            Self::Read => "read",
        }
    }
}

/// Lists tokens, without their secrets
#[derive(Parser)]
#[command(after_help = "Exit code: 0; 125 when the server cannot be asked.")]
pub(crate) struct ListArgs {
    /// One JSON object per line, as the server has it
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    server: ServerArgs,
}

/// Revokes a token: it is refused from now on
#[derive(Parser)]
#[command(after_help = "Exit code: 0; 125 when there is none of that id or the server cannot be asked.")]
pub(crate) struct RevokeArgs {
    /// Its id, from the list
    id: String,

    #[command(flatten)]
    server: ServerArgs,
}

pub(super) async fn run(command: TokenCommand) -> anyhow::Result<u8> {
    match command {
        TokenCommand::Create(args) => create(args).await,
        TokenCommand::List(args) => list(args).await,
        TokenCommand::Revoke(args) => revoke(args).await,
    }
}

async fn create(args: CreateArgs) -> anyhow::Result<u8> {
    let mut body = json!({"name": args.name, "scope": args.scope.name()});
    if let Some(time) = args.expires_in {
        body["expires_in"] = json!(time.as_secs());
    }
    let client = args.server.client()?;
    let made: Value = client.json(&Ask::post("tokens", &body)).await.map_err(|error| told(&error))?;
    let text = |name: &str| made[name].as_str().unwrap_or_default();
    say(format_args!("token {} may {}; it is shown this once", text("id"), args.scope.name()));
    print(format_args!("{}\n", text("token")))?;
    Ok(0)
}

async fn list(args: ListArgs) -> anyhow::Result<u8> {
    let client = args.server.client()?;
    let answer: Value = client.json(&Ask::get("tokens")).await.map_err(|error| told(&error))?;
    let tokens = answer["tokens"].as_array().or_else(|| answer.as_array()).cloned().unwrap_or_default();
    if args.json {
        tokens.iter().try_for_each(|token| print(format_args!("{token}\n")))?;
        return Ok(0);
    }
    let rows: Vec<_> = tokens.iter().map(row).collect();
    print(table(["ID", "NAME", "SCOPE", "CREATED", "EXPIRES", "STATE"], &rows, terminal_width()))?;
    Ok(0)
}

fn row(token: &Value) -> [String; 6] {
    let text = |name: &str| token[name].as_str().unwrap_or_default().to_owned();
    let is_revoked = token["revoked"].as_bool().unwrap_or(!token["revoked"].is_null());
    let state = if is_revoked { "revoked" } else { "" };
    let time = |name: &str| to_the_second(&text(name));
    [text("id"), text("name"), text("scope"), time("created"), time("expires"), state.into()]
}

async fn revoke(args: RevokeArgs) -> anyhow::Result<u8> {
    let client = args.server.client()?;
    let ask = Ask::new(Method::DELETE, format!("tokens/{}", escaped(&args.id)));
    client.ask_patiently(&ask).await.map_err(|error| told(&error))?;
    print(format_args!("token {} is revoked\n", args.id))?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::canned::{Canned, answer};

    #[derive(Parser)]
    struct Line {
        #[command(subcommand)]
        command: TokenCommand,
    }

    #[tokio::test]
    async fn what_is_typed_is_what_is_asked() {
        let answers = [
            answer("201 Created", r#"{"token":"phonehome_read_00","id":"t1"}"#),
            answer("200 OK", r#"{"tokens":[]}"#),
            answer("204 No Content", ""),
        ];
        let mut server = Canned::start(answers).await;
        let url = server.client("").base.to_string();
        for (typed, asked) in [
            (
                &["create", "ci", "--scope", "read", "--expires-in", "2h"][..],
                &["POST /api/v1/tokens HTTP", r#"{"expires_in":7200,"name":"ci","scope":"read"}"#][..],
            ),
            (&["list"], &["GET /api/v1/tokens HTTP"]),
            (&["revoke", "a/b"], &["DELETE /api/v1/tokens/a%2Fb HTTP"]),
        ] {
            let line = ["token"].iter().chain(typed).copied().chain(["--server", &url]);
            assert_eq!(run(Line::try_parse_from(line).unwrap().command).await.unwrap(), 0);
            let request = server.asked().await;
            assert!(asked.iter().all(|part| request.contains(part)), "{request}");
        }
    }

    #[test]
    fn a_token_is_a_row() {
        let token =
            json!({"id": "t1", "name": "ci", "scope": "read", "created": "2026-01-02T03:04:05.5Z", "revoked": null});
        assert_eq!(row(&token), ["t1", "ci", "read", "2026-01-02T03:04:05Z", "", ""]);
        assert_eq!(row(&json!({"revoked": "2026-01-02T03:04:05Z"}))[5], "revoked");
    }
}
