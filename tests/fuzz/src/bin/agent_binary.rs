//! An agent's binary message: whatever decodes can be written again, no longer than it was, and says the same; and so
//! can its text form, unless JSON makes it too long.

#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use phonehome_proto::codec::{Codec, EncodeError, Message, binary, json};

fuzz_target!(|input: &[u8]| {
    let wire = Bytes::copy_from_slice(input);
    let decoded = binary::decode_agent(&wire);
    let checked = Codec::Binary.decode_agent(&Message::Binary(wire.clone()));
    let Ok(frame) = decoded else {
        return assert!(checked.is_err());
    };
    if let Ok(checked) = checked {
        assert_eq!(checked, frame);
    }
    let again = binary::encode_agent(&frame).expect("what was read can be written");
    assert!(again.len() <= wire.len());
    assert_eq!(binary::decode_agent(&again).expect("what was written can be read"), frame);
    match json::encode_agent(&frame) {
        Ok(text) => assert_eq!(json::decode_agent(&text).expect("what was written can be read"), frame),
        Err(EncodeError::TooLarge(_)) => assert!(wire.len() > 4096, "a short message became too long"),
        Err(error @ (EncodeError::HeadTooLarge(_) | EncodeError::Unwritable(_))) => panic!("{error}"),
    }
});
