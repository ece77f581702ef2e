//! From a TCP connection to a websocket: TLS, HTTP, and every reason to say no.

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version,
    header::{
        AUTHORIZATION, CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
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
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{handshake::derive_accept_key, protocol::Role},
};
use tracing::{Instrument, debug, info_span, warn};

use crate::{builds::Build, connection::Connection, server::Shared, tasks::Tasks};

type Body = http_body_util::combinators::UnsyncBoxBody<bytes::Bytes, Box<dyn std::error::Error + Send + Sync>>;

/// Accepts connections until the server shuts down.
pub(crate) struct Listener {
    socket: TcpListener,
    tls: Option<TlsAcceptor>,
    shared: Arc<Shared>,
    tasks: Tasks,
    front: Front,
    strangers: Arc<Semaphore>,
}

/// What a server has beside its agents' connections.
#[derive(Clone, Default)]
pub(crate) struct Front {
    #[cfg(feature = "http")]
    pub(crate) standing: Option<(Arc<crate::serve::Standing>, axum::Router)>,
}

/// Sockets that have not shown a valid token yet. More wait in the system's accept queue.
const MAX_STRANGERS: usize = 512;

/// TLS handshake, and from there to the end of the request's headers.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Read buffer of an agent's socket, bytes: large enough that a block takes few system calls.
const READ_BUFFER: usize = 64 * 1024;

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
        let strangers = Arc::new(Semaphore::new(MAX_STRANGERS));
        Self { socket, tls: tls.map(TlsAcceptor::from), shared, tasks, front, strangers }
    }

    pub(crate) async fn run(self) {
        loop {
            let Ok(permit) = self.strangers.clone().acquire_owned().await else { return };
            let accepted = tokio::select! {
                () = self.shared.shutdown.cancelled() => return,
                accepted = self.socket.accept() => accepted,
            };
            match accepted {
                Ok((tcp, peer)) => self.spawn(tcp, peer, permit),
                Err(error) => {
                    warn!("cannot accept a connection: {error}");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn spawn(&self, tcp: TcpStream, peer: SocketAddr, permit: OwnedSemaphorePermit) {
        let visitor = Visitor {
            tls: self.tls.clone(),
            shared: self.shared.clone(),
            tasks: self.tasks.clone(),
            front: self.front.clone(),
        };
        let shutdown = self.shared.shutdown.clone();
        let span = info_span!("agent", %peer);
        self.tasks.spawn(
            async move {
                tokio::select! {
                    result = visitor.serve(tcp) => if let Err(error) = result {
                        debug!("the connection ended before it was one: {error}");
                    },
                    () = shutdown.cancelled() => {}
                }
                drop(permit);
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
}

impl Visitor {
    async fn serve(self, tcp: TcpStream) -> io::Result<()> {
        network::prepare(&tcp)?;
        match &self.tls {
            None => self.serve_http(tcp).await,
            Some(_) if !speaks_tls(&tcp).await? => refuse_plain_http(tcp).await,
            Some(acceptor) => {
                let stream = timeout(HANDSHAKE_TIMEOUT, acceptor.accept(tcp)).await??;
                self.serve_http(stream).await
            }
        }
    }

    /// Answers one request, and runs the agent's connection when it is one.
    pub(crate) async fn serve_http(
        self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    ) -> io::Result<()> {
        let service = service_fn(async |request| Ok::<_, Infallible>(self.answer(request).await));
        hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HANDSHAKE_TIMEOUT)
            .max_buf_size(MAX_HEADERS)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
            .await
            .map_err(io::Error::other)
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let path = request.uri().path();
        if path == AGENT_PATH || path.ends_with(AGENT_PATH) {
            return self.upgrade(request).await.unwrap_or_else(|refused| {
                self.shared.note_refusal(&format!("it was answered {}", refused.status()));
                refused
            });
        }
        #[cfg(feature = "http")]
        if let Some((_, router)) = &self.front.standing {
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
        let build = self.build(request.headers()).await?;
        let upgraded = hyper::upgrade::on(&mut request);
        let connection = welcome(upgraded, codec, build, self.shared.clone());
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
            Ok(Some(build)) => Ok(build),
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

/// Longest request head, bytes.
const MAX_HEADERS: usize = 16 * 1024;

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

fn text(status: StatusCode, text: &'static str) -> Response<Body> {
    let mut response = Response::new(body(text));
    *response.status_mut() = status;
    response
}

/// Runs an agent's connection once the upgrade is through.
async fn welcome(upgraded: OnUpgrade, codec: Codec, build: Arc<Build>, shared: Arc<Shared>) {
    match timeout(HANDSHAKE_TIMEOUT, upgraded).await {
        Ok(Ok(upgraded)) => {
            let stream = TokioIo::new(upgraded);
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
    let count = timeout(HANDSHAKE_TIMEOUT, tcp.peek(&mut first)).await??;
    Ok(count == 0 || first[0] == 22)
}

async fn refuse_plain_http(mut tcp: TcpStream) -> io::Result<()> {
    let answer = "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length: 42\r\n\r\n\
                  this port speaks TLS, use wss:// or https\n";
    timeout(HANDSHAKE_TIMEOUT, async {
        tcp.write_all(answer.as_bytes()).await?;
        tcp.shutdown().await?;
        // What the peer sent is read away, or the answer would be lost in a reset.
        tokio::io::copy(&mut tokio::io::AsyncReadExt::take(&mut tcp, MAX_HEADERS as u64), &mut tokio::io::sink()).await
    })
    .await??;
    Ok(())
}
