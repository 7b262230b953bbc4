//! `cargo xtask interop` and `cargo xtask soak`: build what they take, and run the programs of the test crate.

use std::{io::Read, process::Command, thread, time::Duration};

use anyhow::{Context, ensure};

use crate::{
    command::{build_debug, cargo, workspace},
    setup,
    vm::{Guest, Kernel},
};

/// What root is needed for.
const NAMESPACES: &str = "this makes network namespaces";

pub(crate) fn interop(rows: &str) -> anyhow::Result<()> {
    setup::need_root(NAMESPACES)?;
    let cells = workspace().join("target/interop-guest");
    std::fs::write(&cells, in_guest(rows)?)?;
    let environment = ("INTEROP_GUEST_CELLS", cells.display().to_string());
    run("interop", &[rows.to_owned()], &[environment])
}

/// Seconds that the peers which need a guest may take.
const GUEST_SECONDS: u64 = 1500;

/// What guests find out about the peers that need ESP in the kernel; nothing where there is no kernel for it.
fn in_guest(rows: &str) -> anyhow::Result<String> {
    let Some(kernel) = Kernel::built() else {
        return Ok(String::new());
    };
    build("interop")?;
    let program = workspace().join("target/debug/interop");
    let unpacked = Command::new(&program).arg("unpack").output()?;
    ensure!(
        unpacked.status.success(),
        "the peers for the guest are not there: {}",
        String::from_utf8_lossy(&unpacked.stderr)
    );
    let ours = workspace().join("target/debug/ipsec-ctl");
    let guest = Guest {
        kernel,
        memory: 768,
        limit: Duration::from_secs(GUEST_SECONDS),
        environment: vec![("IPSEC_CTL".to_owned(), ours.display().to_string())],
    };
    let peers = String::from_utf8_lossy(&unpacked.stdout);
    let cells = |peer: &str| {
        let program = program.display().to_string();
        output_of(
            &guest,
            &[
                program,
                "guest".to_owned(),
                peer.to_owned(),
                rows.to_owned(),
            ],
        )
    };
    // A guest has one processor, and its cells wait for most of their time.
    thread::scope(|scope| {
        let guests: Vec<_> = peers
            .lines()
            .map(|peer| scope.spawn(|| cells(peer)))
            .collect();
        guests.into_iter().map(joined).collect()
    })
}

/// What a command writes in a guest.
fn output_of(guest: &Guest, command: &[String]) -> anyhow::Result<String> {
    let (mut output, writer) = std::io::pipe().context("a pipe")?;
    let mut text = String::new();
    thread::scope(|scope| {
        let reader = scope.spawn(|| output.read_to_string(&mut text));
        let status = guest.run_to(command, writer.into());
        joined(reader).map_err(Into::into).and(status)
    })?;
    Ok(text)
}

fn joined<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    thread
        .join()
        .unwrap_or_else(|cause| std::panic::resume_unwind(cause))
}

pub(crate) fn soak(minutes: u32, seed: Option<u64>) -> anyhow::Result<()> {
    let mut arguments = vec![minutes.to_string()];
    arguments.extend(seed.map(|seed| seed.to_string()));
    run("soak", &arguments, &[])
}

fn build(program: &str) -> anyhow::Result<()> {
    setup::need_root(NAMESPACES)?;
    setup::run(setup::Purpose::Test, true)?;
    build_debug()?;
    cargo(&["build", "--package", "ipsec-tests", "--bin", program])
}

fn run(program: &str, arguments: &[String], environment: &[(&str, String)]) -> anyhow::Result<()> {
    build(program)?;
    let target = workspace().join("target/debug");
    let status = Command::new(target.join(program))
        .args(arguments)
        .env("IPSEC_CTL", target.join("ipsec-ctl"))
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .status()
        .with_context(|| format!("{program} cannot be started"))?;
    ensure!(
        status.success(),
        "{program} found something wrong; the table says what"
    );
    Ok(())
}
