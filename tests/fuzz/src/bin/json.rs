//! A text message, taken for an agent's and for a server's: whatever decodes can be written again and says the same,
//! as text and as bytes, unless a limit of the other form is in the way.

#![no_main]

use libfuzzer_sys::fuzz_target;
use phonehome_proto::codec::{Codec, EncodeError, Message, binary, json};

/// Text up to this long fits every form: a record grows most, by its times and checksums.
const SHORT: usize = 4096;

fuzz_target!(|input: &[u8]| {
    let Ok(text) = str::from_utf8(input) else { return };
    agent(text);
    server(text);
});

fn agent(text: &str) {
    let checked = Codec::Json.decode_agent(&Message::Text(text.to_owned()));
    let Ok(frame) = json::decode_agent(text) else {
        return assert!(checked.is_err());
    };
    if let Some(again) = written(text, json::encode_agent(&frame)) {
        assert_eq!(json::decode_agent(&again).expect("what was written can be read"), frame);
    }
    if let Some(wire) = written(text, binary::encode_agent(&frame)) {
        assert_eq!(binary::decode_agent(&wire).expect("what was written can be read"), frame);
    }
}

fn server(text: &str) {
    let checked = Codec::Json.decode_server(&Message::Text(text.to_owned()));
    let Ok(frame) = json::decode_server(text) else {
        return assert!(checked.is_err());
    };
    assert_eq!(checked.expect("nothing else is checked"), frame);
    if let Some(again) = written(text, json::encode_server(&frame)) {
        assert_eq!(json::decode_server(&again).expect("what was written can be read"), frame);
    }
    if let Some(wire) = written(text, binary::encode_server(&frame)) {
        assert_eq!(binary::decode_server(&wire).expect("what was written can be read"), frame);
    }
}

/// What was written, or nothing if it became too long.
fn written<T>(text: &str, result: Result<T, EncodeError>) -> Option<T> {
    match result {
        Ok(written) => Some(written),
        Err(EncodeError::HeadTooLarge(_) | EncodeError::TooLarge(_)) if text.len() > SHORT => None,
        Err(error @ (EncodeError::HeadTooLarge(_) | EncodeError::TooLarge(_) | EncodeError::Unwritable(_))) => {
            panic!("{error}")
        }
    }
}
