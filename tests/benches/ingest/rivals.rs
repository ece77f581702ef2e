//! Other ways from builds to files.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    Result, Run, Tools, Workload,
    daemon::{Daemon, free_port, is_listening},
    process::{all_ended, children_cpu, cpu, installed, total_size},
    senders, text,
};

/// The limit: nothing between a build and its file but a pipe.
pub(super) fn cat(tools: &Tools, scratch: &Path, workload: Workload) -> Result<Run> {
    let stored = places(scratch, "stored", workload)?;
    let (wall, sender) = senders(|| {
        let arguments = tools.write_arguments(workload);
        let pipelines = stored.iter().map(|path| {
            let mut shell = Command::new("sh");
            shell.args(["-c", r#"out=$1; shift; "$@" | cat >"$out" && sync --data "$out""#, "sh"]).arg(path);
            shell.args(&arguments).stdin(Stdio::null()).spawn()
        });
        all_ended(pipelines.collect::<std::io::Result<Vec<_>>>()?)
    })?;
    Ok(Run { wall, sender, receiver: Duration::ZERO, stored })
}

/// A file per build, in a directory of their own.
fn places(scratch: &Path, name: &str, workload: Workload) -> Result<Vec<PathBuf>> {
    let directory = scratch.join(name);
    fs::create_dir(&directory)?;
    Ok((0..workload.builds).map(|number| directory.join(format!("build{number}"))).collect())
}

// --- rsyslog ---

/// imfile, omrelp, imrelp, omfile: a message is confirmed once the receiver has it in its queue.
pub(super) fn relp(tools: &Tools, scratch: &Path, workload: Workload) -> Result<Run> {
    run_relp(tools, scratch, workload, "off")
}

/// The same, with files that are synced.
pub(super) fn relp_sync(tools: &Tools, scratch: &Path, workload: Workload) -> Result<Run> {
    run_relp(tools, scratch, workload, "on")
}

pub(super) fn relp_is_missing() -> Option<&'static str> {
    let has_modules = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib"]
        .map(|library| Path::new(library).join("rsyslog/omrelp.so"))
        .iter()
        .any(|module| module.exists());
    (installed("rsyslogd").is_none() || !has_modules).then_some("rsyslog with its RELP modules")
}

fn run_relp(tools: &Tools, scratch: &Path, workload: Workload, sync: &str) -> Result<Run> {
    let port = free_port()?;
    let written = places(scratch, "written", workload)?;
    let stored = places(scratch, "stored", workload)?;
    let receiver = receiver_settings(scratch, port, sync, workload);
    let mut receiver = rsyslogd(scratch, "receiver", &receiver)?;
    receiver.until("listener", || is_listening(port))?;
    let before = cpu(&receiver)?;
    let sender = sender_settings(&written, port, workload);
    // The builds write to files as they would for a collector on their node; it reads as they do.
    let mut sender = rsyslogd(scratch, "sender", &sender)?;
    through_files(tools, workload, &written, &stored, [&mut sender, &mut receiver], before)
}

fn queue(workload: Workload) -> String {
    let size = 2 * workload.total() / text::LINE + 10_000;
    format!(r#"queue.type="LinkedList" queue.size="{size}" queue.timeoutEnqueue="600000""#)
}

/// With its default window of 128 messages RELP waits for the kernel's delayed confirmations, hundreds of times slower.
fn sender_settings(written: &[PathBuf], port: u16, workload: Workload) -> String {
    let queue = queue(workload);
    let inputs = written.iter().map(|path| {
        let tag = path.file_name().unwrap_or_default().to_string_lossy();
        format!(r#"input(type="imfile" file="{}" tag="{tag}" ruleset="out")"#, path.display()) + "\n"
    });
    format!(
        r#"module(load="imfile")
        module(load="omrelp")
        template(name="line" type="string" string="<13>1 - - %programname% - - - %msg%")
        ruleset(name="out" {queue}) {{
            action(type="omrelp" target="127.0.0.1" port="{port}" template="line" timeout="30" conn.timeout="5"
                   windowSize="10000" action.resumeRetryCount="-1" action.resumeInterval="1")
        }}
        {}"#,
        inputs.collect::<String>()
    )
}

fn receiver_settings(scratch: &Path, port: u16, sync: &str, workload: Workload) -> String {
    format!(
        r#"module(load="imrelp")
        template(name="line" type="string" string="%msg%\n")
        template(name="place" type="string" string="{}/stored/%programname%")
        input(type="imrelp" address="127.0.0.1" port="{port}" ruleset="in")
        ruleset(name="in" {}) {{
            action(type="omfile" dynaFile="place" dynaFileCacheSize="100" template="line" sync="{sync}")
        }}"#,
        scratch.display(),
        queue(workload)
    )
}

fn rsyslogd(scratch: &Path, name: &str, settings: &str) -> Result<Daemon> {
    let work = scratch.join(name);
    fs::create_dir(&work)?;
    let config = work.join("rsyslog.conf");
    fs::write(&config, format!("global(workDirectory=\"{}\")\n{settings}\n", work.display()))?;
    let program = installed("rsyslogd").ok_or("no rsyslogd")?;
    let mut command = Command::new(program);
    command.arg("-n").arg("-f").arg(&config).arg("-i").arg(work.join("pid"));
    Daemon::start(&mut command, work.join("own.log"))
}

// --- fluent-bit ---

pub(super) fn fluent_bit_is_missing() -> Option<&'static str> {
    installed("fluent-bit").is_none().then_some("fluent-bit")
}

/// tail, forward with require_ack_response, forward, file.
pub(super) fn fluent_bit(tools: &Tools, scratch: &Path, workload: Workload) -> Result<Run> {
    let port = free_port()?;
    let written = places(scratch, "written", workload)?;
    let stored = places(scratch, "stored", workload)?;
    let directory = |paths: &[PathBuf]| paths[0].parent().unwrap_or(scratch).display().to_string();
    let program = installed("fluent-bit").ok_or("no fluent-bit")?;
    let service = "[SERVICE]\n    flush 0.1\n    log_level warn\n";
    let receiver = format!(
        "{service}[INPUT]\n    name forward\n    listen 127.0.0.1\n    port {port}\n[OUTPUT]\n    name file\n    \
         match *\n    path {}\n    format template\n    template {{log}}\n",
        directory(&stored)
    );
    let sender = format!(
        "{service}[INPUT]\n    name tail\n    path {0}/*\n    tag_regex {0}/(?<build>.*)\n    tag <build>\n    \
         read_from_head on\n    refresh_interval 1\n[OUTPUT]\n    name forward\n    match *\n    host 127.0.0.1\n    \
         port {port}\n    require_ack_response true\n    retry_limit no_limits\n",
        directory(&written)
    );
    let start = |name: &str, settings: &str| {
        let config = scratch.join(format!("{name}.conf"));
        fs::write(&config, settings)?;
        Daemon::start(Command::new(&program).arg("-c").arg(config), scratch.join(format!("{name}.log")))
    };
    let mut receiver = start("receiver", &receiver)?;
    receiver.until("listener", || is_listening(port))?;
    let before = cpu(&receiver)?;
    let mut sender = start("sender", &sender)?;
    through_files(tools, workload, &written, &stored, [&mut sender, &mut receiver], before)
}

/// Builds write to files, which a pair of daemons carries elsewhere.
fn through_files(
    tools: &Tools,
    workload: Workload,
    written: &[PathBuf],
    stored: &[PathBuf],
    [sender, receiver]: [&mut Daemon; 2],
    before: Duration,
) -> Result<Run> {
    let (start, writers_before) = (Instant::now(), children_cpu()?);
    let arguments = tools.write_arguments(workload);
    let writers = written.iter().map(|path| {
        let out = fs::File::create(path)?;
        Command::new(&arguments[0]).args(&arguments[1..]).stdin(Stdio::null()).stdout(out).spawn()
    });
    all_ended(writers.collect::<std::io::Result<Vec<_>>>()?)?;
    receiver.until("bytes", || Ok(total_size(stored) >= workload.total()))?;
    let wall = start.elapsed();
    let sent = cpu(sender)? + children_cpu()? - writers_before;
    let received = cpu(receiver)? - before;
    sender.stop()?;
    receiver.stop()?;
    Ok(Run { wall, sender: sent, receiver: received, stored: stored.to_vec() })
}
