//! Layouts of the BPF maps and of the note that travels with a redirected packet: the contract between the XDP program and userspace.
//!
//! Any change of a size or a meaning here is a new [`ABI`]: pins of another version are never reinterpreted. What the
//! program does with the maps stands in `ipsec-ebpf`; who fills them is userspace's concern.
//!
//! Numbers are in host byte order, addresses in network order. All padding is explicit, since the kernel compares keys
//! byte by byte.

use core::net::{IpAddr, Ipv6Addr};

use crate::{REASONS, SaWords, Spi};

/// Version of these layouts; the name of the folder that holds the pins is made of it.
pub const ABI: u32 = 2;

/// Elements of `SA_WORDS`: SAs, both directions counted, that can exist at a time.
pub const SA_SLOTS: u32 = 16 * 1024;
/// Elements of `TUNNELS`.
pub const TUNNEL_SLOTS: u32 = 8 * 1024;
/// Elements of `ADDRESSES`.
pub const ADDRESS_SLOTS: u32 = 4 * 1024;
/// Elements of `LINKS` and of `VLANS`.
pub const LINK_SLOTS: u32 = 1024;
/// Elements of `SOCKETS`, the XSKMAP of all interfaces.
pub const SOCKET_SLOTS: u32 = 4 * 1024;

/// Elements of `IKE_PEERS`; those not seen for longest make room.
pub const IKE_PEER_SLOTS: u32 = 16 * 1024;
/// Elements of `IKE_SPIS`; those not seen for longest make room.
pub const IKE_SPI_SLOTS: u32 = 64 * 1024;
/// Elements of `IKE_SOURCES`: a power of two.
pub const IKE_SOURCE_BUCKETS: u32 = 64 * 1024;

/// An address as maps hold it: IPv6, or IPv4 mapped into it (`::ffff:a.b.c.d`).
pub type MappedAddress = [u8; 16];

/// Maps an address to the form of the maps.
pub const fn mapped(address: IpAddr) -> MappedAddress {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

/// Takes an address back from the form of the maps.
pub const fn unmapped(address: MappedAddress) -> IpAddr {
    IpAddr::V6(Ipv6Addr::from_octets(address)).to_canonical()
}

/// Element 0 of `HEADER`: what pins were made by, so that only their own version touches them.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// [`ABI`].
    pub abi: u32,
    /// Size of [`SaWords`] in bytes.
    pub sa_words: u32,
    /// [`SA_SLOTS`].
    pub sa_slots: u32,
    /// Size of [`InboundEntry`] in bytes.
    pub inbound: u32,
    /// Size of [`TunnelEntry`] in bytes.
    pub tunnel: u32,
    /// Size of [`LinkEntry`] in bytes.
    pub link: u32,
    /// [`SOCKET_SLOTS`].
    pub sockets: u32,
    /// [`REASONS`]. Counters may be added without a new version, so this one may differ.
    pub reasons: u32,
}

impl Header {
    /// The header that this version writes.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "sizes of small structures, known when this is compiled"
    )]
    pub const CURRENT: Self = Self {
        abi: ABI,
        sa_words: size_of::<SaWords>() as u32,
        sa_slots: SA_SLOTS,
        inbound: size_of::<InboundEntry>() as u32,
        tunnel: size_of::<TunnelEntry>() as u32,
        link: size_of::<LinkEntry>() as u32,
        sockets: SOCKET_SLOTS,
        reasons: REASONS,
    };
}

/// Element 0 of `SETTINGS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Packets of unknown SPIs that each CPU lets through to the slow path in a second, so that it can report them.
    pub unknown_spi_per_second: u32,
    /// UDP port on which ESP arrives encapsulated; 0 is none.
    pub nat_port: u16,
    /// UDP port of IKE; 0 is none.
    pub ike_port: u16,
    /// IKE of no known SA that a stranger may send in a second.
    pub ike_per_source: u32,
    /// IKE of no known SA that a known peer may send in a second: it may have a thousand tunnels.
    pub ike_per_peer: u32,
    /// IKE of no known SA that all sources but known peers together may send in a second, of each stage.
    pub ike_per_second: u32,
    /// Zero.
    pub padding: u32,
    /// Makes [`source_bucket`] another function in each process, so that nobody can aim at another's element.
    pub seed: u64,
}

/// Element of `IKE_SOURCES` that counts what comes from an address: for IPv6 the one of its /64, which one host may fill.
#[inline(always)]
pub const fn source_bucket(source: &MappedAddress, seed: u64) -> u32 {
    // Odd, with bits all over: 2^64 over the golden ratio.
    const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
    let [a, b, c, d, e, f, g, h, .., i, j, k, l] = *source;
    let high = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
    // IPv4 is mapped into the prefix of all zeros, and lies in the last four bytes.
    let low = if high == 0 {
        u32::from_ne_bytes([i, j, k, l]) as u64
    } else {
        0
    };
    let mut hash = (high ^ seed).wrapping_mul(SPREAD);
    hash = (hash ^ hash >> 32 ^ low).wrapping_mul(SPREAD);
    hash = (hash ^ hash >> 29 ^ seed).wrapping_mul(SPREAD);
    (hash >> 40) as u32 & (IKE_SOURCE_BUCKETS - 1)
}

/// Key of `INBOUND`: what an ESP packet that arrives says about its SA.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct InboundKey {
    /// Destination of the outer packet, one of our addresses.
    pub destination: MappedAddress,
    /// SPI as it stands in the packet.
    pub spi: [u8; 4],
}

impl InboundKey {
    /// The key of an SA.
    pub const fn new(spi: Spi, destination: IpAddr) -> Self {
        Self {
            destination: mapped(destination),
            spi: spi.to_be_bytes(),
        }
    }
}

/// Value of `INBOUND`: an inbound SA.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InboundEntry {
    /// Index of its words in `SA_WORDS`.
    pub slot: u32,
    /// 1: workers open its packets. 0: they go to the slow path.
    pub offloaded: u32,
}

/// Value of `TUNNELS`, whose key is the interface index of a tunnel's device.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunnelEntry {
    /// Longest inner packet in bytes; longer ones go to the kernel, which fragments or answers.
    pub mtu: u32,
    /// 1: workers seal its packets. 0: they go to the slow path.
    pub offloaded: u32,
    /// 1: a packet that its selectors let in may pretend to come out of a tunnel, so that the way back is looked at.
    pub wary: u32,
}

/// Value of `LINKS`, whose key is the index of an interface that carries the program.
///
/// An interface without an entry passes everything: it has no AF_XDP sockets, and the slow path does its work.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkEntry {
    /// Element of `SOCKETS` that belongs to receive queue 0; the others follow it.
    pub sockets_base: u32,
    /// Number of receive queues that have elements.
    pub queues: u32,
    /// Its hardware address. Frames to others (a flooding switch, promiscuous mode) are not ours to forward.
    pub mac: [u8; 6],
    /// Zero.
    pub padding: u16,
}

/// Key of `VLANS`: a tagged packet as it arrives on an interface that carries the program.
///
/// Its value is the index of the VLAN device, whose routing the packet gets. A tag without an entry passes. Frames
/// without a tag and with VLAN 0 (a priority tag only) belong to the interface itself.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VlanKey {
    /// Index of the interface that the frame arrived on.
    pub link: u32,
    /// VLAN id of the outer tag.
    pub outer: u16,
    /// VLAN id of the inner tag, 0 where there is one tag only.
    pub inner: u16,
}

/// What a worker has to do with a packet.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// The FIB sends it into a tunnel: seal it.
    Outbound = 1,
    /// It is ESP for an SA of ours: open it.
    Inbound = 2,
}

/// What the program found out about a packet that it redirects, so that the worker asks no FIB and parses nothing twice.
///
/// The [`NOTE_BYTES`] bytes directly before the frame in its UMEM chunk: XDP metadata (`bpf_xdp_adjust_meta`), which
/// the kernel copies along in copy mode and the driver leaves in place in zero-copy mode. Only our program redirects
/// into our sockets and it always writes one; a driver without metadata gets no redirect at all. [`Note::MAGIC`] is
/// there all the same, so that a chunk of other origin is dropped and not misread. The offsets are within the frame
/// and were checked by [`crate::classify`]: headers of the length that [`crate::packet`] needs were there.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Note {
    /// [`Note::MAGIC`].
    pub magic: u32,
    /// A [`Work`].
    pub work: u8,
    /// Offset of the IP header from the start of the frame in bytes: 14, 18 or 22.
    pub network: u8,
    /// Inbound: offset of the ESP header from the start of the frame in bytes. Outbound: 0.
    pub esp: u8,
    /// Zero.
    pub padding: u8,
    /// Inbound: index of the SA's words in `SA_WORDS`. Outbound: interface index of the tunnel's device.
    pub target: u32,
    /// Interface index that the packet was routed for: the VLAN device where it is tagged.
    pub link: u32,
}

/// Size of a [`Note`].
pub const NOTE_BYTES: usize = 16;
const _: () = assert!(size_of::<Note>() == NOTE_BYTES);

impl Note {
    /// First four bytes of a note.
    pub const MAGIC: u32 = 0x4950_5801;

    /// Writes the note as it stands before the frame.
    pub const fn to_bytes(self) -> [u8; NOTE_BYTES] {
        let magic = self.magic.to_ne_bytes();
        let target = self.target.to_ne_bytes();
        let link = self.link.to_ne_bytes();
        [
            magic[0],
            magic[1],
            magic[2],
            magic[3],
            self.work,
            self.network,
            self.esp,
            self.padding,
            target[0],
            target[1],
            target[2],
            target[3],
            link[0],
            link[1],
            link[2],
            link[3],
        ]
    }

    /// Reads the bytes before a frame; `None` if they are no note of this version.
    pub fn read(bytes: &[u8; NOTE_BYTES]) -> Option<(Work, Self)> {
        let [
            m0,
            m1,
            m2,
            m3,
            work,
            network,
            esp,
            padding,
            t0,
            t1,
            t2,
            t3,
            l0,
            l1,
            l2,
            l3,
        ] = *bytes;
        let note = Self {
            magic: u32::from_ne_bytes([m0, m1, m2, m3]),
            work,
            network,
            esp,
            padding,
            target: u32::from_ne_bytes([t0, t1, t2, t3]),
            link: u32::from_ne_bytes([l0, l1, l2, l3]),
        };
        let work = match work {
            1 => Work::Outbound,
            2 => Work::Inbound,
            _ => return None,
        };
        (note.magic == Self::MAGIC).then_some((work, note))
    }
}

/// How much passed in the current second: packets of unknown SPIs, in the element of `LIMITER` of each CPU; IKE of no known
/// SA from one of many groups of sources, in `IKE_SOURCES`, and in all, in the element of `IKE_TOTALS` of its stage.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limiter {
    /// Second of CLOCK_MONOTONIC.
    pub second: u64,
    /// Packets that passed in it.
    pub passed: u64,
}

impl Limiter {
    /// Whether one more may pass now, and the limiter afterwards.
    pub const fn admit(self, now_seconds: u64, per_second: u32) -> (bool, Self) {
        let passed = if self.second == now_seconds {
            self.passed
        } else {
            0
        };
        let admitted = passed < per_second as u64;
        let next = Self {
            second: now_seconds,
            passed: if admitted { passed + 1 } else { passed },
        };
        (admitted, next)
    }
}

/// Makes the layouts plain old data for aya's typed maps.
#[cfg(feature = "aya")]
mod pod {
    #![expect(
        unsafe_code,
        reason = "aya reads and writes map elements as bytes and wants to be told that it may"
    )]
    use super::{
        Header, InboundEntry, InboundKey, Limiter, LinkEntry, Settings, TunnelEntry, VlanKey,
    };

    macro_rules! pod {
        ($($layout:ty),*) => { $(
            // SAFETY: `repr(C)`, integers and arrays of integers only, every byte explicit, any bytes valid.
            unsafe impl aya::Pod for $layout {}
        )* };
    }
    pod!(
        Header,
        Settings,
        InboundKey,
        InboundEntry,
        TunnelEntry,
        LinkEntry,
        VlanKey,
        Limiter
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_both_families_come_back_as_they_went_in() {
        for text in ["192.0.2.1", "2001:db8::1", "::"] {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(unmapped(mapped(address)), address);
        }
        assert_eq!(
            mapped("192.0.2.1".parse().unwrap()),
            *b"\0\0\0\0\0\0\0\0\0\0\xff\xff\xc0\0\x02\x01"
        );
    }

    #[test]
    fn a_note_is_read_as_it_was_written_and_other_bytes_are_none() {
        let note = Note {
            magic: Note::MAGIC,
            work: Work::Inbound as u8,
            network: 14,
            esp: 34,
            padding: 0,
            target: 7,
            link: 3,
        };
        assert_eq!(Note::read(&note.to_bytes()), Some((Work::Inbound, note)));
        assert_eq!(Note::read(&[0; NOTE_BYTES]), None);
        let mut other = note.to_bytes();
        other[4] = 9;
        assert_eq!(Note::read(&other), None);
    }

    #[test]
    fn sources_are_spread_over_the_buckets_and_a_seed_spreads_them_otherwise() {
        let bucket = |number: u32, seed| {
            let address = IpAddr::from(number.wrapping_mul(7).to_be_bytes());
            source_bucket(&mapped(address), seed)
        };
        let mut load = vec![0_u32; IKE_SOURCE_BUCKETS as usize];
        for number in 0..IKE_SOURCE_BUCKETS * 4 {
            load[bucket(number, 99) as usize] += 1;
        }
        assert!(
            load.iter().all(|load| *load < 24),
            "{:?}",
            load.iter().max()
        );
        let moved = (0..1000).filter(|number| bucket(*number, 1) != bucket(*number, 2));
        assert!(moved.count() > 900);
        let of = |text: &str| source_bucket(&mapped(text.parse().unwrap()), 5);
        assert_eq!(of("2001:db8::1"), of("2001:db8::2"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
    }

    #[test]
    fn the_limiter_admits_so_many_a_second() {
        let mut limiter = Limiter {
            second: 0,
            passed: 0,
        };
        let mut passed = 0;
        for now in [5, 5, 5, 5, 6] {
            let (admitted, next) = limiter.admit(now, 2);
            passed += u32::from(admitted);
            limiter = next;
        }
        assert_eq!(passed, 3);
    }
}
