//! Looking up a name, once at a time.
//!
//! The system's look-up holds a thread until it has an answer, and cannot be given up. Whoever begins another one while
//! a resolver hangs holds another thread.

use std::{io, net::SocketAddr};

use tokio::{net::lookup_host, task::JoinHandle};

/// The look-up of one name, which goes on from one attempt to the next.
#[derive(Debug, Default)]
pub(super) struct Lookup {
    underway: Option<JoinHandle<Answer>>,
}

type Answer = io::Result<Vec<SocketAddr>>;

impl Lookup {
    /// The addresses of a host, always the same one. Cancel safe: the next call waits for what this one has begun.
    pub(super) async fn addresses(&mut self, host: &str, port: u16) -> Answer {
        let host = host.to_owned();
        self.answer(|| async move { Ok(lookup_host((host, port)).await?.collect()) }).await
    }

    async fn answer<F>(&mut self, begin: impl FnOnce() -> F) -> Answer
    where
        F: Future<Output = Answer> + Send + 'static,
    {
        let underway = self.underway.get_or_insert_with(|| tokio::spawn(begin()));
        let answer = underway.await;
        self.underway = None;
        answer?
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{sync::oneshot, time::timeout};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_look_up_that_hangs_is_waited_for_and_not_begun_again() {
        let address = SocketAddr::from(([127, 0, 0, 1], 80));
        let (answer, hung) = oneshot::channel();
        let mut hung = Some(hung);
        let mut begin = || {
            let hung = hung.take().expect("it is begun once");
            async move { hung.await.map_err(io::Error::other) }
        };
        let mut lookup = Lookup::default();
        for _ in 0..3 {
            timeout(Duration::from_secs(5), lookup.answer(&mut begin)).await.unwrap_err();
        }
        answer.send(vec![address]).unwrap();
        assert_eq!(lookup.answer(&mut begin).await.unwrap(), [address]);
        let failed = lookup.answer(|| async { Err(io::ErrorKind::NotFound.into()) }).await;
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::NotFound, "what has ended is begun anew");
    }
}
