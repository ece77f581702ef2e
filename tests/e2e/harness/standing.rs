//! A standing server as a process, its API, and agents of the builds declared there.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::Command,
};

use super::{Process, Scene, agent, patiently, server, site::own_address};

/// `phonehome-server serve` in a directory of its own, on an address that it keeps over restarts.
#[derive(Debug)]
pub(crate) struct Standing {
    pub(crate) scene: Scene,
    pub(crate) address: SocketAddr,
    pub(crate) data: PathBuf,
    pub(crate) process: Process,
    options: Vec<String>,
    variables: Vec<(String, String)>,
}

/// An answer of the API.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Vec<u8>,
}

/// Its tokens.
pub(crate) const ADMIN: &str = "admin-of-this-test";
pub(crate) const READER: &str = "reader-of-this-test";

impl Standing {
    /// Starts one, and waits until it serves.
    pub(crate) async fn start(options: &[&str]) -> Self {
        Self::start_in(Scene::new(), options, &[]).await
    }

    /// Starts one in a scene that is prepared, with variables of its own.
    pub(crate) async fn start_in(scene: Scene, options: &[&str], variables: &[(&str, &str)]) -> Self {
        let (address, data) = (own_address(), scene.path("data"));
        let options: Vec<_> = options.iter().map(|option| (*option).to_owned()).collect();
        let variables: Vec<_> = variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let process = serve(&scene, address, &data, &options, &variables);
        let standing = Self { scene, address, data, process, options, variables };
        standing.process.stderr.shows("\"serving\"").await;
        standing
    }

    /// The options of its next start.
    pub(crate) fn options(&mut self, options: &[&str]) {
        self.options = options.iter().map(|option| (*option).to_owned()).collect();
    }

    /// Kills it where it stands and starts it again.
    pub(crate) async fn crash(&mut self) {
        self.process.signal(Signal::KILL);
        assert_eq!(self.process.ended().await, 128 + 9);
        self.start_again().await;
    }

    pub(crate) async fn start_again(&mut self) {
        self.process = serve(&self.scene, self.address, &self.data, &self.options, &self.variables);
        self.process.stderr.shows("\"serving\"").await;
    }

    /// Asks as admin.
    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, ADMIN, None).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Answer {
        self.ask("POST", path, ADMIN, Some(body)).await
    }

    /// Asks with a token; `""` is none.
    pub(crate) async fn ask(&self, method: &str, path: &str, token: &str, body: Option<Value>) -> Answer {
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        let authorization = if token.is_empty() { String::new() } else { format!("Authorization: Bearer {token}\r\n") };
        let request = format!(
            "{method} {path} HTTP/1.0\r\nHost: {}\r\n{authorization}Content-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        );
        patiently(path, exchange(self.address, request.as_bytes())).await
    }

    /// Declares a build and returns the token of its agents.
    pub(crate) async fn declare(&self, body: Value) -> String {
        let answer = self.post("/api/v1/builds", body).await;
        assert_eq!(answer.status, 201, "{answer:?}");
        answer.json()["token"].as_str().unwrap().to_owned()
    }

    /// Declares a build with one step.
    pub(crate) async fn declare_one(&self, id: &str) -> String {
        self.declare(json!({ "id": id })).await
    }

    /// An agent that runs a script as a step of a build.
    pub(crate) fn agent(&self, build: &str, token: &str, options: &[&str], script: &str) -> Process {
        let mut command = self.agent_command(build, token);
        Process::spawn(command.args(options).args(["--", "sh", "-c", script]))
    }

    pub(crate) fn agent_command(&self, build: &str, token: &str) -> Command {
        let mut command = self.scene.command(agent());
        command.env("PHONEHOME_URL", format!("ws://{}", self.address));
        command.env("PHONEHOME_BUILD", build).env("PHONEHOME_TOKEN", token);
        command
    }

    /// The build once it has ended.
    pub(crate) async fn ended(&self, build: &str) -> Value {
        loop {
            let answer = self.get(&format!("/api/v1/builds/{build}/wait?timeout=60")).await;
            match answer.status {
                200 => return answer.json(),
                204 => panic!("build {build} does not end"),
                503 => {} // it was started again in between
                _ => panic!("{answer:?}"),
            }
        }
    }

    /// What is stored of a step's first attempt, as it lies in its file.
    pub(crate) fn stored(&self, build: &str, step: &str) -> Vec<u8> {
        std::fs::read(self.data.join(format!("builds/{build}/{step}/1/log"))).unwrap()
    }
}

fn serve(
    scene: &Scene,
    address: SocketAddr,
    data: &std::path::Path,
    options: &[String],
    variables: &[(String, String)],
) -> Process {
    let mut command = scene.command(server());
    command.envs(variables.iter().map(|(name, value)| (name, value)));
    command.env("PHONEHOME_ADMIN_TOKEN", ADMIN).env("PHONEHOME_READ_TOKEN", READER);
    command.arg("serve").arg("--data").arg(data).arg("--listen").arg(address.to_string()).args(options);
    Process::spawn(&mut command)
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// Sends one request as it is, and reads the answer until the server closes.
pub(crate) async fn exchange(address: SocketAddr, request: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n").expect("an answer has a head");
    let head = String::from_utf8(answer[..end].to_vec()).unwrap();
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers =
        lines.filter_map(|line| line.split_once(": ")).map(|(k, v)| (k.to_lowercase(), v.to_owned())).collect();
    Answer { status, headers, body: answer[end + 4..].to_vec() }
}
