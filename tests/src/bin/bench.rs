//! `cargo xtask bench`: measures, and leaves the report in the terminal and as JSON.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context;
use ipsec_tests::bench::{ANSWER, Effort, Part, answer, compare, measure};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the benchmark broke off: {error:?}");
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stdout, reason = "the report is what this is for")]
fn run() -> anyhow::Result<()> {
    let mut effort = Effort::full();
    let mut json = PathBuf::from("bench.json");
    let mut parts = Vec::new();
    let mut engines = false;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--quick" => effort = Effort::quick(),
            // Started by the measurement of IKE set-ups.
            ANSWER => {
                let mut next = || arguments.next().context("--answer ADDRESS SUITE");
                return answer(&next()?, &next()?);
            }
            "--json" => json = arguments.next().context("--json FILE")?.into(),
            "engines" => engines = true,
            other => {
                let part = Part::ALL.iter().find(|(name, _)| *name == other);
                parts.push(
                    part.with_context(|| format!("unknown argument `{other}`"))?
                        .1,
                );
            }
        }
    }
    anyhow::ensure!(
        nix::unistd::geteuid().is_root(),
        "benchmarks need root for network namespaces and XDP"
    );
    if engines {
        let time = Duration::from_secs(if effort.rounds > 5 { 5 } else { 1 });
        println!("{}", compare(time)?);
        if parts.is_empty() {
            return Ok(());
        }
    }
    if parts.is_empty() {
        parts = Part::ALL.map(|(_, part)| part).to_vec();
    }
    let report = measure(&effort, &parts)?;
    println!("{report}");
    std::fs::write(&json, format!("{:#}\n", report.json()))
        .with_context(|| json.display().to_string())?;
    println!("as JSON: {}", json.display());
    Ok(())
}
