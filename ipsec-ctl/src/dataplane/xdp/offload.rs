//! What may take the fast path and why not: the decisions behind the ledger, as pure functions of what is known.

use crate::{
    dataplane::{
        seam::{FastPath, Offload, OffloadReason},
        xdp::af_xdp::umem::LONGEST_PACKET,
    },
    net::netlink::Link,
};

/// Ethernet header with two VLAN tags.
const LONGEST_LINK_HEADER: u32 = 14 + 2 * 4;

/// Why an interface cannot have the fast path by what it is, if it cannot. Whether the program and the sockets are taken
/// is seen when that is tried.
pub fn unsuitable(link: &Link) -> Option<OffloadReason> {
    // Physical and virtio interfaces have no kind; a TUN or TAP device is a "tun", and a TUN has no MAC address.
    let reachable = matches!(link.kind.as_deref(), None | Some("veth" | "tun"));
    if !reachable || link.mac.len() != 6 {
        return Some(OffloadReason::InterfaceKind);
    }
    let longest = u32::try_from(LONGEST_PACKET).unwrap_or(u32::MAX);
    (link.mtu.saturating_add(LONGEST_LINK_HEADER) > longest).then_some(OffloadReason::MtuTooLarge)
}

/// Whether packets of a link may come with checksums that a NIC was to complete.
pub fn has_partial_checksums(link: &Link) -> bool {
    matches!(link.kind.as_deref(), Some("veth" | "tun"))
}

/// What is known when an SA's offload is decided.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// What its tunnel's configuration says.
    pub fast_path: FastPath,
    /// Netfilter chains of others would be bypassed.
    pub foreign_netfilter: bool,
    /// The program could not be loaded.
    pub no_xdp: bool,
    /// Of each interface, why it has no fast path, if it has none.
    pub interfaces: &'a [Option<OffloadReason>],
}

/// Decides whether an SA takes the fast path.
pub fn decide(facts: &Facts<'_>) -> Offload {
    let bypasses = facts.foreign_netfilter && facts.fast_path == FastPath::Auto;
    match facts {
        Facts {
            fast_path: FastPath::Off,
            ..
        } => return Offload::Declined(OffloadReason::Configured),
        _ if bypasses => return Offload::Declined(OffloadReason::NetfilterRules),
        Facts { no_xdp: true, .. } => return Offload::Declined(OffloadReason::NoXdp),
        Facts { .. } => {}
    }
    let mut reasons = facts.interfaces.iter().flatten();
    match (
        facts.interfaces.iter().any(Option::is_none),
        reasons.next().copied(),
    ) {
        (true, None) => Offload::Full,
        (true, Some(reason)) => Offload::Partial(reason),
        // Where all have the same reason, that one tells more than that none is left.
        (false, Some(reason)) if reasons.all(|other| *other == reason) => Offload::Declined(reason),
        (false, _) => Offload::Declined(OffloadReason::NoInterface),
    }
}

/// Whether the XDP program may send packets of an SA, or into a tunnel, to the workers.
pub fn is_offloaded(offload: Offload) -> bool {
    match offload {
        Offload::Full | Offload::Partial(_) => true,
        Offload::Declined(_) | Offload::Kernel(_) | Offload::Policies(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL_GOOD: Facts<'_> = Facts {
        fast_path: FastPath::Auto,
        foreign_netfilter: false,
        no_xdp: false,
        interfaces: &[None, None],
    };

    #[test]
    fn an_sa_is_offloaded_where_nothing_stands_against_it() {
        assert_eq!(decide(&ALL_GOOD), Offload::Full);
    }

    #[test]
    fn what_stands_against_it_is_named() {
        use OffloadReason::{
            Configured, InterfaceKind, MtuTooLarge, NetfilterRules, NoInterface, NoXdp,
        };
        let cases = [
            (
                Facts {
                    fast_path: FastPath::Off,
                    ..ALL_GOOD
                },
                Offload::Declined(Configured),
            ),
            (
                Facts {
                    foreign_netfilter: true,
                    ..ALL_GOOD
                },
                Offload::Declined(NetfilterRules),
            ),
            (
                Facts {
                    foreign_netfilter: true,
                    fast_path: FastPath::On,
                    ..ALL_GOOD
                },
                Offload::Full,
            ),
            (
                Facts {
                    no_xdp: true,
                    ..ALL_GOOD
                },
                Offload::Declined(NoXdp),
            ),
            (
                Facts {
                    interfaces: &[None, Some(InterfaceKind)],
                    ..ALL_GOOD
                },
                Offload::Partial(InterfaceKind),
            ),
            (
                Facts {
                    interfaces: &[Some(InterfaceKind), Some(InterfaceKind)],
                    ..ALL_GOOD
                },
                Offload::Declined(InterfaceKind),
            ),
            (
                Facts {
                    interfaces: &[Some(MtuTooLarge), Some(InterfaceKind)],
                    ..ALL_GOOD
                },
                Offload::Declined(NoInterface),
            ),
            (
                Facts {
                    interfaces: &[],
                    ..ALL_GOOD
                },
                Offload::Declined(NoInterface),
            ),
        ];
        for (facts, expected) in cases {
            assert_eq!(decide(&facts), expected, "{facts:?}");
        }
    }

    #[test]
    fn interfaces_are_judged_by_kind_address_and_mtu() {
        let link = |kind: Option<&str>, mac: usize, mtu| Link {
            index: 1,
            name: "x".into(),
            mtu,
            mac: vec![2; mac],
            up: true,
            kind: kind.map(str::to_owned),
            loopback: false,
        };
        let cases = [
            (link(None, 6, 1500), None),
            (link(Some("veth"), 6, 3000), None),
            (
                link(Some("veth"), 6, 9000),
                Some(OffloadReason::MtuTooLarge),
            ),
            (
                link(Some("bridge"), 6, 1500),
                Some(OffloadReason::InterfaceKind),
            ),
            (
                link(Some("vlan"), 6, 1500),
                Some(OffloadReason::InterfaceKind),
            ),
            (
                link(Some("tun"), 0, 1500),
                Some(OffloadReason::InterfaceKind),
            ),
            (link(Some("tun"), 6, 1500), None),
        ];
        for (link, expected) in cases {
            assert_eq!(unsuitable(&link), expected, "{link:?}");
        }
    }
}
