//! Between the values of the configuration, of the endpoint and of the data plane, which do not know each other.

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use ipnet::{IpNet, Ipv4Subnets, Ipv6Subnets};
use ipsec_common::TrafficSelector;
use zeroize::Zeroizing;

use super::peers::{Place, all_ways};
use crate::{
    config::{self, Child, Nat, Peer, Role, Tunnel},
    dataplane::{
        routing::RoutingSpec,
        seam::{
            self, ChildId, ChildTrap, Direction, Flow, Lifetime, Outer, SaId, SaSpec, SelectorPair,
            TunnelId, TunnelSpec, UdpEncap,
        },
    },
    esp::{EspKeys, EspSuite, Integrity},
    ike::{
        self,
        config::{
            ChildConfig, ChildName, DpdMode, Mode, NatPolicy, OnDead, PeerConfig, PeerId, Remote,
            Unique, Way,
        },
        crypto::{self, ChildSuite, Encryption, Esn},
        event::{ChildUp, IkeInfo, OuterAddresses},
    },
};

/// What the data plane is told of a tunnel.
pub(super) fn tunnel_spec(
    id: TunnelId,
    tunnel: &Tunnel,
    places: &[Place],
    elsewhere: &BTreeSet<IpAddr>,
) -> TunnelSpec {
    TunnelSpec {
        id,
        name: tunnel.name.clone(),
        device: tunnel.device.clone(),
        mtu: tunnel.mtu,
        engine: tunnel.engine,
        fast_path: tunnel.fast_path,
        offload: tunnel.offload,
        mode: tunnel.mode,
        policy_based: tunnel.policy_based,
        df: tunnel.df,
        clamp_mss: tunnel.clamp_mss,
        copy_dscp: tunnel.copy_dscp,
        children: (0..)
            .zip(&tunnel.children)
            .map(|(number, child)| ChildTrap {
                id: ChildId(number),
                name: child.name.clone(),
                selectors: child.selectors(),
                on_demand: is_on_demand(tunnel, child),
            })
            .collect(),
        routing: routing_spec(tunnel, places, elsewhere),
    }
}

/// Whether a packet may start a child.
pub(super) fn is_on_demand(tunnel: &Tunnel, child: &Child) -> bool {
    tunnel.role == Role::OnDemand || child.on_dead == config::OnDead::Trap
}

fn routing_spec(tunnel: &Tunnel, places: &[Place], elsewhere: &BTreeSet<IpAddr>) -> RoutingSpec {
    let cover = |selectors: &dyn Fn(&Child) -> Vec<TrafficSelector>| {
        IpNet::aggregate(
            &tunnel
                .children
                .iter()
                .flat_map(selectors)
                .flat_map(|selector| prefixes(selector.addresses))
                .collect(),
        )
    };
    RoutingSpec {
        mode: tunnel.routes,
        remote: cover(&|child| child.remote.clone()),
        local: cover(&|child| child.local.clone()),
        peers: peers(tunnel, places, elsewhere),
        anywhere: tunnel.peer == Peer::Any || tunnel.peer.has_names(),
        outer_local: tunnel.local,
        addresses: tunnel.address.clone(),
        bypass: tunnel.bypass.clone(),
    }
}

/// The addresses of the peer: those that are written down, those that its names stand for, and where it has moved to. Where
/// one is that may be anywhere does not count: routes are ready for it wherever it is.
fn peers(tunnel: &Tunnel, places: &[Place], elsewhere: &BTreeSet<IpAddr>) -> Vec<IpAddr> {
    if tunnel.peer == Peer::Any {
        return Vec::new();
    }
    let mut peers: Vec<IpAddr> = tunnel.peer.addresses().collect();
    let found = all_ways(places).into_iter().map(|way| way.remote);
    for address in found.chain(elsewhere.iter().copied()) {
        if !peers.contains(&address) {
            peers.push(address);
        }
    }
    peers
}

/// Where the endpoint finds the peer; before anything was looked up, at the addresses that are written down.
fn remote(tunnel: &Tunnel, places: &[Place]) -> Remote {
    match &tunnel.peer {
        Peer::Any => Remote::Anywhere,
        Peer::At(_) if places.is_empty() => {
            let ways = tunnel.peer.addresses().map(|remote| Way {
                remote,
                local: tunnel.local,
            });
            Remote::At(ways.collect())
        }
        Peer::At(_) => Remote::At(all_ways(places)),
    }
}

/// The fewest prefixes that cover exactly the range.
fn prefixes((first, last): (IpAddr, IpAddr)) -> Vec<IpNet> {
    match (first, last) {
        (IpAddr::V4(first), IpAddr::V4(last)) => {
            Ipv4Subnets::new(first, last, 0).map(IpNet::V4).collect()
        }
        (IpAddr::V6(first), IpAddr::V6(last)) => {
            Ipv6Subnets::new(first, last, 0).map(IpNet::V6).collect()
        }
        // A selector is of one address family; the configuration and the codec see to that.
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => Vec::new(),
    }
}

/// Limits by volume of the SAs of a child: soft early enough for the replacement to be there in time. That is at nine tenths, or
/// earlier where the pair before `lasted` so short that the last tenth of a volume goes in less time than a request that
/// has to be repeated takes; at a half at the earliest.
fn volume(
    (packets, bytes): (Option<u64>, Option<u64>),
    esn: bool,
    lasted: Option<Duration>,
) -> Lifetime {
    // RFC 4303 section 3.3.3: without ESN an SA must not send more than 2^32 packets.
    let sequence = if esn { u64::MAX } else { u64::from(u32::MAX) };
    let hard_packets = packets.unwrap_or(u64::MAX).min(sequence);
    let hard_bytes = bytes.unwrap_or(u64::MAX);
    let soft = |hard: u64| match lasted {
        _ if hard == u64::MAX => hard,
        None => hard - hard / 10,
        Some(lasted) => {
            let meanwhile = u128::from(hard) * REPETITIONS.as_millis() / lasted.as_millis().max(1);
            let meanwhile = u64::try_from(meanwhile).unwrap_or(u64::MAX);
            hard - meanwhile.clamp(hard / 10, hard / 2)
        }
    };
    Lifetime {
        soft_packets: soft(hard_packets),
        hard_packets,
        soft_bytes: soft(hard_bytes),
        hard_bytes,
        expires: None,
    }
}

/// What the endpoint is told of a tunnel.
pub(super) fn peer_config(id: TunnelId, tunnel: &Tunnel, places: &[Place]) -> PeerConfig {
    PeerConfig {
        id: PeerId(id.0),
        name: tunnel.name.clone(),
        remote: remote(tunnel, places),
        local: tunnel.local,
        local_id: tunnel.local_id.clone(),
        remote_id: tunnel.remote_id.clone(),
        psk: Zeroizing::new(tunnel.psk.expose().to_vec()),
        role: match tunnel.role {
            Role::Initiate => ike::config::Role::Initiate,
            Role::OnDemand => ike::config::Role::OnDemand,
            Role::Respond => ike::config::Role::Respond,
        },
        proposals: tunnel.ike.clone(),
        nat: match tunnel.nat {
            Nat::Auto => NatPolicy::Auto,
            Nat::Force => NatPolicy::Force,
            Nat::Forbid => NatPolicy::Forbid,
        },
        fragment_size: tunnel.fragment_size,
        keepalive: tunnel.keepalive,
        dpd_mode: match tunnel.dpd.mode {
            config::DpdMode::Off => DpdMode::Off,
            config::DpdMode::OnDemand => DpdMode::OnDemand,
            config::DpdMode::Periodic => DpdMode::Periodic,
        },
        dpd_interval: tunnel.dpd.interval,
        dpd_timeout: tunnel.dpd.timeout,
        // RFC 4555 section 1.2: it moves tunnel mode alone.
        mobike: tunnel.mobike && tunnel.mode == seam::Mode::Tunnel,
        return_routability: tunnel.return_routability,
        childless: tunnel.childless,
        unique: match tunnel.unique {
            config::Unique::Replace => Unique::Replace,
            config::Unique::Keep => Unique::Keep,
            config::Unique::Never => Unique::Never,
        },
        lifetime: tunnel.lifetime,
        reauth: tunnel.reauth,
        children: (0..)
            .zip(&tunnel.children)
            .map(|(number, child)| ChildConfig {
                id: ChildName(number),
                name: child.name.clone(),
                local: child.local.clone(),
                remote: child.remote.clone(),
                proposals: child.esp.clone(),
                on_dead: match child.on_dead {
                    config::OnDead::Restart => OnDead::Restart,
                    config::OnDead::Trap => OnDead::Trap,
                    config::OnDead::Clear => OnDead::Clear,
                },
                lifetime: child.lifetime,
                mode: match tunnel.mode {
                    seam::Mode::Tunnel => Mode::Tunnel,
                    seam::Mode::Transport => Mode::Transport,
                },
            })
            .collect(),
    }
}

/// The packet that asks for a child, as selectors of our side and of the peer's.
pub(super) fn packet(flow: &Flow) -> (TrafficSelector, TrafficSelector) {
    // RFC 7296 section 2.9: a protocol without ports has all of them. What is 0 as a port is so for want of any.
    let side = |address, port| TrafficSelector {
        protocol: flow.protocol,
        ports: if port == 0 {
            (0, u16::MAX)
        } else {
            (port, port)
        },
        addresses: (address, address),
    };
    (
        side(flow.source, flow.source_port),
        side(flow.destination, flow.destination_port),
    )
}

/// Time within which a request has been repeated some times.
const REPETITIONS: Duration = Duration::from_secs(5);

/// Time that the data plane gives an SA beyond its lifetime, within which a daemon that lives has removed it.
const OVERTIME: Duration = Duration::from_secs(10);

/// What the data plane is told of one direction of a pair of SAs that was negotiated at `since` (seconds of CLOCK_MONOTONIC), in
/// the place of one that `lasted` so long.
pub(super) fn sa_spec(
    tunnel: TunnelId,
    child: &Child,
    up: &ChildUp,
    id: SaId,
    direction: Direction,
    (since, lasted): (u64, Option<Duration>),
) -> SaSpec {
    let esn = up.suite.esn == Esn::Yes;
    let (spi, key) = match direction {
        Direction::Inbound => (up.spi_in, &up.key_in),
        Direction::Outbound => (up.spi_out, &up.key_out),
    };
    SaSpec {
        id,
        tunnel,
        child: ChildId(up.child.0),
        direction,
        spi,
        suite: esp_suite(&up.suite),
        keys: EspKeys {
            cipher: Zeroizing::new(key.encryption.bytes().to_vec()),
            integrity: Zeroizing::new(key.integrity.bytes().to_vec()),
        },
        esn,
        replay_window: child.replay_window,
        outer: outer(&up.outer),
        selectors: SelectorPair {
            local: up.local.clone(),
            remote: up.remote.clone(),
        },
        lifetime: Lifetime {
            expires: Some(since.saturating_add((child.lifetime + OVERTIME).as_secs())),
            ..volume((child.lifetime_packets, child.lifetime_bytes), esn, lasted)
        },
    }
}

/// Outer addresses as the data plane has them.
pub(super) fn outer(outer: &OuterAddresses) -> Outer {
    Outer {
        local: outer.local.ip(),
        remote: outer.remote.ip(),
        encap: outer.encapsulated.then(|| UdpEncap {
            local_port: outer.local.port(),
            remote_port: outer.remote.port(),
        }),
    }
}

fn esp_suite(suite: &ChildSuite) -> EspSuite {
    let integrity = match suite.integrity {
        Some(crypto::Integrity::HmacSha256) | None => Integrity::HmacSha256,
        Some(crypto::Integrity::HmacSha384) => Integrity::HmacSha384,
        Some(crypto::Integrity::HmacSha512) => Integrity::HmacSha512,
    };
    let cbc = |key_bytes| EspSuite::AesCbc {
        key_bytes,
        integrity,
    };
    match suite.encryption {
        Encryption::AesCbc128 => cbc(16),
        Encryption::AesCbc192 => cbc(24),
        Encryption::AesCbc256 => cbc(32),
        Encryption::Aes128Gcm16 => EspSuite::Aes128Gcm16,
        Encryption::Aes256Gcm16 => EspSuite::Aes256Gcm16,
        Encryption::ChaCha20Poly1305 => EspSuite::ChaCha20Poly1305,
    }
}

/// What NAT detection found, in words.
pub(super) fn nat_words(info: &IkeInfo) -> &'static str {
    match (info.nat_local, info.nat_remote) {
        (false, false) => "none",
        (true, false) => "here",
        (false, true) => "at the peer",
        (true, true) => "on both sides",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_faster_an_sa_is_used_up_the_earlier_its_replacement_begins() {
        let soft = |lasted: Option<u64>| {
            let limits = volume(
                (Some(10_000), Some(1 << 40)),
                true,
                lasted.map(Duration::from_secs),
            );
            assert_eq!((limits.hard_packets, limits.hard_bytes), (10_000, 1 << 40));
            limits.soft_packets
        };
        assert_eq!(soft(None), 9_000);
        assert_eq!(soft(Some(3600)), 9_000);
        assert_eq!(soft(Some(25)), 8_000, "five of 25 seconds");
        assert_eq!(soft(Some(1)), 5_000);
        assert_eq!(soft(Some(0)), 5_000);
    }

    #[test]
    fn what_has_no_limit_gets_none() {
        let limits = volume((None, None), true, Some(Duration::ZERO));
        assert_eq!(
            (limits.soft_packets, limits.soft_bytes),
            (u64::MAX, u64::MAX)
        );
        let limits = volume((None, None), false, None);
        assert_eq!(limits.hard_packets, u64::from(u32::MAX));
        assert!(limits.soft_packets < limits.hard_packets);
    }
}
