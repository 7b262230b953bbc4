//! See `ipsec_ctl::ike::fuzzing::ts`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| ipsec_ctl::ike::fuzzing::ts(input));
