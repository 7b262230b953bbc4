//! Sockets on which IKE and ESP arrive, and raw ones that send whole outer packets.
//!
//! All are non-blocking and carry our firewall mark, which keeps what they send out of the tunnels.
#![expect(
    unsafe_code,
    reason = "IP_MTU_DISCOVER and IP_XFRM_POLICY have no safe wrapper"
)]

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use nix::{
    cmsg_space,
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg,
        setsockopt, sockopt,
    },
};
use socket2::{Domain, Protocol, Socket, Type};

use super::{
    esp_filter,
    xfrm::{PolicyDirection, socket_pass},
};

/// Receive buffer of each socket in bytes: some milliseconds at full speed.
const BUFFER_BYTES: usize = 4 << 20;

/// What came with a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Its length in bytes.
    pub length: usize,
    /// Address it was sent to, and our port (0 for raw sockets).
    pub local: SocketAddr,
    /// Where it came from.
    pub remote: SocketAddr,
    /// DSCP and ECN of its IP header.
    pub class: u8,
}

/// An ICMP message that says that a packet of ours was too long for its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooBig {
    /// Bytes of the packet that came back.
    pub length: usize,
    /// Where the packet was going.
    pub remote: IpAddr,
    /// What the path takes, in bytes, by a message that anybody can forge.
    pub mtu: u16,
}

/// A socket that tells the local address of each datagram.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    port: u16,
}

impl Listener {
    /// Keeps ESP with these SPIs away from a raw socket of ESP.
    ///
    /// # Errors
    ///
    /// What the kernel refused.
    pub fn ignore(&self, v6: bool, spis: &[u32]) -> io::Result<()> {
        self.socket.attach_filter(&esp_filter::without(v6, spis))
    }

    /// Lets what it sends and receives pass whatever the IPsec policies of the whole host say.
    ///
    /// # Errors
    ///
    /// `ENOPROTOOPT` where the kernel has no XFRM, `EINVAL` before it has loaded `xfrm_user`.
    pub fn pass_policies(&self, v6: bool) -> io::Result<()> {
        pass_policies(&self.socket, v6)
    }

    /// A UDP socket on all addresses of a family.
    ///
    /// # Errors
    ///
    /// `EADDRINUSE` if another IKE daemon runs, `EPERM` without CAP_NET_ADMIN and CAP_NET_BIND_SERVICE.
    pub fn udp(v6: bool, port: u16, mark: u32) -> io::Result<Self> {
        Self::udp_with(v6, port, mark, |_| Ok(()))
    }

    /// The same, beside which [`encapsulated`] sockets may be opened.
    ///
    /// # Errors
    ///
    /// As for [`Self::udp`].
    pub fn udp_beside_encapsulated(v6: bool, port: u16, mark: u32) -> io::Result<Self> {
        // Not SO_REUSEADDR, by which others could take the port as well: this one is for processes of one user.
        Self::udp_with(v6, port, mark, |socket| socket.set_reuse_port(true))
    }

    fn udp_with(
        v6: bool,
        port: u16,
        mark: u32,
        prepare: impl Fn(&Socket) -> io::Result<()>,
    ) -> io::Result<Self> {
        let socket = open(v6, Type::DGRAM, Protocol::UDP, mark)?;
        prepare(&socket)?;
        let any: SocketAddr = if v6 {
            socket.set_only_v6(true)?;
            (Ipv6Addr::UNSPECIFIED, port).into()
        } else {
            (Ipv4Addr::UNSPECIFIED, port).into()
        };
        socket.bind(&any.into())?;
        Ok(Self { socket, port })
    }

    /// A raw socket for ESP of a family. Without one the kernel answers ESP with ICMP protocol unreachable.
    ///
    /// # Errors
    ///
    /// `EPERM` without CAP_NET_RAW.
    pub fn esp(v6: bool, mark: u32) -> io::Result<Self> {
        let socket = open(v6, Type::RAW, Protocol::from(libc::IPPROTO_ESP), mark)?;
        Ok(Self { socket, port: 0 })
    }

    /// Receives one datagram: `WouldBlock` if there is none. Raw IPv4 comes with its IP header.
    ///
    /// # Errors
    ///
    /// Those of recvmsg(2).
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Received> {
        let mut control = cmsg_space!(libc::in6_pktinfo, libc::in_pktinfo, libc::c_int);
        let mut slices = [io::IoSliceMut::new(buffer)];
        let message = recvmsg::<SockaddrStorage>(
            self.socket.as_raw_fd(),
            &mut slices,
            Some(&mut control),
            MsgFlags::empty(),
        )?;
        let remote = message
            .address
            .as_ref()
            .and_then(address)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        let mut local = SocketAddr::new(
            if remote.is_ipv4() {
                Ipv4Addr::UNSPECIFIED.into()
            } else {
                Ipv6Addr::UNSPECIFIED.into()
            },
            self.port,
        );
        let mut class = 0;
        for control in message.cmsgs()? {
            match control {
                ControlMessageOwned::Ipv4PacketInfo(info) => {
                    local.set_ip(Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr)).into());
                }
                ControlMessageOwned::Ipv6PacketInfo(info) => {
                    local.set_ip(Ipv6Addr::from(info.ipi6_addr.s6_addr).into());
                }
                ControlMessageOwned::Ipv4Tos(tos) => class = tos,
                ControlMessageOwned::Ipv6TClass(value) => {
                    class = u8::try_from(value).unwrap_or_default();
                }
                _ => {}
            }
        }
        Ok(Received {
            length: message.bytes,
            local,
            remote,
            class,
        })
    }

    /// Takes one error about an earlier packet of ours: `WouldBlock` if there is none, `Ok(None)` for an error about
    /// something else than its length. `buffer` receives what came back of the packet, from behind its IP and UDP
    /// headers on.
    ///
    /// # Errors
    ///
    /// Those of recvmsg(2).
    pub fn receive_too_big(&self, buffer: &mut [u8]) -> io::Result<Option<TooBig>> {
        let mut control = cmsg_space!(
            [libc::sockaddr_in6; 2], // the error and who reports it
            libc::in6_pktinfo,
            libc::in_pktinfo,
            libc::c_int
        );
        let mut slices = [io::IoSliceMut::new(buffer)];
        let message = recvmsg::<SockaddrStorage>(
            self.socket.as_raw_fd(),
            &mut slices,
            Some(&mut control),
            MsgFlags::MSG_ERRQUEUE,
        )?;
        let Some(remote) = message.address.as_ref().and_then(address) else {
            return Ok(None);
        };
        let error = message.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::Ipv4RecvErr(error, _)
            | ControlMessageOwned::Ipv6RecvErr(error, _) => Some(error),
            _ => None,
        });
        let mtu = error
            .filter(|error| i32::try_from(error.ee_errno) == Ok(libc::EMSGSIZE))
            .and_then(|error| u16::try_from(error.ee_info).ok());
        Ok(mtu.map(|mtu| TooBig {
            length: message.bytes,
            remote: remote.ip(),
            mtu,
        }))
    }

    /// Sends a datagram from one of our addresses.
    ///
    /// # Errors
    ///
    /// Those of sendmsg(2).
    pub fn send(&self, from: IpAddr, to: SocketAddr, parts: &[&[u8]]) -> io::Result<()> {
        let slices: Vec<io::IoSlice<'_>> =
            parts.iter().map(|part| io::IoSlice::new(part)).collect();
        let (v4, v6);
        let control = match from {
            IpAddr::V4(from) => {
                v4 = libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: libc::in_addr {
                        s_addr: u32::from(from).to_be(),
                    },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                };
                ControlMessage::Ipv4PacketInfo(&v4)
            }
            IpAddr::V6(from) => {
                v6 = libc::in6_pktinfo {
                    ipi6_addr: libc::in6_addr {
                        s6_addr: from.octets(),
                    },
                    ipi6_ifindex: 0,
                };
                ControlMessage::Ipv6PacketInfo(&v6)
            }
        };
        sendmsg(
            self.socket.as_raw_fd(),
            &slices,
            &[control],
            MsgFlags::empty(),
            Some(&SockaddrStorage::from(to)),
        )?;
        Ok(())
    }
}

/// Whether the kernel has AF_XDP: a socket is opened and closed again.
///
/// # Errors
///
/// `EAFNOSUPPORT` where it has none, `EPERM` without CAP_NET_RAW.
pub fn has_af_xdp() -> io::Result<()> {
    Socket::new(Domain::from(libc::AF_XDP), Type::RAW, None).map(drop)
}

/// Opens a socket through which the kernel opens the encapsulated ESP of one peer (RFC 3948). What is no ESP comes out of
/// it. On a socket for all peers the kernel would take the ESP of all, also of those whose SAs it does not have.
///
/// What has arrived for others while it was not yet connected is handed to `stray`, with its source.
///
/// # Errors
///
/// `ENOPROTOOPT` where the kernel has no ESP in UDP, and others of socket(7).
pub fn encapsulated(
    local: SocketAddr,
    remote: SocketAddr,
    mark: u32,
    mut stray: impl FnMut(SocketAddr, &[u8]),
) -> io::Result<UdpSocket> {
    // include/uapi/linux/udp.h
    const UDP_ENCAP: libc::c_int = 100;
    const UDP_ENCAP_ESPINUDP: libc::c_int = 2;
    let socket = open(local.is_ipv6(), Type::DGRAM, Protocol::UDP, mark)?;
    if local.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_port(true)?;
    socket.bind(&local.into())?;
    pass_policies(&socket, local.is_ipv6())?;
    socket.connect(&remote.into())?;
    let socket = UdpSocket::from(socket);
    let mut buffer = vec![0; 65_535];
    while let Ok((length, source)) = socket.recv_from(&mut buffer) {
        stray(source, buffer.get(..length).unwrap_or_default());
    }
    set_option(&socket, libc::IPPROTO_UDP, UDP_ENCAP, UDP_ENCAP_ESPINUDP)?;
    Ok(socket)
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Sends whole IP packets, header included.
#[derive(Debug)]
pub struct RawSender {
    socket: Socket,
}

impl RawSender {
    /// A sender for a family.
    ///
    /// # Errors
    ///
    /// `EPERM` without CAP_NET_RAW.
    pub fn new(v6: bool, mark: u32) -> io::Result<Self> {
        let socket = open(v6, Type::RAW, Protocol::from(libc::IPPROTO_RAW), mark)?;
        if v6 {
            socket.set_header_included_v6(true)?;
        } else {
            socket.set_header_included_v4(true)?;
            // Our header says whether the packet may be fragmented, and the kernel must not think otherwise.
            set_option(
                &socket,
                libc::IPPROTO_IP,
                libc::IP_MTU_DISCOVER,
                libc::IP_PMTUDISC_PROBE,
            )?;
        }
        Ok(Self { socket })
    }

    /// As [`Listener::pass_policies`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn pass_policies(&self, v6: bool) -> io::Result<()> {
        pass_policies(&self.socket, v6)
    }

    /// Sends one packet.
    ///
    /// # Errors
    ///
    /// `EMSGSIZE` for one that is longer than the link takes, and others of sendto(2).
    pub fn send(&self, to: IpAddr, packet: &[u8]) -> io::Result<()> {
        let to = SocketAddr::new(to, 0);
        self.socket.send_to(packet, &to.into()).map(|_| ())
    }
}

fn open(v6: bool, kind: Type, protocol: Protocol, mark: u32) -> io::Result<Socket> {
    let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
    let socket = Socket::new(domain, kind.nonblocking().cloexec(), Some(protocol))?;
    socket.set_mark(mark)?;
    // Past the sysctl rmem_max, which stands at 208 KiB: packets of a tenth of a second at a moderate rate. A smaller
    // buffer only loses packets earlier.
    if setsockopt(&socket, sockopt::RcvBufForce, &BUFFER_BYTES).is_err() {
        let _ = socket.set_recv_buffer_size(BUFFER_BYTES);
    }
    // IKE messages may be fragmented on the way: that beats a black hole. The kernel tells us of ICMP messages about
    // narrow paths and does not believe them itself, for it cannot know which of them are forged.
    if v6 {
        set_option(
            &socket,
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_PMTUDISC_OMIT,
        )?;
        setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?;
        setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
        setsockopt(&socket, sockopt::Ipv6RecvTClass, &true)?;
    } else {
        set_option(
            &socket,
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            libc::IP_PMTUDISC_OMIT,
        )?;
        setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
        setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
        setsockopt(&socket, sockopt::IpRecvTos, &true)?;
    }
    Ok(socket)
}

/// A socket that has a policy of its own is not asked about by those of the whole host.
fn pass_policies(socket: &impl AsRawFd, v6: bool) -> io::Result<()> {
    // include/uapi/linux/in.h and in6.h
    const IP_XFRM_POLICY: libc::c_int = 17;
    const IPV6_XFRM_POLICY: libc::c_int = 35;
    let (level, option) = if v6 {
        (libc::IPPROTO_IPV6, IPV6_XFRM_POLICY)
    } else {
        (libc::IPPROTO_IP, IP_XFRM_POLICY)
    };
    for direction in [PolicyDirection::In, PolicyDirection::Out] {
        set_bytes(socket, level, option, &socket_pass(v6, direction))?;
    }
    Ok(())
}

/// Sets an integer option for which there is no safe wrapper.
fn set_option(
    socket: &impl AsRawFd,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    set_bytes(socket, level, option, &value.to_ne_bytes())
}

fn set_bytes(
    socket: &impl AsRawFd,
    level: libc::c_int,
    option: libc::c_int,
    value: &[u8],
) -> io::Result<()> {
    let length = libc::socklen_t::try_from(value.len())
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the descriptor is open, and the kernel reads `length` bytes of a slice that has so many and outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            value.as_ptr().cast(),
            length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn address(storage: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = storage.as_sockaddr_in() {
        return Some(SocketAddrV4::new(v4.ip(), v4.port()).into());
    }
    storage
        .as_sockaddr_in6()
        .map(|v6| SocketAddrV6::new(v6.ip(), v6.port(), 0, 0).into())
}
