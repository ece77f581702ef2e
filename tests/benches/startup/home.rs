//! The server, in this process: what it uses is not counted among that of the children.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use phonehome_server::{Config, Durability, Expected, ExpectedBuild, Server};
use tokio::runtime::Runtime;

use super::Result;

/// A server on loopback that speaks TLS.
pub(super) struct Home {
    runtime: Runtime,
    server: Server,
    builds: AtomicU32,
    _data: tempfile::TempDir,
}

/// An agent that is about to call.
pub(super) struct Visit<'a> {
    home: &'a Home,
    build: ExpectedBuild,
}

impl Home {
    pub(super) fn open() -> Result<Self> {
        let data = tempfile::tempdir()?;
        let config = Config {
            listen: "127.0.0.1:0".parse()?,
            tls: true,
            data: data.path().to_owned(),
            durability: Durability::Os,
        };
        let runtime = Runtime::new()?;
        let server = runtime.block_on(Server::spawn(config))?;
        Ok(Self { runtime, server, builds: AtomicU32::new(0), _data: data })
    }

    pub(super) fn expect(&self) -> Result<Visit<'_>> {
        let id = format!("build-{}", self.builds.fetch_add(1, Ordering::Relaxed));
        let _entered = self.runtime.enter();
        Ok(Visit { home: self, build: self.server.expect(Expected::new(id.parse()?))? })
    }

    pub(super) fn close(self) {
        self.runtime.block_on(self.server.shutdown(Duration::from_secs(5)));
    }
}

impl Visit<'_> {
    /// What the agent has to be told.
    pub(super) fn variables(&self) -> Vec<(&'static str, String)> {
        let server = &self.home.server;
        vec![
            ("PHONEHOME_URL", server.url("127.0.0.1", server.local_addr().port())),
            ("PHONEHOME_PIN", server.pin().unwrap_or_default().to_owned()),
            ("PHONEHOME_BUILD", self.build.id().to_string()),
            ("PHONEHOME_TOKEN", self.build.token().to_owned()),
        ]
    }

    /// Whether the server has all of it, and it was a success.
    pub(super) fn succeeded(self) -> Result<()> {
        match self.home.runtime.block_on(self.build.verdict()).exit_code() {
            0 => Ok(()),
            code => Err(format!("a build at the server ended with {code}").into()),
        }
    }
}
