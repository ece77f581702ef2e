//! What is declared of a build before anybody phones home, and how it is kept: `build.json`.

use std::{collections::BTreeMap, time::Duration};

use phonehome_proto::{frame::UnixMicros, id::StepName};
use serde::{Deserialize, Serialize};

use crate::builds::{Clocks, TokenHash};

/// A build as it was declared.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Declaration {
    /// When, microseconds since 1970.
    pub(crate) created: UnixMicros,
    /// In the order in which they are listed.
    pub(crate) steps: Vec<StepName>,
    #[serde(default)]
    pub(crate) labels: BTreeMap<String, String>,
    #[serde(with = "ClocksFile")]
    pub(crate) timeouts: Clocks,
    /// SHA-256 of the token of its agents.
    pub(crate) token: TokenHash,
}

impl Declaration {
    /// The contents of `build.json`.
    pub(crate) fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("a declaration is plain data")
    }
}

/// The clocks with the unit in the names; `null` is no limit.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Clocks")]
struct ClocksFile {
    #[serde(rename = "connect_ms", with = "limit")]
    connect: Option<Duration>,
    #[serde(rename = "idle_ms", with = "limit")]
    idle: Option<Duration>,
    #[serde(rename = "lost_ms", with = "limit")]
    lost: Option<Duration>,
    #[serde(rename = "total_ms", with = "limit")]
    total: Option<Duration>,
    #[serde(rename = "grace_ms", with = "millis")]
    grace: Duration,
}

mod limit {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[expect(clippy::ref_option, reason = "the shape that serde asks for")]
    pub(super) fn serialize<S: Serializer>(limit: &Option<Duration>, out: S) -> Result<S::Ok, S::Error> {
        limit.map(|limit| limit.as_millis() as u64).serialize(out)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<u64>::deserialize(input)?.map(Duration::from_millis))
    }
}

mod millis {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(time: &Duration, out: S) -> Result<S::Ok, S::Error> {
        (time.as_millis() as u64).serialize(out)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Duration, D::Error> {
        Ok(Duration::from_millis(u64::deserialize(input)?))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::builds::hash_token;

    #[test]
    fn a_declaration_comes_back_from_its_file_without_its_token() {
        let timeouts = Clocks { idle: None, total: Some(Duration::from_millis(1500)), ..Clocks::default() };
        let labels = BTreeMap::from([("app".to_owned(), "shop".to_owned())]);
        let steps = vec!["build".parse().unwrap(), "test".parse().unwrap()];
        let declaration = Declaration { created: 7, steps, labels, timeouts, token: hash_token("secret") };
        let text = declaration.to_json();
        assert!(!text.windows(6).any(|part| part == b"secret"));
        let value: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(value["timeouts"]["total_ms"], json!(1500));
        assert_eq!(value["timeouts"]["idle_ms"], Value::Null);
        assert_eq!(value["token"].as_str().unwrap().len(), 64);
        let back: Declaration = serde_json::from_slice(&text).unwrap();
        assert_eq!(back.to_json(), text);
    }
}
