//! How a command shows that it is ready, and how others find out.

use std::{fs, net::TcpListener, os::unix::net::UnixListener};

use rustix::process::Signal;

use crate::support::{Pod, own_address, python, skipped};

#[test]
fn a_line_of_the_output_in_either_stream() {
    for target in ["", ">&2"] {
        let script = format!("echo not ready; read _ <gate; printf 'ready on '; echo port 80 {target}; read _ <gate");
        let script = script.replace("printf 'ready on '", &format!("printf 'ready on ' {target}"));
        let pod = Pod::new();
        becomes_ready(&pod, "output:^ready on port [0-9]+$", &script, |gate| gate());
    }
}

#[test]
fn a_command_that_succeeds() {
    let pod = Pod::new();
    becomes_ready(&pod, "exec:sh -c 'test -e \"is ready\"'", "read _ <gate; : >'is ready'; read _ <gate", |gate| {
        gate()
    });
}

#[test]
fn a_file_and_what_is_in_it() {
    for (kind, before) in [("file", None), ("content", Some(""))] {
        let pod = Pod::new();
        let probe = format!("{kind}:{}", pod.path("state").display());
        before.into_iter().for_each(|text| fs::write(pod.path("state"), text).unwrap());
        becomes_ready(&pod, &probe, WAIT, |_| fs::write(pod.path("state"), "up").unwrap());
    }
}

#[test]
fn a_port_and_a_socket_that_accept() {
    let pod = Pod::new();
    let address = own_address();
    let mut listener = None;
    becomes_ready(&pod, &format!("tcp:{address}"), WAIT, |_| listener = Some(TcpListener::bind(address).unwrap()));
    let pod = Pod::new();
    let (path, mut listener) = (pod.path("socket"), None);
    becomes_ready(&pod, &format!("unix:{}", path.display()), WAIT, |_| {
        listener = Some(UnixListener::bind(&path).unwrap());
    });
}

#[test]
fn an_answer_to_a_request() {
    let pod = Pod::new();
    let server = "
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if os.path.exists('page') and self.path == '/health' else 503)
        self.end_headers()
http.server.ThreadingHTTPServer.server_bind = http.server.socketserver.TCPServer.server_bind
http.server.ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
";
    let Some(server) = python(&pod, "server.py", server) else { return };
    let address = own_address();
    let script = format!("{server} {} {} 2>server.log", address.ip(), address.port());
    becomes_ready(&pod, &format!("http://{address}/health"), &script, |_| fs::write(pod.path("page"), "").unwrap());
}

#[test]
fn a_probe_that_is_a_command_runs_as_the_commands_user() {
    if !rustix::process::geteuid().is_root() {
        return skipped("only root can run a command as another user");
    }
    let pod = Pod::new();
    let probe = "exec:sh -c 'test $(id -u):$(id -g):$(id -G) = 12345:54321:54321'";
    let wait = format!("identity={probe}");
    let options = ["--user", "12345:54321", "--ready-when", probe, "--wait-for", &wait, "--birth-timeout", "10s"];
    let main = pod.start("main", &options, "exec sleep 1000");
    pod.carved("main", "Ready");
    main.signal(Signal::TERM);
    assert_eq!(main.ended().code, 143);
}

/// As a program of systemd's does.
#[test]
fn a_word_of_its_own() {
    let pod = Pod::new();
    let program = "
import os, socket
name = os.environ['NOTIFY_SOCKET']
def tell(text): socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(text, '\\0' + name[1:])
tell(b'STATUS=starting')
open('gate').readline()
tell(b'MAINPID=7\\nREADY=1')
open('gate').readline()
";
    let Some(script) = python(&pod, "program.py", program) else { return };
    becomes_ready(&pod, "notify", &script, |gate| gate());
}

#[test]
fn nobody_is_ready_who_has_ended() {
    let pod = Pod::new();
    let server = pod.start("server", &["--ready-when", "output:^up$"], "echo almost; echo up to you").ended();
    assert_eq!(server.code, 0);
    assert_eq!(pod.tombstone("server").keys(), ["Born", "Died", "ExitCode", "Attempt"]);
    let client = pod.start("client", &["--birth-deps", "server:ready", "--birth-timeout", "100ms"], "true").ended();
    assert_eq!(client.code, 125);
    assert!(client.log.contains("server to be ready (it died at "), "{}", client.log);
}

const WAIT: &str = "read _ <gate";

/// Starts a server with this probe, and a client that waits for it; `event` makes the server ready, if need be by the gate.
fn becomes_ready(pod: &Pod, probe: &str, script: &str, event: impl FnOnce(&dyn Fn())) {
    let server = pod.start("server", &["--ready-when", probe, "--expected-exit", "143"], script);
    let mut client = pod.start("client", &["--birth-deps", "server:ready"], "echo started");
    client.log.shows("waiting for server to be ready");
    assert_eq!(pod.carved("server", "Born").value("Ready"), None, "{probe}");
    event(&|| pod.gate.open());
    let client = client.ended();
    assert_eq!((client.code, &*client.stdout), (0, "started\n"), "{probe}: {}", client.log);
    assert!(pod.tombstone("server").value("Ready") < pod.tombstone("client").value("Born"), "{probe}");
    server.signal(Signal::TERM);
    assert_eq!(server.ended().code, 143, "{probe}: TERM came from outside");
}
