//! `cargo xtask tidy`: rules of this project that the compiler does not know.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};

use crate::command::workspace;

/// Folders of `ipsec-ctl/src` from top to bottom: each may import from those below it.
const LAYERS: &[&str] = &[
    "cli",
    "daemon",
    "api",
    "config",
    "ike",
    "dataplane",
    "esp",
    "net",
];
/// Lines after which a file surely holds a second concept.
const LONGEST_FILE_LINES: usize = 800;

pub(crate) fn run() -> anyhow::Result<()> {
    let root = workspace();
    let mut complaints = Vec::new();
    let mut files = 0;
    for package in ["ipsec-common", "ipsec-ctl", "ipsec-ebpf", "tests", "xtask"] {
        for path in rust_files(&root.join(package))? {
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            let name = path
                .strip_prefix(&root)
                .unwrap_or(&path)
                .display()
                .to_string();
            complaints.extend(
                judge(&name, &text)
                    .into_iter()
                    .map(|complaint| format!("{name}: {complaint}")),
            );
            files += 1;
        }
    }
    for complaint in &complaints {
        eprintln!("{complaint}");
    }
    ensure!(files > 0, "no source file was found");
    ensure!(
        complaints.is_empty(),
        "{} complaint(s) in {files} files",
        complaints.len()
    );
    eprintln!("{files} files are tidy");
    Ok(())
}

fn rust_files(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(rust_files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// What is wrong with one file.
fn judge(name: &str, text: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    if !text.starts_with("//!") {
        complaints.push("does not open with `//!`: say what the module is for".to_owned());
    }
    let lines = text.lines().count();
    if lines > LONGEST_FILE_LINES {
        complaints.push(format!("has {lines} lines: look for the second concept"));
    }
    // This file names what it looks for.
    if !name.ends_with("tidy.rs") {
        for leftover in [
            "todo!(",
            "unimplemented!(",
            "FIXME",
            "TODO",
            "#[ignore",
            "phase 1",
            "phase 2",
            "phase1",
        ] {
            if text.contains(leftover) {
                complaints.push(format!("contains `{leftover}`"));
            }
        }
    }
    complaints.extend(upward_imports(name, text));
    complaints
}

/// Imports that point up, or between `ike` and `dataplane`.
fn upward_imports(name: &str, text: &str) -> Vec<String> {
    let layer_of = |folder: &str| LAYERS.iter().position(|layer| *layer == folder);
    let Some(folder) = name
        .strip_prefix("ipsec-ctl/src/")
        .and_then(|rest| rest.split('/').next())
    else {
        return Vec::new();
    };
    let Some(own) = layer_of(folder) else {
        return Vec::new();
    };
    imported(text)
        .filter(|target| {
            let up = layer_of(target).is_some_and(|layer| layer < own);
            up || (folder == "ike" && *target == "dataplane")
        })
        .map(|target| format!("`{folder}` must not import `{target}`"))
        .collect()
}

/// First path segments after `crate::`, in single paths and in brace groups.
fn imported(text: &str) -> impl Iterator<Item = &str> {
    let word = |part: &'_ str| {
        part.find(|c: char| !c.is_ascii_lowercase() && c != '_')
            .unwrap_or(part.len())
    };
    let single = text
        .split("crate::")
        .skip(1)
        .map(move |rest| &rest[..word(rest)]);
    let grouped = text.split("crate::{").skip(1).flat_map(move |rest| {
        let group = rest.split(';').next().unwrap_or_default();
        group
            .split([',', '\n'])
            .filter_map(|part| part.trim_start().split("::").next())
            .map(move |part| &part[..word(part)])
    });
    single.chain(grouped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clean_file_has_no_complaint() {
        let text = "//! Good.\nuse crate::{\n    dataplane::seam::Df,\n    ike::Identity,\n};\n";
        assert_eq!(
            judge("ipsec-ctl/src/config/model.rs", text),
            Vec::<String>::new()
        );
    }

    #[test]
    fn imports_that_point_up_are_found() {
        for (name, text) in [
            (
                "ipsec-ctl/src/esp/mod.rs",
                "//! Esp.\nuse crate::config::Config;",
            ),
            (
                "ipsec-ctl/src/ike/mod.rs",
                "//! Ike.\nuse crate::dataplane::seam;",
            ),
            (
                "ipsec-ctl/src/dataplane/mod.rs",
                "//! Plane.\nuse crate::{\n    ike::Identity,\n};",
            ),
            (
                "ipsec-ctl/src/dataplane/mod.rs",
                "//! Plane.\nuse crate::{esp::EspKeys, ike::Identity};",
            ),
        ] {
            assert_eq!(judge(name, text).len(), 1, "{name}");
        }
    }

    #[test]
    fn leftovers_and_silent_modules_are_found() {
        let complaints = judge("xtask/src/x.rs", "fn f() { todo!() }\n");
        assert_eq!(complaints.len(), 2, "{complaints:?}");
        let long = format!("//! Long.\n{}", "\n".repeat(LONGEST_FILE_LINES));
        assert_eq!(judge("xtask/src/x.rs", &long).len(), 1);
    }
}
