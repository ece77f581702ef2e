//! A server made of the library, for as many builds as are wanted.

use std::{
    fmt::Write as _,
    fs,
    io::{self, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
};

use phonehome_server::{Clocks, Config, Durability, Expected, Server};

use super::Result;

/// Serves until it is killed. Builds keep their names and tokens when it is started again.
pub(crate) async fn serve(listen: SocketAddr, data: PathBuf, builds: usize, file: &Path, tls: bool) -> Result<()> {
    let server = Server::spawn(Config { listen, tls, data, durability: Durability::Fsync }).await?;
    let clocks = Clocks { connect: None, lost: None, total: None, ..Clocks::default() };
    let mut names = String::new();
    for at in 0..builds {
        let (id, token) = (format!("swarm-{at}"), format!("secret-of-{at}"));
        writeln!(names, "{id} {token}")?;
        let expected = Expected { token: Some(token), clocks: clocks.clone(), ..Expected::new(id.parse()?) };
        server.expect(expected)?;
    }
    fs::write(file, names)?;
    let address = server.local_addr();
    writeln!(io::stdout(), "{}", server.url(&address.ip().to_string(), address.port()))?;
    std::future::pending().await
}
