//! `ipsec-ctl check` as an operator runs it: the binary, files on disk, exit status and both outputs.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare its files has failed"
)]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Command, Output},
};

/// A folder with a configuration and its key, gone with the test.
struct Site(PathBuf);

impl Site {
    fn new(name: &str, configuration: &str, key_mode: u32) -> Self {
        let folder = std::env::temp_dir().join(format!("ixdp-check-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("gateway.toml"), configuration).unwrap();
        fs::write(folder.join("office.psk"), "correct horse battery staple\n").unwrap();
        fs::set_permissions(
            folder.join("office.psk"),
            fs::Permissions::from_mode(key_mode),
        )
        .unwrap();
        Self(folder)
    }

    fn check(&self) -> Output {
        Command::new(env!("CARGO_BIN_EXE_ipsec-ctl"))
            .arg("check")
            .arg(self.0.join("gateway.toml"))
            .output()
            .unwrap()
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // Nothing depends on a leftover in the temporary folder.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What was said on stderr, with the wrapping of long lines undone.
fn told(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    text.split_whitespace()
        .filter(|word| *word != "│")
        .collect::<Vec<_>>()
        .join(" ")
}

const OFFICE: &str = r#"[[tunnel]]
name = "office"
peer = "203.0.113.9"
psk_file = "office.psk"

[[tunnel.child]]
name = "net"
local = ["10.1.0.0/24"]
remote = ["10.2.0.0/24"]
"#;

#[test]
fn a_valid_configuration_is_shown_as_it_was_understood() {
    let output = Site::new("valid", OFFICE, 0o600).check();
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    assert!(output.stderr.is_empty());
    assert!(
        shown.contains("valid: 1 tunnel\n") && shown.contains("net: 10.1.0.0/24 <-> 10.2.0.0/24"),
        "{shown}"
    );
    assert!(
        !shown.contains("correct horse"),
        "the key must not be shown"
    );
}

#[test]
fn a_key_that_others_can_read_is_refused_with_the_remedy() {
    let output = Site::new("exposed", OFFICE, 0o644).check();
    let told = told(&output);
    assert!(!output.status.success());
    assert!(output.stdout.is_empty());
    assert!(
        told.contains("mode 0644") && told.contains("chmod 600"),
        "{told}"
    );
}

#[test]
fn a_mistake_is_shown_with_its_line() {
    let output = Site::new("mistake", &OFFICE.replace("peer =", "peeer ="), 0o600).check();
    let told = told(&output);
    assert!(!output.status.success());
    assert!(
        told.contains("peeer") && told.contains("did you mean `peer`?"),
        "{told}"
    );
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let site = Site::new("absent", OFFICE, 0o600);
    fs::remove_file(site.0.join("gateway.toml")).unwrap();
    let output = site.check();
    assert!(!output.status.success());
    assert!(told(&output).contains("cannot be read: No such file"));
}
