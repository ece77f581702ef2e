//! One line of the log.

use std::{
    borrow::Cow,
    fmt::{self, Write},
    time::SystemTime,
};

use serde_json::{Value, json};
use tracing::{
    Event, Level,
    field::{Field, Visit},
};

use crate::redact::Redactor;

/// What a line says, in no form yet.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) time: SystemTime,
    pub(super) level: Level,
    pub(super) target: &'static str,
    pub(super) message: String,
    pub(super) fields: Vec<(Cow<'static, str>, Value)>,
}

impl Line {
    pub(super) fn new(time: SystemTime, level: Level, target: &'static str) -> Self {
        Self { time, level, target, message: String::new(), fields: Vec::new() }
    }

    pub(super) fn of(event: &Event<'_>, time: SystemTime) -> Self {
        let metadata = event.metadata();
        let mut line = Self::new(time, *metadata.level(), metadata.target());
        event.record(&mut line);
        line
    }

    /// Masks secrets in whatever it says.
    pub(super) fn mask(&mut self, redactor: &Redactor) {
        self.message = redactor.mask_text(&self.message).into_owned();
        self.fields.iter_mut().for_each(|(_, value)| redactor.mask_value(value));
    }

    /// One object, the fields beside the message.
    pub(super) fn json(&self) -> String {
        let time = humantime::format_rfc3339_micros(self.time).to_string();
        let head: [(Cow<'_, str>, Value); 4] = [
            ("time".into(), time.into()),
            ("level".into(), self.level.as_str().to_ascii_lowercase().into()),
            ("module".into(), module(self.target).into()),
            ("message".into(), self.message.as_str().into()),
        ];
        let members: Vec<_> =
            head.iter().chain(&self.fields).map(|(name, value)| format!("{}:{value}", json!(name))).collect();
        format!("{{{}}}", members.join(","))
    }

    /// About what it takes in memory, bytes.
    pub(super) fn size(&self) -> usize {
        let text = |value: &Value| value.as_str().map_or(0, str::len);
        size_of::<Self>() + self.message.len() + self.fields.iter().map(|field| FIELD + text(&field.1)).sum::<usize>()
    }
}

/// What a field takes beside its text, bytes.
const FIELD: usize = size_of::<(Cow<'static, str>, Value)>();

/// The last part of a target: the module without its parents.
pub(super) fn module(target: &str) -> &str {
    target.rsplit("::").next().unwrap_or(target)
}

/// `2026-01-02T03:04:05.678901Z  WARN uplink: disconnected delay=250ms`, always one line.
impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = humantime::format_rfc3339_micros(self.time);
        write!(f, "{time} {:>5} {}: {}", self.level.as_str(), module(self.target), OneLine(&self.message))?;
        self.fields.iter().try_for_each(|(name, value)| write_field(f, name, value))
    }
}

/// A space and `name=value`; the members of an object each by itself.
fn write_field(f: &mut fmt::Formatter<'_>, name: &str, value: &Value) -> fmt::Result {
    match value {
        Value::Object(members) => members.iter().try_for_each(|(name, value)| write_field(f, name, value)),
        Value::String(text) if is_plain(text) => write!(f, " {name}={text}"),
        Value::Array(_) | Value::Bool(_) | Value::Null | Value::Number(_) | Value::String(_) => {
            write!(f, " {name}={value}")
        }
    }
}

/// Whether a text can stand without quotation marks.
fn is_plain(text: &str) -> bool {
    !text.is_empty() && !text.contains(|letter: char| letter.is_whitespace() || letter.is_control() || letter == '"')
}

/// A text whose control characters are shown and not done: what a server or a file says ends no line and moves no
/// cursor.
struct OneLine<'a>(&'a str);

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for letter in self.0.chars() {
            if letter.is_control() { write!(f, "{}", letter.escape_default())? } else { f.write_char(letter)? }
        }
        Ok(())
    }
}

impl Line {
    fn add(&mut self, field: &Field, value: Value) {
        self.fields.push((Cow::Borrowed(field.name()), value));
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            write!(self.message, "{value:?}").expect("a String takes everything");
        } else {
            self.add(field, format!("{value:?}").into());
        }
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" { value.clone_into(&mut self.message) } else { self.add(field, value.into()) }
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, value.into());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, value.into());
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field, json!(value));
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    fn line() -> Line {
        let mut line =
            Line::new(UNIX_EPOCH + Duration::from_micros(1_500_000), Level::WARN, "phonehome_agent::a::uplink");
        line.message = "gone\nfor \"good\"".into();
        line.fields = vec![("delay".into(), "250ms".into()), ("why".into(), "a b".into()), ("n".into(), 7.into())];
        line
    }

    #[test]
    fn secrets_are_masked_in_message_and_fields() {
        let mut line = line();
        line.message = "cannot run hunter2".into();
        line.fields.push(("config".into(), json!({"command": "hunter2", "wait-for": ["a=exec:hunter2", 1]})));
        line.mask(&Redactor::new([zeroize::Zeroizing::new(b"hunter2".to_vec())]).unwrap().unwrap());
        let text = line.to_string();
        assert!(text.contains("cannot run [redacted]") && text.contains("a=exec:[redacted]"), "{text}");
        assert!(text.contains("delay=250ms") && !text.contains("hunter2"), "{text}");
    }

    #[test]
    fn as_text_it_is_one_line() {
        let text = "1970-01-01T00:00:01.500000Z  WARN uplink: gone\\nfor \"good\" delay=250ms why=\"a b\" n=7";
        assert_eq!(line().to_string(), text);
    }

    #[test]
    fn as_json_its_fields_stand_beside_the_message() {
        let expected = r#"{"time":"1970-01-01T00:00:01.500000Z","level":"warn","module":"uplink","message":"gone\nfor \"good\"","delay":"250ms","why":"a b","n":7}"#;
        assert_eq!(line().json(), expected);
    }
}
