//! `ipsec-ctl up`, `down` and `reload`: the daemon is told, and says what it did.

use super::{print, remote::Remote};
use crate::api::model::Done;

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// The tunnel's name in the configuration.
    name: String,
    #[command(flatten)]
    remote: Remote,
}

#[derive(Debug, clap::Args)]
pub(super) struct ReloadOptions {
    #[command(flatten)]
    remote: Remote,
}

pub(super) fn up(options: &Options) -> miette::Result<()> {
    told(
        &options
            .remote
            .ask(async |client| client.up(&options.name).await)?,
    )
}

pub(super) fn down(options: &Options) -> miette::Result<()> {
    told(
        &options
            .remote
            .ask(async |client| client.down(&options.name).await)?,
    )
}

pub(super) fn reload(options: &ReloadOptions) -> miette::Result<()> {
    told(&options.remote.ask(async |client| client.reload().await)?)
}

fn told(done: &Done) -> miette::Result<()> {
    print(
        &done
            .lines
            .iter()
            .map(|line| format!("{line}\n"))
            .collect::<String>(),
    )
}
