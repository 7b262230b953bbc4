//! `ipsec-ctl probe`: what this machine has for carrying tunnels fast, and what to do about what is missing.

use std::fmt::Write;

use miette::{Context, IntoDiagnostic};

use super::{print, run::need_root};
use crate::dataplane::probe::{self, Finding};

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Print JSON for programs.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(options: &Options) -> miette::Result<()> {
    need_root("trying out what the kernel has")?;
    let findings = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .and_then(|runtime| runtime.block_on(probe::findings()))
        .into_diagnostic()
        .wrap_err("this machine cannot be looked at")?;
    let text = if options.json {
        serde_json::to_string_pretty(&findings).into_diagnostic()? + "\n"
    } else {
        render(&findings)
    };
    print(&text)
}

fn render(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let mark = if finding.there { "yes" } else { "no" };
        let _ = writeln!(text, "{:<3} {:<38} {}", mark, finding.what, finding.found);
        if let Some(remedy) = &finding.remedy {
            let _ = writeln!(text, "    {:<38} -> {remedy}", "");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_stands_with_what_to_do() {
        let text = render(&[
            Finding {
                what: "AF_XDP".to_owned(),
                there: true,
                found: "there".to_owned(),
                remedy: None,
            },
            Finding {
                what: "kernel ESP".to_owned(),
                there: false,
                found: "the kernel has no ESP (Function not implemented)".to_owned(),
                remedy: Some("another kernel".to_owned()),
            },
        ]);
        let lines: Vec<&str> = text.lines().map(str::trim_start).collect();
        assert!(lines[0].starts_with("yes AF_XDP"), "{text}");
        assert!(lines[1].contains("Function not implemented"), "{text}");
        assert_eq!(lines[2], "-> another kernel");
    }
}
