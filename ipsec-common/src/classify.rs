//! What a frame is, as far as its own bytes tell: the XDP program's reading of it, which asks no map and no FIB.
//!
//! The same function runs in the kernel, in host tests and in proptest. It is written for the verifier: reads at small
//! offsets only, no loops over packet contents. Packet work that needs more than the first headers is [`crate::packet`]'s.

pub mod ike;

use crate::{Reason, maps::MappedAddress};

/// Bytes of a frame, of which every read is checked.
pub trait Frame {
    /// Reads `N` bytes at `offset`; `None` beyond the end.
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;
    /// Length of the frame in bytes.
    fn length(&self) -> usize;
}

impl Frame for [u8] {
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let end = offset.checked_add(N)?;
        self.get(offset..end)?.try_into().ok()
    }

    fn length(&self) -> usize {
        self.len()
    }
}

/// The IP packet in a frame, so far as the XDP program needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outline {
    /// Destination of the frame.
    pub mac: [u8; 6],
    /// VLAN ids of outer and inner tag; 0 where there is none.
    pub vlan: (u16, u16),
    /// Offset of the IP header from the start of the frame in bytes: 14, 18 or 22.
    pub network: usize,
    /// IPv6, otherwise IPv4.
    pub is_v6: bool,
    /// Source.
    pub source: MappedAddress,
    /// Destination.
    pub destination: MappedAddress,
    /// IPv4: protocol. IPv6: next header of the fixed header.
    pub protocol: u8,
    /// Offset of what follows the IP header without options, from the start of the frame in bytes.
    pub transport: usize,
    /// Length of the IP packet in bytes, its header included.
    pub bytes: u16,
    /// TTL or hop limit.
    pub hops: u8,
    /// IPv4: TOS octet.
    pub tos: u8,
    /// IPv6: version, traffic class and flow label in network order.
    pub flow: [u8; 4],
    /// A fragment, the first one included.
    pub is_fragment: bool,
    /// IPv4 options or IPv6 extension headers.
    pub has_options: bool,
}

const ETHERTYPE_V4: u16 = 0x0800;
const ETHERTYPE_V6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_VLAN_OUTER: u16 = 0x88a8;
const PROTOCOL_UDP: u8 = 17;
const PROTOCOL_ESP: u8 = 50;
const UDP_HEADER_BYTES: usize = 8;
/// SPI and sequence number.
const ESP_HEADER_BYTES: u16 = 8;
/// UDP's length field with such a header behind it.
const SHORTEST_ESP_IN_UDP: u16 = 16;

impl Outline {
    /// Reads a frame; `None` if it is no unicast IP packet, or one whose lengths contradict each other: the kernel's business.
    #[inline(always)]
    pub fn of<F: Frame + ?Sized>(frame: &F) -> Option<Self> {
        let mac: [u8; 6] = frame.read(0)?;
        if mac[0] & 1 != 0 {
            return None;
        }
        let (network, vlan, ethertype) = tags(frame)?;
        match ethertype {
            ETHERTYPE_V4 => Self::v4(frame, mac, vlan, network),
            ETHERTYPE_V6 => Self::v6(frame, mac, vlan, network),
            _ => None,
        }
    }

    #[inline(always)]
    fn v4<F: Frame + ?Sized>(
        frame: &F,
        mac: [u8; 6],
        vlan: (u16, u16),
        network: usize,
    ) -> Option<Self> {
        let header: [u8; 20] = frame.read(network)?;
        let header_words = header[0] & 0xf;
        let bytes = u16::from_be_bytes([header[2], header[3]]);
        let fits = network + bytes as usize <= frame.length();
        if header[0] >> 4 != 4 || header_words < 5 || (bytes as usize) < 20 || !fits {
            return None;
        }
        // Class D and E and the limited broadcast; broadcasts of a subnet come in multicast frames.
        if header[16] >= 224 {
            return None;
        }
        let mapped = |at: usize| {
            let mut address = [0; 16];
            address[10] = 0xff;
            address[11] = 0xff;
            address[12] = header[at];
            address[13] = header[at + 1];
            address[14] = header[at + 2];
            address[15] = header[at + 3];
            address
        };
        Some(Self {
            mac,
            vlan,
            network,
            is_v6: false,
            source: mapped(12),
            destination: mapped(16),
            protocol: header[9],
            transport: network + 20,
            bytes,
            hops: header[8],
            tos: header[1],
            flow: [0; 4],
            // More fragments, or an offset.
            is_fragment: header[6] & 0x3f != 0 || header[7] != 0,
            has_options: header_words != 5,
        })
    }

    #[inline(always)]
    fn v6<F: Frame + ?Sized>(
        frame: &F,
        mac: [u8; 6],
        vlan: (u16, u16),
        network: usize,
    ) -> Option<Self> {
        let start: [u8; 8] = frame.read(network)?;
        let source: [u8; 16] = frame.read(network + 8)?;
        let destination: [u8; 16] = frame.read(network + 24)?;
        let bytes = u16::from_be_bytes([start[4], start[5]]).checked_add(40)?;
        let fits = network + bytes as usize <= frame.length();
        if start[0] >> 4 != 6 || !fits || destination[0] == 0xff {
            return None;
        }
        // Link-local packets are never forwarded.
        if destination[0] == 0xfe && destination[1] & 0xc0 == 0x80 {
            return None;
        }
        let protocol = start[6];
        Some(Self {
            mac,
            vlan,
            network,
            is_v6: true,
            source,
            destination,
            protocol,
            transport: network + 40,
            bytes,
            hops: start[7],
            tos: 0,
            flow: [start[0], start[1], start[2], start[3]],
            is_fragment: protocol == 44,
            // Hop-by-hop, routing, AH, destination options, mobility, HIP, shim6.
            has_options: matches!(protocol, 0 | 43 | 51 | 60 | 135 | 139 | 140),
        })
    }

    /// The SPI and the offset of the ESP header from the start of the frame, if this is ESP as it comes in whole: bare, or in UDP to `nat_port`.
    #[inline(always)]
    pub fn esp<F: Frame + ?Sized>(&self, frame: &F, nat_port: u16) -> Option<([u8; 4], usize)> {
        if self.is_fragment || self.has_options {
            return None;
        }
        // The lengths of the headers, not of the frame, which may be padded.
        #[expect(clippy::cast_possible_truncation, reason = "20 or 40, by construction")]
        let payload = self.bytes - (self.transport - self.network) as u16;
        match self.protocol {
            PROTOCOL_ESP if payload >= ESP_HEADER_BYTES => {
                Some((frame.read(self.transport)?, self.transport))
            }
            PROTOCOL_UDP => {
                let header: [u8; UDP_HEADER_BYTES + 4] = frame.read(self.transport)?;
                let port = u16::from_be_bytes([header[2], header[3]]);
                let length = u16::from_be_bytes([header[4], header[5]]);
                let spi = [header[8], header[9], header[10], header[11]];
                // RFC 3948 section 2.2: four zero bytes in the place of the SPI mark IKE; section 2.3: a keep-alive is one byte.
                let is_esp = length >= SHORTEST_ESP_IN_UDP && length <= payload && spi != [0; 4];
                (port == nat_port && nat_port != 0 && is_esp)
                    .then_some((spi, self.transport + UDP_HEADER_BYTES))
            }
            _ => None,
        }
    }

    /// Source and destination port in network order as the FIB's policy rules see them; zero where there are none.
    #[inline(always)]
    pub fn ports<F: Frame + ?Sized>(&self, frame: &F) -> ([u8; 2], [u8; 2]) {
        let has_ports = matches!(self.protocol, 6 | PROTOCOL_UDP | 132);
        if !has_ports || self.is_fragment || self.has_options {
            return ([0; 2], [0; 2]);
        }
        match frame.read::<4>(self.transport) {
            Some([s0, s1, d0, d1]) => ([s0, s1], [d0, d1]),
            None => ([0; 2], [0; 2]),
        }
    }

    /// Why a packet into a tunnel takes the slow path whatever the tunnel, if it does.
    #[inline(always)]
    pub const fn slow(&self) -> Option<Reason> {
        if self.is_fragment {
            Some(Reason::SlowFragment)
        } else if self.has_options {
            Some(Reason::SlowOptions)
        } else if self.hops <= 1 {
            Some(Reason::SlowTtl)
        } else {
            None
        }
    }
}

/// Offset of the network header, the VLAN ids and the Ethernet type behind up to two tags.
#[inline(always)]
fn tags<F: Frame + ?Sized>(frame: &F) -> Option<(usize, (u16, u16), u16)> {
    let ethertype = u16::from_be_bytes(frame.read(12)?);
    if ethertype != ETHERTYPE_VLAN && ethertype != ETHERTYPE_VLAN_OUTER {
        return Some((14, (0, 0), ethertype));
    }
    let [t0, t1, e0, e1] = frame.read(14)?;
    let outer = u16::from_be_bytes([t0, t1]) & 0xfff;
    let ethertype = u16::from_be_bytes([e0, e1]);
    if ethertype != ETHERTYPE_VLAN {
        return Some((18, (outer, 0), ethertype));
    }
    let [t0, t1, e0, e1] = frame.read(18)?;
    let inner = u16::from_be_bytes([t0, t1]) & 0xfff;
    Some((22, (outer, inner), u16::from_be_bytes([e0, e1])))
}

#[cfg(test)]
mod tests;
