//! `phonehome-server wait`.

use std::time::Duration;

use clap::Parser;
use phonehome_proto::id::BuildId;
use tokio::time::Instant;

use super::{ServerArgs, out::print, told};
use crate::{
    cli::hook_args::{Limit, duration},
    client::{
        http::{Ask, Client},
        model::Detail,
    },
};

/// Waits until builds have their verdict
///
/// Prints a line for each: its name and how it ended. Survives restarts of the server.
#[derive(Parser)]
#[command(
    after_help = "Exit code: the build's: its own, 124 timed out, 121 its agent was lost, 130 cancelled, 125 phonehome failed; of \
                  several builds that of the first, in the order given, that did not succeed. 122 when --timeout is over and a \
                  build still runs. 125 also when the server cannot be asked."
)]
pub(crate) struct WaitArgs {
    /// The builds
    #[arg(required = true)]
    build: Vec<BuildId>,

    /// Wait at most so long, for all of them together
    #[arg(long, value_name = "TIME", value_parser = duration)]
    timeout: Option<Duration>,

    /// How long a server that went away is waited for; off is for ever
    #[arg(long, value_name = "TIME", default_value = "5m")]
    patience: Limit,

    #[command(flatten)]
    server: ServerArgs,
}

/// Our own time is over, which is no verdict: 124 would be one.
const EXIT_STILL_RUNNING: u8 = 122;

/// One question: proxies cut longer ones.
const WAIT: Duration = Duration::from_secs(50);

pub(super) async fn run(args: WaitArgs) -> anyhow::Result<u8> {
    let client = args.server.client()?;
    let deadline = args.timeout.map(|timeout| Instant::now() + timeout);
    let mut code = 0;
    for build in &args.build {
        match wait(&client, build, deadline, args.patience.0).await? {
            None => return Ok(EXIT_STILL_RUNNING),
            Some(detail) => {
                print(format_args!("{build} {}\n", detail.told()))?;
                code = if code == 0 { detail.exit_code().unwrap_or_default() } else { code };
            }
        }
    }
    Ok(code)
}

/// The build once it has ended; `None` when the time is over before.
pub(super) async fn wait(
    client: &Client,
    build: &BuildId,
    deadline: Option<Instant>,
    patience: Option<Duration>,
) -> anyhow::Result<Option<Detail>> {
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let time = left.unwrap_or(WAIT).min(WAIT);
        let ask = Ask::get(format!("builds/{build}/wait?timeout={}", time.as_secs_f64())).taking(time);
        let detail = client.json_if_any(shorter(patience, left), &ask).await.map_err(|error| told(&error))?;
        if detail.is_some() {
            return Ok(detail);
        }
        if left.is_some_and(|left| left <= time) {
            return Ok(None);
        }
    }
}

/// The shorter of two times, of which none is for ever.
fn shorter(one: Option<Duration>, other: Option<Duration>) -> Option<Duration> {
    one.into_iter().chain(other).min()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::canned::{Canned, answer};

    #[tokio::test]
    async fn a_time_of_our_own_also_ends_the_wait_for_a_server() {
        let (short, long) = (Some(Duration::from_millis(1)), Some(Duration::from_secs(1)));
        assert_eq!((shorter(None, short), shorter(long, short), shorter(None, None)), (short, short, None));
        let server = Canned::start([""]).await;
        let (client, build) = (server.client(""), "b".parse().unwrap());
        drop(server);
        let deadline = Some(Instant::now() + Duration::from_millis(10));
        assert!(wait(&client, &build, deadline, None).await.is_err());
    }

    #[tokio::test]
    async fn it_asks_again_until_the_build_has_ended() {
        let nothing = "HTTP/1.1 204 No Content\r\n\r\n".to_owned();
        let ended = answer("200 OK", r#"{"id":"b","verdict":"lost"}"#);
        let server = Canned::start([nothing.clone(), ended, nothing]).await;
        let (client, build) = (server.client(""), "b".parse().unwrap());
        let detail = wait(&client, &build, None, None).await.unwrap().unwrap();
        assert_eq!(detail.exit_code(), Some(121));
        let over = Some(Instant::now());
        assert_eq!(wait(&client, &build, over, None).await.unwrap(), None);
    }
}
