//! What a byte costs on its way from a build to the hook's output, beside other ways to carry it.
//!
//! `cargo bench -p phonehome-tests` prints, for large and for line-sized writes, MB/s and CPU seconds per GiB of every
//! way in one run, and both as ratios to `socat`. Read the ratios: they carry over to other machines, the figures do
//! not. CPU is that of all processes of a way, the writer's included. Ways whose tools are missing are skipped.

use std::{
    error::Error,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Rounds per way; the medians are shown.
const ROUNDS: usize = 3;

const MIB: u64 = 1 << 20;

/// What the build writes.
#[derive(Clone, Copy)]
struct Workload {
    name: &'static str,
    block: usize,
    bytes: u64,
}

const WORKLOADS: [Workload; 2] = [
    Workload { name: "64 KiB writes", block: 64 * 1024, bytes: 512 * MIB },
    Workload { name: "line-sized writes (80 bytes)", block: 80, bytes: 128 * MIB },
];

/// One way, and how to run it for a workload.
struct Way {
    name: &'static str,
    run: fn(&Tools, Workload) -> Result<()>,
    needs: Option<&'static str>,
}

const WAYS: [Way; 6] = [
    Way { name: "pipe to cat", run: pipe, needs: None },
    Way { name: "socat", run: socat, needs: Some("socat") },
    Way { name: "websocat", run: websocat, needs: Some("websocat") },
    Way { name: "phonehome, plain", run: phonehome_plain, needs: None },
    Way { name: "phonehome, TLS", run: phonehome_tls, needs: None },
    Way { name: "phonehome, TLS and fsync", run: phonehome_fsync, needs: None },
];

struct Tools {
    writer: PathBuf,
    agent: PathBuf,
    server: PathBuf,
    scratch: tempfile::TempDir,
}

fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args().collect();
    if let [_, role, block, bytes] = &arguments[..]
        && role == "write"
    {
        return write(block.parse()?, bytes.parse()?);
    }
    let tools = Tools::build()?;
    WORKLOADS.into_iter().try_for_each(|workload| compare(&tools, workload))
}

/// The build: blocks of text until enough is written.
fn write(block: usize, bytes: u64) -> Result<()> {
    let mut text: Vec<u8> = (0..block).map(|at| b' ' + (at * 7 % 95) as u8).collect();
    if let Some(last) = text.last_mut() {
        *last = b'\n';
    }
    let mut stdout = fs::File::from(std::os::fd::AsFd::as_fd(&io::stdout()).try_clone_to_owned()?);
    for _ in 0..bytes / block as u64 {
        stdout.write_all(&text)?;
    }
    Ok(())
}

fn compare(tools: &Tools, workload: Workload) -> Result<()> {
    say(&format!("\n{}, {} MiB, medians of {ROUNDS}", workload.name, workload.bytes / MIB));
    say(&format!("{:<26} {:>8} {:>12} {:>10} {:>10}", "", "MB/s", "CPU s/GiB", "x socat", "x its CPU"));
    let mut base = None;
    for way in WAYS {
        if way.needs.is_some_and(|tool| !is_installed(tool)) {
            say(&format!("{:<26} skipped: not installed", way.name));
            continue;
        }
        let (speed, cpu) = measure(&way, tools, workload)?;
        if way.name == "socat" {
            base = Some((speed, cpu));
        }
        let ratio = base.map_or(String::new(), |(s, c)| format!("{:>10.2} {:>10.2}", speed / s, cpu / c));
        say(&format!("{:<26} {speed:>8.0} {cpu:>12.2} {ratio}", way.name));
    }
    Ok(())
}

/// Median MB/s and median CPU seconds per GiB.
fn measure(way: &Way, tools: &Tools, workload: Workload) -> Result<(f64, f64)> {
    let mut speeds = Vec::new();
    let mut costs = Vec::new();
    for _ in 0..ROUNDS {
        let cpu = children_cpu()?;
        let start = tokio::time::Instant::now();
        (way.run)(tools, workload)?;
        speeds.push(workload.bytes as f64 / 1e6 / start.elapsed().as_secs_f64());
        let used = children_cpu()? - cpu;
        costs.push(used.as_secs_f64() * (1024 * MIB) as f64 / workload.bytes as f64);
    }
    Ok((median(speeds), median(costs)))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// CPU time of all children that were waited for, with theirs: fields 16 and 17 of proc_pid_stat(5), in ticks of 10 ms.
fn children_cpu() -> Result<Duration> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let (_, fields) = stat.rsplit_once(") ").ok_or("no stat")?;
    let ticks: u64 = fields.split(' ').skip(13).take(2).map(|field| field.parse::<u64>().unwrap_or(0)).sum();
    Ok(Duration::from_millis(10 * ticks))
}

fn is_installed(tool: &str) -> bool {
    Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
        || Command::new(tool).arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

#[expect(clippy::print_stdout, reason = "the report is what this program is for")]
fn say(line: &str) {
    println!("{line}");
}

impl Tools {
    fn build() -> Result<Self> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let packages = ["-p", "phonehome-agent", "-p", "phonehome-server"];
        let status = Command::new(cargo).args(["build", "--locked", "--release"]).args(packages).status()?;
        if !status.success() {
            return Err("the programs do not build".into());
        }
        let writer = std::env::current_exe()?;
        let release = writer.parent().and_then(Path::parent).ok_or("no target directory")?.to_owned();
        let (agent, server) = (release.join("phonehome-agent"), release.join("phonehome-server"));
        Ok(Self { writer, agent, server, scratch: tempfile::tempdir()? })
    }

    fn write_arguments(&self, workload: Workload) -> Vec<String> {
        let writer = self.writer.display().to_string();
        vec![writer, "write".into(), workload.block.to_string(), workload.bytes.to_string()]
    }

    fn writer(&self, workload: Workload) -> Result<Child> {
        let arguments = self.write_arguments(workload);
        Ok(Command::new(&arguments[0]).args(&arguments[1..]).stdout(Stdio::piped()).spawn()?)
    }
}

fn ended(mut child: Child) -> Result<()> {
    let status = child.wait()?;
    if status.success() { Ok(()) } else { Err(format!("a program ended with {status}").into()) }
}

fn pipe(tools: &Tools, workload: Workload) -> Result<()> {
    let mut writer = tools.writer(workload)?;
    let output = writer.stdout.take().ok_or("no pipe")?;
    let cat = Command::new("cat").stdin(output).stdout(Stdio::null()).spawn()?;
    ended(writer)?;
    ended(cat)
}

/// Writer, relay to loopback, receiver; nothing is stored and nothing is proven.
fn socat(tools: &Tools, workload: Workload) -> Result<()> {
    let port = free_port()?;
    let listen = format!("TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr");
    let receiver = Command::new("socat").args(["-u", "-b65536", &listen, "STDOUT"]).stdout(Stdio::null()).spawn()?;
    let mut writer = tools.writer(workload)?;
    let output = writer.stdout.take().ok_or("no pipe")?;
    let connect = format!("TCP:127.0.0.1:{port},retry=100,interval=0.02");
    let sender = Command::new("socat").args(["-u", "-b65536", "STDIN", &connect]).stdin(output).spawn()?;
    ended(writer)?;
    ended(sender)?;
    ended(receiver)
}

fn websocat(tools: &Tools, workload: Workload) -> Result<()> {
    let port = free_port()?;
    let address = format!("127.0.0.1:{port}");
    let mut receiver = Command::new("websocat");
    receiver.args(["-b", "-u", "--oneshot", &format!("ws-l:{address}"), "-"]).stdin(Stdio::null());
    let receiver = receiver.stdout(Stdio::null()).spawn()?;
    while !is_listening(port)? {
        std::thread::yield_now();
    }
    let mut writer = tools.writer(workload)?;
    let output = writer.stdout.take().ok_or("no pipe")?;
    let sender = Command::new("websocat").args(["-b", "-u", "-", &format!("ws://{address}")]).stdin(output).spawn()?;
    ended(writer)?;
    ended(sender)?;
    ended(receiver)
}

fn phonehome_plain(tools: &Tools, workload: Workload) -> Result<()> {
    phonehome(tools, workload, &["--no-tls"])
}

fn phonehome_tls(tools: &Tools, workload: Workload) -> Result<()> {
    phonehome(tools, workload, &[])
}

fn phonehome_fsync(tools: &Tools, workload: Workload) -> Result<()> {
    let data = tools.scratch.path().join("data");
    phonehome(tools, workload, &["--data", &data.display().to_string()])?;
    Ok(fs::remove_dir_all(data)?)
}

/// Everything: numbered, checked, hashed, stored, acknowledged, read back, printed.
fn phonehome(tools: &Tools, workload: Workload, flags: &[&str]) -> Result<()> {
    let mut hook = Command::new(&tools.server);
    hook.args(["hook", "--listen", "127.0.0.1:0"]).args(flags).arg("--").arg(&tools.agent).args(["--tee", "off", "--"]);
    ended(hook.args(tools.write_arguments(workload)).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?)
}

/// Whether somebody listens, without connecting (proc_net_tcp(5); state 0A is LISTEN).
fn is_listening(port: u16) -> Result<bool> {
    let sockets = fs::read_to_string("/proc/net/tcp")?;
    let local = format!(":{port:04X} 00000000:0000 0A");
    Ok(sockets.contains(&local))
}

fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
