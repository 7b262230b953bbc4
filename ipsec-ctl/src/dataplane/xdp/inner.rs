//! What the pipeline reads from an inner packet before sealing it and after opening it, and what it changes there.
//!
//! Changes keep checksums right incrementally (RFC 1624), so that a checksum that was wrong stays wrong.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::selectors::Flow;

const TCP: u8 = 6;
const FRAGMENT_HEADER: u8 = 44;
/// Extension headers looked at before a packet is refused.
const MOST_EXTENSION_HEADERS: usize = 8;

/// An inner packet, as far as the pipeline looks.
#[derive(Clone, Copy, Debug)]
pub struct Inner {
    /// What selectors look at.
    pub flow: Flow,
    /// DSCP and ECN: the TOS byte or traffic class.
    pub tos: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Must not be fragmented: DF over IPv4, always over IPv6.
    pub df: bool,
    /// One of several fragments.
    pub fragment: bool,
    /// Length in bytes by its own header; what follows is padding.
    pub bytes: usize,
    /// Offset of the header behind the IP headers; only the first fragment holds one.
    transport: Option<usize>,
}

/// Its headers are truncated or contradict each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

impl Inner {
    /// Reads an IPv4 or IPv6 packet.
    pub fn parse(packet: &[u8]) -> Result<Self, Malformed> {
        match packet.first().map(|byte| byte >> 4) {
            Some(4) => Self::parse_v4(packet).ok_or(Malformed),
            Some(6) => Self::parse_v6(packet).ok_or(Malformed),
            _ => Err(Malformed),
        }
    }

    /// Whether it is IPv6.
    pub fn is_v6(&self) -> bool {
        self.flow.source.is_ipv6()
    }

    /// The next header value that ESP names it by.
    pub fn next_header(&self) -> u8 {
        if self.is_v6() { 41 } else { 4 }
    }

    fn parse_v4(packet: &[u8]) -> Option<Self> {
        let header = packet.first_chunk::<20>()?;
        let header_bytes = usize::from(header[0] & 0x0f) * 4;
        let bytes = usize::from(be16(packet, 2)?);
        if header_bytes < 20 || bytes < header_bytes || bytes > packet.len() {
            return None;
        }
        let flags = be16(packet, 6)?;
        let offset = flags & 0x1fff;
        let more = flags & 0x2000 != 0;
        let packet = packet.get(..bytes)?;
        let protocol = header[9];
        let transport = (offset == 0).then_some(header_bytes);
        Some(Self {
            flow: Flow {
                source: IpAddr::V4(Ipv4Addr::from(*header[12..].first_chunk::<4>()?)),
                destination: IpAddr::V4(Ipv4Addr::from(*header[16..].first_chunk::<4>()?)),
                protocol,
                ports: transport.and_then(|at| ports(packet, protocol, at)),
            },
            tos: header[1],
            ttl: header[8],
            df: flags & 0x4000 != 0,
            fragment: more || offset != 0,
            bytes,
            transport,
        })
    }

    fn parse_v6(packet: &[u8]) -> Option<Self> {
        let header = packet.first_chunk::<40>()?;
        let bytes = 40 + usize::from(be16(packet, 4)?);
        let packet = packet.get(..bytes)?;
        let (protocol, at, fragment) = skip_extensions(packet, header[6])?;
        let transport = (fragment != Some(Fragment::Later)).then_some(at);
        Some(Self {
            flow: Flow {
                source: IpAddr::V6(Ipv6Addr::from(*header[8..].first_chunk::<16>()?)),
                destination: IpAddr::V6(Ipv6Addr::from(*header[24..].first_chunk::<16>()?)),
                protocol,
                ports: transport.and_then(|at| ports(packet, protocol, at)),
            },
            tos: header[0] << 4 | header[1] >> 4,
            ttl: header[7],
            df: true,
            fragment: fragment.is_some(),
            bytes,
            transport,
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fragment {
    First,
    Later,
}

/// Protocol and offset behind the extension headers of an IPv6 packet, and which fragment it is.
fn skip_extensions(packet: &[u8], first: u8) -> Option<(u8, usize, Option<Fragment>)> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const AUTHENTICATION: u8 = 51;
    const DESTINATION: u8 = 60;
    const MOBILITY: u8 = 135;
    let (mut next, mut at, mut fragment) = (first, 40, None);
    for _ in 0..MOST_EXTENSION_HEADERS {
        let length = || packet.get(at + 1).map(|&length| usize::from(length));
        let bytes = match next {
            HOP_BY_HOP | ROUTING | DESTINATION | MOBILITY => 8 * (length()? + 1),
            AUTHENTICATION => 4 * (length()? + 2),
            FRAGMENT_HEADER => {
                let field = be16(packet, at + 2)?;
                if field & 0xfff8 != 0 {
                    return Some((*packet.get(at)?, at + 8, Some(Fragment::Later)));
                }
                fragment = (field & 1 != 0).then_some(Fragment::First);
                8
            }
            _ => return Some((next, at, fragment)),
        };
        next = *packet.get(at)?;
        at = at.checked_add(bytes).filter(|&at| at <= packet.len())?;
    }
    None
}

fn ports(packet: &[u8], protocol: u8, at: usize) -> Option<(u16, u16)> {
    match protocol {
        1 | 58 => Some(Flow::icmp_ports(*packet.get(at)?, *packet.get(at + 1)?)),
        _ if Flow::protocol_has_ports(protocol) => Some((be16(packet, at)?, be16(packet, at + 2)?)),
        _ => None,
    }
}

/// Takes one from the TTL or hop limit of a parsed packet, unless none would be left; tells whether it did.
pub fn decrement_ttl(packet: &mut [u8], inner: &Inner) -> bool {
    if inner.ttl <= 1 {
        return false;
    }
    if inner.is_v6() {
        set(packet, 7, inner.ttl - 1);
    } else {
        let word = u16::from_be_bytes([inner.ttl, inner.flow.protocol]);
        set(packet, 8, inner.ttl - 1);
        adjust_checksum(packet, 10, word, word - 0x0100);
    }
    true
}

/// What ECN marks on the outer and inner header make of the inner one; `None` means drop.
// RFC 6040 section 4.2: the combinations of the figure; Not-ECT inside with CE outside must not be forwarded.
pub fn decapsulate_ecn(inner: u8, outer: u8) -> Option<u8> {
    const NOT_ECT: u8 = 0;
    const ECT_1: u8 = 1;
    const ECT_0: u8 = 2;
    const CE: u8 = 3;
    match (inner & 3, outer & 3) {
        (NOT_ECT, CE) => None,
        (ECT_0 | ECT_1, CE) => Some(CE),
        (ECT_0, ECT_1) => Some(ECT_1),
        (inner, _) => Some(inner),
    }
}

/// Writes the ECN field of a parsed packet, and notes it in `inner`.
pub fn set_ecn(packet: &mut [u8], inner: &mut Inner, ecn: u8) {
    if inner.tos & 3 == ecn {
        return;
    }
    let tos = inner.tos & !3 | ecn;
    inner.tos = tos;
    if inner.is_v6() {
        if let Some(byte) = packet.get_mut(1) {
            *byte = *byte & 0x0f | tos << 4;
        }
    } else {
        let old = be16(packet, 0).unwrap_or_default();
        set(packet, 1, tos);
        adjust_checksum(packet, 10, old, old & 0xff00 | u16::from(tos));
    }
}

/// Lowers the MSS of a TCP SYN to what fits `mtu` bytes; anything else stays as it is.
// RFC 9293 section 3.7.1: the MSS is the MTU less 20 bytes of TCP and the fixed IP header.
pub fn clamp_mss(packet: &mut [u8], inner: &Inner, mtu: u16) {
    let Some(at) = inner.transport.filter(|_| inner.flow.protocol == TCP) else {
        return;
    };
    let most = mtu.saturating_sub(if inner.is_v6() { 60 } else { 40 });
    let Some(segment) = packet.get_mut(at..inner.bytes) else {
        return;
    };
    const SYN: u8 = 0x02;
    if segment.get(13).is_none_or(|flags| flags & SYN == 0) {
        return;
    }
    let header_bytes = usize::from(segment[12] >> 4) * 4;
    let Some(value_at) = find_mss(segment, header_bytes) else {
        return;
    };
    let Some(mss) = be16(segment, value_at) else {
        return;
    };
    if mss <= most {
        return;
    }
    set(segment, value_at, most.to_be_bytes()[0]);
    set(segment, value_at + 1, most.to_be_bytes()[1]);
    // An option may start at an odd offset: then its bytes sit swapped in the checksum's words.
    if value_at % 2 == 0 {
        adjust_checksum(segment, 16, mss, most);
    } else {
        adjust_checksum(segment, 16, mss.swap_bytes(), most.swap_bytes());
    }
}

/// Offset of the MSS value among the options of a TCP header.
fn find_mss(segment: &[u8], header_bytes: usize) -> Option<usize> {
    const END: u8 = 0;
    const NOP: u8 = 1;
    const MSS: u8 = 2;
    let options = segment.get(..header_bytes)?;
    let mut at = 20;
    while at < options.len() {
        match options[at] {
            END => return None,
            NOP => at += 1,
            kind => {
                let bytes = usize::from(*options.get(at + 1)?);
                if kind == MSS {
                    return (bytes == 4 && at + 4 <= options.len()).then_some(at + 2);
                }
                at += bytes.max(2);
            }
        }
    }
    None
}

/// Internet checksum (RFC 1071) of a packet's parts, each of even length but the last.
pub fn internet_checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u64;
    for part in parts {
        let mut words = part.chunks_exact(2);
        for word in &mut words {
            sum += u64::from(u16::from_be_bytes([word[0], word[1]]));
        }
        if let [last] = words.remainder() {
            sum += u64::from(*last) << 8;
        }
    }
    !fold(sum)
}

#[expect(clippy::cast_possible_truncation, reason = "folded below 2^16")]
fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

// RFC 1624 section 3: HC' = ~(~HC + ~m + m').
fn adjust_checksum(packet: &mut [u8], at: usize, old: u16, new: u16) {
    let Some(checksum) = be16(packet, at) else {
        return;
    };
    let sum = fold(u64::from(!checksum) + u64::from(!old) + u64::from(new));
    let [high, low] = (!sum).to_be_bytes();
    set(packet, at, high);
    set(packet, at + 1, low);
}

fn set(packet: &mut [u8], at: usize, value: u8) {
    if let Some(byte) = packet.get_mut(at) {
        *byte = value;
    }
}

fn be16(packet: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]))
}
