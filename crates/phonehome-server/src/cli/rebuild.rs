//! `phonehome-server rebuild`.

use std::{
    io::{IsTerminal, Write},
    path::PathBuf,
};

use anyhow::{Context, ensure};
use clap::Parser;
use phonehome_env::Env;

use crate::{catalogue, serve};

/// Makes the catalogue of a data directory again from its files
///
/// The server itself does so at its start when the catalogue is missing or damaged; this is for when it is suspected to
/// be wrong. The server must not run.
#[derive(Parser)]
pub(super) struct RebuildArgs {
    /// The data directory
    #[arg(long, value_name = "DIR", env = "PHONEHOME_DATA")]
    data: PathBuf,
}

pub(super) fn run(args: &RebuildArgs) -> anyhow::Result<()> {
    let env = Env::real();
    let told = || format!("cannot use {}", args.data.display());
    ensure!(args.data.join("builds").is_dir(), "{} is no data directory: it has no builds", args.data.display());
    let lock = serve::lock(&*env.disk, &args.data).with_context(told)?;
    ensure!(lock.is_some(), "a server uses {}: stop it first", args.data.display());
    catalogue::discard(&args.data).with_context(told)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let count = runtime.block_on(async { serve::rebuild(&env, &args.data, &mut show) }).with_context(told)?;
    writeln!(std::io::stderr(), "{}{count} builds are in the catalogue", if is_shown() { "\r" } else { "" })?;
    Ok(())
}

fn is_shown() -> bool {
    std::io::stderr().is_terminal()
}

/// Builds between two lines on the terminal.
const INTERVAL: usize = 100;

fn show(done: usize, total: usize) {
    if is_shown() && done.is_multiple_of(INTERVAL) {
        drop(write!(std::io::stderr(), "\r{done} of {total} builds ")); // a terminal that is gone shows nothing
    }
}
