//! The sockets of an engine: ESP and IKE arrive on them, and ESP of the slow path leaves through them.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
};

use ipsec_common::Reason;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::{
    dataplane::{
        seam::IkeDatagram,
        xdp::fragment::{fragment_v4, fragment_v6},
    },
    net::socket::{Listener, RawSender},
};

// RFC 3948 section 2.2: four zero bytes, where ESP has an SPI, announce an IKE message.
const NON_ESP_MARKER: [u8; 4] = [0; 4];

/// What arrives on a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Raw ESP; over IPv4 with its IP header.
    Esp,
    /// IKE without marker.
    Ike,
    /// ESP, keep-alives, and IKE behind a marker.
    Nat,
}

/// A socket and what arrives on it.
#[derive(Debug)]
pub(super) struct Inlet {
    pub(super) kind: Kind,
    pub(super) v6: bool,
    pub(super) listener: Listener,
}

/// All sockets. IPv6 ones are missing where the kernel has no IPv6.
#[derive(Debug)]
pub struct Sockets {
    inlets: Vec<Inlet>,
    ready: Epoll,
    sender_v4: RawSender,
    sender_v6: Option<RawSender>,
    ike_port: u16,
}

impl Sockets {
    /// Opens all sockets, in the network namespace that the caller is in.
    ///
    /// # Errors
    ///
    /// `EADDRINUSE` if another IKE daemon runs, `EPERM` without the capabilities.
    pub fn open(ike_port: u16, nat_port: u16, mark: u32) -> io::Result<Self> {
        let ready = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let mut inlets = Vec::new();
        let mut open = |kind, v6| -> io::Result<()> {
            let listener = match kind {
                Kind::Esp => Listener::esp(v6, mark),
                Kind::Ike => Listener::udp(v6, ike_port, mark),
                Kind::Nat => Listener::udp_beside_encapsulated(v6, nat_port, mark),
            }?;
            let event = EpollEvent::new(EpollFlags::EPOLLIN, inlets.len() as u64);
            ready.add(listener.as_fd(), event)?;
            inlets.push(Inlet { kind, v6, listener });
            Ok(())
        };
        for kind in [Kind::Esp, Kind::Ike, Kind::Nat] {
            open(kind, false)?;
        }
        let sender_v6 = match RawSender::new(true, mark) {
            Ok(sender) => Some(sender),
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => None,
            Err(error) => return Err(error),
        };
        if sender_v6.is_some() {
            for kind in [Kind::Esp, Kind::Ike, Kind::Nat] {
                open(kind, true)?;
            }
        }
        Ok(Self {
            inlets,
            ready,
            sender_v4: RawSender::new(false, mark)?,
            sender_v6,
            ike_port,
        })
    }

    /// Keeps ESP with these SPIs, which another engine opens, away from the raw sockets.
    ///
    /// # Errors
    ///
    /// What the kernel refused.
    pub fn ignore(&self, spis: &[u32]) -> io::Result<()> {
        let raw = self.inlets.iter().filter(|inlet| inlet.kind == Kind::Esp);
        raw.into_iter()
            .try_for_each(|inlet| inlet.listener.ignore(inlet.v6, spis))
    }

    /// Lets IKE and ESP pass whatever the IPsec policies of the whole host say: those protect what travels in tunnels.
    ///
    /// # Errors
    ///
    /// What the kernel refused.
    pub fn pass_policies(&self) -> io::Result<()> {
        for inlet in &self.inlets {
            inlet.listener.pass_policies(inlet.v6)?;
        }
        self.sender_v4.pass_policies(false)?;
        self.sender_v6
            .as_ref()
            .map_or(Ok(()), |sender| sender.pass_policies(true))
    }

    /// Sends an IKE message, behind the marker unless it leaves from the plain IKE port.
    ///
    /// # Errors
    ///
    /// Those of sendmsg(2); `EAFNOSUPPORT` for IPv6 where there is none.
    pub fn send_ike(&self, datagram: &IkeDatagram) -> io::Result<()> {
        let kind = if datagram.local.port() == self.ike_port {
            Kind::Ike
        } else {
            Kind::Nat
        };
        let v6 = datagram.remote.is_ipv6();
        let inlet = self
            .inlets
            .iter()
            .find(|inlet| inlet.kind == kind && inlet.v6 == v6)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EAFNOSUPPORT))?;
        let marker: &[u8] = match kind {
            Kind::Nat => &NON_ESP_MARKER,
            Kind::Ike | Kind::Esp => &[],
        };
        inlet.listener.send(
            datagram.local.ip(),
            datagram.remote,
            &[marker, &datagram.bytes],
        )
    }

    /// Sends a whole outer packet. One that is too long for the path is cut: it comes only from a tunnel whose MTU IPv6
    /// keeps above what the path takes, or whose MTU is just changing.
    ///
    /// # Errors
    ///
    /// The reason to count, and what the kernel said.
    pub fn send_packet(
        &self,
        to: IpAddr,
        packet: &[u8],
        mtu: u16,
    ) -> Result<(), (Reason, io::Error)> {
        let mtu = usize::from(mtu);
        let fragments = match to {
            _ if packet.len() <= mtu => None,
            IpAddr::V4(_) => fragment_outer_v4(packet, mtu),
            IpAddr::V6(_) => fragment_v6(packet, mtu, sequence(packet, 40, 6)),
        };
        match fragments {
            None => self.send_one(to, packet),
            Some(fragments) => fragments
                .iter()
                .try_for_each(|fragment| self.send_one(to, fragment)),
        }
        .map_err(|error| match error.raw_os_error() {
            Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES | libc::EINVAL) => {
                (Reason::NoRoute, error)
            }
            _ => (Reason::SendFailed, error),
        })
    }

    fn send_one(&self, to: IpAddr, packet: &[u8]) -> io::Result<()> {
        match (to, &self.sender_v6) {
            (IpAddr::V4(_), _) => self.sender_v4.send(to, packet),
            (IpAddr::V6(_), Some(sender)) => sender.send(to, packet),
            (IpAddr::V6(_), None) => Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT)),
        }
    }

    /// Waits until packets or errors have arrived, for so long at most; tells where there are errors.
    pub(super) fn wait(&self, milliseconds: u8) -> Vec<(&Inlet, bool)> {
        let mut events = [EpollEvent::empty(); 8];
        let count = self
            .ready
            .wait(&mut events, EpollTimeout::from(milliseconds))
            .unwrap_or_default();
        events
            .iter()
            .take(count)
            .filter_map(|event| {
                let inlet = self.inlets.get(usize::try_from(event.data()).ok()?)?;
                Some((inlet, event.events().contains(EpollFlags::EPOLLERR)))
            })
            .collect()
    }
}

/// Cuts an outer IPv4 packet without options, whatever its DF bit says.
fn fragment_outer_v4(packet: &[u8], mtu: usize) -> Option<Vec<Vec<u8>>> {
    let mut packet = packet.to_vec();
    let [.., high, low] = sequence(&packet, 20, 9).to_be_bytes();
    packet.get_mut(4..8)?.copy_from_slice(&[high, low, 0, 0]);
    fragment_v4(&packet, mtu)
}

/// Something that differs between the packets of a pair of addresses: the low half of the ESP sequence number, which
/// stands behind the SPI, with or without UDP in front.
fn sequence(packet: &[u8], ip_bytes: usize, protocol_at: usize) -> u32 {
    const UDP: u8 = 17;
    let udp_bytes = if packet.get(protocol_at) == Some(&UDP) {
        8
    } else {
        0
    };
    packet
        .get(ip_bytes + udp_bytes + 4..)
        .and_then(|rest| rest.first_chunk::<4>())
        .map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

/// What a datagram on the port of encapsulated ESP is.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::dataplane) enum Datagram {
    /// An IKE message, which starts at this offset.
    Ike(usize),
    /// ESP.
    Esp,
    /// A keep-alive, or too short for anything.
    Nothing,
}

impl Datagram {
    pub(in crate::dataplane) fn of(bytes: &[u8]) -> Self {
        match bytes.first_chunk::<4>() {
            // RFC 3948 section 2.3: a keep-alive is the one byte 0xff, and is to be ignored.
            None => Self::Nothing,
            Some(&NON_ESP_MARKER) => Self::Ike(NON_ESP_MARKER.len()),
            Some(_) => Self::Esp,
        }
    }
}

/// An IKE datagram as the daemon gets it.
pub(super) fn ike(local: SocketAddr, remote: SocketAddr, bytes: &[u8]) -> IkeDatagram {
    IkeDatagram {
        local,
        remote,
        bytes: bytes.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outer_packet_is_cut_whatever_its_df_bit_says() {
        let mut packet = vec![0x45, 0, 0, 120, 0, 0, 0x40, 0, 64, 50, 0, 0];
        packet.extend([192, 0, 2, 1, 192, 0, 2, 2]); // addresses
        packet.extend([0, 0, 16, 1, 0, 1, 2, 3]); // SPI and sequence number
        packet.resize(120, 7);
        let fragments = fragment_outer_v4(&packet, 76).unwrap();
        assert_eq!(fragments.len(), 2);
        assert_eq!(fragments[0][4..8], [2, 3, 0x20, 0]);
        assert_eq!(fragments[1][4..8], [2, 3, 0, 7]);
    }

    #[test]
    fn what_shares_the_port_is_told_apart() {
        assert_eq!(Datagram::of(&[0xff]), Datagram::Nothing);
        assert_eq!(Datagram::of(&[]), Datagram::Nothing);
        assert_eq!(Datagram::of(&[0, 0, 0, 0, 1]), Datagram::Ike(4));
        assert_eq!(Datagram::of(&[0, 0, 1, 0, 1]), Datagram::Esp);
    }
}
