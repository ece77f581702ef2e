//! One request to a standing server and its answer: HTTP/1.1 over TCP or TLS, a connection for each.

use std::{io, time::Duration};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode,
    header::{ACCEPT, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HOST, LOCATION, USER_AGENT},
};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use phonehome_env::{
    Env,
    network::Transport,
    proxy::{Proxy, ProxyError},
    secret::Secret,
    tls::{self, TlsError},
    trust::Trust,
};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tokio_rustls::TlsConnector;

use super::{
    base::Base,
    problem::Problem,
    retry::{FIRST_CONTACT, Retry},
};

/// Asks one server.
pub(crate) struct Client {
    env: Env,
    pub(crate) base: Base,
    authorization: Option<HeaderValue>,
    tls: Option<TlsConnector>,
    proxy: Option<Proxy>,
}

/// What is asked.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    method: Method,
    /// Below the API, with its query.
    path: String,
    headers: HeaderMap,
    body: Option<Bytes>,
    /// Whether asking twice is as good as once.
    is_repeatable: bool,
    /// Until the answer's head is there.
    patience: Duration,
}

/// An answer that is no error; its body is still to be read.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Body,
}

/// A body on its way.
#[derive(Debug)]
pub(crate) struct Body {
    incoming: Incoming,
    /// Moves the bytes; ends with the body.
    _connection: Connection,
}

/// The task of a connection.
#[derive(Debug)]
struct Connection(JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Why there is no answer, or none that helps.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// The connection broke in the middle.
    #[error("the connection to the server broke")]
    Broken(#[source] hyper::Error),
    /// Whatever answers there, it is no server of this kind.
    #[error("this is no phonehome-server, or one of another version: {0}")]
    NotUnderstood(String),
    #[error(transparent)]
    Proxy(#[from] ProxyError),
    #[error(transparent)]
    Refused(Box<Problem>),
    #[error("the server did not answer within {} s", .0.as_secs())]
    TimedOut(Duration),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("cannot reach {0}")]
    Unreachable(String, #[source] io::Error),
}

/// TCP, proxy and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);

/// Until the head of an answer, unless the question itself takes time.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Without a byte of a body. A stream of events says something every 15 s.
const SILENCE: Duration = Duration::from_secs(45);

/// Largest JSON answer, bytes: 500 builds with many labels are far below.
const MAX_JSON: usize = 16 * 1024 * 1024;

/// Largest error that is read, bytes.
const MAX_PROBLEM: usize = 64 * 1024;

impl ClientError {
    /// Whether it may be otherwise a little later.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Broken(_) | Self::TimedOut(_) | Self::Unreachable(..) => true,
            Self::Proxy(error) => matches!(error, ProxyError::Unreachable(..)),
            Self::Refused(problem) => problem.is_transient(),
            Self::Tls(error) => !error.is_fatal(),
            Self::NotUnderstood(_) => false,
        }
    }

    /// Whether nobody answered at all.
    pub(crate) fn is_unanswered(&self) -> bool {
        match self {
            Self::TimedOut(_) | Self::Unreachable(..) | Self::Proxy(ProxyError::Unreachable(..)) => true,
            Self::Broken(_) | Self::NotUnderstood(_) | Self::Proxy(_) | Self::Refused(_) | Self::Tls(_) => false,
        }
    }

    /// Whether the server has certainly not done what was asked.
    fn is_undone(&self) -> bool {
        match self {
            Self::Unreachable(..) | Self::Proxy(_) | Self::Tls(_) => true,
            Self::Refused(problem) => problem.is_undone(),
            Self::Broken(_) | Self::NotUnderstood(_) | Self::TimedOut(_) => false,
        }
    }

    /// How long the server wants to be left alone.
    pub(crate) fn retry_after(&self) -> Duration {
        match self {
            Self::Refused(problem) => problem.retry_after,
            Self::Broken(_)
            | Self::NotUnderstood(_)
            | Self::Proxy(_)
            | Self::TimedOut(_)
            | Self::Tls(_)
            | Self::Unreachable(..) => Duration::ZERO,
        }
    }

    /// The status of an answer that is an error.
    pub(crate) fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Refused(problem) => Some(problem.status),
            Self::Broken(_)
            | Self::NotUnderstood(_)
            | Self::Proxy(_)
            | Self::TimedOut(_)
            | Self::Tls(_)
            | Self::Unreachable(..) => None,
        }
    }

    /// All of it on one line.
    pub(crate) fn told(&self) -> String {
        let mut told = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            told.push_str(": ");
            told.push_str(&cause.to_string());
            source = cause.source();
        }
        told
    }
}

impl Ask {
    pub(crate) fn new(method: Method, path: impl Into<String>) -> Self {
        let is_repeatable = method == Method::GET;
        let (path, headers) = (path.into(), HeaderMap::new());
        Self { method, path, headers, body: None, is_repeatable, patience: ANSWER_TIMEOUT }
    }

    pub(crate) fn get(path: impl Into<String>) -> Self {
        Self::new(Method::GET, path)
    }

    pub(crate) fn post(path: impl Into<String>, body: &Value) -> Self {
        let mut ask = Self::new(Method::POST, path).header(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        ask.body = Some(body.to_string().into());
        ask
    }

    pub(crate) fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.insert(name, value);
        self
    }

    /// The answer itself may take this long besides.
    pub(crate) fn taking(mut self, time: Duration) -> Self {
        self.patience = ANSWER_TIMEOUT + time;
        self
    }

    /// Asking twice is as good as once.
    pub(crate) fn repeatable(self) -> Self {
        Self { is_repeatable: true, ..self }
    }
}

impl Client {
    /// Reads the files that say whom to trust; nothing is connected yet.
    pub(crate) fn new(
        base: Base,
        token: Option<&Secret>,
        trust: &Trust,
        proxy: Option<Proxy>,
    ) -> Result<Self, TlsError> {
        let authorization = token.and_then(|token| HeaderValue::from_str(&format!("Bearer {}", token.expose())).ok());
        let authorization = authorization.map(|mut value| {
            value.set_sensitive(true);
            value
        });
        let tls = if base.tls { Some(tls::connector(trust)?) } else { None };
        Ok(Self { env: Env::real(), base, authorization, tls, proxy })
    }

    /// Chance for a pause.
    pub(crate) fn jitter(&self) -> f64 {
        self.env.jitter()
    }

    /// Asks once.
    pub(crate) async fn ask(&self, ask: &Ask) -> Result<Answer, ClientError> {
        let connected = timeout(CONNECT_TIMEOUT, self.connect()).await;
        let stream = connected.map_err(|_| ClientError::TimedOut(CONNECT_TIMEOUT))??;
        let (mut sender, connection) =
            http1::handshake::<_, Full<Bytes>>(TokioIo::new(stream)).await.map_err(ClientError::Broken)?;
        let connection = Connection(tokio::spawn(async move {
            drop(connection.await); // what went wrong shows in the answer
        }));
        let request = self.request(ask)?;
        let answered = timeout(ask.patience, sender.send_request(request)).await;
        let answer = answered.map_err(|_| ClientError::TimedOut(ask.patience))?.map_err(ClientError::Broken)?;
        let (head, incoming) = answer.into_parts();
        let body = Body { incoming, _connection: connection };
        if head.status.is_success() {
            return Ok(Answer { status: head.status, headers: head.headers, body });
        }
        if head.status.is_redirection() {
            let target = head.headers.get(LOCATION).and_then(|target| target.to_str().ok()).unwrap_or_default();
            return Err(ClientError::NotUnderstood(format!("it redirects to {target:?}, give that address instead")));
        }
        let text = body.read(MAX_PROBLEM).await.unwrap_or_default(); // the status says the most of it
        Err(ClientError::Refused(Box::new(Problem::read(head.status, &head.headers, &text))))
    }

    async fn connect(&self) -> Result<Box<dyn Transport>, ClientError> {
        let Base { host, port, .. } = &self.base;
        let network = &*self.env.network;
        let tcp = match &self.proxy {
            Some(proxy) => proxy.connect(network, host, *port).await?,
            None => {
                let unreachable = |error| ClientError::Unreachable(self.base.to_string(), error);
                network.connect(host, *port).await.map_err(unreachable)?
            }
        };
        match &self.tls {
            Some(connector) => Ok(Box::new(tls::handshake(connector, host, tcp).await?)),
            None => Ok(tcp),
        }
    }

    fn request(&self, ask: &Ask) -> Result<Request<Full<Bytes>>, ClientError> {
        let body = ask.body.clone().unwrap_or_default();
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = ask.method.clone();
        let not_asked = |_| ClientError::NotUnderstood(format!("{:?} cannot be asked for", ask.path));
        *request.uri_mut() = self.base.api(&ask.path).parse().map_err(not_asked)?;
        let headers = request.headers_mut();
        headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
        headers.insert(USER_AGENT, HeaderValue::from_static(concat!("phonehome-server/", env!("CARGO_PKG_VERSION"))));
        if ask.body.is_none() && ask.method != Method::GET {
            headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        }
        let host = HeaderValue::from_str(&self.base.authority);
        headers.extend(host.into_iter().map(|host| (HOST, host)));
        headers.extend(self.authorization.iter().map(|value| (AUTHORIZATION, value.clone())));
        headers.extend(ask.headers.clone());
        Ok(request)
    }

    /// Asks, and asks again for a while when a failure may pass. What would be done twice is only asked again when it
    /// was certainly not done.
    pub(crate) async fn ask_patiently(&self, ask: &Ask) -> Result<Answer, ClientError> {
        self.ask_for(Some(FIRST_CONTACT), ask).await
    }

    /// The same with a patience of one's own; `None` is for ever.
    pub(crate) async fn ask_for(&self, limit: Option<Duration>, ask: &Ask) -> Result<Answer, ClientError> {
        self.insist(limit, ask, async |answer| Ok(answer)).await
    }

    /// The same for an answer that may be nothing (204) at this time.
    pub(crate) async fn json_if_any<T: DeserializeOwned>(
        &self,
        limit: Option<Duration>,
        ask: &Ask,
    ) -> Result<Option<T>, ClientError> {
        let read = async |answer: Answer| match answer.status {
            StatusCode::NO_CONTENT => Ok(None),
            _ => answer.json().await.map(Some),
        };
        self.insist(limit, ask, read).await
    }

    async fn insist<T>(
        &self,
        limit: Option<Duration>,
        ask: &Ask,
        read: impl AsyncFn(Answer) -> Result<T, ClientError>,
    ) -> Result<T, ClientError> {
        let mut retry = Retry::new(limit, Instant::now());
        loop {
            let result = match self.ask(ask).await {
                Ok(answer) => read(answer).await,
                Err(error) => Err(error),
            };
            let error = match result {
                Ok(read) => return Ok(read),
                Err(error) => error,
            };
            if !ask.is_repeatable && !error.is_undone() {
                return Err(error);
            }
            match retry.handle_failure(&error, self.jitter(), Instant::now()) {
                Some(pause) => sleep(pause).await,
                None => return Err(error),
            }
        }
    }

    /// Asks for JSON.
    pub(crate) async fn json<T: DeserializeOwned>(&self, ask: &Ask) -> Result<T, ClientError> {
        self.json_for(Some(FIRST_CONTACT), ask).await
    }

    /// The same with a patience of one's own; `None` is for ever.
    pub(crate) async fn json_for<T: DeserializeOwned>(
        &self,
        limit: Option<Duration>,
        ask: &Ask,
    ) -> Result<T, ClientError> {
        self.insist(limit, ask, async |answer| answer.json().await).await
    }
}

impl Answer {
    /// The whole body as JSON.
    pub(crate) async fn json<T: DeserializeOwned>(self) -> Result<T, ClientError> {
        let text = self.body.read(MAX_JSON).await?;
        let not_understood = |error: serde_json::Error| ClientError::NotUnderstood(error.to_string());
        // By way of a value: of a member that is there twice the last one counts (RFC 8259, section 4).
        let value: Value = serde_json::from_slice(&text).map_err(not_understood)?;
        serde_json::from_value(value).map_err(not_understood)
    }

    /// A header as text.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

impl Body {
    /// The next piece; `None` at its proper end. Cancel safe.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        loop {
            let frame = timeout(SILENCE, self.incoming.frame()).await.map_err(|_| ClientError::TimedOut(SILENCE))?;
            match frame {
                None => return Ok(None),
                Some(Err(error)) => return Err(ClientError::Broken(error)),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }

    /// All of it, if it is not larger than that.
    async fn read(self, limit: usize) -> Result<Bytes, ClientError> {
        let Self { incoming, _connection } = self;
        let collected = timeout(ANSWER_TIMEOUT, Limited::new(incoming, limit).collect()).await;
        match collected.map_err(|_| ClientError::TimedOut(ANSWER_TIMEOUT))? {
            Ok(body) => Ok(body.to_bytes()),
            Err(error) if error.is::<LengthLimitError>() => {
                Err(ClientError::NotUnderstood(format!("its answer is larger than {limit} bytes")))
            }
            Err(error) => match error.downcast::<hyper::Error>() {
                Ok(error) => Err(ClientError::Broken(*error)),
                Err(error) => Err(ClientError::NotUnderstood(error.to_string())),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::canned::{Canned, answer, torn};

    #[tokio::test]
    async fn a_question_carries_the_token_the_prefix_and_its_body() {
        let mut server = Canned::start(["HTTP/1.1 201 Created\r\nContent-Length: 8\r\n\r\n{\"a\": 7}"]).await;
        let client = server.client("/pre/fix/");
        let ask = Ask::post("builds", &serde_json::json!({"id": "b"}));
        let answer: Value = client.json(&ask).await.unwrap();
        assert_eq!(answer["a"], 7);
        let asked = server.asked().await;
        assert!(asked.starts_with("POST /pre/fix/api/v1/builds HTTP/1.1\r\n"), "{asked}");
        assert!(asked.contains("authorization: Bearer a-token\r\n") && asked.ends_with("{\"id\":\"b\"}"), "{asked}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_busy_server_is_asked_again_as_late_as_it_wishes() {
        let busy = "HTTP/1.1 503 Busy\r\nRetry-After: 3\r\nContent-Length: 0\r\n\r\n";
        let server = Canned::start([busy, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"]).await;
        let before = Instant::now();
        let _: Value = server.client("").json(&Ask::get("builds")).await.unwrap();
        assert!(before.elapsed() >= Duration::from_secs(3), "{:?}", before.elapsed());
    }

    #[tokio::test]
    async fn an_answer_that_is_cut_off_is_asked_for_again() {
        let server = Canned::start([torn("{"), answer("200 OK", "{}")]).await;
        let _: Value = server.client("").json(&Ask::get("builds")).await.unwrap();
    }

    #[tokio::test]
    async fn what_may_have_been_done_is_not_asked_twice() {
        let mut server = Canned::start(["", "HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\n{}"]).await;
        let result: Result<Value, _> = server.client("").json(&Ask::post("builds", &Value::Null)).await;
        assert!(matches!(result, Err(ClientError::Broken(_))), "{result:?}");
        server.asked().await;
        let _: Value = server.client("").json(&Ask::get("builds")).await.unwrap();
    }

    #[tokio::test]
    async fn a_no_is_told_and_a_redirection_shown() {
        let refusal = "HTTP/1.1 404 Not Found\r\nContent-Length: 19\r\n\r\n{\"detail\":\"no way\"}";
        let moved = "HTTP/1.1 301 Moved\r\nLocation: https://elsewhere/\r\nContent-Length: 0\r\n\r\n";
        let server = Canned::start([refusal, moved]).await;
        let why = async || {
            let result: Result<Value, _> = server.client("").json(&Ask::get("builds/x")).await;
            result.unwrap_err().told()
        };
        assert_eq!(why().await, "the server answered 404 Not Found: no way");
        assert!(why().await.contains("https://elsewhere/"));
    }
}
