//! A server whose answers were written before anybody asked.

use phonehome_env::{secret::Secret, trust::Trust};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::mpsc,
    task::JoinHandle,
};

use super::http::Client;

/// Gives each connection the next answer and closes it then.
pub(crate) struct Canned {
    address: std::net::SocketAddr,
    asked: mpsc::Receiver<String>,
    task: JoinHandle<()>,
}

impl Drop for Canned {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Canned {
    pub(crate) async fn start<A: Into<String>>(answers: impl IntoIterator<Item = A>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (tell, asked) = mpsc::channel(64);
        let answers: Vec<String> = answers.into_iter().map(Into::into).collect();
        let task = tokio::spawn(async move {
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                while !is_whole(&request) && stream.read_buf(&mut request).await.unwrap() > 0 {}
                tell.send(String::from_utf8(request).unwrap()).await.unwrap();
                stream.write_all(answer.as_bytes()).await.unwrap();
                stream.shutdown().await.unwrap();
            }
        });
        Self { address, asked, task }
    }

    pub(crate) fn client(&self, prefix: &str) -> Client {
        let base = format!("http://{}{prefix}", self.address).parse().unwrap();
        Client::new(base, Some(&Secret::new("a-token".into())), &Trust::default(), None).unwrap()
    }

    /// The next request that came in.
    pub(crate) async fn asked(&mut self) -> String {
        self.asked.recv().await.unwrap()
    }
}

/// Whether the head and as much body as it promises are there.
fn is_whole(request: &[u8]) -> bool {
    let text = String::from_utf8_lossy(request);
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
    body.len() >= length.unwrap_or(0)
}

/// A whole answer with a body of known length.
pub(crate) fn answer(status: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

/// An answer whose body is cut off after this much.
pub(crate) fn torn(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len() + 1)
}
