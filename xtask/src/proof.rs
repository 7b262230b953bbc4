//! `cargo xtask interop` and `cargo xtask soak`: build what they take, and run the programs of the test crate.

use std::process::Command;

use anyhow::{Context, ensure};

use crate::{
    command::{build_debug, cargo, workspace},
    setup,
};

pub(crate) fn interop(rows: &str) -> anyhow::Result<()> {
    run("interop", &[rows.to_owned()])
}

pub(crate) fn soak(minutes: u32, seed: Option<u64>) -> anyhow::Result<()> {
    let mut arguments = vec![minutes.to_string()];
    arguments.extend(seed.map(|seed| seed.to_string()));
    run("soak", &arguments)
}

fn run(program: &str, arguments: &[String]) -> anyhow::Result<()> {
    setup::need_root(program)?;
    setup::run(setup::Purpose::Test, true)?;
    build_debug()?;
    cargo(&["build", "--package", "ipsec-tests", "--bin", program])?;
    let target = workspace().join("target/debug");
    let status = Command::new(target.join(program))
        .args(arguments)
        .env("IPSEC_CTL", target.join("ipsec-ctl"))
        .status()
        .with_context(|| format!("{program} cannot be started"))?;
    ensure!(
        status.success(),
        "{program} found something wrong; the table says what"
    );
    Ok(())
}
