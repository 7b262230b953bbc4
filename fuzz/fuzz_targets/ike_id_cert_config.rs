//! See `ipsec_ctl::ike::fuzzing::id_cert_config`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| ipsec_ctl::ike::fuzzing::id_cert_config(input));
