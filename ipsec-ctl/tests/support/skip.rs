//! A test that this machine cannot run says so, for `cargo xtask test` to count: cargo's own harness knows only tests that
//! pass and tests that fail.

use std::{fmt::Display, fs::OpenOptions, io::Write, thread};

/// Notes that the test of this thread is skipped, and why. It has to return then.
pub(crate) fn skip(reason: impl Display) {
    eprintln!("skipped: {reason}");
    let Some(path) = std::env::var_os("IPSEC_TESTS_SKIPPED") else {
        return;
    };
    // The harness names the thread of a test after it.
    let current = thread::current();
    let line = format!("{}: {reason}\n", current.name().unwrap_or("a test"));
    let file = OpenOptions::new().append(true).create(true).open(path);
    if let Err(error) = file.and_then(|mut file| file.write_all(line.as_bytes())) {
        eprintln!("nobody will know: {error}");
    }
}
