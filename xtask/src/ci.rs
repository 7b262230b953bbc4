//! `cargo xtask ci`: what every change must pass, cheapest first.

use std::time::Instant;

use crate::{
    bpf,
    command::{build_release, cargo},
    demo, setup, test, tidy,
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
    timed("set-up", || setup::run(setup::Purpose::Test, true))?;
    timed("XDP program", || {
        bpf::build()?;
        bpf::lint()
    })?;
    timed("build", build_release)?;
    timed("tests", || test::run(false, &[]))?;
    timed("demo", || demo::run(false, "plain"))
}

fn timed(step: &str, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let start = Instant::now();
    work()?;
    eprintln!("{step}: passed in {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}
