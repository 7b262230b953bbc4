//! `cargo xtask interop`: tries everything that we and other implementations have in common, and writes down what works.
//!
//! Peers that need ESP in the kernel are tried by this program in a guest each (`interop guest PEER ROWS`), whose cells come
//! out as lines; they are unpacked before (`interop unpack`, which tells their names), for the guest writes nothing.

use std::{fs, io::Write, path::Path, process::ExitCode, sync::Mutex, thread, time::Instant};

use anyhow::{Context, anyhow};
use ipsec_tests::{
    interop::{Cell, Column, Kind, Table},
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

/// What is unpacked of libreswan.
const LIBRESWAN: &[&str] = &["libreswan"];
/// Its releases, which run in a guest, and the suites of the distribution that have them.
const IN_GUEST: &[(&str, &str)] = &[("libreswan 4.10", "bookworm"), ("libreswan 5.2", "trixie")];
/// Names the file with the cells that a guest has filled, if there was one.
const GUEST_CELLS: &str = "INTEROP_GUEST_CELLS";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments.as_slice() {
        ["unpack"] => unpack().map(|()| 0),
        ["guest", peer, rows] => run_in_guest(peer, rows).map(|()| 0),
        [] => run(""),
        [rows, ..] => run(rows),
    };
    match result {
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

fn unpack() -> anyhow::Result<()> {
    for (peer, suite) in IN_GUEST {
        Release::unpacked(suite, LIBRESWAN).with_context(|| (*peer).to_owned())?;
        writeln!(std::io::stdout(), "{peer}")?;
    }
    Ok(())
}

fn run_in_guest(only: &str, rows: &str) -> anyhow::Result<()> {
    let show = &|cell: &Cell| {
        let _ = writeln!(std::io::stdout(), "{}", cell.line());
    };
    for (peer, suite) in IN_GUEST.iter().filter(|(peer, _)| *peer == only) {
        for we_initiate in [true, false] {
            let column = Column {
                peer: (*peer).to_owned(),
                kind: Kind::LibreSwan,
                release: Release::unpacked(suite, LIBRESWAN)?,
                we_initiate,
            };
            column.run(rows, show)?;
        }
    }
    Ok(())
}

/// Takes over what a guest has found out.
fn add_guest(table: &mut Table) {
    let text = std::env::var_os(GUEST_CELLS).and_then(|path| fs::read_to_string(path).ok());
    let lines = text.as_deref().unwrap_or_default().lines();
    let cells: Vec<Cell> = lines.filter_map(Cell::read).collect();
    for (peer, _) in IN_GUEST {
        if cells.iter().all(|cell| cell.peer != *peer) {
            let why = "no guest with ESP has tried it; `cargo xtask vm --build` makes its kernel";
            table.absent.push(((*peer).to_owned(), why.to_owned()));
        }
    }
    table.cells.extend(cells);
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
                kind: Kind::StrongSwan,
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
    add_guest(&mut table);
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
