//! Why a packet was dropped or left the fast path: one enumeration for XDP program, workers, slow path, CLI and docs.

/// Declares [`Reason`] with the name and the meaning that the CLI and the docs show.
macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $value:literal, $name:literal, $kind:ident, $meaning:literal;)*) => {
        /// A reason; its number is the index of its counter in the BPF map.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
        pub enum Reason { $(#[doc = $meaning] $variant = $value,)* }

        impl Reason {
            /// All reasons in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Name in the CLI, in JSON and in the docs.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// What became of the packet.
            pub const fn kind(self) -> Kind {
                match self { $(Self::$variant => Kind::$kind,)* }
            }

            /// What it means, in a sentence without a full stop.
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$variant => $meaning,)* }
            }
        }
    };
}

/// What became of a packet that a [`Reason`] was counted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It was dropped.
    Dropped,
    /// It left the fast path for the slow one, where it goes on.
    Slow,
    /// It was none of ours and went on untouched.
    Passed,
    /// It took the fast path.
    Fast,
}

reasons! {
    FastOutbound = 0, "fast-outbound", Fast, "sent to a worker for encryption";
    FastInbound = 1, "fast-inbound", Fast, "sent to a worker for decryption";
    NotOurs = 2, "not-ours", Passed, "neither ESP of ours nor routed into a tunnel";
    Malformed = 3, "malformed", Dropped, "headers are truncated or contradict each other";
    UnknownSpi = 4, "unknown-spi", Dropped, "ESP to one of our addresses that names no SA";
    Replayed = 5, "replayed", Dropped, "the sequence number was received before";
    TooOld = 6, "too-old", Dropped, "the sequence number is left of the anti-replay window";
    BadIcv = 7, "bad-icv", Dropped, "the integrity check failed: forged, damaged, or other keys";
    BadTrailer = 8, "bad-trailer", Dropped, "padding or next header of an authentic packet is wrong";
    BadInner = 9, "bad-inner", Dropped, "an authentic packet holds no valid IP packet";
    InboundSelectors = 10, "inbound-selectors", Dropped, "the inner packet does not match the selectors of its SA";
    OutboundSelectors = 11, "outbound-selectors", Dropped, "a packet routed into the tunnel matches no child";
    NoSa = 12, "no-sa", Dropped, "its child has no SA at the moment";
    HardLimit = 13, "hard-limit", Dropped, "the SA is past its hard limit";
    SequenceExhausted = 14, "sequence-exhausted", Dropped, "the SA has no sequence number left";
    TtlExpired = 15, "ttl-expired", Dropped, "the TTL or hop limit ran out";
    EcnInvalid = 16, "ecn-invalid", Dropped, "congestion was marked outside a packet that cannot carry the mark inside (RFC 6040)";
    TooBig = 17, "too-big", Dropped, "longer than the tunnel MTU and must not be fragmented; the sender was told";
    FragmentPorts = 18, "fragment-ports", Dropped, "a fragment without ports, under selectors that name ports";
    Cleartext = 19, "cleartext", Dropped, "protected traffic arrived in the clear";
    RecursiveRoute = 20, "recursive-route", Dropped, "the peer's address is routed into a tunnel of ours";
    NoRoute = 21, "no-route", Dropped, "no route or next hop for the packet";
    SendFailed = 22, "send-failed", Dropped, "the kernel or a full ring did not take the packet";
    NoSocket = 23, "no-socket", Dropped, "known ESP on a queue that has no AF_XDP socket";
    SlowOptions = 24, "slow-options", Slow, "IP options or extension headers";
    SlowFragment = 25, "slow-fragment", Slow, "a fragment";
    SlowMulticast = 26, "slow-multicast", Slow, "multicast or broadcast";
    SlowTtl = 27, "slow-ttl", Slow, "a TTL or hop limit of 1";
    SlowTooLong = 28, "slow-too-long", Slow, "longer than the MTU it meets, so the kernel fragments or answers";
    SlowLocal = 29, "slow-local", Slow, "to an address of this host";
    SlowNextHop = 30, "slow-next-hop", Slow, "the next hop is not known yet";
    SlowPolicy = 31, "slow-policy", Slow, "the tunnel is not offloaded; its ledger says why";
    SlowTunnel = 32, "slow-tunnel", Slow, "from one tunnel into another";
    Unanswered = 33, "unanswered", Dropped, "waited for an SA on demand that did not come in time";
    IkeSource = 34, "ike-source", Dropped, "IKE of no known SA, more than one source may send in a second";
    IkeFlood = 35, "ike-flood", Dropped, "IKE of no known SA, more than all strangers may send in a second";
    SlowGuard = 36, "slow-guard", Slow, "the way back to its source is a tunnel: the plaintext guard decides";
    RxRingFull = 37, "rx-ring-full", Dropped, "a worker is too busy: the receive ring of its AF_XDP socket was full";
    RxNoFrame = 38, "rx-no-frame", Dropped, "a worker is too busy: its AF_XDP socket had no frame for the packet, or none that is long enough";
}

/// Number of reasons, hence of counters.
pub const REASONS: u32 = 39;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_indices_and_names_are_unique() {
        assert_eq!(Reason::ALL.len(), usize::try_from(REASONS).unwrap());
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
            assert_eq!(
                Reason::ALL
                    .iter()
                    .filter(|other| other.name() == reason.name())
                    .count(),
                1,
                "{}",
                reason.name()
            );
        }
    }
}
