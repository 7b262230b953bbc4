//! The matrix as a table: for the terminal, and as the page `docs/interop.md`.

use std::fmt::Write;

/// One cell.
#[derive(Clone, Debug)]
pub struct Cell {
    /// The part of the table.
    pub group: &'static str,
    /// The row.
    pub row: String,
    /// The peer.
    pub peer: String,
    /// Our role.
    pub role: &'static str,
    /// Why it fails, if it does.
    pub failure: Option<String>,
}

/// All cells, in the order in which they were tried.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// The cells.
    pub cells: Vec<Cell>,
    /// Peers that could not be tried, and why.
    pub absent: Vec<(String, String)>,
}

impl Table {
    /// Cells that fail.
    pub fn failures(&self) -> impl Iterator<Item = &Cell> {
        self.cells.iter().filter(|cell| cell.failure.is_some())
    }

    /// The page. Failures are numbered in the table, and their reasons stand below it.
    pub fn page(&self) -> String {
        let mut text = String::from(
            "# Interoperation\n\nMade by `cargo xtask interop`; not to be edited. Every row is tried with us as initiator and as \
             responder: the\ntunnel comes up, pings cross it, and the behaviour is seen. Peers older or newer than the \
             distribution's are unpacked\nunder `target/peers`.\n\nstrongSwan runs with its userspace ESP, which always \
             encapsulates in UDP, knows tunnel mode only, and no ESN. Groups\nare used by IKE_SA_INIT and by CREATE_CHILD_SA.\n",
        );
        let columns = unique(
            self.cells
                .iter()
                .map(|cell| (cell.peer.as_str(), cell.role)),
        );
        let mut reasons: Vec<&str> = Vec::new();
        for group in unique(self.cells.iter().map(|cell| cell.group)) {
            let _ = write!(text, "\n## {group}\n\n| |");
            for (peer, role) in &columns {
                let _ = write!(text, " {peer}, {role} |");
            }
            let _ = writeln!(text, "\n|---|{}", "---|".repeat(columns.len()));
            let cells = || self.cells.iter().filter(|cell| cell.group == group);
            for row in unique(cells().map(|cell| cell.row.as_str())) {
                let _ = write!(text, "| {row} |");
                for column in &columns {
                    let cell = cells()
                        .find(|cell| cell.row == row && (cell.peer.as_str(), cell.role) == *column);
                    let shown = match cell.map(|cell| &cell.failure) {
                        None => String::new(),
                        Some(None) => "yes".to_owned(),
                        Some(Some(reason)) => {
                            reasons.push(reason);
                            format!("**no** [{}]", reasons.len())
                        }
                    };
                    let _ = write!(text, " {shown} |");
                }
                text.push('\n');
            }
        }
        if !reasons.is_empty() {
            text += "\n## What fails\n\n";
        }
        for (number, reason) in reasons.iter().enumerate() {
            let _ = writeln!(text, "- [{}] {}", number + 1, first_line(reason));
        }
        if !self.absent.is_empty() {
            text += "\n## Not tried\n\n";
        }
        for (peer, reason) in &self.absent {
            let _ = writeln!(text, "- {peer}: {}", first_line(reason));
        }
        text
    }
}

/// The first line of a reason; logs follow in the others.
fn first_line(reason: &str) -> &str {
    reason
        .lines()
        .find(|line| !line.trim().is_empty())
        .unwrap_or_default()
}

/// Every value once, in the order of its first appearance.
fn unique<T: PartialEq>(values: impl Iterator<Item = T>) -> Vec<T> {
    let mut all = Vec::new();
    for value in values {
        if !all.contains(&value) {
            all.push(value);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(role: &'static str, failure: Option<&str>) -> Cell {
        Cell {
            group: "Suites",
            row: "aes".to_owned(),
            peer: "peer 1".to_owned(),
            role,
            failure: failure.map(str::to_owned),
        }
    }

    #[test]
    fn a_failing_cell_points_at_its_reason() {
        let table = Table {
            cells: vec![
                cell("initiator", None),
                cell("responder", Some("refused\nlog")),
            ],
            absent: Vec::new(),
        };
        let page = table.page();
        assert!(page.contains("| aes | yes | **no** [1] |"), "{page}");
        assert!(page.contains("- [1] refused\n"), "{page}");
        assert_eq!(table.failures().count(), 1);
    }
}
