//! See `ipsec_ctl::ike::fuzzing::sa`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| ipsec_ctl::ike::fuzzing::sa(input));
