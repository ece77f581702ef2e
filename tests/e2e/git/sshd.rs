//! An ssh server of the test's own, which lets in whoever has the test's key.

use std::{fs, path::Path, process::Command};

use tokio::net::TcpListener;

use super::without;
use crate::harness::{Process, Scene, works};

#[derive(Debug)]
pub(super) struct Sshd {
    _process: Process,
    port: u16,
    user: String,
    key: String,
}

/// Where distributions put it; it wants to be started by its full name (sshd(8)).
const PROGRAMS: [&str; 2] = ["/usr/sbin/sshd", "/usr/bin/sshd"];

/// The directory into which it locks its unprivileged half. Packages make it when they start their service.
const PRIVSEP: &str = "/run/sshd";

/// What the client's command line contains and the server's does not.
pub(super) const CLIENT: &str = "UserKnownHostsFile";

impl Sshd {
    /// `None`, and a word about it, where there is none or it cannot run.
    pub(super) async fn start(scene: &Scene) -> Option<Self> {
        let Some(program) = PROGRAMS.iter().find(|program| Path::new(program).exists()) else {
            without("sshd");
            return None;
        };
        if !Path::new(PRIVSEP).exists() && fs::create_dir(PRIVSEP).is_err() {
            without(PRIVSEP);
            return None;
        }
        let key = |name: &str| {
            let path = scene.path(name).to_str().unwrap().to_owned();
            works("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-f", &path]).then_some(path)
        };
        let (Some(host_key), Some(user_key)) = (key("host-key"), key("user-key")) else {
            without("ssh-keygen");
            return None;
        };
        fs::copy(scene.path("user-key.pub"), scene.path("authorized-keys")).unwrap();
        let port = free_port().await;
        let config = scene.write("sshd.conf", config(scene, port, &host_key));
        let process = Process::spawn(scene.command(program).args(["-D", "-e", "-f"]).arg(config));
        process.stderr.shows(&format!("Server listening on 127.0.0.1 port {port}.")).await;
        let user = Command::new("id").arg("-un").output().unwrap().stdout;
        let user = String::from_utf8(user).unwrap().trim().to_owned();
        Some(Self { _process: process, port, user, key: user_key })
    }

    pub(super) fn url(&self, repository: &Path) -> String {
        format!("ssh://{}@127.0.0.1:{}{}", self.user, self.port, repository.display())
    }

    /// For `GIT_SSH_COMMAND`.
    pub(super) fn client_command(&self) -> String {
        let options = "-F none -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null";
        format!("ssh -q -i {} -o IdentitiesOnly=yes {options}", self.key)
    }
}

/// sshd cannot choose one itself.
async fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port()
}

fn config(scene: &Scene, port: u16, host_key: &str) -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    let dir = scene.dir().display();
    format!(
        "Port {port}\nListenAddress 127.0.0.1\nHostKey {host_key}\nPidFile none\nUsePAM no\nStrictModes no\n\
         PermitRootLogin yes\nAuthorizedKeysFile {dir}/authorized-keys\nPasswordAuthentication no\n\
         KbdInteractiveAuthentication no\nSetEnv PATH={path} E2E_SCENE={dir}\n"
    )
}
