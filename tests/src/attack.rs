//! An attacker on the network between: it replays, forges and floods, under whatever source address it likes.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, ensure};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    capture::{Kind, Report},
    netns::Netns,
};

/// IP protocol numbers.
const UDP: u8 = 17;
const ESP: u8 = 50;
/// `IPPROTO_RAW`: the sender writes the whole IP header.
const RAW: i32 = 255;

/// A socket that sends IPv4 packets as they are, headers included.
#[derive(Debug)]
pub struct Attacker {
    socket: Socket,
}

impl Attacker {
    /// In a namespace.
    ///
    /// # Errors
    ///
    /// The raw socket cannot be opened.
    pub fn new(netns: &Netns) -> anyhow::Result<Self> {
        let socket = netns.run(|| {
            Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(RAW))).context("a raw socket")
        })?;
        socket.set_send_buffer_size(8 << 20)?;
        Ok(Self { socket })
    }

    /// Sends an IPv4 packet, whose header checksum the kernel fills in.
    ///
    /// # Errors
    ///
    /// It is no IPv4 packet, or the kernel refuses it.
    pub fn send(&self, packet: &[u8]) -> anyhow::Result<()> {
        let [_, to] = addresses(packet).context("no IPv4 packet")?;
        self.socket
            .send_to(packet, &SocketAddr::new(IpAddr::V4(to), 0).into())?;
        Ok(())
    }

    /// Sends all that can be sent; tells how many were.
    pub fn send_all<'a>(&self, packets: impl IntoIterator<Item = &'a [u8]>) -> u64 {
        packets
            .into_iter()
            .map(|packet| u64::from(self.send(packet).is_ok()))
            .sum()
    }
}

/// Packets of one kind in a capture that go to an address.
pub fn captured(report: &Report, kind: Kind, to: IpAddr) -> Vec<&[u8]> {
    report
        .kept
        .iter()
        .filter(|(of, packet)| {
            *of == kind && addresses(packet).is_some_and(|[_, destination]| destination == to)
        })
        .map(|(_, packet)| packet.as_slice())
        .collect()
}

/// Source and destination of an IPv4 packet.
fn addresses(packet: &[u8]) -> Option<[Ipv4Addr; 2]> {
    let header = packet.get(..20).filter(|header| header[0] >> 4 == 4)?;
    let at = |at: usize| Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]);
    Some([at(12), at(16)])
}

/// The packet with one bit of its last byte turned over.
pub fn damaged(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if let Some(last) = packet.last_mut() {
        *last ^= 1;
    }
    packet
}

/// ESP with an SPI and a sequence number, and noise for the rest.
pub fn esp(from: Ipv4Addr, to: Ipv4Addr, spi: u32, sequence: u32) -> Vec<u8> {
    let mut payload = spi.to_be_bytes().to_vec();
    payload.extend(sequence.to_be_bytes());
    payload.extend(noise(sequence, 80));
    ipv4(from, to, ESP, &payload)
}

/// UDP without checksum.
pub fn udp(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), data: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut payload = from.1.to_be_bytes().to_vec();
    payload.extend(to.1.to_be_bytes());
    payload.extend(u16::try_from(8 + data.len())?.to_be_bytes());
    payload.extend([0; 2]);
    payload.extend(data);
    Ok(ipv4(from.0, to.0, UDP, &payload))
}

/// The IKE message in a captured packet on port 500, without IP and UDP headers.
///
/// # Errors
///
/// There is none.
pub fn ike_message(packet: &[u8]) -> anyhow::Result<&[u8]> {
    ensure!(packet.get(9) == Some(&UDP), "no UDP packet");
    packet.get(28..).context("a short packet")
}

/// The same IKE_SA_INIT under another initiator SPI: to the responder, another initiator.
pub fn with_initiator_spi(message: &[u8], number: u64) -> Vec<u8> {
    let mut message = message.to_vec();
    if let Some(spi) = message.get_mut(..8) {
        spi.copy_from_slice(&(number | 1 << 63).to_be_bytes());
    }
    message
}

/// Bytes that look like nothing.
pub fn noise(seed: u32, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state.to_be_bytes()[0]
        })
        .collect()
}

/// An IPv4 packet; length and checksum of its header are the kernel's to fill in.
fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0];
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(payload);
    packet
}
