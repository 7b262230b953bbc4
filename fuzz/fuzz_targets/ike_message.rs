//! Datagrams: whatever is read can be written, and reads the same again.
#![no_main]

use ipsec_ctl::ike::message::{Message, Payload};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(message) = Message::parse(bytes) else {
        return;
    };
    let encrypted = message.payloads.iter().any(|payload| {
        matches!(
            payload,
            Payload::Encrypted(_) | Payload::EncryptedFragment { .. }
        )
    });
    if !encrypted {
        let written = message.emit().expect("what was read has a wire form");
        let again = Message::parse(&written).expect("what was written can be read");
        assert_eq!(again.payloads, message.payloads);
    }
});
