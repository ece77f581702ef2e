//! The raw log of an attempt, block by block; a connection that breaks is taken up where it was.

use http::{HeaderValue, StatusCode, header::RANGE};
use tokio::time::{Instant, sleep};

use crate::client::{
    base::escaped,
    http::{Ask, Client, ClientError},
    retry::{FIRST_CONTACT, Retry},
};

/// What of a log is wanted, as it is stored.
#[derive(Debug, Clone, Default)]
pub(super) struct Raw {
    pub(super) build: String,
    pub(super) step: Option<String>,
    pub(super) attempt: Option<u32>,
    pub(super) stream: Option<&'static str>,
    /// The first byte.
    pub(super) from: u64,
}

impl Raw {
    fn path(&self) -> String {
        let mut path = format!("builds/{}/log", self.build);
        let attempt = self.attempt.map(|attempt| attempt.to_string());
        let parameters = [("step", self.step.as_deref()), ("attempt", attempt.as_deref()), ("stream", self.stream)];
        let given = parameters.into_iter().filter_map(|(name, value)| Some((name, value?)));
        for (at, (name, value)) in given.enumerate() {
            path.push(if at == 0 { '?' } else { '&' });
            path.push_str(&format!("{name}={}", escaped(value)));
        }
        path
    }
}

/// Why a download came to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum DownloadError {
    #[error("{}", .0.told())]
    Client(#[from] ClientError),
    #[error(transparent)]
    Sink(#[from] std::io::Error),
}

/// Passes every byte to `take`, once and in order, with how many there were before and how many there are in all.
pub(super) async fn download(
    client: &Client,
    raw: &Raw,
    mut take: impl FnMut(&[u8], u64, Option<u64>) -> std::io::Result<()>,
) -> Result<u64, DownloadError> {
    let mut retry = Retry::new(Some(FIRST_CONTACT), Instant::now());
    let mut at = raw.from;
    loop {
        match download_from(client, raw, &mut at, &mut retry, &mut take).await {
            Err(DownloadError::Client(error)) => match retry.handle_failure(&error, client.jitter(), Instant::now()) {
                Some(pause) => sleep(pause).await,
                None => return Err(error.into()),
            },
            result => return result.map(|()| at - raw.from),
        }
    }
}

async fn download_from(
    client: &Client,
    raw: &Raw,
    at: &mut u64,
    retry: &mut Retry,
    take: &mut impl FnMut(&[u8], u64, Option<u64>) -> std::io::Result<()>,
) -> Result<(), DownloadError> {
    let mut ask = Ask::get(raw.path());
    if *at > 0 {
        let range = HeaderValue::from_str(&format!("bytes={at}-"));
        ask = ask.header(RANGE, range.map_err(|error| ClientError::NotUnderstood(error.to_string()))?);
    }
    let answer = match client.ask(&ask).await {
        // Nothing comes after what is there already.
        Err(error) if *at > 0 && error.status() == Some(StatusCode::RANGE_NOT_SATISFIABLE) => return Ok(()),
        answer => answer?,
    };
    if *at > 0 && answer.status != StatusCode::PARTIAL_CONTENT {
        return Err(ClientError::NotUnderstood("it does not continue a log that was cut off".into()).into());
    }
    let length = answer.header("content-length").and_then(|length| length.parse::<u64>().ok());
    let total = length.map(|length| *at + length);
    let mut body = answer.body;
    while let Some(block) = body.next().await? {
        retry.handle_contact(Instant::now());
        take(&block, *at, total)?;
        *at += block.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::canned::{Canned, torn};

    #[tokio::test]
    async fn a_download_that_was_cut_goes_on_behind_its_last_byte() {
        let rest = "HTTP/1.1 206 Partial Content\r\nContent-Length: 3\r\n\r\ndef";
        let mut server = Canned::start([torn("abc"), rest.to_owned()]).await;
        let raw = Raw { build: "b".into(), step: Some("a b".into()), attempt: Some(2), ..Raw::default() };
        let (client, mut got) = (server.client(""), Vec::new());
        let count = download(&client, &raw, |block, _, _| {
            got.extend_from_slice(block);
            Ok(())
        });
        assert_eq!(count.await.unwrap(), 6);
        assert_eq!(got, b"abcdef");
        assert!(server.asked().await.starts_with("GET /api/v1/builds/b/log?step=a%20b&attempt=2 HTTP"));
        assert!(server.asked().await.contains("range: bytes=3-\r\n"));
    }

    #[tokio::test]
    async fn a_server_that_starts_over_is_not_believed() {
        let server = Canned::start([torn("abc"), torn("abc")]).await;
        let raw = Raw { build: "b".into(), ..Raw::default() };
        let told = download(&server.client(""), &raw, |_, _, _| Ok(())).await.unwrap_err().to_string();
        assert!(told.contains("does not continue"), "{told}");
    }
}
