//! `cargo xtask interop`: tries everything that we and other implementations have in common, and writes down what works.

use std::{fs, io::Write, path::Path, process::ExitCode, sync::Mutex, thread, time::Instant};

use anyhow::anyhow;
use ipsec_tests::{
    interop::{Cell, Column, Table},
    netns,
    release::Release,
};

/// What is unpacked of strongSwan.
const STRONGSWAN: &[&str] = &[
    "charon-systemd",
    "strongswan-swanctl",
    "libcharon-extra-plugins",
    "libstrongswan-standard-plugins",
    "libstrongswan-extra-plugins",
];
/// Peers, and the suite of the distribution that has them; none for the one that is installed.
const PEERS: &[(&str, Option<&str>)] = &[
    ("strongSwan 5.9", None),
    ("strongSwan 6.0", Some("trixie")),
    ("strongSwan 6.1", Some("sid")),
];

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let filter = arguments.next().unwrap_or_default();
    match run(&filter) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(failures) => {
            eprintln!("{failures} cells fail");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("interop: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(filter: &str) -> anyhow::Result<usize> {
    netns::sweep();
    let start = Instant::now();
    let mut table = Table::default();
    let mut columns = Vec::new();
    for (peer, suite) in PEERS {
        let release = suite.map_or_else(
            || Ok(Release::installed()),
            |suite| Release::unpacked(suite, STRONGSWAN),
        );
        match release {
            Ok(release) => columns.push([true, false].map(|we_initiate| Column {
                peer: (*peer).to_owned(),
                release: release.clone(),
                we_initiate,
            })),
            Err(error) => table
                .absent
                .push(((*peer).to_owned(), format!("{error:#}"))),
        }
    }
    // Cells wait for timers and peers most of their time, so the peers are tried beside each other.
    let shown = Mutex::new(());
    let show = &|cell: &Cell| {
        let _one = shown.lock();
        let result = cell.failure.as_deref().unwrap_or("works");
        let _ = writeln!(
            std::io::stdout(),
            "{:<16} {:<10} {:<52} {result}",
            cell.peer,
            cell.role,
            cell.row
        );
    };
    let results: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = columns
            .iter()
            .map(|roles| {
                scope.spawn(move || {
                    let mut cells = Vec::new();
                    for column in roles {
                        cells.extend(column.run(filter, show)?);
                    }
                    anyhow::Ok(cells)
                })
            })
            .collect();
        threads
            .into_iter()
            .map(thread::ScopedJoinHandle::join)
            .collect()
    });
    for result in results {
        table
            .cells
            .extend(result.map_err(|_| anyhow!("a peer's thread panicked"))??);
    }
    let failures = table.failures().count();
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n{}", table.page())?;
    writeln!(
        out,
        "{} cells, {failures} fail, {:.0} s",
        table.cells.len(),
        start.elapsed().as_secs_f64()
    )?;
    // A part of the table must not take the place of the whole.
    if filter.is_empty() {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/interop.md");
        fs::write(page, table.page())?;
    }
    Ok(failures)
}
