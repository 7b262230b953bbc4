//! Tunnels without a device: what the kernel's policies cannot tell apart, and settings that need a device.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use ipsec_common::TrafficSelector;

use super::Problems;
use crate::{
    config::{
        diagnostic::Problem,
        model::{Child, Tunnel},
        schema::TunnelTable,
    },
    dataplane::{
        kernel::{
            host,
            selectors::{Inexpressible, between},
        },
        seam::{EngineChoice, Mode},
    },
    net::xfrm::Selector,
};

pub(super) fn policy_based(
    raw: &TunnelTable,
    engine: EngineChoice,
    mode: Mode,
    children: &[Child],
    problems: &mut Problems,
) -> bool {
    let Some(place) = raw.policy_based.as_ref().filter(|wanted| *wanted.get_ref()) else {
        return false;
    };
    let place = place.span();
    if engine != EngineChoice::Kernel {
        problems.add(
            Problem::new("only the kernel's ESP is led by policies")
                .at(place.clone(), "not with this engine")
                .help("add engine = \"kernel\" to this tunnel, or leave policy_based out"),
        );
    }
    if mode == Mode::Transport {
        problems.add(
            Problem::new("transport mode has no device anyway")
                .at(place.clone(), "says nothing more")
                .help("leave policy_based out"),
        );
        return false;
    }
    for (there, key) in [
        (raw.device.is_some(), "device"),
        (raw.mtu.is_some(), "mtu"),
        (!raw.address.is_empty(), "address"),
        (raw.routes.is_some(), "routes"),
    ] {
        if there {
            problems.add(
                Problem::new(format!(
                    "by policies alone there is no device, so `{key}` has no meaning"
                ))
                .at(place.clone(), "set here")
                .help(format!("leave policy_based or `{key}` out")),
            );
        }
    }
    for child in children {
        match host::is_ambiguous(&child.selectors()) {
            Ok(false) => {}
            Ok(true) => problems.add(
                Problem::new(format!(
                    "local and remote of child `{}` are the same, so no policy can tell our side from the peer's",
                    child.name
                ))
                .at(place.clone(), "without a device")
                .help("write in `local` what is behind this gateway, or leave policy_based out: a device has routes to go by"),
            ),
            Err(error) => problems.add(unspeakable(child, error, place.clone())),
        }
    }
    true
}

fn unspeakable(child: &Child, error: Inexpressible, place: Range<usize>) -> Problem {
    Problem::new(format!(
        "the selectors of child `{}` cannot be policies: {error}",
        child.name
    ))
    .at(place, "the kernel has no words for them")
}

/// Finds tunnels without a device whose packets the kernel would have to give to another one, too.
pub(super) fn shadowed(tunnels: &[Tunnel], spans: &[Range<usize>], problems: &mut Problems) {
    let places = tunnels.iter().zip(spans);
    let mut both = |what: &str, help: &str, one: &Range<usize>, other: &Range<usize>| {
        problems.add(
            Problem::new(what)
                .at(one.clone(), "this one")
                .at(other.clone(), "and this one")
                .help(help),
        );
    };
    let mut taken: BTreeMap<Selector, usize> = BTreeMap::new();
    for (number, (tunnel, span)) in places.clone().enumerate() {
        if !tunnel.is_without_device() {
            continue;
        }
        let mut others = BTreeSet::new();
        for child in &tunnel.children {
            // What cannot be said to the kernel is told elsewhere.
            for selector in between(&child.local, &child.remote).unwrap_or_default() {
                let first = *taken.entry(selector).or_insert(number);
                others.extend((first != number).then_some(first));
            }
        }
        for other in others.iter().filter_map(|other| spans.get(*other)) {
            both(
                "two tunnels without a device have the same selectors, and the kernel has room for one policy",
                "give them other selectors (the more specific ones win), or let an xfrm interface carry one: leave policy_based out",
                other,
                span,
            );
        }
    }
    for (tunnel, span) in places.clone().filter(|(tunnel, _)| tunnel.policy_based) {
        let with_device = places
            .clone()
            .filter(|(other, _)| !other.is_without_device());
        for (_, other) in with_device.filter(|(other, _)| remotes_overlap(tunnel, other)) {
            both(
                "a tunnel by policies alone and one with a device have remote addresses in common: policies would take them before any route",
                "carry both with devices, or both with policy_based = true: then the more specific selectors win",
                span,
                other,
            );
        }
    }
}

fn remotes(tunnel: &Tunnel) -> impl Iterator<Item = &TrafficSelector> {
    tunnel.children.iter().flat_map(|child| &child.remote)
}

fn remotes_overlap(one: &Tunnel, other: &Tunnel) -> bool {
    remotes(one).any(|remote| remotes(other).any(|other| remote.shares_addresses(other)))
}

#[cfg(test)]
mod tests;
