//! The examples that kubexit comes with, without a cluster: `examples/client-server-job` and `examples/cloudsql-proxy-job`.

use std::net::TcpListener;

use crate::support::{Pod, own_address, python};

/// Answers requests for files of its directory; ends with 0 when it is told to, as nginx does.
const SERVER: &str = "
import http.server, signal, socketserver, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
socketserver.TCPServer.allow_reuse_address = True
host, port = sys.argv[1:]
with socketserver.TCPServer((host, int(port)), http.server.SimpleHTTPRequestHandler) as server:
    server.serve_forever()
";

/// Asks for a file once, and fails where nobody answers.
const CLIENT: &str = "
import http.client, sys
host, port = sys.argv[1:]
connection = http.client.HTTPConnection(host, int(port))
connection.request('GET', '/page')
answer = connection.getresponse()
print(answer.status, answer.read().decode())
";

/// The client waits for a server that is slow to start; the server ends when the client is through.
#[test]
fn the_client_server_job() {
    let pod = Pod::new();
    let (Some(server), Some(client)) = (python(&pod, "server.py", SERVER), python(&pod, "client.py", CLIENT)) else {
        return;
    };
    std::fs::write(pod.path("page"), "welcome").unwrap();
    let address = own_address();
    let (host, port) = (address.ip(), address.port());
    let mut client = pod.start("client", &["--birth-deps", "server:ready"], &format!("{client} {host} {port}"));
    client.log.shows("waiting for server to be ready");
    let ready = format!("tcp:{address}");
    let server = pod.start(
        "server",
        &["--death-deps", "client", "--ready-when", &ready],
        &format!("cat graveyard/client; {server} {host} {port}"),
    );
    let client = client.ended();
    assert_eq!((client.code, &*client.stdout), (0, "200 welcome\n"), "{}", client.log);
    let server = server.ended();
    assert_eq!(server.code, 0, "{}", server.log);
    assert!(!server.stdout.contains("Born"), "the client was born first: {}", server.stdout);
    let (client, server) = (pod.tombstone("client"), pod.tombstone("server"));
    assert!(server.value("Born") < server.value("Ready") && server.value("Ready") < client.value("Born"));
    assert!(client.value("Died") < server.value("Died"));
    assert_eq!(server.value("Reason"), Some("client has died with exit code 0"));
    assert_eq!((client.value("ExitCode"), server.value("ExitCode")), (Some("0"), Some("0")));
}

/// The pod ends with its main command, and as it did: the proxy, which dies of TERM, is no failure.
#[test]
fn the_proxy_job() {
    for code in [0, 3] {
        let pod = Pod::new();
        let Some(proxy) = python(&pod, "proxy.py", &SERVER.replace("signal.signal", "#")) else { return };
        let address = own_address();
        let (host, port) = (address.ip(), address.port());
        let ready = format!("tcp:{address}");
        let psql = pod.start("psql", &["--birth-deps", "cloudsql-proxy:ready"], &format!("exit {code}"));
        let proxy = pod.start(
            "cloudsql-proxy",
            &["--death-deps", "psql", "--ready-when", &ready, "--expected-exit", "143"],
            &format!("{proxy} {host} {port}"),
        );
        assert_eq!(psql.ended().code, code);
        let proxy = proxy.ended();
        assert_eq!(proxy.code, 0, "{}", proxy.log);
        let stone = pod.tombstone("cloudsql-proxy");
        assert_eq!((stone.value("ExitCode"), stone.value("Signal")), (Some("143"), Some("SIGTERM")), "its real end");
        assert_eq!(stone.value("Reason"), Some(&*format!("psql has died with exit code {code}")));
    }
}

/// A proxy without an agent; here it is the test.
#[test]
fn the_proxy_job_with_a_proxy_that_is_not_wrapped() {
    let pod = Pod::new();
    let address = own_address();
    let mut psql = pod.start("psql", &["--wait-for", &format!("proxy=tcp:{address}")], "echo started");
    psql.log.shows(&format!("waiting for proxy to pass tcp:{address}"));
    assert!(!pod.graveyard().join("psql").exists());
    let proxy = TcpListener::bind(address).unwrap();
    let psql = psql.ended();
    drop(proxy);
    assert_eq!((psql.code, &*psql.stdout), (0, "started\n"), "{}", psql.log);
}
