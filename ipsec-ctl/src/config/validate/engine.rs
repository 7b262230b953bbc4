//! What an engine can do and what not: settings that only one of them carries out.

use std::{net::IpAddr, ops::Range};

use ipsec_common::TrafficSelector;
use toml::Spanned;

use super::Problems;
use crate::{
    config::{
        diagnostic::Problem,
        model::{Child, Host, Peer},
        schema::{Nat, TunnelTable},
    },
    dataplane::seam::{Df, EngineChoice, Mode, NicOffload},
};

pub(super) fn df(raw: Option<&Spanned<Df>>, engine: EngineChoice, problems: &mut Problems) -> Df {
    let Some(df) = raw else {
        return Df::default();
    };
    if *df.get_ref() == Df::Set && engine == EngineChoice::Kernel {
        problems.add(
            Problem::new("the kernel's ESP cannot always set the don't-fragment bit")
                .at(df.span(), "not with engine = \"kernel\"")
                .help("write df = \"copy\", or let engine = \"xdp\" carry this tunnel"),
        );
    }
    *df.get_ref()
}

pub(super) fn offload(
    raw: Option<&Spanned<NicOffload>>,
    engine: EngineChoice,
    problems: &mut Problems,
) -> NicOffload {
    let Some(offload) = raw else {
        return NicOffload::default();
    };
    if *offload.get_ref() != NicOffload::Off && engine == EngineChoice::Xdp {
        problems.add(
            Problem::new("network cards take over the kernel's ESP, and no other")
                .at(offload.span(), "not with engine = \"xdp\"")
                .help("add engine = \"kernel\" to this tunnel, or leave offload out"),
        );
    }
    *offload.get_ref()
}

pub(super) fn mode(
    raw: &TunnelTable,
    engine: EngineChoice,
    (peer, local): (&Peer, Option<IpAddr>),
    children: &[Child],
    problems: &mut Problems,
) -> Mode {
    let Some(mode) = &raw.mode else {
        return Mode::default();
    };
    if *mode.get_ref() == Mode::Tunnel {
        return Mode::Tunnel;
    }
    let place = mode.span();
    if engine != EngineChoice::Kernel {
        problems.add(
            Problem::new("only the kernel's ESP carries transport mode")
                .at(place.clone(), "not with this engine")
                .help("add engine = \"kernel\" to this tunnel, or leave mode out"),
        );
    }
    if raw.nat == Nat::Force {
        problems.add(
            Problem::new("transport mode does not go in UDP")
                .at(place.clone(), "not with nat = \"force\""),
        );
    }
    for (there, key) in [
        (raw.device.is_some(), "device"),
        (raw.mtu.is_some(), "mtu"),
        (!raw.address.is_empty(), "address"),
        (!raw.bypass.is_empty(), "bypass"),
    ] {
        if there {
            problems.add(
                Problem::new(format!(
                    "in transport mode there is no device, so `{key}` has no meaning"
                ))
                .at(place.clone(), "set here"),
            );
        }
    }
    hosts(place, (peer, local), children, problems);
    Mode::Transport
}

/// In transport mode the packets are those of the two hosts themselves.
fn hosts(
    place: Range<usize>,
    (peer, local): (&Peer, Option<IpAddr>),
    children: &[Child],
    problems: &mut Problems,
) {
    let remote = match peer {
        Peer::At(hosts) => match hosts.as_slice() {
            [Host::Address(address)] => Some(*address),
            _ => None,
        },
        Peer::Any => None,
    };
    let Some(remote) = remote else {
        problems.add(
            Problem::new("in transport mode the peer has one address, which does not change")
                .at(place, "set here")
                .help("write the peer's address in `peer`"),
        );
        return;
    };
    let one_host = |side: &[TrafficSelector]| {
        let first = side.first()?.addresses.0;
        let same = |selector: &TrafficSelector| selector.addresses == (first, first);
        side.iter().all(same).then_some(first)
    };
    for child in children {
        let ours = one_host(&child.local);
        let ours_fits = ours.is_some() && (local.is_none() || ours == local);
        if !ours_fits || one_host(&child.remote) != Some(remote) {
            problems.add(
                Problem::new(format!(
                    "the selectors of child `{}` are not the two hosts",
                    child.name
                ))
                .at(place.clone(), "in transport mode they must be")
                .help(format!(
                    "write local = [\"OUR ADDRESS/32\"] and remote = [\"{remote}\"], with a protocol and ports behind if wanted"
                )),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, ConfigErrors, parse, secret::Secret};

    fn read(tunnel: &str, local: &str, remote: &str) -> Result<Config, ConfigErrors> {
        let text = format!(
            "[[tunnel]]\nname = \"office\"\npeer = \"203.0.113.9\"\npsk_file = \"office.psk\"\n{tunnel}\n\
             [[tunnel.child]]\nname = \"net\"\nlocal = [\"{local}\"]\nremote = [\"{remote}\"]\n"
        );
        parse("test.toml", &text, &|_| Ok(Secret::new(b"key".to_vec())))
    }

    fn refusal(tunnel: &str, local: &str, remote: &str) -> String {
        let errors = read(tunnel, local, remote).unwrap_err();
        errors.messages().collect::<Vec<_>>().join("; ")
    }

    const TRANSPORT: &str = "engine = \"kernel\"\nmode = \"transport\"";

    #[test]
    fn transport_mode_is_for_two_hosts_on_the_kernels_esp() {
        let config = read(TRANSPORT, "198.51.100.1", "203.0.113.9").unwrap();
        assert_eq!(config.tunnels[0].mode, Mode::Transport);
        for (tunnel, local, remote, message) in [
            (
                "mode = \"transport\"",
                "198.51.100.1",
                "203.0.113.9",
                "only the kernel's ESP",
            ),
            (
                TRANSPORT,
                "198.51.100.0/24",
                "203.0.113.9",
                "not the two hosts",
            ),
            (
                TRANSPORT,
                "198.51.100.1",
                "203.0.113.8",
                "not the two hosts",
            ),
        ] {
            let found = refusal(tunnel, local, remote);
            assert!(found.contains(message), "{found}");
        }
        for (line, message) in [
            ("nat = \"force\"", "does not go in UDP"),
            ("device = \"x\"", "`device` has no meaning"),
        ] {
            let found = refusal(
                &format!("{TRANSPORT}\n{line}"),
                "198.51.100.1",
                "203.0.113.9",
            );
            assert!(found.contains(message), "{found}");
        }
    }

    #[test]
    fn a_card_helps_the_kernel_alone() {
        let found = refusal("offload = \"crypto\"", "10.1.0.0/24", "10.2.0.0/24");
        assert!(found.contains("and no other"), "{found}");
        let config = read(
            "engine = \"kernel\"\noffload = \"auto\"",
            "10.1.0.0/24",
            "10.2.0.0/24",
        );
        assert_eq!(config.unwrap().tunnels[0].offload, NicOffload::Auto);
    }
}
