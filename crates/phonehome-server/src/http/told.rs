//! What a reader of a log is told, as JSON: lines of `format=ndjson`, data of server-sent events.

use base64::{Engine, engine::general_purpose::STANDARD};
use phonehome_proto::{
    frame::{Record, Stream},
    id::{Attempt, StepName},
};
use serde::Serialize;
use serde_json::Value;

use crate::{
    builds::{LogItem, LogRecord, Verdict, cursor::Cursor},
    report::Report,
    summary::rfc3339,
};

/// One thing told. Its text has no line feed in it, whatever the build wrote.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Told<'a> {
    /// The last thing.
    End {
        end: &'a Verdict,
    },
    Lost {
        cursor: String,
        step: &'a StepName,
        attempt: Attempt,
        lost: u64,
    },
    Record(Box<RecordTold<'a>>),
    Report {
        cursor: String,
        time: String,
        stream: &'static str,
        report: &'a Report,
    },
}

#[derive(Debug, Serialize)]
pub(crate) struct RecordTold<'a> {
    cursor: String,
    time: String,
    step: &'a StepName,
    attempt: Attempt,
    seq: u64,
    stream: &'static str,
    offset: u64,
    #[serde(flatten)]
    content: Content<'a>,
}

/// Bytes, as what they are.
#[derive(Debug, Serialize)]
#[serde(rename_all = "lowercase")]
enum Content<'a> {
    Base64(String),
    Event(Value),
    Text(&'a str),
}

impl<'a> Content<'a> {
    fn of(record: &'a Record) -> Self {
        if record.stream == Stream::Event
            && let Ok(event) = serde_json::from_slice(&record.payload)
        {
            return Self::Event(event);
        }
        match std::str::from_utf8(&record.payload) {
            Ok(text) => Self::Text(text),
            Err(_) => Self::Base64(STANDARD.encode(&record.payload)),
        }
    }
}

impl<'a> Told<'a> {
    /// An item of the log, and the place behind it.
    pub(crate) fn item(item: &'a LogItem, behind: &Cursor) -> Self {
        let cursor = behind.to_string();
        match item {
            LogItem::Lost { step, attempt, records } => Self::Lost { cursor, step, attempt: *attempt, lost: *records },
            LogItem::Record(LogRecord { step, attempt, record }) => Self::Record(Box::new(RecordTold {
                cursor,
                time: rfc3339(record.time),
                step,
                attempt: *attempt,
                seq: record.seq,
                stream: record.stream.name(),
                offset: record.offset,
                content: Content::of(record),
            })),
        }
    }

    pub(crate) fn report(report: &'a Report, behind: &Cursor) -> Self {
        Self::Report { cursor: behind.to_string(), time: rfc3339(report.time), stream: "report", report }
    }

    /// The name of the server-sent event.
    fn kind(&self) -> &'static str {
        match self {
            Self::End { .. } => "end",
            Self::Lost { .. } => "lost",
            Self::Record(record) if record.stream == Stream::Event.name() => "lifecycle",
            Self::Record(_) => "output",
            Self::Report { .. } => "report",
        }
    }

    /// Adds a line of JSON.
    pub(crate) fn write_line(&self, out: &mut Vec<u8>) {
        serde_json::to_writer(&mut *out, self).expect("what is told is plain data");
        out.push(b'\n');
    }

    /// Adds a server-sent event. `behind` is where the reader goes on when its connection is cut.
    pub(crate) fn write_event(&self, behind: &Cursor, out: &mut Vec<u8>) {
        out.extend_from_slice(format!("id: {behind}\nevent: {}\ndata: ", self.kind()).as_bytes());
        self.write_line(out);
        out.push(b'\n');
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_record_is_told_as_what_it_is() {
        for (stream, payload, member, expected) in [
            (Stream::Stdout, b"a\nb\xc3\xa9".as_slice(), "text", json!("a\nb\u{e9}")),
            (Stream::Stderr, b"\xff\n", "base64", json!("/wo=")),
            (Stream::Event, b"{\"event\":\n\"born\"}", "event", json!({"event": "born"})),
            (Stream::Event, b"no json", "text", json!("no json")),
            (Stream::Event, b"\xff", "base64", json!("/w==")),
        ] {
            let told = line(&item(stream, payload));
            assert_eq!(told[member], expected, "{told}");
            assert_eq!(told["stream"], stream.name());
            assert_eq!((&told["seq"], &told["offset"], &told["attempt"]), (&json!(3), &json!(7), &json!(2)));
            assert_eq!(told["time"], "1970-01-01T00:00:00.000001Z");
        }
    }

    #[test]
    fn an_event_of_the_stream_has_one_line_of_data() {
        let mut out = Vec::new();
        let behind = Cursor::start(&"b".parse().unwrap(), 0);
        Told::item(&item(Stream::Stdout, b"a\r\nb\n\ndata: c\n\n"), &behind).write_event(&behind, &mut out);
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<_> = text.split('\n').collect();
        assert_eq!(lines.len(), 5, "{text}");
        assert_eq!((lines[0], lines[1]), (&*format!("id: {behind}"), "event: output"));
        assert!(lines[2].starts_with("data: {") && !text.contains('\r'));
    }

    #[test]
    fn what_is_lost_is_counted() {
        let lost = LogItem::Lost { step: StepName::default(), attempt: 1, records: 9 };
        assert_eq!(line(&lost)["lost"], 9);
    }

    fn item(stream: Stream, payload: &'static [u8]) -> LogItem {
        let record = Record::new(3, 1, stream, 7, payload.into());
        LogItem::Record(LogRecord { step: StepName::default(), attempt: 2, record })
    }

    fn line(item: &LogItem) -> Value {
        let mut out = Vec::new();
        Told::item(item, &Cursor::start(&"b".parse().unwrap(), 0)).write_line(&mut out);
        assert_eq!(out.iter().filter(|&&byte| byte == b'\n').count(), 1);
        serde_json::from_slice(&out).unwrap()
    }
}
