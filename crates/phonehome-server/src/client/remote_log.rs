//! The log of a build on a standing server, read from a cursor: nothing is lost and nothing comes twice, however often
//! the connection or the server goes away.
//!
//! What has been passed on is known by cursor, and by the number of each attempt's last record: a cursor says where to
//! go on, and the number that a record is new.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use http::HeaderValue;
use phonehome_proto::{
    frame::Stream,
    id::{Attempt, BuildId, StepName},
};
use serde::Deserialize;
use serde_json::Value;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep},
};

use super::{
    base::escaped,
    http::{Ask, Body, Client, ClientError},
    lines::{Lines, Sse, TooLong},
    model::{Detail, Report},
    retry::Retry,
};

/// What a reader of a build's log comes upon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Item {
    /// Records were acknowledged once and are gone: how many.
    Lost { step: StepName, records: u64 },
    /// Bytes of a stream, or an event as JSON.
    Record { step: StepName, attempt: Attempt, stream: Stream, payload: Bytes },
    /// Somebody around the build told something.
    Report(Report),
    /// What the reader is told about the reading itself.
    Note(String),
}

/// What is wanted of the log.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted {
    /// To the verdict, and not only what is there.
    pub(crate) follow: bool,
    pub(crate) step: Option<StepName>,
    pub(crate) attempt: Option<Attempt>,
    pub(crate) stream: Option<Stream>,
    /// The last lines only.
    pub(crate) tail: Option<u64>,
    /// The time in front of each line.
    pub(crate) timestamps: bool,
}

/// A reader of a build's log; a task of its own reads ahead a little.
#[derive(Debug)]
pub(crate) struct RemoteLog {
    items: mpsc::Receiver<Result<Item, String>>,
    outcome: Outcome,
    connected: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

/// Tells how a followed build ended.
pub(crate) type Outcome = watch::Receiver<Option<Result<Detail, String>>>;

/// Items between the network and the printer: at most a MiB.
const READ_AHEAD: usize = 16;

/// An outage that is worth a line.
const WORTH_TELLING: Duration = Duration::from_secs(5);

impl Drop for RemoteLog {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl RemoteLog {
    /// Starts to read. A server that does not answer is tried again for `patience`; `None` is for ever.
    pub(crate) fn start(client: Arc<Client>, build: BuildId, wanted: Wanted, patience: Option<Duration>) -> Self {
        let (sender, items) = mpsc::channel(READ_AHEAD);
        let (tell, outcome) = watch::channel(None);
        let connected = Arc::new(AtomicBool::new(false));
        let reader = Reader {
            connected: connected.clone(),
            client,
            build,
            retry: Retry::new(patience, Instant::now()),
            cursor: None,
            position: Position::default(),
            stamper: wanted.timestamps.then(Stamper::default),
            wanted,
            items: sender,
            told_outage: false,
        };
        let task = tokio::spawn(async move {
            if let Some(told) = reader.run().await {
                tell.send_replace(Some(told));
            }
        });
        Self { items, outcome, connected, task }
    }

    /// How the build ended, once it has and is followed.
    pub(crate) fn outcome(&self) -> Outcome {
        self.outcome.clone()
    }

    /// Whether any agent has written a record.
    pub(crate) fn connected(&self) -> Arc<AtomicBool> {
        self.connected.clone()
    }

    /// The next item; `None` when everything was read. Cancel safe.
    pub(crate) async fn next(&mut self) -> std::io::Result<Option<Item>> {
        self.items.recv().await.transpose().map_err(std::io::Error::other)
    }

    /// The next item, if there is one at this moment.
    pub(crate) fn try_next(&mut self) -> std::io::Result<Option<Item>> {
        self.items.try_recv().ok().transpose().map_err(std::io::Error::other)
    }
}

/// The task behind a [`RemoteLog`].
struct Reader {
    client: Arc<Client>,
    build: BuildId,
    wanted: Wanted,
    retry: Retry,
    cursor: Option<String>,
    position: Position,
    stamper: Option<Stamper>,
    items: mpsc::Sender<Result<Item, String>>,
    told_outage: bool,
    connected: Arc<AtomicBool>,
}

/// Why a log was not read to its end.
enum Stopped {
    /// It cannot be read, and why.
    Failed(String),
    /// Nobody wants the items any more.
    Unwanted,
}

/// Why a stream of items came to an end before its end.
enum Interrupted {
    Client(ClientError),
    /// Nobody wants the items any more.
    Unwanted,
}

impl From<ClientError> for Interrupted {
    fn from(error: ClientError) -> Self {
        Self::Client(error)
    }
}

impl From<TooLong> for Interrupted {
    fn from(error: TooLong) -> Self {
        Self::Client(ClientError::NotUnderstood(error.to_string()))
    }
}

impl Reader {
    /// Reads until the end, and says how the build ended, unless nobody reads to the end. Failures are told among the
    /// items too.
    async fn run(mut self) -> Option<Result<Detail, String>> {
        match self.read_all().await {
            Ok(detail) => Some(Ok(detail)),
            Err(Stopped::Unwanted) => None,
            Err(Stopped::Failed(reason)) => {
                drop(self.items.send(Err(reason.clone())).await); // nobody may read any more
                Some(Err(reason))
            }
        }
    }

    async fn read_all(&mut self) -> Result<Detail, Stopped> {
        let history = !self.wanted.follow || self.wanted.tail.is_some();
        if history {
            self.insist(async |reader| reader.read_history().await).await?;
        }
        if self.wanted.follow {
            self.insist(async |reader| reader.follow().await).await?;
        }
        self.insist(async |reader| reader.fetch_detail().await).await
    }

    /// Does something again until it is done or hopeless.
    async fn insist<T>(
        &mut self,
        mut work: impl AsyncFnMut(&mut Self) -> Result<T, Interrupted>,
    ) -> Result<T, Stopped> {
        loop {
            let error = match work(self).await {
                Ok(done) => return Ok(done),
                Err(Interrupted::Unwanted) => return Err(Stopped::Unwanted),
                Err(Interrupted::Client(error)) => error,
            };
            let now = Instant::now();
            let Some(pause) = self.retry.handle_failure(&error, self.client.jitter(), now) else {
                return Err(Stopped::Failed(self.final_word(&error, now)));
            };
            if !self.told_outage && self.retry.silence(now) >= WORTH_TELLING {
                self.told_outage = true;
                self.note(format!(
                    "no log for {} s, trying again: {}",
                    self.retry.silence(now).as_secs(),
                    error.told()
                ))
                .await;
            }
            sleep(pause).await;
        }
    }

    fn final_word(&self, error: &ClientError, now: Instant) -> String {
        match self.retry.silence(now).as_secs() {
            silence @ 1.. if error.is_transient() => {
                format!("the server has not been heard of for {silence} s: {}", error.told())
            }
            _ => error.told(),
        }
    }

    async fn fetch_detail(&mut self) -> Result<Detail, Interrupted> {
        Ok(self.client.ask(&Ask::get(format!("builds/{}", self.build))).await?.json().await?)
    }

    /// Reads what is there; also a second time, when the first was cut off.
    async fn read_history(&mut self) -> Result<(), Interrupted> {
        let mut body = self.client.ask(&Ask::get(self.history_path())).await?.body;
        let mut lines = Lines::default();
        // That what was read comes again is no contact: a log that cannot be read beyond a place would be tried for ever.
        while let Some(block) = body.next().await? {
            lines.push(&block);
            while let Some(line) = lines.next()? {
                self.handle_entry(&line, false).await?;
            }
        }
        Ok(())
    }

    fn history_path(&self) -> String {
        let Wanted { step, attempt, stream, tail, .. } = &self.wanted;
        let mut path = format!("builds/{}/log?format=ndjson", self.build);
        let mut add = |name: &str, value: Option<String>| {
            path.extend(value.map(|value| format!("&{name}={}", escaped(&value))));
        };
        add("step", step.as_ref().map(ToString::to_string));
        add("attempt", attempt.map(|attempt| attempt.to_string()));
        add("stream", stream.map(|stream| stream.name().to_owned()));
        add("tail", tail.map(|tail| tail.to_string()));
        path
    }

    /// Reads events until the last one.
    async fn follow(&mut self) -> Result<(), Interrupted> {
        let mut ask = Ask::get(format!("builds/{}/events", self.build));
        if let Some(cursor) = &self.cursor {
            let unusable = |_| ClientError::NotUnderstood("its cursor is no text".into());
            let cursor = HeaderValue::from_str(cursor).map_err(unusable)?;
            ask = ask.header(http::HeaderName::from_static("last-event-id"), cursor);
        }
        let mut body = self.client.ask(&ask).await?.body;
        let mut events = Sse::default();
        while let Some(block) = self.next_block(&mut body).await? {
            events.push(&block);
            while let Some(event) = events.next()? {
                let is_end = event.event == "end";
                if !event.data.is_empty() && !is_end {
                    self.handle_entry(&event.data, event.event == "report").await?;
                }
                self.cursor = event.id.or(self.cursor.take());
                if is_end {
                    return Ok(());
                }
            }
        }
        // A server that shuts down ends its answers without having told the end of the build.
        Err(ClientError::Unreachable("the rest of the log".into(), std::io::ErrorKind::UnexpectedEof.into()).into())
    }

    async fn next_block(&mut self, body: &mut Body) -> Result<Option<Bytes>, Interrupted> {
        let block = body.next().await?;
        self.handle_contact().await;
        Ok(block)
    }

    async fn handle_contact(&mut self) {
        self.retry.handle_contact(Instant::now());
        if std::mem::take(&mut self.told_outage) {
            self.note("the server is there again".into()).await;
        }
    }

    async fn note(&self, text: String) {
        drop(self.items.send(Ok(Item::Note(text))).await); // the next item finds out that nobody reads
    }

    /// Takes one entry in: a line of the log, or the data of an event.
    async fn handle_entry(&mut self, json: &[u8], is_report: bool) -> Result<(), Interrupted> {
        let not_understood = |error: serde_json::Error| ClientError::NotUnderstood(error.to_string());
        let item = if is_report {
            Some(Item::Report(report(json).map_err(not_understood)?))
        } else {
            let entry: Entry = serde_json::from_slice(json).map_err(not_understood)?;
            let is_followed_by_events = self.wanted.follow;
            if let Some(cursor) = entry.cursor.clone().filter(|_| is_followed_by_events) {
                self.cursor = Some(cursor);
            }
            self.item(entry).map_err(ClientError::NotUnderstood)?
        };
        let Some(item) = item else { return Ok(()) };
        self.handle_contact().await;
        self.items.send(Ok(item)).await.map_err(|_| Interrupted::Unwanted)
    }

    /// What an entry is, if it is new and wanted.
    fn item(&mut self, entry: Entry) -> Result<Option<Item>, String> {
        if let Some(report) = entry.report {
            return Ok(Some(Item::Report(report)));
        }
        if entry.step.is_none() || !self.is_wanted(&entry) {
            return Ok(None); // the end, or what a later server says
        }
        self.connected.store(true, Ordering::Relaxed);
        let step: StepName = entry.step.unwrap_or_default().parse().map_err(|error| format!("its step: {error}"))?;
        let attempt = entry.attempt.unwrap_or(1);
        if let Some(records) = entry.lost {
            return Ok(Some(Item::Lost { step, records }));
        }
        if !self.position.is_new(&step, attempt, entry.seq) {
            return Ok(None);
        }
        let stream = stream(entry.stream.as_deref().unwrap_or_default()).ok_or("its stream has no known name")?;
        let payload: Bytes = match (entry.text, entry.base64, entry.event) {
            (Some(text), _, _) => text.into(),
            (None, Some(coded), _) => BASE64_STANDARD.decode(coded).map_err(|error| error.to_string())?.into(),
            (None, None, Some(event)) => event.to_string().into(),
            (None, None, None) => Bytes::new(),
        };
        let payload = match &mut self.stamper {
            Some(stamper) if stream.is_output() => {
                stamper.stamp(&step, stream, entry.time.as_deref().unwrap_or_default(), &payload)
            }
            Some(_) | None => payload,
        };
        Ok(Some(Item::Record { step, attempt, stream, payload }))
    }

    fn is_wanted(&self, entry: &Entry) -> bool {
        let Wanted { step, attempt, stream, .. } = &self.wanted;
        let is_step = step.as_ref().is_none_or(|step| entry.step.as_deref() == Some(step.as_str()));
        let is_attempt = attempt.is_none_or(|attempt| entry.attempt == Some(attempt));
        let is_stream = stream.is_none_or(|stream| {
            let name = entry.stream.as_deref();
            entry.lost.is_some() || name == Some(stream.name()) || name == Some(Stream::Event.name())
        });
        is_step && is_attempt && is_stream
    }
}

/// A line of a log as NDJSON, which is also the data of an event.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Entry {
    cursor: Option<String>,
    time: Option<String>,
    step: Option<String>,
    attempt: Option<Attempt>,
    seq: Option<u64>,
    stream: Option<String>,
    text: Option<String>,
    base64: Option<String>,
    event: Option<Value>,
    lost: Option<u64>,
    report: Option<Report>,
}

/// A report, on its own or as a member.
fn report(json: &[u8]) -> Result<Report, serde_json::Error> {
    let value: Value = serde_json::from_slice(json)?;
    serde_json::from_value(if value["report"].is_object() { value["report"].clone() } else { value })
}

fn stream(name: &str) -> Option<Stream> {
    Stream::ALL.into_iter().find(|stream| stream.name() == name)
}

/// Which records were passed on: of each attempt all below a number.
#[derive(Debug, Default)]
struct Position(BTreeMap<(StepName, Attempt), u64>);

impl Position {
    /// Whether a record has not been there before; from now on it has.
    fn is_new(&mut self, step: &StepName, attempt: Attempt, seq: Option<u64>) -> bool {
        let Some(seq) = seq else { return true };
        let next = self.0.entry((step.clone(), attempt)).or_default();
        let is_new = seq >= *next;
        *next = (*next).max(seq + 1);
        is_new
    }
}

/// Puts the time in front of lines.
#[derive(Debug, Default)]
struct Stamper {
    /// Streams in the middle of a line.
    within: BTreeMap<(StepName, Stream), bool>,
}

impl Stamper {
    fn stamp(&mut self, step: &StepName, stream: Stream, time: &str, payload: &[u8]) -> Bytes {
        let within = self.within.entry((step.clone(), stream)).or_default();
        let mut stamped = Vec::with_capacity(payload.len() + time.len() + 1);
        for line in payload.split_inclusive(|byte| *byte == b'\n') {
            if !std::mem::replace(within, !line.ends_with(b"\n")) {
                stamped.extend_from_slice(time.as_bytes());
                stamped.push(b' ');
            }
            stamped.extend_from_slice(line);
        }
        stamped.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::canned::{Canned, answer, torn};

    const BUILD: &str = r#"{"id":"b","verdict":"failed","exit_code":7,"steps":[{"step":"main"}]}"#;

    #[tokio::test]
    async fn a_cut_stream_goes_on_at_its_cursor_and_repeats_nothing() {
        let first =
            format!(": hi\n\n{}{}{}", sse("c1", 0, "one\n"), sse("c2", 1, "two"), "event: output\ndata: {\"torn");
        // The second answer repeats a record, as a server may that was killed before it said how far it had got.
        let second = format!("{}{}event: end\nid: c4\ndata: {{}}\n\n", sse("c2", 1, "two"), sse("c3", 2, "\nthree\n"));
        let answers = [torn(&first), torn(""), answer("200 OK", &second), answer("200 OK", BUILD)];
        let mut server = Canned::start(answers).await;
        let mut log = RemoteLog::start(Arc::new(server.client("")), "b".parse().unwrap(), follow(), None);
        assert_eq!(text(&mut log).await, "one\ntwo\nthree\n");
        assert!(!server.asked().await.contains("last-event-id"));
        for _ in 0..2 {
            assert!(server.asked().await.contains("last-event-id: c2\r\n"));
        }
        let outcome = log.outcome().wait_for(Option::is_some).await.unwrap().clone().unwrap().unwrap();
        assert_eq!(outcome.exit_code(), Some(7));
    }

    #[tokio::test]
    async fn a_stream_that_ends_politely_before_its_end_is_taken_up_again() {
        let answers =
            [answer("200 OK", &sse("c1", 0, "one")), answer("200 OK", "event: end\n\n"), answer("200 OK", BUILD)];
        let server = Canned::start(answers).await;
        let mut log = RemoteLog::start(Arc::new(server.client("")), "b".parse().unwrap(), follow(), None);
        assert_eq!(text(&mut log).await, "one");
    }

    #[tokio::test]
    async fn the_end_of_a_long_log_comes_first_and_then_what_follows_it() {
        let line = r#"{"cursor":"c5","step":"main","attempt":1,"seq":5,"stream":"stdout","text":"five\n"}"#;
        let rest = format!("{}event: end\ndata: {{}}\n\n", sse("c6", 6, "six\n"));
        let answers = [answer("200 OK", &format!("{line}\n")), answer("200 OK", &rest), answer("200 OK", BUILD)];
        let mut server = Canned::start(answers).await;
        let wanted = Wanted { tail: Some(1), ..follow() };
        let mut log = RemoteLog::start(Arc::new(server.client("")), "b".parse().unwrap(), wanted, None);
        assert_eq!(text(&mut log).await, "five\nsix\n");
        assert!(server.asked().await.starts_with("GET /api/v1/builds/b/log?format=ndjson&tail=1 HTTP"));
        assert!(server.asked().await.contains("last-event-id: c5\r\n"));
    }

    #[tokio::test]
    async fn what_is_no_text_holes_events_and_reports_are_passed_on() {
        let body = [
            r#"{"step":"main","attempt":1,"seq":0,"stream":"stderr","base64":"/wA="}"#,
            r#"{"step":"main","attempt":1,"lost":3}"#,
            r#"{"step":"main","attempt":2,"seq":0,"stream":"event","event":{"event":"ready","by":"x"}}"#,
            r#"{"report":{"type":"Warning","reason":"Failed","message":"m"}}"#,
            r#"{"end":{"verdict":"failed"}}"#,
        ];
        let answers = [answer("200 OK", &(body.join("\n") + "\n")), answer("200 OK", BUILD)];
        let server = Canned::start(answers).await;
        let wanted = Wanted::default();
        let mut log = RemoteLog::start(Arc::new(server.client("")), "b".parse().unwrap(), wanted, None);
        let step = StepName::default();
        let record = |attempt, stream, payload: &'static [u8]| Item::Record {
            step: step.clone(),
            attempt,
            stream,
            payload: Bytes::from_static(payload),
        };
        assert_eq!(log.next().await.unwrap(), Some(record(1, Stream::Stderr, b"\xff\0")));
        assert_eq!(log.next().await.unwrap(), Some(Item::Lost { step: step.clone(), records: 3 }));
        assert_eq!(log.next().await.unwrap(), Some(record(2, Stream::Event, br#"{"by":"x","event":"ready"}"#)));
        assert!(matches!(log.next().await.unwrap(), Some(Item::Report(report)) if report.told() == "Failed: m"));
        assert_eq!(log.next().await.unwrap(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_stays_away_is_given_up_and_that_is_told() {
        let server = Canned::start([torn(&sse("c1", 0, "one"))]).await;
        let patience = Some(Duration::from_secs(120));
        let mut log = RemoteLog::start(Arc::new(server.client("")), "b".parse().unwrap(), follow(), patience);
        assert!(matches!(log.next().await.unwrap(), Some(Item::Record { .. })));
        assert!(matches!(log.next().await.unwrap(), Some(Item::Note(note)) if note.starts_with("no log for ")));
        let gone = log.next().await.unwrap_err().to_string();
        assert!(gone.contains("has not been heard of for 12"), "{gone}");
        assert!(log.outcome().wait_for(Option::is_some).await.unwrap().clone().unwrap().is_err());
    }

    #[test]
    fn every_line_gets_its_time_once() {
        let (mut stamper, step) = (Stamper::default(), StepName::default());
        let mut stamp = |stream, time, text: &str| stamper.stamp(&step, stream, time, text.as_bytes());
        assert_eq!(stamp(Stream::Stdout, "T1", "a\nb"), "T1 a\nT1 b");
        assert_eq!(stamp(Stream::Stderr, "T2", "x\n"), "T2 x\n");
        assert_eq!(stamp(Stream::Stdout, "T3", "c\n\nd\n"), "c\nT3 \nT3 d\n");
    }

    fn follow() -> Wanted {
        Wanted { follow: true, ..Wanted::default() }
    }

    fn sse(cursor: &str, seq: u64, text: &str) -> String {
        let entry = serde_json::json!({
            "cursor": cursor, "step": "main", "attempt": 1, "seq": seq, "stream": "stdout", "text": text,
        });
        format!("event: output\nid: {cursor}\ndata: {entry}\n\n")
    }

    /// All the output up to the end.
    async fn text(log: &mut RemoteLog) -> String {
        let mut all = Vec::new();
        while let Some(item) = log.next().await.unwrap() {
            if let Item::Record { payload, .. } = item {
                all.extend_from_slice(&payload);
            }
        }
        String::from_utf8(all).unwrap()
    }
}
