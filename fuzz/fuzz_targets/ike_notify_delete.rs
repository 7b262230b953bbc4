//! See `ipsec_ctl::ike::fuzzing::notify_delete`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| ipsec_ctl::ike::fuzzing::notify_delete(input));
