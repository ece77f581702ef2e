//! The standing server of a bench, and agents of its builds.

use std::{
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    process::{Command, Stdio},
};

use super::{
    Result,
    daemon::{Daemon, free_port},
};

pub(super) const ADMIN: &str = "admin-of-this-bench";

/// A server that keeps everything in `data` of its directory.
pub(super) struct Standing {
    pub(super) daemon: Daemon,
    pub(super) port: u16,
}

impl Standing {
    pub(super) fn start(server: &Path, scratch: &Path, durability: &str) -> Result<Self> {
        let port = free_port()?;
        let mut command = Command::new(server);
        command.args(["serve", "--durability", durability, "--listen", &format!("127.0.0.1:{port}"), "--data"]);
        command
            .arg(scratch.join("data"))
            .env("PHONEHOME_ADMIN_TOKEN", ADMIN)
            .env("PHONEHOME_READ_TOKEN", "reader-of-this-bench");
        let mut daemon = Daemon::start(&mut command, scratch.join("server.log"))?;
        daemon.says("\"serving\"")?;
        Ok(Self { daemon, port })
    }

    pub(super) fn declare(&self, build: &str) -> Result<()> {
        let body = format!(r#"{{"id":"{build}","token":"{}"}}"#, token(build));
        let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
        write!(
            stream,
            "POST /api/v1/builds HTTP/1.0\r\nHost: localhost\r\nAuthorization: Bearer {ADMIN}\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        if answer.split(' ').nth(1) == Some("201") { Ok(()) } else { Err(format!("not declared: {answer}").into()) }
    }

    /// An agent of a build, silent, with the build's command to come.
    pub(super) fn agent(&self, agent: &Path, build: &str) -> Command {
        let mut command = Command::new(agent);
        command.env("PHONEHOME_URL", format!("ws://127.0.0.1:{}", self.port));
        command.env("PHONEHOME_BUILD", build).env("PHONEHOME_TOKEN", token(build));
        // It ends well only when the server has confirmed all of it.
        command.args(["--tee", "off", "--require-delivery", "--start", "connected", "--"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }
}

/// Each build has its own.
fn token(build: &str) -> String {
    let digits: String = build.bytes().map(|byte| format!("{byte:02x}")).collect();
    format!("phonehome_build_{digits:0<64}")
}
