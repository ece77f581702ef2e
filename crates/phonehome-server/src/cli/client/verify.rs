//! `phonehome-server verify`.

use clap::Parser;
use phonehome_proto::id::BuildId;
use serde::Deserialize;
use serde_json::Value;

use super::{
    ServerArgs,
    download::{Raw, download},
    out::{print, size},
    progress::Progress,
    told,
};
use crate::{
    client::{
        http::{Ask, Client},
        model::{Attempt, Detail},
    },
    words::OneLine,
};

/// Checks that a build's log is what its agents promised
///
/// The server reads what it has stored and compares it with the digest that came with the end of each attempt. With --local the
/// log is fetched and hashed here, so that nobody has to be believed but the agent.
#[derive(Parser)]
#[command(
    after_help = "Exit code: 0 when everything agrees; 1 when something does not, or the newest attempt of a step promised \
                  nothing; 125 when the server cannot be asked."
)]
pub(crate) struct VerifyArgs {
    /// The build
    build: BuildId,

    /// Fetch the log and hash it here
    #[arg(long)]
    local: bool,

    /// As JSON, as the server has it
    #[arg(long, conflicts_with = "local")]
    json: bool,

    #[command(flatten)]
    server: ServerArgs,
}

/// Something does not agree.
const EXIT_DIFFERS: u8 = 1;

/// A large log takes its time.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(1800);

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Verified {
    ok: bool,
    attempts: Vec<VerifiedAttempt>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct VerifiedAttempt {
    step: String,
    attempt: u32,
    stored_digest: Option<String>,
    promised_digest: Option<String>,
    records: u64,
    bytes: u64,
    ok: bool,
    problem: Option<String>,
}

pub(super) async fn run(args: VerifyArgs) -> anyhow::Result<u8> {
    let client = args.server.client()?;
    let ok = if args.local {
        verify_here(&client, &args.build).await?
    } else {
        verify_there(&client, &args.build, args.json).await?
    };
    Ok(if ok { 0 } else { EXIT_DIFFERS })
}

async fn verify_there(client: &Client, build: &BuildId, json: bool) -> anyhow::Result<bool> {
    let ask = Ask::post(format!("builds/{build}/verify"), &serde_json::json!({})).repeatable().taking(PATIENCE);
    let mut progress = Progress::new();
    progress.show(|| format!("the server reads the log of {build}"));
    let answer: Value = client.json(&ask).await.map_err(|error| told(&error))?;
    drop(progress);
    let verified: Verified = serde_json::from_value(answer.clone())?;
    if json {
        print(format_args!("{answer}\n"))?;
    } else {
        verified.attempts.iter().try_for_each(|attempt| print(line(attempt)))?;
    }
    Ok(verified.ok)
}

fn line(attempt: &VerifiedAttempt) -> String {
    let VerifiedAttempt { step, attempt: number, records, bytes, .. } = attempt;
    let verdict = match (&attempt.problem, attempt.ok) {
        (Some(problem), _) => format!("differs: {}", OneLine(problem)),
        (None, true) => "ok".to_owned(),
        (None, false) => "differs".to_owned(),
    };
    let digest = attempt.stored_digest.as_deref().unwrap_or("none");
    let promised = match &attempt.promised_digest {
        None => "; nothing was promised".to_owned(),
        Some(promised) if Some(promised) == attempt.stored_digest.as_ref() => String::new(),
        Some(promised) => format!(", promised {}", OneLine(promised)),
    };
    let (step, digest) = (OneLine(step), OneLine(digest));
    format!("{step} attempt {number}: {verdict}; {} in {records} records, BLAKE3 {digest}{promised}\n", size(*bytes))
}

async fn verify_here(client: &Client, build: &BuildId) -> anyhow::Result<bool> {
    let detail: Detail = client.json(&Ask::get(format!("builds/{build}"))).await.map_err(|error| told(&error))?;
    let mut all_agree = true;
    for step in &detail.steps {
        let newest = step.attempts.iter().map(|attempt| attempt.attempt).max();
        for attempt in &step.attempts {
            let raw = Raw {
                build: build.to_string(),
                step: Some(step.step.clone()),
                attempt: Some(attempt.attempt),
                ..Raw::default()
            };
            let (digest, bytes) = hash(client, &raw).await?;
            let finding = compare(attempt, &digest, bytes);
            all_agree &= match finding {
                Finding::Agrees => true,
                Finding::NothingPromised => Some(attempt.attempt) != newest,
                Finding::Differs => false,
            };
            let words = match finding {
                Finding::Agrees => "ok",
                Finding::NothingPromised => "nothing was promised",
                Finding::Differs => "differs",
            };
            let name = OneLine(&step.step);
            print(format_args!("{name} attempt {}: {words}; {}, BLAKE3 {digest}\n", attempt.attempt, size(bytes)))?;
        }
    }
    Ok(all_agree)
}

/// What a comparison has shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Finding {
    Agrees,
    /// Its end never arrived.
    NothingPromised,
    Differs,
}

fn compare(attempt: &Attempt, digest: &str, bytes: u64) -> Finding {
    let agrees = attempt.digest.as_deref() == Some(digest) && attempt.total() == bytes;
    match attempt.complete {
        Some(true) if agrees => Finding::Agrees,
        Some(true) => Finding::Differs,
        Some(false) if attempt.digest.is_some() && !agrees => Finding::Differs,
        Some(false) | None => Finding::NothingPromised,
    }
}

/// Digest and length of a raw log.
pub(super) async fn hash(client: &Client, raw: &Raw) -> anyhow::Result<(String, u64)> {
    let mut hasher = blake3::Hasher::new();
    let mut progress = Progress::new();
    let bytes = download(client, raw, |block, before, total| {
        hasher.update(block);
        progress.show(|| match total {
            Some(total) => format!("{} of {}", size(before), size(total)),
            None => size(before),
        });
        Ok(())
    })
    .await?;
    Ok((hasher.finalize().to_hex().to_string(), bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_promised_digest_agrees() {
        let attempt = |complete, digest: Option<&str>| Attempt {
            complete,
            digest: digest.map(str::to_owned),
            bytes: crate::client::model::StreamBytes { stdout: Some(2), stderr: Some(1), total: 3 },
            ..Attempt::default()
        };
        assert_eq!(compare(&attempt(Some(true), Some("aa")), "aa", 3), Finding::Agrees);
        assert_eq!(compare(&attempt(Some(true), Some("aa")), "aa", 2), Finding::Differs);
        assert_eq!(compare(&attempt(Some(true), Some("ab")), "aa", 3), Finding::Differs);
        assert_eq!(compare(&attempt(Some(true), None), "aa", 3), Finding::Differs);
        assert_eq!(compare(&attempt(Some(false), None), "aa", 3), Finding::NothingPromised);
    }

    #[test]
    fn a_servers_finding_is_one_line() {
        let attempt = VerifiedAttempt {
            step: "main".into(),
            attempt: 2,
            stored_digest: Some("aa".into()),
            promised_digest: Some("ab".into()),
            records: 3,
            bytes: 7,
            ok: false,
            problem: Some("byte 5\nis damaged".into()),
        };
        let told = "main attempt 2: differs: byte 5?is damaged; 7 B in 3 records, BLAKE3 aa, promised ab\n";
        assert_eq!(line(&attempt), told);
    }
}
