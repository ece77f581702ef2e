//! Local questions whose answer says whether something is up: a port, a URL, a file, a socket, a command.
//!
//! | form | passes when |
//! |---|---|
//! | `tcp:PORT`, `tcp:HOST:PORT` | a connection is accepted; without a host on 127.0.0.1 or ::1 |
//! | `http://HOST[:PORT][/PATH]`, `http:PORT[/PATH]` | the answer to a GET has a status from 200 to 399, as for the kubelet |
//! | `unix:PATH` | a stream socket accepts a connection |
//! | `file:PATH` | there is something of this name |
//! | `content:PATH` | there is a regular file of this name with something in it |
//! | `exec:COMMAND` | it exits with 0. Split into words like a shell does, but run without one |

pub(crate) mod exec;
mod http;
mod lookup;
pub(crate) mod notify;
pub(crate) mod output;

use std::{
    ffi::OsString,
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::{TcpStream, UnixStream},
    time::{sleep, timeout},
};
use tracing::trace;

use self::{exec::Runner, http::Get, lookup::Lookup};
use crate::config::User;

/// A question about the machine or its network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    text: String,
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Tcp(Endpoint),
    Http(Get),
    Unix(PathBuf),
    File(PathBuf),
    Content(PathBuf),
    Exec(Vec<OsString>),
}

/// Where to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Endpoint {
    /// None for this machine.
    host: Option<String>,
    port: u16,
}

/// Why a text is no probe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProbeError {
    /// What follows `tcp:` is none.
    #[error("tcp: needs a port, tcp:5432 or tcp:db:5432; an IPv6 address stands in brackets")]
    BadEndpoint,
    /// What follows `exec:` cannot be split.
    #[error("exec: needs a command, and every quote in it an end")]
    BadCommand,
    /// What follows `notify` or `output:` does not work there.
    #[error("{0}: is a probe of the own command, for --ready-when")]
    OwnOnly(&'static str),
    /// The pattern is no regular expression that can be used.
    #[error("the pattern of output: cannot be used: {0}")]
    BadPattern(String),
    /// What follows `http:` is none.
    #[error("http: needs an address without user name: http://127.0.0.1:8080/health or http:8080/health")]
    BadUrl,
    /// No probe speaks TLS.
    #[error("https is not spoken by probes: use tcp:, or exec: with a program that speaks it")]
    Https,
    /// A relative path depends on a working directory, and an empty one on nothing.
    #[error("{0}: needs an absolute path")]
    NotAbsolute(&'static str),
    /// No known form.
    #[error("{0:?} is no probe: use tcp:, http:, unix:, file:, content: or exec:")]
    UnknownForm(String),
}

/// The longest that one attempt at a connection or a command may take.
const ATTEMPT: Duration = Duration::from_secs(5);

/// Between the first attempts, doubled from one to the next.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// Between later ones: what is awaited for long is not missed by much, and costs little.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

impl Probe {
    /// Asks until the answer is yes. A command runs as `user`, if there is one. `failed` is told why it is no. Cancel safe.
    pub(crate) async fn pass(&self, runner: &dyn Runner, user: Option<User>, mut failed: impl FnMut(String)) {
        let mut pause = FIRST_PAUSE;
        let mut lookup = Lookup::default();
        while let Err(error) = self.attempt(runner, user, &mut lookup).await {
            trace!(probe = %self, "failed: {error}");
            failed(error.to_string());
            sleep(pause).await;
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
    }

    async fn attempt(&self, runner: &dyn Runner, user: Option<User>, lookup: &mut Lookup) -> io::Result<()> {
        match &self.kind {
            Kind::Tcp(endpoint) => limited(endpoint.connect(lookup)).await.map(drop),
            Kind::Http(get) => limited(get.attempt(lookup)).await,
            Kind::Unix(path) => limited(UnixStream::connect(path)).await.map(drop),
            // A hung file system holds a thread: another attempt would only hold another.
            Kind::File(path) => tokio::fs::metadata(path).await.map(drop),
            Kind::Content(path) => has_content(&tokio::fs::metadata(path).await?),
            Kind::Exec(command) => succeeded(limited(runner.run(command, user)).await?),
        }
    }
}

async fn limited<T>(attempt: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", ATTEMPT.as_secs()));
    timeout(ATTEMPT, attempt).await.map_err(late)?
}

fn has_content(found: &std::fs::Metadata) -> io::Result<()> {
    match (found.is_file(), found.len()) {
        (true, 1..) => Ok(()),
        (true, 0) => Err(io::Error::other("it is empty")),
        (false, _) => Err(io::Error::other("it is not a regular file")),
    }
}

fn succeeded(code: u8) -> io::Result<()> {
    if code == 0 { Ok(()) } else { Err(io::Error::other(format!("exit code {code}"))) }
}

impl Endpoint {
    /// `PORT` or `HOST:PORT`; a host that is an IPv6 address stands in brackets.
    fn parse(text: &str) -> Option<Self> {
        let (host, port) = match text.rsplit_once(':') {
            None => (None, text),
            Some((host, port)) => (Some(host), port),
        };
        let port = port.parse().ok().filter(|port| *port != 0)?;
        let Some(host) = host else { return Some(Self { host: None, port }) };
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let is_ipv6 = bare.parse::<Ipv6Addr>().is_ok();
        let is_fine = if bare.len() == host.len() { !host.contains([':', '[', ']', '/', '@', ' ']) } else { is_ipv6 };
        let host = (bare != "localhost").then(|| bare.to_owned());
        (is_fine && !bare.is_empty()).then_some(Self { host, port })
    }

    async fn connect(&self, lookup: &mut Lookup) -> io::Result<TcpStream> {
        match &self.host {
            Some(host) => TcpStream::connect(&lookup.addresses(host, self.port).await?[..]).await,
            None => TcpStream::connect(&LOCALHOST.map(|address| (address, self.port).into())[..]).await,
        }
    }
}

/// An image may have no `/etc/hosts` to look these up in.
const LOCALHOST: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

impl FromStr for Probe {
    type Err = ProbeError;

    fn from_str(text: &str) -> Result<Self, ProbeError> {
        let unknown = || ProbeError::UnknownForm(text.to_owned());
        let (form, rest) = text.split_once(':').unwrap_or((text, ""));
        let kind = match form {
            "tcp" => Kind::Tcp(Endpoint::parse(rest).ok_or(ProbeError::BadEndpoint)?),
            "http" => Kind::Http(Get::parse(rest)?),
            "https" => return Err(ProbeError::Https),
            "unix" => Kind::Unix(absolute("unix", rest)?),
            "file" => Kind::File(absolute("file", rest)?),
            "content" => Kind::Content(absolute("content", rest)?),
            "exec" => Kind::Exec(words(rest).ok_or(ProbeError::BadCommand)?),
            "output" => return Err(ProbeError::OwnOnly("output")),
            "notify" => return Err(ProbeError::OwnOnly("notify")),
            _ => return Err(unknown()),
        };
        Ok(Self { text: text.to_owned(), kind })
    }
}

fn absolute(form: &'static str, path: &str) -> Result<PathBuf, ProbeError> {
    if path.starts_with('/') { Ok(path.into()) } else { Err(ProbeError::NotAbsolute(form)) }
}

fn words(text: &str) -> Option<Vec<OsString>> {
    let words = shlex::split(text)?;
    (!words.is_empty() && !text.contains('\0')).then(|| words.into_iter().map(Into::into).collect())
}

impl fmt::Display for Probe {
    /// As it was configured.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// How a command shows that it does its work.
#[derive(Debug, Clone)]
pub enum ReadyWhen {
    /// A probe from outside passes.
    Probe(Probe),
    /// It writes a line that matches.
    Output(output::Pattern),
    /// It says so with `READY=1` on its `NOTIFY_SOCKET`.
    Notify,
}

impl FromStr for ReadyWhen {
    type Err = ProbeError;

    fn from_str(text: &str) -> Result<Self, ProbeError> {
        if text == NOTIFY {
            return Ok(Self::Notify);
        }
        match text.strip_prefix("output:") {
            Some(pattern) => pattern.parse().map(Self::Output),
            None => text.parse().map(Self::Probe),
        }
    }
}

impl fmt::Display for ReadyWhen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Probe(probe) => probe.fmt(f),
            Self::Output(pattern) => write!(f, "output:{pattern}"),
            Self::Notify => f.write_str(NOTIFY),
        }
    }
}

const NOTIFY: &str = "notify";

/// What waits for a probe shares the runner with others.
pub(crate) type SharedRunner = Arc<dyn Runner>;

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, UnixListener},
    };

    use super::*;

    #[test]
    fn probes_say_what_is_wrong_with_them() {
        for (text, expected) in [
            ("tcp:", "tcp: needs a port"),
            ("tcp:http", "tcp: needs a port"),
            ("tcp:0", "tcp: needs a port"),
            ("tcp:::1:80", "tcp: needs a port"),
            ("tcp::80", "tcp: needs a port"),
            ("http:", "http: needs an address"),
            ("http://a b/", "http: needs an address"),
            ("http://u:p@h/", "http: needs an address"),
            ("https://h/", "https is not spoken"),
            ("http:https://h/", "https is not spoken"),
            ("file:relative", "file: needs an absolute path"),
            ("unix:", "unix: needs an absolute path"),
            ("exec:", "exec: needs a command"),
            ("exec:a 'b", "exec: needs a command"),
            ("output:x", "output: is a probe of the own command"),
            ("port:80", "\"port:80\" is no probe"),
            ("notify", "notify: is a probe of the own command"),
        ] {
            let failure = text.parse::<Probe>().unwrap_err().to_string();
            assert!(failure.starts_with(expected), "{failure}");
        }
        assert!("output:(".parse::<ReadyWhen>().unwrap_err().to_string().starts_with("the pattern of output:"));
        for text in ["notify", "output:^ready: .*$", "tcp:[::1]:80", "http:8080/health", "exec:sh -c 'a b'"] {
            assert_eq!(text.parse::<ReadyWhen>().unwrap().to_string(), text);
        }
    }

    #[tokio::test]
    async fn tcp_passes_when_somebody_listens() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address).await else {
                assert!(address.starts_with('['), "no IPv4 here");
                continue; // a machine without IPv6
            };
            let port = listener.local_addr().unwrap().port();
            check(&format!("tcp:{port}")).await.unwrap();
            check(&format!("tcp:localhost:{port}")).await.unwrap();
            check(&format!("tcp:{}", listener.local_addr().unwrap())).await.unwrap();
            drop(listener);
            let refused = check(&format!("tcp:{port}")).await.unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        }
    }

    #[tokio::test]
    async fn http_passes_with_a_status_that_is_no_error() {
        for (status, passes) in [("200 OK", true), ("302 Found", true), ("404 Not Found", false), ("503 No", false)] {
            let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n");
            let (port, request) = serve_once(answer.into_bytes()).await;
            let outcome = check(&format!("http://127.0.0.1:{port}/health?full=1")).await;
            assert_eq!(outcome.is_ok(), passes, "{status}");
            let request = request.await.unwrap();
            assert!(request.starts_with("GET /health?full=1 HTTP/1.1\r\n"), "{request}");
            assert!(request.contains(&format!("\r\nHost: 127.0.0.1:{port}\r\n")), "{request}");
        }
        for noise in ["", "SSH-2.0-x\r\n", "HTTP/1.1 2\r\n", "HTTP/1.1 200", "HTTP/1.1 2000 x\r\n"] {
            let (port, _request) = serve_once(noise.into()).await;
            assert!(check(&format!("http:{port}")).await.is_err(), "{noise}");
        }
        let (port, _request) = serve_once(vec![b'x'; 1 << 20]).await;
        assert!(check(&format!("http:{port}/x")).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn an_attempt_has_an_end() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap(); // accepts, and never answers
        let port = listener.local_addr().unwrap().port();
        assert_eq!(check(&format!("http:{port}")).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_unix_socket_passes_when_somebody_listens() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let probe = format!("unix:{}", path.display());
        assert!(check(&probe).await.is_err());
        let listener = UnixListener::bind(&path).unwrap();
        check(&probe).await.unwrap();
        drop(listener);
        assert!(check(&probe).await.is_err(), "the file alone is not enough");
    }

    #[tokio::test]
    async fn a_file_exists_or_has_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ready: yes");
        let (file, content) = (format!("file:{}", path.display()), format!("content:{}", path.display()));
        assert!(check(&file).await.is_err() && check(&content).await.is_err());
        std::fs::write(&path, "").unwrap();
        check(&file).await.unwrap();
        assert_eq!(check(&content).await.unwrap_err().to_string(), "it is empty");
        std::fs::write(&path, "x").unwrap();
        check(&content).await.unwrap();
        assert!(check(&format!("content:{}", dir.path().display())).await.is_err());
    }

    #[tokio::test]
    async fn exec_passes_with_exit_code_0_and_gets_its_words() {
        let runner = FakeRunner::default();
        let probe: Probe = "exec:pg_isready -h 'a b' \"c\"".parse().unwrap();
        let mut lookup = Lookup::default();
        assert_eq!(probe.attempt(&runner, None, &mut lookup).await.unwrap_err().to_string(), "exit code 2");
        probe.attempt(&runner, None, &mut lookup).await.unwrap_err();
        probe.attempt(&runner, None, &mut lookup).await.unwrap();
        assert_eq!(runner.0.lock().unwrap()[0], ["pg_isready", "-h", "a b", "c"]);
    }

    #[tokio::test(start_paused = true)]
    async fn it_asks_again_and_tells_why_not() {
        let mut reasons = Vec::new();
        let probe: Probe = "exec:x".parse().unwrap();
        probe.pass(&FakeRunner::default(), None, |why| reasons.push(why)).await;
        assert_eq!(reasons, ["exit code 2", "exit code 1"]);
    }

    async fn check(probe: &str) -> io::Result<()> {
        probe.parse::<Probe>().unwrap().attempt(&FakeRunner::default(), None, &mut Lookup::default()).await
    }

    /// Fails twice.
    #[derive(Debug, Default)]
    struct FakeRunner(Mutex<Vec<Vec<OsString>>>);

    impl Runner for FakeRunner {
        fn run(&self, command: &[OsString], _: Option<User>) -> exec::Running {
            let mut runs = self.0.lock().unwrap();
            runs.push(command.to_vec());
            let code = 3u8.saturating_sub(runs.len() as u8);
            Box::pin(async move { Ok(code) })
        }
    }

    /// Answers one request, and returns it.
    async fn serve_once(answer: Vec<u8>) -> (u16, tokio::task::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let task = tokio::spawn(async move {
            let (mut socket, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                assert!(socket.read_buf(&mut request).await.unwrap() > 0, "the request has no end");
            }
            drop(socket.write_all(&answer).await); // whoever has read enough may be gone
            String::from_utf8(request).unwrap()
        });
        (port, task)
    }
}
