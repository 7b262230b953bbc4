//! The matrix as a table: for the terminal, and as the page `docs/interop.md`.

use std::fmt::Write;

use serde_json::{Value, json};

/// One cell.
#[derive(Clone, Debug)]
pub struct Cell {
    /// The part of the table.
    pub group: String,
    /// The row.
    pub row: String,
    /// The peer.
    pub peer: String,
    /// Our role.
    pub role: String,
    /// Why it fails, if it does.
    pub failure: Option<String>,
}

impl Cell {
    /// What became of a row with a peer, we in the one role or the other.
    pub(super) fn of(
        (group, row): (&str, &str),
        (peer, we_initiate): (&str, bool),
        result: anyhow::Result<()>,
    ) -> Self {
        let role = if we_initiate {
            "initiator"
        } else {
            "responder"
        };
        Self {
            group: group.to_owned(),
            row: row.to_owned(),
            peer: peer.to_owned(),
            role: role.to_owned(),
            // The page has the first line: the cause, and not the log around it.
            failure: result
                .err()
                .map(|error| format!("{}\n{error:#}", error.root_cause())),
        }
    }

    /// One line, for whoever collects cells of several machines.
    pub fn line(&self) -> String {
        json!([self.group, self.row, self.peer, self.role, self.failure]).to_string()
    }

    /// Reads [`Self::line`]; none if it is another line.
    pub fn read(line: &str) -> Option<Self> {
        let Value::Array(parts) = serde_json::from_str(line).ok()? else {
            return None;
        };
        let [group, row, peer, role, failure] = parts.as_slice() else {
            return None;
        };
        let text = |value: &Value| value.as_str().map(str::to_owned);
        Some(Self {
            group: text(group)?,
            row: text(row)?,
            peer: text(peer)?,
            role: text(role)?,
            failure: text(failure),
        })
    }
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
             encapsulates in UDP, knows tunnel mode only, and no ESN. libreswan\nruns in a guest with the kernel's ESP, \
             without encapsulation where there is no NAT. Groups are used by IKE_SA_INIT and by\nCREATE_CHILD_SA.\n\n\
             An empty field is a row that is not tried with a peer. libreswan knows no selectors that are ranges, starts no IKE\n\
             SA without a child, has no command for reauthentication, and splits only messages longer than those that it sends\n\
             here; libreswan 4 has one selector a side in a child, and rekeys children in the group of their IKE SA.\n",
        );
        let columns = unique(
            self.cells
                .iter()
                .map(|cell| (cell.peer.as_str(), cell.role.as_str())),
        );
        let mut reasons: Vec<&str> = Vec::new();
        for group in unique(self.cells.iter().map(|cell| cell.group.as_str())) {
            let _ = write!(text, "\n## {group}\n\n| |");
            for (peer, role) in &columns {
                let _ = write!(text, " {peer}, {role} |");
            }
            let _ = writeln!(text, "\n|---|{}", "---|".repeat(columns.len()));
            let cells = || self.cells.iter().filter(|cell| cell.group == group);
            for row in unique(cells().map(|cell| cell.row.as_str())) {
                let _ = write!(text, "| {row} |");
                for column in &columns {
                    let cell = cells().find(|cell| {
                        cell.row == row && (cell.peer.as_str(), cell.role.as_str()) == *column
                    });
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

    fn cell(role: &str, failure: Option<&str>) -> Cell {
        Cell {
            group: "Suites".to_owned(),
            row: "aes".to_owned(),
            peer: "peer 1".to_owned(),
            role: role.to_owned(),
            failure: failure.map(str::to_owned),
        }
    }

    #[test]
    fn a_cell_comes_through_as_a_line() {
        let cell = cell("responder", Some("refused\nlog"));
        let read = Cell::read(&cell.line()).unwrap();
        assert_eq!((read.row, read.role), (cell.row, cell.role));
        assert_eq!(read.failure, cell.failure);
        assert!(Cell::read("vm: some other line").is_none());
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
