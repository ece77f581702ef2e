//! From a TCP connection to a websocket: TLS, HTTP, and every reason to say no.

mod impatient;

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version,
    header::{
        AUTHORIZATION, CONNECTION, RETRY_AFTER, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
        SEC_WEBSOCKET_VERSION, UPGRADE, WWW_AUTHENTICATE,
    },
};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, service::service_fn, upgrade::OnUpgrade};
use hyper_util::rt::{TokioIo, TokioTimer};
use phonehome_env::{network, websocket};
use phonehome_proto::codec::Codec;
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::OwnedSemaphorePermit,
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{handshake::derive_accept_key, protocol::Role},
};
use tracing::{Instrument, debug, info_span, warn};

use self::impatient::Impatient;
use crate::{
    builds::Build, burst::Burst, connection::Connection, origin, server::Shared, strangers::Stranger, tasks::Tasks,
};

type Body = http_body_util::combinators::UnsyncBoxBody<bytes::Bytes, Box<dyn std::error::Error + Send + Sync>>;

/// Accepts connections until the server shuts down.
pub(crate) struct Listener {
    socket: TcpListener,
    tls: Option<TlsAcceptor>,
    shared: Arc<Shared>,
    tasks: Tasks,
    front: Front,
}

/// What a server has beside its agents' connections.
#[derive(Clone, Default)]
pub(crate) struct Front {
    #[cfg(feature = "http")]
    pub(crate) standing: Option<(Arc<crate::serve::Standing>, axum::Router)>,
}

/// From the connection to the end of the first request's head, TLS handshake included; and the same time for the head of
/// each further request on the connection.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Read buffer of an agent's socket, bytes. Each of ten thousand silent agents has one: a line or a sign of life fits in,
/// and [`Burst`] sees to it that a block takes few system calls all the same.
const READ_BUFFER: usize = 1024;

/// Pause after the system refused a connection, out of descriptors say.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl Listener {
    pub(crate) fn new(
        socket: TcpListener,
        tls: Option<Arc<ServerConfig>>,
        shared: Arc<Shared>,
        tasks: Tasks,
        front: Front,
    ) -> Self {
        Self { socket, tls: tls.map(TlsAcceptor::from), shared, tasks, front }
    }

    pub(crate) async fn run(self) {
        loop {
            let accepted = tokio::select! {
                () = self.shared.shutdown.cancelled() => return,
                accepted = self.socket.accept() => accepted,
            };
            match accepted {
                Ok((tcp, peer)) => self.spawn(tcp, peer),
                Err(error) => {
                    warn!("cannot accept a connection: {error}");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn spawn(&self, tcp: TcpStream, peer: SocketAddr) {
        let stranger = Arc::new(self.shared.strangers.admit(peer.ip()));
        let visitor = Visitor {
            tls: self.tls.clone(),
            shared: self.shared.clone(),
            tasks: self.tasks.clone(),
            front: self.front.clone(),
            stranger: Some(stranger.clone()),
        };
        let shutdown = self.shared.shutdown.clone();
        let span = info_span!("agent", %peer);
        self.tasks.spawn(
            async move {
                tokio::select! {
                    result = visitor.serve(tcp) => if let Err(error) = result {
                        debug!("the connection ended before it was one: {error}");
                    },
                    () = stranger.gives_way() => debug!("closed for newer connections: it has not shown a token yet"),
                    () = shutdown.cancelled() => {}
                }
            }
            .instrument(span),
        );
    }
}

/// Somebody who has not shown a token yet.
pub(crate) struct Visitor {
    pub(crate) tls: Option<TlsAcceptor>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) tasks: Tasks,
    pub(crate) front: Front,
    /// Its place among those, which it has for as long as it is one; `None` for whoever was let in elsewhere.
    pub(crate) stranger: Option<Arc<Stranger>>,
}

impl Visitor {
    async fn serve(self, tcp: TcpStream) -> io::Result<()> {
        let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
        network::prepare(&tcp)?;
        match &self.tls {
            None => self.serve_http_by(deadline, tcp).await,
            Some(_) if !timeout_at(deadline, speaks_tls(&tcp)).await?? => refuse_plain_http(tcp).await,
            Some(acceptor) => {
                let stream = timeout_at(deadline, acceptor.accept(tcp)).await??;
                self.serve_http_by(deadline, stream).await
            }
        }
    }

    /// Answers requests, and runs the agent's connection when one asks for it.
    pub(crate) async fn serve_http(
        self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    ) -> io::Result<()> {
        self.serve_http_by(Instant::now() + HANDSHAKE_TIMEOUT, stream).await
    }

    /// The same, with the first request's head there by `deadline`.
    async fn serve_http_by(
        self,
        deadline: Instant,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    ) -> io::Result<()> {
        let was_asked = AtomicBool::new(false);
        let service = service_fn(async |request| {
            was_asked.store(true, Ordering::Relaxed);
            Ok::<_, Infallible>(self.answer(request).await)
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HANDSHAKE_TIMEOUT)
            .max_buf_size(MAX_HEAD)
            .max_headers(MAX_HEADERS)
            .serve_connection(TokioIo::new(Impatient::new(stream)), service)
            .with_upgrades();
        let overdue = async {
            sleep_until(deadline).await;
            if was_asked.load(Ordering::Relaxed) {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            result = connection => result.map_err(io::Error::other),
            () = overdue => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    #[cfg_attr(not(feature = "http"), expect(unused_mut, reason = "the API has to know who asks"))]
    async fn answer(&self, mut request: Request<Incoming>) -> Response<Body> {
        let path = request.uri().path();
        if path == AGENT_PATH || path.ends_with(AGENT_PATH) {
            return self.upgrade(request).await.unwrap_or_else(|refused| {
                let status = refused.status();
                self.shared.note_refusal(status.as_str(), &format!("it was answered {status}"));
                refused
            });
        }
        #[cfg(feature = "http")]
        if let Some((_, router)) = &self.front.standing {
            request.extensions_mut().insert(self.stranger.clone());
            return answer_by(router, request).await;
        }
        match path {
            "/healthz" if matches!(*request.method(), Method::GET | Method::HEAD) => text(StatusCode::OK, "ok\n"),
            "/healthz" => text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n"),
            _ => text(StatusCode::NOT_FOUND, "not found; agents connect to /v1/agent\n"),
        }
    }

    /// Checks the handshake (RFC 6455, section 4.2.1), the version and the token, in that order.
    async fn upgrade(&self, mut request: Request<Incoming>) -> Result<Response<Body>, Response<Body>> {
        let key = websocket_key(&request)?.clone();
        let codec = codec(request.headers())?;
        if origin::is_foreign(request.headers(), self.advertised()) {
            return Err(text(StatusCode::FORBIDDEN, origin::REFUSED));
        }
        if self.shared.draining.is_cancelled() {
            return Err(come_back("1", "the server is draining, come back soon\n"));
        }
        let build = self.build(request.headers()).await?;
        let place = self.shared.places.clone().try_acquire_owned();
        let place = place.map_err(|_| come_back(CROWDED_FOR, "as many agents are connected as may be\n"))?;
        let upgraded = hyper::upgrade::on(&mut request);
        let connection = welcome(upgraded, codec, build, self.shared.clone(), place);
        self.tasks.spawn(connection.in_current_span());
        let mut response = Response::new(body(""));
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(codec.subprotocol()));
        if let Ok(accept) = HeaderValue::from_str(&derive_accept_key(key.as_bytes())) {
            headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
        }
        Ok(response)
    }

    async fn build(&self, headers: &HeaderMap) -> Result<Arc<Build>, Response<Body>> {
        let refused = |why| {
            let mut response = text(StatusCode::UNAUTHORIZED, why);
            response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            response
        };
        let header = headers.get(AUTHORIZATION).ok_or_else(|| refused("a bearer token is required\n"))?;
        let (scheme, token) = header.to_str().ok().and_then(|value| value.split_once(' ')).unwrap_or_default();
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(refused("a bearer token is required\n"));
        }
        match self.by_token(token.trim()).await {
            Ok(Some(build)) => {
                self.stranger.iter().for_each(|stranger| stranger.become_known());
                Ok(build)
            }
            Ok(None) if self.may_not_know_yet() => {
                // A server that was started again hears from agents before it is told what to expect: 401 would be final.
                Err(text(StatusCode::SERVICE_UNAVAILABLE, "no build is expected here yet\n"))
            }
            Ok(None) => Err(refused("the token is not valid here\n")),
            Err(error) => {
                warn!("cannot look a token up: {error}");
                Err(text(StatusCode::SERVICE_UNAVAILABLE, "storage is not available\n"))
            }
        }
    }

    async fn by_token(&self, token: &str) -> io::Result<Option<Arc<Build>>> {
        #[cfg(feature = "http")]
        if let Some((standing, _)) = &self.front.standing {
            return standing.by_token(token).await;
        }
        Ok(self.shared.builds.by_token(token))
    }

    /// Where others are told that this server is.
    fn advertised(&self) -> Option<&str> {
        #[cfg(feature = "http")]
        if let Some((standing, _)) = &self.front.standing {
            return standing.settings.advertise.as_deref();
        }
        None
    }

    /// Whether a token that is not known may become so. A standing server knows from its start what it was told before.
    fn may_not_know_yet(&self) -> bool {
        #[cfg(feature = "http")]
        if self.front.standing.is_some() {
            return false;
        }
        self.shared.builds.is_empty()
    }
}

/// Where agents connect, whatever prefix a proxy left in front of it.
const AGENT_PATH: &str = "/v1/agent";

/// After how many seconds an agent asks again that has found no place.
const CROWDED_FOR: &str = "5";

/// Longest request head, bytes; a longer one is answered 431.
const MAX_HEAD: usize = 16 * 1024;

/// Header lines of a request: what clients and the proxies before them send, and as many again.
const MAX_HEADERS: usize = 64;

#[expect(clippy::result_large_err, reason = "the error is an answer, made once per connection")]
fn websocket_key(request: &Request<Incoming>) -> Result<&HeaderValue, Response<Body>> {
    let headers = request.headers();
    let names = |header, name: &str| {
        headers
            .get_all(header)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .any(|value| value.split(',').any(|item| item.trim().eq_ignore_ascii_case(name)))
    };
    let is_upgrade = request.method() == Method::GET
        && request.version() == Version::HTTP_11
        && names(CONNECTION, "upgrade")
        && names(UPGRADE, "websocket");
    if !is_upgrade {
        return Err(text(StatusCode::BAD_REQUEST, "this is a websocket endpoint for phonehome agents\n"));
    }
    if !names(SEC_WEBSOCKET_VERSION, "13") {
        let mut response = text(StatusCode::UPGRADE_REQUIRED, "websocket version 13 is required\n");
        response.headers_mut().insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        return Err(response);
    }
    headers.get(SEC_WEBSOCKET_KEY).ok_or_else(|| text(StatusCode::BAD_REQUEST, "Sec-WebSocket-Key is missing\n"))
}

#[expect(clippy::result_large_err, reason = "the error is an answer, made once per connection")]
fn codec(headers: &HeaderMap) -> Result<Codec, Response<Body>> {
    let offers = headers.get_all(SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|value| value.to_str().ok());
    offers.into_iter().find_map(Codec::negotiate).ok_or_else(|| {
        text(StatusCode::BAD_REQUEST, "no common version: offer subprotocol phonehome.v1 or phonehome.v1.json\n")
    })
}

/// What the API answers.
#[cfg(feature = "http")]
async fn answer_by(router: &axum::Router, request: Request<Incoming>) -> Response<Body> {
    let Ok(response) = tower_service::Service::call(&mut router.clone(), request).await;
    response.map(|body| body.map_err(Into::into).boxed_unsync())
}

fn body(text: &'static str) -> Body {
    Full::from(text).map_err(|never| match never {}).boxed_unsync()
}

fn come_back(seconds: &'static str, why: &'static str) -> Response<Body> {
    let mut response = text(StatusCode::SERVICE_UNAVAILABLE, why);
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static(seconds));
    response
}

fn text(status: StatusCode, text: &'static str) -> Response<Body> {
    let mut response = Response::new(body(text));
    *response.status_mut() = status;
    response
}

/// Runs an agent's connection once the upgrade is through. Its place is free again when it has ended.
async fn welcome(
    upgraded: OnUpgrade,
    codec: Codec,
    build: Arc<Build>,
    shared: Arc<Shared>,
    _place: OwnedSemaphorePermit,
) {
    match timeout(HANDSHAKE_TIMEOUT, upgraded).await {
        Ok(Ok(upgraded)) => {
            let stream = Burst::new(TokioIo::new(upgraded));
            let socket =
                WebSocketStream::from_raw_socket(stream, Role::Server, Some(websocket::config(READ_BUFFER))).await;
            Connection::new(socket, codec, build, shared).run().await;
        }
        Ok(Err(error)) => debug!("the upgrade failed: {error}"),
        Err(_) => debug!("the upgrade took too long"),
    }
}

/// Whether the first byte is a TLS handshake record's (RFC 8446, section 5.1).
async fn speaks_tls(tcp: &TcpStream) -> io::Result<bool> {
    let mut first = [0];
    let count = tcp.peek(&mut first).await?;
    Ok(count == 0 || first[0] == 22)
}

async fn refuse_plain_http(mut tcp: TcpStream) -> io::Result<()> {
    let answer = "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length: 42\r\n\r\n\
                  this port speaks TLS, use wss:// or https\n";
    timeout(HANDSHAKE_TIMEOUT, async {
        tcp.write_all(answer.as_bytes()).await?;
        tcp.shutdown().await?;
        // What the peer sent is read away, or the answer would be lost in a reset.
        tokio::io::copy(&mut tokio::io::AsyncReadExt::take(&mut tcp, MAX_HEAD as u64), &mut tokio::io::sink()).await
    })
    .await??;
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, DuplexStream},
        task::JoinHandle,
        time::advance,
    };

    use super::*;
    use crate::{Config, Durability, Expected, Server};

    #[tokio::test]
    async fn a_head_that_is_too_long_or_has_too_many_lines_is_answered_431() {
        let scene = Scene::new();
        let long = format!("GET /healthz HTTP/1.1\r\nX-Long: {}\r\n\r\n", "x".repeat(MAX_HEAD));
        let many = format!("GET /healthz HTTP/1.1\r\n{}\r\n", "X-Many: x\r\n".repeat(MAX_HEADERS + 1));
        let fine = format!("GET /healthz HTTP/1.1\r\n{}\r\n", "X-Many: x\r\n".repeat(MAX_HEADERS));
        for (request, status) in [(long, "431"), (many, "431"), (fine, "200")] {
            let (mut client, _served) = scene.connect();
            client.write_all(request.as_bytes()).await.unwrap();
            let mut answer = [0; "HTTP/1.1 431".len()];
            client.read_exact(&mut answer).await.unwrap();
            assert!(answer.ends_with(status.as_bytes()), "{}", String::from_utf8_lossy(&answer));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_dribbles_in_is_not_waited_for() {
        let scene = Scene::new();
        let (mut client, served) = scene.connect();
        for byte in b"GET /heal" {
            client.write_all(&[*byte]).await.unwrap();
            advance(Duration::from_secs(1)).await;
        }
        assert!(!served.is_finished());
        advance(Duration::from_secs(2)).await;
        assert!(served.await.unwrap().is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn neither_is_the_head_of_a_second_request() {
        let scene = Scene::new();
        for second in ["", "GET /heal"] {
            let (mut client, served) = scene.connect();
            client.write_all(b"GET /healthz HTTP/1.1\r\n\r\n").await.unwrap();
            let mut answer = [0; 1024];
            assert!(client.read(&mut answer).await.unwrap() > 0);
            client.write_all(second.as_bytes()).await.unwrap();
            let began = Instant::now();
            drop(served.await.unwrap()); // in whatever way it ended
            assert!(began.elapsed() < HANDSHAKE_TIMEOUT + Duration::from_secs(1), "{second:?}");
        }
    }

    #[tokio::test]
    async fn sockets_that_say_nothing_do_not_keep_others_out() {
        let dir = tempfile::tempdir().unwrap();
        let (listen, data) = ("127.0.0.1:0".parse().unwrap(), dir.path().to_owned());
        let server = Server::spawn(Config { listen, tls: false, data, durability: Durability::Os }).await.unwrap();
        let mut silent = Vec::new();
        for _ in 0..500 {
            silent.push(TcpStream::connect(server.local_addr()).await.unwrap());
        }
        let mut honest = TcpStream::connect(server.local_addr()).await.unwrap();
        honest.write_all(b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        timeout(HANDSHAKE_TIMEOUT, honest.read_to_string(&mut answer)).await.expect("it is served at once").unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let closed = timeout(HANDSHAKE_TIMEOUT / 2, silent[0].read(&mut [0])).await.expect("the oldest has given way");
        assert!(!matches!(closed, Ok(1..)));
        assert!(server.visitor().shared.strangers.count() <= 64);
    }

    #[tokio::test]
    async fn beyond_the_limit_an_agent_is_told_to_come_back_and_finds_the_place_of_one_that_left() {
        let scene = Scene::new();
        let build = scene.server.expect(Expected::new("b".parse().unwrap())).unwrap();
        scene.server.visitor().shared.places.forget_permits(tokio::sync::Semaphore::MAX_PERMITS - 1);
        let (seated, answer) = scene.call(build.token()).await;
        assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
        let (_, answer) = scene.call(build.token()).await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("retry-after: 5\r\n"), "{answer}");
        drop(seated);
        let places = scene.server.visitor().shared.places.clone();
        drop(timeout(HANDSHAKE_TIMEOUT, places.acquire()).await.expect("the place is free again").unwrap());
        assert!(scene.call(build.token()).await.1.starts_with("HTTP/1.1 101"));
    }

    #[tokio::test]
    async fn a_page_of_somebody_else_opens_no_websocket() {
        let scene = Scene::new();
        let build = scene.server.expect(Expected::new("b".parse().unwrap())).unwrap();
        let (_, answer) = scene.call_with(build.token(), "Origin: https://evil.example\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
        let (_, answer) = scene.call_with(build.token(), "Origin: http://b\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
    }

    struct Scene {
        server: Server,
        _dir: tempfile::TempDir,
    }

    impl Scene {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let (listen, data) = ("127.0.0.1:0".parse().unwrap(), dir.path().to_owned());
            let config = Config { listen, tls: false, data, durability: Durability::Os };
            Self { server: Server::deaf(phonehome_env::Env::real(), &config).unwrap(), _dir: dir }
        }

        /// An agent's upgrade, and the head of the answer.
        async fn call(&self, token: &str) -> (DuplexStream, String) {
            self.call_with(token, "").await
        }

        async fn call_with(&self, token: &str, header: &str) -> (DuplexStream, String) {
            let (mut client, _served) = self.connect();
            let request = format!(
                "GET /v1/agent HTTP/1.1\r\nHost: b\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\
                 Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                 Sec-WebSocket-Protocol: phonehome.v1\r\nAuthorization: Bearer {token}\r\n{header}\r\n"
            );
            client.write_all(request.as_bytes()).await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(client.read_u8().await.unwrap());
            }
            (client, String::from_utf8(head).unwrap())
        }

        fn connect(&self) -> (DuplexStream, JoinHandle<io::Result<()>>) {
            let (client, stream) = tokio::io::duplex(64 * 1024);
            (client, tokio::spawn(self.server.visitor().serve_http(stream)))
        }
    }
}
