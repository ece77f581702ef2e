//! `phonehome-server cancel` and `phonehome-server rm`.

use clap::Parser;
use http::Method;
use phonehome_proto::id::BuildId;
use serde_json::json;

use super::{
    ServerArgs,
    out::{print, say},
    told,
};
use crate::{cli::EXIT_FAILURE, client::http::Ask};

/// Stops a build
///
/// TERM to its command, KILL after its grace period. Does not wait for that, see the command wait.
#[derive(Parser)]
#[command(
    after_help = "Exit code: 0 when it is being stopped; 125 when it has ended already, does not exist or the server cannot be \
                  asked."
)]
pub(crate) struct CancelArgs {
    /// The build
    build: BuildId,

    /// What those are told who wait for it
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,

    #[command(flatten)]
    server: ServerArgs,
}

pub(super) async fn cancel(args: CancelArgs) -> anyhow::Result<u8> {
    let client = args.server.client()?;
    let body = args.reason.map_or_else(|| json!({}), |reason| json!({"reason": reason}));
    let ask = Ask::post(format!("builds/{}/cancel", args.build), &body).repeatable();
    client.ask_patiently(&ask).await.map_err(|error| told(&error))?;
    print(format_args!("build {} is being stopped\n", args.build))?;
    Ok(0)
}

/// Removes builds that have ended, with their logs
#[derive(Parser)]
#[command(
    after_help = "Exit code: 0 when all were removed; 125 when one runs, does not exist or the server cannot be asked. The others \
                  are removed all the same."
)]
pub(crate) struct RmArgs {
    /// The builds
    #[arg(required = true)]
    build: Vec<BuildId>,

    #[command(flatten)]
    server: ServerArgs,
}

pub(super) async fn rm(args: RmArgs) -> anyhow::Result<u8> {
    let client = args.server.client()?;
    let mut code = 0;
    for build in &args.build {
        match client.ask_patiently(&Ask::new(Method::DELETE, format!("builds/{build}"))).await {
            Ok(_) => print(format_args!("build {build} is removed\n"))?,
            Err(error) => {
                say(format_args!("build {build}: {}", error.told()));
                code = EXIT_FAILURE;
            }
        }
    }
    Ok(code)
}
