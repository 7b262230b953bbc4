//! `ipsec-ctl check FILE`: says whether the file can be used and how it was understood.

use std::{
    fmt::{Display, Write},
    path::PathBuf,
};

use super::{print, table::counted};
use crate::{
    config::{self, Child, Config, Peer, Tunnel},
    net::preflight,
};

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// The configuration file.
    file: PathBuf,
}

pub(super) fn run(options: &Options) -> miette::Result<()> {
    let config = config::load(&options.file)?;
    print(&(render(&config) + &render_host(&config)))
}

fn render(config: &Config) -> String {
    let mut text = format!(
        "the configuration is valid: {}\n",
        counted(config.tunnels.len(), "tunnel")
    );
    for tunnel in &config.tunnels {
        text.push_str(&render_tunnel(tunnel));
    }
    text
}

/// What of this host stands in the way.
fn render_host(config: &Config) -> String {
    let mut text = "\nthis host\n".to_owned();
    for finding in preflight::findings(uses_ipv6(config)) {
        let _ = writeln!(text, "  {:<30} {}", finding.what, finding.found);
        if let Some(remedy) = finding.remedy {
            let _ = writeln!(text, "  {:<30} -> {remedy}", "");
        }
    }
    text
}

fn uses_ipv6(config: &Config) -> bool {
    config
        .tunnels
        .iter()
        .flat_map(|tunnel| &tunnel.children)
        .flat_map(|child| child.local.iter().chain(&child.remote))
        .any(|selector| selector.addresses.0.is_ipv6())
}

fn render_tunnel(tunnel: &Tunnel) -> String {
    let or = |identity: &Option<crate::ike::Identity>, otherwise: &str| {
        identity
            .as_ref()
            .map_or_else(|| otherwise.to_owned(), ToString::to_string)
    };
    let (peer, any_id) = match &tunnel.peer {
        Peer::At(_) => (tunnel.peer.to_string(), "its address"),
        Peer::Any => ("any address".to_owned(), "any identity"),
    };
    let device = if tunnel.is_without_device() {
        "none, policies alone"
    } else {
        &tunnel.device
    };
    let mut text = format!(
        "\ntunnel {}\n  peer      {peer}, as {}\n  we are    {}\n  device    {}\n  IKE       {}\n",
        tunnel.name,
        or(&tunnel.remote_id, any_id),
        or(&tunnel.local_id, "our address"),
        device,
        list(&tunnel.ike, "\n            "),
    );
    for child in &tunnel.children {
        text.push_str(&render_child(child));
    }
    text
}

fn render_child(child: &Child) -> String {
    format!(
        "  child     {}: {} <-> {}\n    ESP     {}\n",
        child.name,
        list(&child.local, ", "),
        list(&child.remote, ", "),
        list(&child.esp, "\n            "),
    )
}

fn list<T: Display>(items: &[T], between: &str) -> String {
    items
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(between)
}
