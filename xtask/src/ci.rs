//! `cargo xtask ci`: what every change must pass, cheapest first.

use std::time::Instant;

use crate::{
    command::{build_release, cargo},
    test, tidy,
};

pub(crate) fn run() -> anyhow::Result<()> {
    timed("format", || cargo(&["fmt", "--all", "--check"]))?;
    timed("tidy", tidy::run)?;
    timed("lints", || {
        cargo(&[
            "clippy",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ])
    })?;
    timed("build", build_release)?;
    timed("tests", || test::run(false))
}

fn timed(step: &str, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let start = Instant::now();
    work()?;
    eprintln!("{step}: passed in {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}
