//! The outer headers of ESP packets: IPv4 or IPv6, with UDP in between where the SA is encapsulated (RFC 3948).

use std::{net::IpAddr, ops::Range};

use super::inner::{Inner, internet_checksum};
use crate::dataplane::seam::{Df, Outer};

const UDP_BYTES: usize = 8;
const ESP: u8 = 50;
const UDP: u8 = 17;
/// TTL and hop limit of what we send.
const TTL: u8 = 64;

/// What the outer headers of one SA are made of.
#[derive(Clone, Copy, Debug)]
pub struct OuterTemplate {
    /// Addresses and ports.
    pub outer: Outer,
    /// Don't-fragment bit of the outer IPv4 header.
    pub df: Df,
    /// Copies the inner DSCP; otherwise it is 0.
    pub copy_dscp: bool,
}

impl OuterTemplate {
    /// Bytes of the headers before ESP.
    pub fn header_bytes(&self) -> usize {
        let ip = if self.outer.local.is_ipv6() { 40 } else { 20 };
        ip + if self.outer.encap.is_some() {
            UDP_BYTES
        } else {
            0
        }
    }

    /// The TOS byte or traffic class that an inner packet gets outside.
    // RFC 6040 section 4.1: normal mode copies the ECN field as it is.
    pub fn tos(&self, inner: &Inner) -> u8 {
        if self.copy_dscp {
            inner.tos
        } else {
            inner.tos & 3
        }
    }

    /// Writes the headers before `esp` and returns the range of the whole packet; `None` if there is no headroom, or the
    /// packet would be longer than 65535 bytes.
    pub fn write(
        &self,
        frame: &mut [u8],
        esp: Range<usize>,
        inner: &Inner,
        sequence: u64,
    ) -> Option<Range<usize>> {
        let start = esp.start.checked_sub(self.header_bytes())?;
        let packet = frame.get_mut(start..esp.end)?;
        let df = match self.df {
            Df::Copy => inner.df,
            Df::Set => true,
            Df::Clear => false,
        };
        match (self.outer.local, self.outer.remote) {
            (IpAddr::V4(local), IpAddr::V4(remote)) => {
                let header = packet.first_chunk_mut::<20>()?;
                let length = u16::try_from(esp.end - start).ok()?;
                header[0] = 0x45;
                header[1] = self.tos(inner);
                header[2..4].copy_from_slice(&length.to_be_bytes());
                // RFC 6864 section 4: only a packet that may be fragmented needs an identification.
                let id = if df { [0, 0] } else { low16(sequence) };
                header[4..6].copy_from_slice(&id);
                header[6..8].copy_from_slice(&if df { [0x40, 0] } else { [0, 0] });
                header[8] = TTL;
                header[9] = self.protocol();
                header[10..12].fill(0);
                header[12..16].copy_from_slice(&local.octets());
                header[16..20].copy_from_slice(&remote.octets());
                let checksum = internet_checksum(&[header.as_slice()]);
                header[10..12].copy_from_slice(&checksum.to_be_bytes());
            }
            (IpAddr::V6(local), IpAddr::V6(remote)) => {
                let header = packet.first_chunk_mut::<40>()?;
                let length = u16::try_from((esp.end - start).checked_sub(40)?).ok()?;
                let tos = self.tos(inner);
                header[0] = 0x60 | tos >> 4;
                header[1] = tos << 4;
                header[2..4].fill(0);
                header[4..6].copy_from_slice(&length.to_be_bytes());
                header[6] = self.protocol();
                header[7] = TTL;
                header[8..24].copy_from_slice(&local.octets());
                header[24..40].copy_from_slice(&remote.octets());
            }
            _ => return None,
        }
        self.write_udp(packet)?;
        Some(start..esp.end)
    }

    fn protocol(&self) -> u8 {
        if self.outer.encap.is_some() { UDP } else { ESP }
    }

    fn write_udp(&self, packet: &mut [u8]) -> Option<()> {
        let Some(encap) = self.outer.encap else {
            return Some(());
        };
        let (ip, udp) = packet.split_at_mut_checked(self.header_bytes() - UDP_BYTES)?;
        let length = u16::try_from(udp.len()).ok()?.to_be_bytes();
        udp.get_mut(0..2)?
            .copy_from_slice(&encap.local_port.to_be_bytes());
        udp.get_mut(2..4)?
            .copy_from_slice(&encap.remote_port.to_be_bytes());
        udp.get_mut(4..6)?.copy_from_slice(&length);
        // RFC 3948 section 2.1: zero over IPv4. RFC 8200 section 8.1: over IPv6 it is needed.
        udp.get_mut(6..8)?.fill(0);
        if self.outer.local.is_ipv6() {
            let addresses = ip.get(8..40)?;
            let checksum = match internet_checksum(&[addresses, &[0, UDP], &length, udp]) {
                0 => 0xffff,
                checksum => checksum,
            };
            udp.get_mut(6..8)?.copy_from_slice(&checksum.to_be_bytes());
        }
        Some(())
    }
}

fn low16(sequence: u64) -> [u8; 2] {
    let [.., high, low] = sequence.to_be_bytes();
    [high, low]
}
