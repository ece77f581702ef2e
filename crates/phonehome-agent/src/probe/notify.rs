//! The socket on which a command says itself that it is ready (sd_notify(3)).

use std::{
    ffi::OsString,
    io,
    os::{linux::net::SocketAddrExt, unix::net},
};

use phonehome_env::Nature;
use tokio::net::UnixDatagram;
use tracing::debug;

/// A datagram socket in the abstract namespace: it needs no directory that both may write to, and leaves nothing behind.
/// The command has to share the network namespace.
#[derive(Debug)]
pub(crate) struct NotifySocket {
    socket: UnixDatagram,
    name: String,
}

/// The variable that tells a command of the socket.
pub(crate) const VARIABLE: &str = "NOTIFY_SOCKET";

/// Longest message that is read whole, bytes: as systemd does.
const MAX_MESSAGE: usize = 4096;

impl NotifySocket {
    /// A new socket under a name that nobody can guess: everybody in a pod could send to it.
    pub(crate) fn bind(nature: &dyn Nature) -> io::Result<Self> {
        let mut random = [0; 16];
        nature.fill(&mut random)?;
        let name = format!("phonehome-notify-{:032x}", u128::from_le_bytes(random));
        let socket = net::UnixDatagram::bind_addr(&net::SocketAddr::from_abstract_name(&name)?)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket: UnixDatagram::from_std(socket)?, name })
    }

    /// What the variable has to be.
    pub(crate) fn value(&self) -> OsString {
        format!("@{}", self.name).into()
    }

    /// Waits for `READY=1`. Cancel safe.
    pub(crate) async fn ready(&self) -> io::Result<()> {
        let mut message = [0; MAX_MESSAGE];
        loop {
            let length = self.socket.recv(&mut message).await?;
            if is_ready(&message[..length]) {
                return Ok(());
            }
        }
    }

    /// Takes what else is said, and heeds none of it: a command that finds its socket gone may take that for an error.
    /// Ends only when it cannot be read.
    pub(crate) async fn drain(self) {
        let mut start = [0; 1]; // the rest of a message is dropped (recv(2))
        loop {
            if let Err(error) = self.socket.recv(&mut start).await {
                return debug!("the socket for --ready-when notify is closed: {error}");
            }
        }
    }
}

fn is_ready(message: &[u8]) -> bool {
    message.split(|byte| *byte == b'\n').any(|line| line == b"READY=1")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use phonehome_env::Env;

    use super::*;

    #[tokio::test]
    async fn ready_is_heard_among_other_news() {
        let socket = NotifySocket::bind(&*Env::real().nature).unwrap();
        let value = socket.value().into_string().unwrap();
        let address = net::SocketAddr::from_abstract_name(value.strip_prefix('@').unwrap()).unwrap();
        let command = net::UnixDatagram::unbound().unwrap();
        let tell = |message: &[u8]| command.send_to_addr(message, &address).unwrap();
        tell(b"STATUS=READY=1 soon\nMAINPID=7");
        tell(b"READY=0");
        tell(b"");
        assert!(tokio::time::timeout(Duration::from_millis(50), socket.ready()).await.is_err());
        tell(b"MAINPID=7\nREADY=1\nSTATUS=up\n");
        tokio::time::timeout(Duration::from_secs(20), socket.ready()).await.unwrap().unwrap();
    }
}
