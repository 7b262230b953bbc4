//! `cargo xtask demo`: builds what it takes and runs the demo of the test crate.

use std::process::Command;

use anyhow::{Context, ensure};

use crate::{
    command::{build_release, cargo, workspace},
    setup,
};

pub(crate) fn run(keep: bool, scenario: &str) -> anyhow::Result<()> {
    setup::need_root("the demo makes network namespaces")?;
    setup::run(setup::Purpose::Test, true)?;
    build_release()?;
    cargo(&["build", "--package", "ipsec-tests", "--bin", "demo"])?;
    let target = workspace().join("target");
    let mut demo = Command::new(target.join("debug/demo"));
    demo.arg(scenario)
        .env("IPSEC_CTL", target.join("release/ipsec-ctl"));
    if keep {
        demo.arg("--keep");
    }
    let status = demo.status().context("the demo cannot be started")?;
    ensure!(
        status.success(),
        "the demo found something wrong; the table says what"
    );
    Ok(())
}
