//! Namespaces for two gateways and a host behind each, and UDP traffic between the hosts.
//!
//! host A (10.1.0.2) - gateway A - WAN 192.0.2.0/24 - gateway B - host B (10.2.0.2)

use std::{
    fs::File,
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::{fd::AsRawFd, unix::process::CommandExt},
    process::Command as Process,
    thread,
    time::{Duration, Instant},
};

use ipsec_ctl::dataplane::xdp::program;
use nix::{
    sched::{CloneFlags, setns},
    sys::socket::{
        ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendto, setsockopt, sockopt,
    },
};
use socket2::{Domain, Socket, Type};

use crate::skip::skip;

/// Namespaces of one test, removed when dropped.
pub(crate) struct Net {
    prefix: String,
}

impl Net {
    pub(crate) fn name(&self, which: &str) -> String {
        format!("{}-{which}", self.prefix)
    }

    /// `None`, with the reason printed, where namespaces cannot be made.
    pub(crate) fn new(test: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            skip("network namespaces need root");
            return None;
        }
        let net = Self {
            prefix: format!("ipx-{}-{test}", std::process::id()),
        };
        for which in ["ha", "ga", "gb", "hb"] {
            ip(&format!("netns add {}", net.name(which)));
            ip(&format!("-n {} link set lo up", net.name(which)));
            // Duplicate address detection would take a second on every link.
            net.inside(which, || {
                std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0").unwrap();
            });
        }
        net.join("ha", "eth0", "10.1.0.2/24", "ga", "lan", "10.1.0.1/24");
        net.join("ga", "wan", "192.0.2.1/24", "gb", "wan", "192.0.2.2/24");
        net.join("hb", "eth0", "10.2.0.2/24", "gb", "lan", "10.2.0.1/24");
        for (host, number) in [("ha", 1), ("hb", 2)] {
            let name = net.name(host);
            ip(&format!("-n {name} route add default via 10.{number}.0.1"));
            ip(&format!(
                "-n {name} route add default via 2001:db8:{number}::1"
            ));
        }
        for gateway in ["ga", "gb"] {
            for setting in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                let path = format!("/proc/sys/net/{setting}");
                net.inside(gateway, move || std::fs::write(path, "1").unwrap());
            }
        }
        Some(net)
    }

    /// A veth pair with IPv4 addresses, and IPv6 ones made of them.
    pub(crate) fn join(&self, a: &str, a_if: &str, a_ip: &str, b: &str, b_if: &str, b_ip: &str) {
        let (a, b) = (self.name(a), self.name(b));
        ip(&format!(
            "link add {a_if} netns {a} type veth peer name {b_if} netns {b}"
        ));
        for (netns, interface, address) in [(a, a_if, a_ip), (b, b_if, b_ip)] {
            ip(&format!("-n {netns} address add {address} dev {interface}"));
            let (net, host) = match address.split(['.', '/']).collect::<Vec<_>>()[..] {
                ["192", _, _, host, _] => ("ff", host),
                [_, net, _, host, _] => (net, host),
                _ => panic!("an IPv4 prefix"),
            };
            ip(&format!(
                "-n {netns} address add 2001:db8:{net}::{host}/64 dev {interface} nodad"
            ));
            ip(&format!("-n {netns} link set {interface} up"));
        }
    }

    pub(crate) fn handle(&self, which: &str) -> File {
        File::open(format!("/run/netns/{}", self.name(which))).unwrap()
    }

    pub(crate) fn inside<T: Send + 'static>(
        &self,
        which: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        let handle = self.handle(which);
        thread::spawn(move || {
            setns(handle, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        })
        .join()
        .unwrap()
    }

    /// Runs a program and returns whether it succeeded, and its output.
    #[expect(
        unsafe_code,
        reason = "the child enters its namespace between fork and exec"
    )]
    pub(crate) fn exec(&self, which: &str, line: &str) -> (bool, String) {
        let handle = self.handle(which);
        let mut words = line.split_whitespace();
        let mut command = Process::new(words.next().unwrap());
        let enter = move || setns(&handle, CloneFlags::CLONE_NEWNET).map_err(io::Error::from);
        // SAFETY: only the system call setns is made, which neither allocates nor locks.
        unsafe { command.pre_exec(enter) };
        let output = command.args(words).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.success(), text)
    }

    /// Whether a gateway sends what is for this address into its tunnel.
    pub(crate) fn leads_into_tunnel(&self, which: &str, address: &str) -> bool {
        let (_, route) = self.exec(which, &format!("ip route get {address}"));
        route.contains("office")
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for which in ["ha", "ga", "gb", "hb"] {
            let _ = program::release(&self.name(which));
            let _ = Process::new("ip")
                .args(["netns", "del", &self.name(which)])
                .status();
        }
    }
}

/// Answers UDP datagrams on port 7 of host B with themselves, and with the TTL that each arrived with in front.
pub(crate) fn echo(net: &Net) {
    for any in ["0.0.0.0:7", "[::]:7"] {
        let socket = net.inside("hb", move || {
            let address: SocketAddr = any.parse().unwrap();
            let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None).unwrap();
            if address.is_ipv6() {
                socket.set_only_v6(true).unwrap();
                setsockopt(&socket, sockopt::Ipv6RecvHopLimit, &true).unwrap();
            } else {
                setsockopt(&socket, sockopt::Ipv4RecvTtl, &true).unwrap();
            }
            socket.bind(&address.into()).unwrap();
            socket
                .set_read_timeout(Some(Duration::from_secs(30)))
                .unwrap();
            socket
        });
        thread::spawn(move || {
            let mut buffer = [0; 9000];
            loop {
                let mut control = nix::cmsg_space!(libc::c_int);
                let mut slices = [io::IoSliceMut::new(&mut buffer)];
                let flags = MsgFlags::empty();
                let Ok(message) = recvmsg::<SockaddrStorage>(
                    socket.as_raw_fd(),
                    &mut slices,
                    Some(&mut control),
                    flags,
                ) else {
                    return;
                };
                let ttl = message.cmsgs().unwrap().find_map(|control| match control {
                    ControlMessageOwned::Ipv4Ttl(ttl) => Some(ttl),
                    ControlMessageOwned::Ipv6HopLimit(limit) => Some(limit),
                    _ => None,
                });
                let (length, from) = (message.bytes, message.address.unwrap());
                let ttl = u8::try_from(ttl.unwrap()).unwrap();
                let answer = [&[ttl], &buffer[..length]].concat();
                let _ = sendto(socket.as_raw_fd(), &answer, &from, flags);
            }
        });
    }
}

#[expect(unsafe_code, reason = "this option has no safe wrapper")]
pub(crate) fn set_mtu_discover(socket: &UdpSocket, value: libc::c_int) {
    let bytes = u32::try_from(size_of_val(&value)).unwrap();
    // SAFETY: the descriptor is open, and the value is an integer of the length given that outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            (&raw const value).cast(),
            bytes,
        )
    };
    assert_eq!(result, 0);
}

/// A UDP socket of host A, connected to the echo on host B.
pub(crate) fn client(net: &Net, destination: &str, may_fragment: bool) -> UdpSocket {
    let address: SocketAddr = (destination.parse::<IpAddr>().unwrap(), 7).into();
    net.inside("ha", move || {
        let any = if address.is_ipv6() {
            "[::]:0"
        } else {
            "0.0.0.0:0"
        };
        let socket = UdpSocket::bind(any).unwrap();
        if address.is_ipv4() {
            let discover = if may_fragment {
                libc::IP_PMTUDISC_DONT
            } else {
                libc::IP_PMTUDISC_DO
            };
            set_mtu_discover(&socket, discover);
        }
        socket.connect(address).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        socket
    })
}

/// Waits until something holds: as long as a busy machine may need.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Sends so many bytes and waits for the echo. Returns the TTL that they arrived with.
pub(crate) fn exchange(socket: &UdpSocket, bytes: usize) -> io::Result<u8> {
    let data: Vec<u8> = (0..bytes)
        .map(|byte| u8::try_from(byte % 251).unwrap())
        .collect();
    socket.send(&data)?;
    let mut answer = vec![0; bytes + 1];
    let length = socket.recv(&mut answer)?;
    assert_eq!(answer[1..length], data);
    Ok(answer[0])
}

pub(crate) fn ip(arguments: &str) {
    let status = Process::new("ip")
        .args(arguments.split_whitespace())
        .status()
        .unwrap();
    assert!(status.success(), "ip {arguments}");
}
