//! JSON objects that have to be objects: serde takes an array of the values in their order for one as well.

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error},
};
use serde_json::{Map, Value};

/// For `deserialize_with`.
pub(crate) fn object<'de, D: Deserializer<'de>, T: DeserializeOwned>(input: D) -> Result<T, D::Error> {
    let members = Map::deserialize(input)?;
    T::deserialize(Value::Object(members)).map_err(Error::custom)
}

/// The same, or `null`.
pub(crate) fn optional_object<'de, D, T>(input: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned,
{
    let members = Option::<Map<String, Value>>::deserialize(input)?;
    members.map(|members| T::deserialize(Value::Object(members)).map_err(Error::custom)).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Outer {
        #[serde(deserialize_with = "object")]
        inner: Inner,
        #[serde(default, deserialize_with = "optional_object")]
        more: Option<Inner>,
    }

    #[derive(Deserialize)]
    struct Inner {
        value: u8,
    }

    #[test]
    fn an_array_is_no_object() {
        let good: Outer = serde_json::from_str(r#"{"inner":{"value":1},"more":null}"#).unwrap();
        assert!(good.inner.value == 1 && good.more.is_none());
        let good: Outer = serde_json::from_str(r#"{"inner":{"value":1},"more":{"value":2}}"#).unwrap();
        assert_eq!(good.more.unwrap().value, 2);
        for bad in [r#"{"inner":[1]}"#, r#"{"inner":{"value":1},"more":[1]}"#, r#"{"inner":null}"#] {
            assert!(serde_json::from_str::<Outer>(bad).is_err(), "{bad}");
        }
    }
}
