//! `ipsec-ctl up`, `down`, `rekey`, `move` and `reload`: the daemon is told, and says what it did.

use super::{print, remote::Remote};
use crate::{
    api::model::{Done, Rekey},
    dataplane::seam::EngineChoice,
};

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// The tunnel's name in the configuration.
    name: String,
    #[command(flatten)]
    remote: Remote,
}

#[derive(Debug, clap::Args)]
pub(super) struct RekeyOptions {
    /// The tunnel's name in the configuration.
    name: String,
    /// Rekey the IKE SA instead of the children.
    #[arg(long)]
    ike: bool,
    #[command(flatten)]
    remote: Remote,
}

#[derive(Debug, clap::Args)]
pub(super) struct MoveOptions {
    /// The tunnel's name in the configuration.
    name: String,
    /// What is to carry it.
    #[arg(value_enum)]
    engine: Engine,
    #[command(flatten)]
    remote: Remote,
}

/// An engine as the configuration names it.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Engine {
    Xdp,
    Kernel,
    Auto,
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

pub(super) fn rekey(options: &RekeyOptions) -> miette::Result<()> {
    let what = if options.ike {
        Rekey::Ike
    } else {
        Rekey::Children
    };
    told(
        &options
            .remote
            .ask(async |client| client.rekey(&options.name, what).await)?,
    )
}

pub(super) fn move_to(options: &MoveOptions) -> miette::Result<()> {
    let engine = match options.engine {
        Engine::Xdp => EngineChoice::Xdp,
        Engine::Kernel => EngineChoice::Kernel,
        Engine::Auto => EngineChoice::Auto,
    };
    told(
        &options
            .remote
            .ask(async |client| client.move_to(&options.name, engine).await)?,
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
