//! The configuration file: schema, validation, and diagnostics that point at the line.
//!
//! [`load`] reads a file and the key files it names, and returns either a [`Config`] in which every value is known to
//! be usable, or every problem found at once. Nothing here touches the network or the kernel.
#![forbid(unsafe_code)]

mod diagnostic;
mod model;
mod reference;
mod schema;
mod secret;
mod validate;
mod value;

use std::{fs, path::Path};

pub use self::{
    diagnostic::{ConfigErrors, Problem},
    model::{Child, Config, Dpd, Host, Limits, Peer, Ports, Role, Tunnel},
    reference::markdown as reference_markdown,
    schema::{DpdMode, Nat, OnDead, SysctlSetting, Unique},
    secret::{KeyFileError, Secret},
};

/// Reads and validates the configuration file at `path`, key files included.
///
/// # Errors
///
/// All problems found, each with its place in the file and what to write instead.
pub fn load(path: &Path) -> Result<Config, ConfigErrors> {
    let name = path.display().to_string();
    let text = fs::read_to_string(path).map_err(|cause| ConfigErrors::unreadable(&name, &cause))?;
    parse(&name, &text, &|file| {
        secret::read_key_file(&beside(path, file))
    })
}

/// Validates configuration text; `read_key` supplies the content of key files.
///
/// # Errors
///
/// As [`load`].
pub fn parse(
    name: &str,
    text: &str,
    read_key: &dyn Fn(&Path) -> Result<Secret, KeyFileError>,
) -> Result<Config, ConfigErrors> {
    let raw: schema::File = toml::from_str(text)
        .map_err(|error| ConfigErrors::new(name, text, vec![Problem::from_toml(&error)]))?;
    validate::config(raw, read_key).map_err(|problems| ConfigErrors::new(name, text, problems))
}

/// Relative key files are looked for beside the configuration file.
fn beside(config: &Path, file: &Path) -> std::path::PathBuf {
    match config.parent() {
        Some(folder) => folder.join(file),
        None => file.to_owned(),
    }
}

#[cfg(test)]
mod tests;
