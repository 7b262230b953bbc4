//! What the outer paths to the peers take, in bytes, and what that leaves for the devices of the tunnels.

use std::{collections::HashMap, net::IpAddr};

use arc_swap::ArcSwap;

use super::{
    outbound::LEAST_IPV6_MTU,
    sa::OutboundSa,
    table::{Settings, Tunnel},
};

/// What a path is taken to carry while nothing is known of it.
const ETHERNET: u16 = 1500;
/// The MTU of a device while its tunnel has no SA: enough for the longest overhead on Ethernet.
pub const MTU_WITHOUT_SA: u16 = 1400;
/// The least MTU that IPv4 can do with (RFC 791 section 3.2).
const LEAST_IPV4_MTU: u16 = 68;
/// RFC 1191 section 6.3: ten minutes after a path became narrower, look whether it is wide again.
const AGE_SECONDS: u64 = 600;

/// What is known of one path.
#[derive(Clone, Copy, Debug)]
struct Path {
    /// By route and link.
    route: u16,
    /// By an ICMP message, and when that was (seconds of CLOCK_MONOTONIC).
    learned: Option<(u16, u64)>,
}

impl Path {
    fn mtu(&self) -> u16 {
        self.learned
            .map_or(self.route, |(mtu, _)| mtu.min(self.route))
    }
}

/// The paths to all peers.
#[derive(Debug, Default)]
pub struct PathMtus {
    paths: ArcSwap<HashMap<IpAddr, Path>>,
    doubted: ArcSwap<Vec<IpAddr>>,
}

impl PathMtus {
    /// Longest outer packet to a peer in bytes.
    pub fn get(&self, remote: IpAddr) -> u16 {
        self.paths.load().get(&remote).map_or(ETHERNET, Path::mtu)
    }

    /// Notes what route and link take.
    pub fn set_route(&self, remote: IpAddr, mtu: u16) {
        self.change(remote, |path| path.route = mtu);
    }

    /// Notes what a believable ICMP message said at `now` (seconds of CLOCK_MONOTONIC).
    // RFC 8200 section 5 and RFC 791: no path is narrower than the least MTU, whatever a message says.
    pub fn learn(&self, remote: IpAddr, mtu: u16, now: u64) {
        let least = if remote.is_ipv6() {
            LEAST_IPV6_MTU
        } else {
            576
        };
        self.change(remote, |path| {
            path.learned = Some((mtu.max(least), now));
        });
    }

    /// Forgets what ICMP messages said too long ago; tells whether anything was.
    pub fn age(&self, now: u64) -> bool {
        let old = |path: &Path| {
            path.learned
                .is_some_and(|(_, then)| now.saturating_sub(then) >= AGE_SECONDS)
        };
        if !self.paths.load().values().any(old) {
            return false;
        }
        self.paths.rcu(|paths| {
            let mut paths = HashMap::clone(paths);
            for path in paths.values_mut() {
                if old(path) {
                    path.learned = None;
                }
            }
            paths
        });
        true
    }

    /// Notes that a packet was too long for the link after all: the route is to be asked again.
    pub fn doubt(&self, remote: IpAddr) {
        if !self.doubted.load().contains(&remote) {
            self.doubted.rcu(|doubted| {
                let mut doubted = Vec::clone(doubted);
                doubted.push(remote);
                doubted
            });
        }
    }

    /// The peers whose routes are to be asked again, each once.
    pub fn take_doubted(&self) -> Vec<IpAddr> {
        if self.doubted.load().is_empty() {
            return Vec::new();
        }
        self.doubted.swap(std::sync::Arc::default()).to_vec()
    }

    fn change(&self, remote: IpAddr, change: impl Fn(&mut Path)) {
        self.paths.rcu(|paths| {
            let mut paths = HashMap::clone(paths);
            change(paths.entry(remote).or_insert(Path {
                route: ETHERNET,
                learned: None,
            }));
            paths
        });
    }

    /// What the device of a tunnel takes: the least that the SAs of its children leave of their paths.
    pub fn device_mtu(&self, tunnel: &Tunnel) -> u16 {
        let settings = tunnel.settings.load();
        if let Some(fixed) = settings.fixed_mtu {
            return fixed;
        }
        let least = self.whole(&settings).unwrap_or(MTU_WITHOUT_SA);
        // RFC 8200 section 5: IPv6 needs 1280 bytes of a link. Then the outer packet is fragmented.
        if settings
            .children
            .iter()
            .any(|child| child.selectors.covers_ipv6())
        {
            least.max(LEAST_IPV6_MTU)
        } else {
            least.max(LEAST_IPV4_MTU)
        }
    }

    /// Longest inner packet of a tunnel in bytes whose outer packet the path takes in one piece.
    pub fn whole_mtu(&self, tunnel: &Tunnel) -> u16 {
        self.whole(&tunnel.settings.load()).unwrap_or(u16::MAX)
    }

    fn whole(&self, settings: &Settings) -> Option<u16> {
        let children = settings.children.iter();
        children
            .filter_map(|child| {
                let senders = child.outbound.load();
                senders.iter().map(|sa| self.inner_mtu(sa)).min()
            })
            .min()
    }

    fn inner_mtu(&self, sa: &OutboundSa) -> u16 {
        let path = self.get(sa.template.outer.remote);
        u16::try_from(sa.inner_mtu(path.into())).unwrap_or(u16::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_narrow_path_is_remembered_for_ten_minutes() {
        let paths = PathMtus::default();
        let peer: IpAddr = "192.0.2.1".parse().unwrap();
        assert_eq!(paths.get(peer), 1500);
        paths.set_route(peer, 9000);
        paths.learn(peer, 1300, 100);
        assert_eq!(paths.get(peer), 1300);
        paths.set_route(peer, 1280);
        assert_eq!(paths.get(peer), 1280, "the link is narrower still");
        paths.learn(peer, 68, 200);
        assert_eq!(paths.get(peer), 576, "nobody believes less");
        assert!(!paths.age(799));
        assert!(paths.age(800));
        assert_eq!(paths.get(peer), 1280);
    }

    #[test]
    fn a_doubted_path_is_asked_again_once() {
        let paths = PathMtus::default();
        let peer: IpAddr = "192.0.2.1".parse().unwrap();
        paths.doubt(peer);
        paths.doubt(peer);
        assert_eq!(paths.take_doubted(), [peer]);
        assert!(paths.take_doubted().is_empty());
    }
}
