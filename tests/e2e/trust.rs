//! Whom the agent believes, how it shows who it is, and the proxies between.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use base64::{Engine, prelude::BASE64_STANDARD};
use futures_util::{SinkExt, StreamExt};
use phonehome_proto::{
    codec::{Codec, Message},
    frame::{AgentFrame, Durable, FinishedAck, Hello, ServerFrame, Welcome},
    limits::{HEARTBEAT, MAX_MESSAGE, MAX_PAYLOAD, WINDOW},
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
    server::WebPkiClientVerifier,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self,
        handshake::server::{Request, Response},
    },
};

use crate::harness::{Hook, Process, Scene, agent, patiently};

#[tokio::test]
async fn a_certificate_of_the_given_authority_is_believed() {
    let scene = Scene::new();
    let authority = Authority::new();
    let server = TlsServer::start(&authority, None).await;
    let ca = authority.file(&scene, "ca.pem");
    let url = format!("wss://localhost:{}/ci", server.address.port());
    let mut agent = agent_of(&scene, &["--url", &url, "--ca", ca.to_str().unwrap(), "--step", "compile"]);
    assert_eq!(agent.ended().await, 3);
    let visit = patiently("the agent's visit", server.visit).await.unwrap();
    assert_eq!(visit.path, "/ci/v1/agent");
    assert_eq!(visit.authorization, "Bearer a-token");
    assert_eq!((visit.hello.build.as_str(), visit.hello.step.as_str()), ("a-build", "compile"));
    assert!(visit.hello.agent.starts_with("phonehome-agent/"), "{}", visit.hello.agent);
    assert_eq!(visit.output, b"out\n");
    assert_eq!(visit.certificates, 0);
}

#[tokio::test]
async fn a_certificate_of_somebody_else_is_refused_and_the_command_runs() {
    let scene = Scene::new();
    let server = TlsServer::start(&Authority::new(), None).await;
    let ca = Authority::new().file(&scene, "other.pem");
    let url = format!("wss://localhost:{}", server.address.port());
    let mut agent = agent_of(&scene, &["--url", &url, "--ca", ca.to_str().unwrap()]);
    assert_eq!(agent.ended().await, 3);
    let own_log = String::from_utf8(agent.stderr.all().await).unwrap();
    assert!(own_log.contains("the TLS handshake failed"), "{own_log}");
}

#[tokio::test]
async fn a_certificate_for_another_name_is_refused() {
    let scene = Scene::new();
    let authority = Authority::new();
    let server = TlsServer::start(&authority, None).await;
    let ca = authority.file(&scene, "ca.pem");
    let url = format!("wss://127.0.0.1:{}", server.address.port());
    let mut agent = agent_of(&scene, &["--url", &url, "--ca", ca.to_str().unwrap()]);
    assert_eq!(agent.ended().await, 3);
    let own_log = String::from_utf8(agent.stderr.all().await).unwrap();
    assert!(own_log.contains("not valid for name"), "{own_log}");
}

#[tokio::test]
async fn the_systems_authorities_do_not_vouch_for_an_unknown_one() {
    let scene = Scene::new();
    let server = TlsServer::start(&Authority::new(), None).await;
    let url = format!("wss://localhost:{}", server.address.port());
    let mut agent = agent_of(&scene, &["--url", &url]);
    assert_eq!(agent.ended().await, 3);
    let own_log = String::from_utf8(agent.stderr.all().await).unwrap();
    assert!(own_log.contains("the TLS handshake failed"), "{own_log}");
}

#[tokio::test]
async fn an_agent_shows_its_certificate_where_one_is_required() {
    let scene = Scene::new();
    let (authority, clients) = (Authority::new(), Authority::new());
    let server = TlsServer::start(&authority, Some(&clients)).await;
    let (cert, key) = clients.issue("agent");
    let cert = scene.write("agent.pem", pem("CERTIFICATE", &cert));
    let key = scene.write("agent.key", pem("PRIVATE KEY", key.secret_der()));
    let ca = authority.file(&scene, "ca.pem");
    let url = format!("wss://localhost:{}", server.address.port());
    let (cert, key) = (cert.to_str().unwrap(), key.to_str().unwrap());
    let mut agent =
        agent_of(&scene, &["--url", &url, "--ca", ca.to_str().unwrap(), "--client-cert", cert, "--client-key", key]);
    assert_eq!(agent.ended().await, 3);
    let visit = patiently("the agent's visit", server.visit).await.unwrap();
    assert_eq!((visit.certificates, &*visit.output), (1, &b"out\n"[..]));
}

#[tokio::test]
async fn an_agent_without_the_required_certificate_delivers_nothing_and_runs_its_command() {
    let scene = Scene::new();
    let (authority, clients) = (Authority::new(), Authority::new());
    let server = TlsServer::start(&authority, Some(&clients)).await;
    let ca = authority.file(&scene, "ca.pem");
    let url = format!("wss://localhost:{}", server.address.port());
    let mut agent = agent_of(&scene, &["--url", &url, "--ca", ca.to_str().unwrap(), "--linger", "300ms"]);
    assert_eq!(agent.ended().await, 3);
    assert!(!server.visit.is_finished(), "nobody was let in");
}

#[tokio::test]
async fn an_agent_goes_through_the_proxy_of_its_environment() {
    let mut hook = Hook::wait(&[]).await;
    let proxy = ConnectProxy::start(hook.address()).await;
    // The name means something to the proxy only, as in a closed network.
    let mut command = hook.agent_command(&["--url", "wss://builds.example:4443"], "echo through; exit 3");
    let mut agent = Process::spawn(command.env("HTTPS_PROXY", format!("http://user:p%40ss@{}", proxy.address)));
    assert_eq!((hook.ended().await.stdout(), agent.ended().await), ("through\n".to_owned(), 3));
    let requests = proxy.requests();
    assert_eq!(requests.len(), 1, "{requests:?}");
    assert!(requests[0].starts_with("CONNECT builds.example:4443 HTTP/1.1\r\n"), "{requests:?}");
    let credentials = format!("Proxy-Authorization: Basic {}\r\n", BASE64_STANDARD.encode("user:p@ss"));
    assert!(requests[0].contains(&credentials), "{requests:?}");
}

#[tokio::test]
async fn no_proxy_names_what_is_reached_directly() {
    let mut hook = Hook::wait(&[]).await;
    let proxy = ConnectProxy::start(hook.address()).await;
    let mut command = hook.agent_command(&[], "echo direct");
    command.env("https_proxy", format!("http://{}", proxy.address)).env("no_proxy", "example.org,127.0.0.1");
    let mut agent = Process::spawn(&mut command);
    assert_eq!((hook.ended().await.stdout(), agent.ended().await), ("direct\n".to_owned(), 0));
    assert!(proxy.requests().is_empty(), "{:?}", proxy.requests());
}

fn agent_of(scene: &Scene, options: &[&str]) -> Process {
    let mut command = scene.command(agent());
    command.args(["--build", "a-build", "--tee", "off"]).env("PHONEHOME_TOKEN", "a-token").args(options);
    Process::spawn(command.args(["--", "sh", "-c", "echo out; exit 3"]))
}

/// Somebody who issues certificates.
struct Authority {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap().der().clone();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    fn issue(&self, name: &str) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        (certificate, PrivatePkcs8KeyDer::from(key.serialize_der()).into())
    }

    fn file(&self, scene: &Scene, name: &str) -> PathBuf {
        scene.write(name, pem("CERTIFICATE", &self.certificate))
    }

    fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).unwrap();
        Arc::new(roots)
    }
}

/// RFC 7468, with one long line, which readers accept.
fn pem(label: &str, der: &[u8]) -> String {
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", BASE64_STANDARD.encode(der))
}

/// A server with files, as somebody else might write it: it takes one agent's log.
struct TlsServer {
    address: SocketAddr,
    visit: JoinHandle<Visit>,
}

/// What an agent showed of itself.
#[derive(Debug)]
struct Visit {
    path: String,
    authorization: String,
    /// How many certificates it showed.
    certificates: usize,
    hello: Hello,
    output: Vec<u8>,
}

impl TlsServer {
    /// For `localhost`, with a certificate of `authority`; requires one of `clients`, if there are any.
    async fn start(authority: &Authority, clients: Option<&Authority>) -> Self {
        let provider = Arc::new(ring::default_provider());
        let builder =
            ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions().unwrap();
        let builder = match clients {
            Some(clients) => builder.with_client_cert_verifier(
                WebPkiClientVerifier::builder_with_provider(clients.roots(), provider).build().unwrap(),
            ),
            None => builder.with_no_client_auth(),
        };
        let (certificate, key) = authority.issue("localhost");
        let config = builder.with_single_cert(vec![certificate], key).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        Self { address, visit: tokio::spawn(receive(listener, Arc::new(config).into())) }
    }
}

/// Waits for an agent that gets through the handshake, and takes its log.
async fn receive(listener: TcpListener, acceptor: TlsAcceptor) -> Visit {
    loop {
        let (tcp, _) = listener.accept().await.unwrap();
        if let Ok(stream) = acceptor.accept(tcp).await {
            return take_log(stream).await;
        }
    }
}

async fn take_log(stream: TlsStream<TcpStream>) -> Visit {
    let certificates = stream.get_ref().1.peer_certificates().map_or(0, <[_]>::len);
    let (mut path, mut authorization) = (String::new(), String::new());
    #[expect(clippy::result_large_err, reason = "the library's signature")]
    let look = |request: &Request, mut response: Response| {
        path = request.uri().path().to_owned();
        authorization = request.headers()["Authorization"].to_str().unwrap().to_owned();
        response.headers_mut().insert("Sec-WebSocket-Protocol", http::HeaderValue::from_static("phonehome.v1"));
        Ok(response)
    };
    let mut socket = tokio_tungstenite::accept_hdr_async(stream, look).await.unwrap();
    let AgentFrame::Hello(hello) = next(&mut socket).await else { panic!("the first frame is a hello") };
    say(&mut socket, ServerFrame::Welcome(welcome())).await;
    let mut output = Vec::new();
    loop {
        match next(&mut socket).await {
            AgentFrame::Records(records) => {
                let ours = records.iter().filter(|record| record.stream.is_output());
                ours.for_each(|record| output.extend_from_slice(&record.payload));
            }
            AgentFrame::Finished(_) => break,
            other => panic!("neither records nor the end: {other:?}"),
        }
    }
    say(&mut socket, ServerFrame::FinishedAck(FinishedAck::Complete)).await;
    while let Some(Ok(_)) = socket.next().await {}
    Visit { path, authorization, certificates, hello, output }
}

async fn next(socket: &mut WebSocketStream<TlsStream<TcpStream>>) -> AgentFrame {
    match socket.next().await.unwrap().unwrap() {
        tungstenite::Message::Binary(bytes) => Codec::Binary.decode_agent(&Message::Binary(bytes)).unwrap(),
        other => panic!("not a binary message: {other:?}"),
    }
}

async fn say(socket: &mut WebSocketStream<TlsStream<TcpStream>>, frame: ServerFrame) {
    let Message::Binary(bytes) = Codec::Binary.encode_server(&frame).unwrap() else { unreachable!("it is binary") };
    socket.send(tungstenite::Message::Binary(bytes)).await.unwrap();
}

fn welcome() -> Welcome {
    Welcome {
        attempt: 1,
        next: 0,
        durable: Durable::Memory,
        window: WINDOW,
        heartbeat: HEARTBEAT.as_millis() as u64,
        max_payload: MAX_PAYLOAD as u32,
        max_message: MAX_MESSAGE as u32,
        cancel: None,
        server: "by hand".into(),
        capabilities: Vec::new(),
    }
}

/// An HTTP proxy that connects everybody to the same address, whatever name they ask for.
struct ConnectProxy {
    address: SocketAddr,
    requests: watch::Receiver<Vec<String>>,
    task: JoinHandle<()>,
}

impl ConnectProxy {
    async fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (seen, requests) = watch::channel(Vec::new());
        let task = tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(client.read_u8().await.unwrap());
                }
                seen.send_modify(|requests| requests.push(String::from_utf8(request).unwrap()));
                client.write_all(b"HTTP/1.1 200 Connection established\r\nVia: 1.1 test\r\n\r\n").await.unwrap();
                let mut server = TcpStream::connect(target).await.unwrap();
                drop(copy_bidirectional(&mut client, &mut server).await); // however it ends
            }
        });
        Self { address, requests, task }
    }

    fn requests(&self) -> Vec<String> {
        self.requests.borrow().clone()
    }
}

impl Drop for ConnectProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}
