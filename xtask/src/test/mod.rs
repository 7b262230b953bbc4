//! `cargo xtask test`: runs all tests group by group, counts them over all crates, and tells what was skipped and why.

mod guest;

use std::{
    io::{BufRead, BufReader, Read, Write},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use crate::{
    command::{build_debug, prepare},
    setup,
};

/// A group of tests: its name, and how cargo is asked for it.
struct Group {
    name: &'static str,
    arguments: &'static [&'static str],
}

/// Cheapest first.
const GROUPS: &[Group] = &[
    Group {
        name: "unit",
        arguments: &[
            "--workspace",
            "--exclude",
            "ipsec-tests",
            "--",
            "--skip",
            "simulat",
        ],
    },
    Group {
        name: "simulation",
        arguments: &["--package", "ipsec-ctl", "--", "simulat"],
    },
    Group {
        name: "namespaces",
        arguments: &[
            "--package",
            "ipsec-tests",
            "--lib",
            "--test",
            "harness",
            "--test",
            "tunnels",
            "--test",
            "fail_closed",
            "--test",
            "restarts",
            "--test",
            "plaintext",
            "--test",
            "attacker",
            "--test",
            "fast_path",
            "--test",
            "rekey",
            "--test",
            "mobike",
            "--test",
            "stalls",
        ],
    },
    Group {
        name: "interop",
        arguments: &["--package", "ipsec-tests", "--test", "strongswan"],
    },
];

/// What a suite begins the line with that tells of a test it tries twice.
const UNSTEADY: &str = "tried twice: ";

/// Results of test programs, added up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Count {
    passed: u64,
    failed: u64,
    skipped: u64,
    /// Names and reasons of what was skipped at run time.
    reasons: Vec<String>,
    /// What failed the first time and was tried again.
    unsteady: Vec<String>,
    /// Names of what failed.
    failures: Vec<String>,
}

/// Runs the groups of these names, or all.
pub(crate) fn run(full: bool, only: &[String]) -> anyhow::Result<()> {
    let in_guests = guest::GROUPS.iter();
    let known = GROUPS.iter().map(|group| group.name);
    let known = known.chain(in_guests.clone().map(|group| group.name));
    for name in only {
        ensure!(
            known.clone().any(|known| known == name),
            "there is no group {name} of tests"
        );
    }
    let named = |name: &str| only.iter().any(|one| one == name);
    let wanted = |name: &str| only.is_empty() || named(name);
    setup::run(setup::Purpose::Test, true)?;
    // Integration tests start the daemon as a program, which cargo does not build for them.
    build_debug()?;
    let mut results = Vec::new();
    for group in GROUPS.iter().filter(|group| wanted(group.name)) {
        let start = Instant::now();
        let (count, good) = run_group(group, full)?;
        results.push((group.name, count, start.elapsed(), good));
    }
    for group in
        in_guests.filter(|group| named(group.name) || wanted(group.name) && (full || !group.long))
    {
        let start = Instant::now();
        let (count, good) = group.run(full)?;
        results.push((group.name, count, start.elapsed(), good));
    }
    summarise(&results)
}

/// Runs one group, its output passed on as it comes; tells whether cargo was content.
fn run_group(group: &Group, full: bool) -> anyhow::Result<(Count, bool)> {
    eprintln!("== {} tests ==", group.name);
    let mut arguments = vec!["test", "--no-fail-fast"];
    arguments.extend(group.arguments);
    let mut command = prepare(&arguments);
    if full {
        command.env("IPSEC_TESTS_FULL", "1");
    }
    // Where tests of cargo's own harness, which knows no skipping at run time, say that they did nothing.
    let skipped = std::env::temp_dir().join(format!("ipsec-xdp-skipped-{}", std::process::id()));
    command.env("IPSEC_TESTS_SKIPPED", &skipped);
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .context("cargo test")?;
    let output = child.stdout.take().context("cargo test has no output")?;
    let mut count = Count::default();
    count.read(output)?;
    let status = child.wait().context("cargo test")?;
    if let Ok(lines) = std::fs::read_to_string(&skipped) {
        count.correct(&lines);
        std::fs::remove_file(&skipped).context("removing the list of skipped tests")?;
    }
    Ok((count, status.success()))
}

fn summarise(results: &[(&str, Count, Duration, bool)]) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let mut all = Count::default();
    writeln!(
        out,
        "\n{:<12} {:>7} {:>7} {:>8} {:>8}",
        "group", "passed", "failed", "skipped", "time"
    )?;
    for (name, count, time, _) in results {
        writeln!(
            out,
            "{name:<12} {:>7} {:>7} {:>8} {:>6.1} s",
            count.passed,
            count.failed,
            count.skipped,
            time.as_secs_f64()
        )?;
        all.join(count.clone());
    }
    for reason in &all.reasons {
        writeln!(out, "skipped: {reason}")?;
    }
    for name in &all.unsteady {
        writeln!(
            out,
            "{UNSTEADY}{name}: it failed the first time, for the reason told above"
        )?;
    }
    for name in &all.failures {
        writeln!(out, "failed: {name}: its error stands above")?;
    }
    for (name, count, ..) in results.iter().filter(|(.., good)| !good) {
        if count.failed == 0 {
            writeln!(
                out,
                "failed: {name}: a program was not built, or ended before its tests did, as told above"
            )?;
        }
    }
    writeln!(
        out,
        "{} passed, {} failed, {} skipped",
        all.passed, all.failed, all.skipped
    )?;
    let good = results.iter().all(|(_, _, _, good)| *good);
    ensure!(good && all.failed == 0, "tests failed");
    ensure!(all.passed > 0, "no test ran");
    Ok(())
}

impl Count {
    /// One test, or all of a kind, that this machine cannot run.
    fn one_skipped(reason: String) -> Self {
        Self {
            skipped: 1,
            reasons: vec![reason],
            ..Self::default()
        }
    }

    /// Passes output on as it comes, and counts.
    fn read(&mut self, output: impl Read) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        for line in BufReader::new(output).lines() {
            let line = line.context("output of the tests")?;
            writeln!(out, "{line}")?;
            self.add(&line);
        }
        Ok(())
    }

    /// Adds what another counted.
    fn join(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.reasons.extend(other.reasons);
        self.unsteady.extend(other.unsteady);
        self.failures.extend(other.failures);
    }

    /// Counts tests as skipped that passed because they did nothing, by the lines that they wrote.
    fn correct(&mut self, lines: &str) {
        for line in lines.lines() {
            self.passed = self.passed.saturating_sub(1);
            self.skipped += 1;
            self.reasons.push(line.to_owned());
        }
    }

    /// Reads a line such as `test result: ok. 22 passed; 0 failed; 1 ignored; ..`, `test NAME ... ignored (REASON)`,
    /// `tried twice: NAME`, or `---- NAME ----` above the output of one that failed; others count nothing.
    fn add(&mut self, line: &str) {
        if let Some(name) = line
            .strip_prefix("---- ")
            .and_then(|rest| rest.strip_suffix(" ----"))
        {
            let name = name.strip_suffix(" stdout").unwrap_or(name);
            self.failures.push(name.to_owned());
        }
        if let Some(name) = line.strip_prefix(UNSTEADY) {
            self.unsteady.push(name.to_owned());
        }
        if let Some((name, reason)) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.split_once(" ... ignored ("))
        {
            let reason = reason.trim_end_matches(')');
            self.reasons.push(format!("{}: {reason}", name.trim_end()));
        }
        let Some((_, results)) = line
            .strip_prefix("test result: ")
            .and_then(|rest| rest.split_once(". "))
        else {
            return;
        };
        for part in results.split("; ") {
            match part
                .split_once(' ')
                .map(|(number, what)| (number.parse::<u64>(), what))
            {
                Some((Ok(number), "passed")) => self.passed += number,
                Some((Ok(number), "failed")) => self.failed += number,
                Some((Ok(number), "ignored")) => self.skipped += number,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_all_crates_are_added_up() {
        let mut count = Count::default();
        for line in [
            "test a ... ok",
            "test result: ok. 22 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s",
            "tried twice: d",
            "---- e ----",
            "---- f::g stdout ----",
            "test b    ... ignored (there is no `nft`: apt-get install nftables)",
            "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s",
        ] {
            count.add(line);
        }
        count.correct("c: needs root\n");
        assert_eq!(
            count,
            Count {
                passed: 24,
                failed: 2,
                skipped: 2,
                reasons: vec![
                    "b: there is no `nft`: apt-get install nftables".to_owned(),
                    "c: needs root".to_owned()
                ],
                unsteady: vec!["d".to_owned()],
                failures: vec!["e".to_owned(), "f::g".to_owned()],
            }
        );
    }
}
