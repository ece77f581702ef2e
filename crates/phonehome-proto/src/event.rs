//! Payloads of the event stream: one JSON object per record, told apart by its `event` member.

use serde::{Deserialize, Serialize};

use crate::frame::Stream;

/// A fact about the build that changes how its log is to be read. Events unknown here are stored and shown as they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// Bytes of a stream that were written by the command and will never arrive.
    Gap(Gap),
    /// An earlier agent of this step died, and this one has delivered what it left.
    TookOver(TookOver),
}

/// What is missing, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// Whose bytes.
    pub stream: Stream,
    /// How many. The stream's next record starts this much further on.
    pub bytes: u64,
    /// Why, in a word or a sentence.
    pub cause: String,
}

/// What an earlier agent left in its spool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TookOver {
    /// Records that the server had not confirmed.
    pub records: u64,
    /// Whether its end was among what it left. Otherwise its last output may be missing, and nobody knows how much.
    pub finished: bool,
}

impl Event {
    /// Reads a payload; `None` for an event that this version does not know.
    #[must_use]
    pub fn parse(payload: &[u8]) -> Option<Self> {
        serde_json::from_slice(payload).ok()
    }

    /// The payload that says this.
    ///
    /// # Panics
    ///
    /// Never: none of its members can fail to be written as JSON.
    #[must_use]
    pub fn payload(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain members always serialise")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_frozen_as_json() {
        let gap = Event::Gap(Gap { stream: Stream::Stdout, bytes: 7, cause: "spool-full".into() });
        assert_eq!(gap.payload(), br#"{"event":"gap","stream":"stdout","bytes":7,"cause":"spool-full"}"#);
        assert_eq!(Event::parse(&gap.payload()), Some(gap));
        assert_eq!(Event::parse(br#"{"event":"born"}"#), None);
    }

    #[test]
    fn a_take_over_is_frozen_as_json() {
        let took_over = Event::TookOver(TookOver { records: 3, finished: false });
        assert_eq!(took_over.payload(), br#"{"event":"took-over","records":3,"finished":false}"#);
        assert_eq!(Event::parse(&took_over.payload()), Some(took_over));
    }
}
