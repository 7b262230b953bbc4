//! `ipsec-ctl counters`: how many packets were dropped or slowed, and for what reason.

use miette::IntoDiagnostic;

use super::{print, remote::Remote, table::columns};
use crate::api::model::Counter;

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Print JSON for programs.
    #[arg(long)]
    json: bool,
    /// Show counters that are zero, too.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    remote: Remote,
}

pub(super) fn run(options: &Options) -> miette::Result<()> {
    let mut counters = options.remote.ask(async |client| client.counters().await)?;
    if options.json {
        return print(&(serde_json::to_string_pretty(&counters).into_diagnostic()? + "\n"));
    }
    if !options.all {
        counters.retain(|counter| counter.packets > 0);
    }
    print(&render(&counters))
}

fn render(counters: &[Counter]) -> String {
    if counters.is_empty() {
        return "no packet has been counted\n".to_owned();
    }
    let rows: Vec<Vec<String>> = counters
        .iter()
        .map(|counter| {
            vec![
                format!("{:>12}", counter.packets),
                counter.kind.clone(),
                counter.name.clone(),
                counter.meaning.clone(),
            ]
        })
        .collect();
    columns(&rows)
}
