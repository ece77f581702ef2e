//! Builds are declared as launchers do it: over HTTP, a few at a time.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use phonehome_env::network::Transport;
use phonehome_proto::id::BuildId;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufStream},
    task::JoinSet,
};

use super::{Result, socket::Target};

/// A build, and what its agent shows.
pub(crate) struct Declared {
    pub(crate) build: BuildId,
    pub(crate) token: String,
}

/// Connections at a time.
const CONNECTIONS: usize = 32;

/// Declares so many builds without clocks.
pub(crate) async fn declare(target: &Arc<Target>, token: &str, count: usize) -> Result<Vec<Declared>> {
    let next = Arc::new(AtomicUsize::new(0));
    let mut clients = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let (target, token, next) = (target.clone(), token.to_owned(), next.clone());
        clients.spawn(async move {
            let mut declared = Vec::new();
            let mut api = Api::connect(&target, token).await.map_err(|error| error.to_string())?;
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                if at >= count {
                    return Ok::<_, String>(declared);
                }
                declared.push(api.declare(at).await.map_err(|error| error.to_string())?);
            }
        });
    }
    let mut all = Vec::new();
    while let Some(declared) = clients.join_next().await {
        all.extend(declared??);
    }
    Ok(all)
}

/// A connection that is kept.
struct Api {
    stream: BufStream<Box<dyn Transport>>,
    token: String,
}

impl Api {
    async fn connect(target: &Target, token: String) -> Result<Self> {
        Ok(Self { stream: BufStream::new(target.dial(0).await?), token })
    }

    async fn declare(&mut self, at: usize) -> Result<Declared> {
        let id = format!("swarm-{at}");
        let timeouts = json!({"connect": null, "lost": null, "total": null});
        let (status, answer) = self.post("/api/v1/builds", &json!({"id": id, "timeouts": timeouts})).await?;
        let token = answer["token"].as_str().filter(|_| status == 201);
        let token = token.ok_or_else(|| format!("{id} is not declared: {status} {answer}"))?.to_owned();
        Ok(Declared { build: id.parse()?, token })
    }

    /// The status, and the body.
    async fn post(&mut self, path: &str, body: &Value) -> Result<(u16, Value)> {
        let (token, body) = (&self.token, body.to_string());
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: swarm\r\nAuthorization: Bearer {token}\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        self.stream.write_all((head + &body).as_bytes()).await?;
        self.stream.flush().await?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            if self.stream.read_until(b'\n', &mut head).await? == 0 {
                return Err("the server hung up".into());
            }
        }
        let head = String::from_utf8(head)?.to_ascii_lowercase();
        let status = head.split(' ').nth(1).ok_or("no status")?.parse()?;
        let length = head.lines().find_map(|line| line.strip_prefix("content-length:")).ok_or("no length")?;
        let mut body = vec![0; length.trim().parse()?];
        self.stream.read_exact(&mut body).await?;
        Ok((status, serde_json::from_slice(&body)?))
    }
}
