//! `cargo xtask test`: runs all tests and counts them over all crates.

use std::{
    io::{BufRead, BufReader, Write},
    process::Stdio,
};

use anyhow::{Context, ensure};

use crate::command::prepare;

/// Results of test programs, added up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    passed: u64,
    failed: u64,
    skipped: u64,
}

pub(crate) fn run() -> anyhow::Result<()> {
    let mut child = prepare(&["test", "--workspace", "--no-fail-fast"])
        .stdout(Stdio::piped())
        .spawn()
        .context("cargo test")?;
    let output = child.stdout.take().context("cargo test has no output")?;
    let mut out = std::io::stdout().lock();
    let mut count = Count::default();
    for line in BufReader::new(output).lines() {
        let line = line.context("output of cargo test")?;
        writeln!(out, "{line}")?;
        count.add(&line);
    }
    let status = child.wait().context("cargo test")?;
    writeln!(
        out,
        "{} passed, {} failed, {} skipped",
        count.passed, count.failed, count.skipped
    )?;
    ensure!(status.success() && count.failed == 0, "tests failed");
    ensure!(count.passed > 0, "no test ran");
    Ok(())
}

impl Count {
    /// Reads a line such as `test result: ok. 22 passed; 0 failed; 1 ignored; ..`; others count nothing.
    fn add(&mut self, line: &str) {
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
            "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s",
        ] {
            count.add(line);
        }
        assert_eq!(
            count,
            Count {
                passed: 25,
                failed: 2,
                skipped: 1
            }
        );
    }
}
