//! Agents and the standing server.

use std::path::Path;

use super::{
    Result, Run, Tools, Workload,
    process::{all_ended, cpu},
    senders,
    standing::Standing,
};

/// Everything that is acknowledged is synced.
pub(super) fn fsync(tools: &Tools, scratch: &Path, workload: Workload) -> Result<Run> {
    run(tools, scratch, workload, "fsync")
}

/// Everything that is acknowledged is with the operating system.
pub(super) fn os(tools: &Tools, scratch: &Path, workload: Workload) -> Result<Run> {
    run(tools, scratch, workload, "os")
}

fn run(tools: &Tools, scratch: &Path, workload: Workload, durability: &str) -> Result<Run> {
    let mut standing = Standing::start(&tools.server, scratch, durability)?;
    let builds: Vec<_> = (0..workload.builds).map(|number| format!("build-{number}")).collect();
    builds.iter().try_for_each(|build| standing.declare(build))?;
    let before = cpu(&standing.daemon)?;
    let (wall, sender) = senders(|| {
        let arguments = tools.write_arguments(workload);
        let agents = builds.iter().map(|build| standing.agent(&tools.agent, build).args(&arguments).spawn());
        all_ended(agents.collect::<std::io::Result<Vec<_>>>()?)
    })?;
    let receiver = cpu(&standing.daemon)? - before;
    standing.daemon.stop()?;
    let stored = builds.iter().map(|build| scratch.join(format!("data/builds/{build}/main/1/log"))).collect();
    Ok(Run { wall, sender, receiver, stored })
}
