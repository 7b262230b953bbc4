//! Chains of payloads, as an Encrypted payload holds them. The first byte is the type of the first payload, so that
//! each codec is reached at once.
#![no_main]

use ipsec_ctl::ike::message::{PayloadType, emit_payloads, parse_payloads};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((first, chain)) = bytes.split_first() else {
        return;
    };
    let Ok(payloads) = parse_payloads(PayloadType(*first), chain) else {
        return;
    };
    let (kind, written) = emit_payloads(&payloads).expect("what was read has a wire form");
    let again = parse_payloads(kind, &written).expect("what was written can be read");
    assert_eq!(again, payloads);
});
