//! Two engines in network namespaces, keys installed by hand, and real packets through their slow paths.
//!
//! host A (10.1.0.2) - gateway A - WAN 192.0.2.0/24 - gateway B - host B (10.2.0.2)
#![expect(
    clippy::unwrap_used,
    reason = "a test fails by panicking, helpers included"
)]

use std::{
    fs::File,
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::{fd::AsRawFd, unix::process::CommandExt},
    process::Command as Process,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use ipsec_common::{Reason, Spi, TrafficSelector};
use ipsec_ctl::{
    dataplane::{
        routing::{RoutesMode, RoutingSpec},
        seam::{
            ChildId, ChildTrap, Command, Df, Direction, Event, FastPath, IkeDatagram, Lifetime,
            Outer, SaId, SaSpec, SelectorPair, TunnelId, TunnelSpec, UdpEncap,
        },
        xdp::engine::{Engine, EngineConfig},
    },
    esp::{EspKeys, EspSuite, Integrity},
};
use nix::{
    sched::{CloneFlags, setns},
    sys::socket::{
        ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendto, setsockopt, sockopt,
    },
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::mpsc::Receiver;

/// Namespaces of one test, removed when dropped.
struct Net {
    prefix: String,
}

impl Net {
    fn name(&self, which: &str) -> String {
        format!("{}-{which}", self.prefix)
    }

    /// `None`, with the reason printed, where namespaces cannot be made.
    fn new(test: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root for network namespaces");
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
    fn join(&self, a: &str, a_if: &str, a_ip: &str, b: &str, b_if: &str, b_ip: &str) {
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

    fn handle(&self, which: &str) -> File {
        File::open(format!("/run/netns/{}", self.name(which))).unwrap()
    }

    fn inside<T: Send + 'static>(
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
    fn exec(&self, which: &str, line: &str) -> (bool, String) {
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
}

impl Drop for Net {
    fn drop(&mut self) {
        for which in ["ha", "ga", "gb", "hb"] {
            let _ = Process::new("ip")
                .args(["netns", "del", &self.name(which)])
                .status();
        }
    }
}

/// Answers UDP datagrams on port 7 of host B with themselves, and with the TTL that each arrived with in front.
fn echo(net: &Net) {
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
fn set_mtu_discover(socket: &UdpSocket, value: libc::c_int) {
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
fn client(net: &Net, destination: &str, may_fragment: bool) -> UdpSocket {
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
            .set_read_timeout(Some(Duration::from_secs(2)))
            .unwrap();
        socket
    })
}

/// Sends so many bytes and waits for the echo. Returns the TTL that they arrived with.
fn exchange(socket: &UdpSocket, bytes: usize) -> io::Result<u8> {
    let data: Vec<u8> = (0..bytes)
        .map(|byte| u8::try_from(byte % 251).unwrap())
        .collect();
    socket.send(&data)?;
    let mut answer = vec![0; bytes + 1];
    let length = socket.recv(&mut answer)?;
    assert_eq!(answer[1..length], data);
    Ok(answer[0])
}

fn ip(arguments: &str) {
    let status = Process::new("ip")
        .args(arguments.split_whitespace())
        .status()
        .unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// Work for the thread of a gateway, which stays in its namespace.
type Job = Box<dyn FnOnce(&tokio::runtime::Runtime, &Engine, &mut Receiver<Event>) + Send>;

/// An engine in a thread of its own.
struct Gateway {
    jobs: mpsc::Sender<Job>,
}

impl Gateway {
    fn start(net: &Net, which: &str) -> Self {
        let handle = net.handle(which);
        let instance = net.name(which);
        let (jobs, queue) = mpsc::channel::<Job>();
        thread::spawn(move || {
            setns(handle, CloneFlags::CLONE_NEWNET).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            let config = EngineConfig {
                instance,
                mark: 0x1e5,
                ike_port: 500,
                nat_port: 4500,
                interfaces: None,
                workers: None,
                busy_poll: false,
            };
            let (engine, mut events) = runtime.block_on(Engine::start(config)).unwrap();
            loop {
                // The runtime drives the engine's own tasks while there is no job.
                match queue.try_recv() {
                    Ok(job) => job(&runtime, &engine, &mut events),
                    Err(mpsc::TryRecvError::Empty) => {
                        runtime
                            .block_on(async { tokio::time::sleep(Duration::from_millis(5)).await });
                    }
                    Err(mpsc::TryRecvError::Disconnected) => break,
                }
            }
            runtime.block_on(engine.stop());
        });
        let gateway = Self { jobs };
        gateway.run(|_, _, _| ()); // its sockets are open now
        gateway
    }

    fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&tokio::runtime::Runtime, &Engine, &mut Receiver<Event>) -> T + Send + 'static,
    ) -> T {
        let (answer, answered) = mpsc::channel();
        let job: Job = Box::new(move |runtime, engine, events| {
            answer.send(work(runtime, engine, events)).unwrap();
        });
        self.jobs.send(job).unwrap();
        answered.recv().unwrap()
    }

    fn command(&self, command: Command) {
        self.run(move |runtime, engine, _| runtime.block_on(engine.command(command)).unwrap());
    }

    fn count(&self, reason: Reason) -> u64 {
        self.run(move |_, engine, _| {
            let counters = engine.counters();
            counters
                .into_iter()
                .find(|(name, _)| *name == reason)
                .unwrap()
                .1
        })
    }

    /// What was dropped, for the message of a failure.
    fn dropped(&self) -> Vec<(Reason, u64)> {
        self.run(|_, engine, _| {
            let counters = engine.counters().into_iter();
            counters.filter(|(_, count)| *count > 0).collect()
        })
    }

    /// The first event that fits, within five seconds.
    fn event<T: Send + 'static>(
        &self,
        pick: impl Fn(Event) -> Option<T> + Send + 'static,
    ) -> Option<T> {
        self.run(move |runtime, _, events| {
            runtime.block_on(async {
                let wait = async {
                    loop {
                        if let Some(found) = pick(events.recv().await?) {
                            return Some(found);
                        }
                    }
                };
                tokio::time::timeout(Duration::from_secs(5), wait)
                    .await
                    .ok()?
            })
        })
    }
}

fn networks(number: u8) -> Vec<TrafficSelector> {
    let range = |first: String, last: String| TrafficSelector {
        protocol: 0,
        ports: (0, u16::MAX),
        addresses: (first.parse().unwrap(), last.parse().unwrap()),
    };
    vec![
        range(format!("10.{number}.0.0"), format!("10.{number}.0.255")),
        range(
            format!("2001:db8:{number}::"),
            format!("2001:db8:{number}::ffff:ffff:ffff:ffff"),
        ),
    ]
}

fn tunnel(local: u8, remote: u8) -> TunnelSpec {
    let prefixes = |number: u8| {
        vec![
            format!("10.{number}.0.0/24").parse().unwrap(),
            format!("2001:db8:{number}::/64").parse().unwrap(),
        ]
    };
    TunnelSpec {
        id: TunnelId(1),
        name: "office".into(),
        device: "office".into(),
        mtu: None,
        fast_path: FastPath::Auto,
        df: Df::Copy,
        clamp_mss: true,
        copy_dscp: true,
        children: vec![ChildTrap {
            id: ChildId(0),
            name: "net".into(),
            selectors: SelectorPair {
                local: networks(local),
                remote: networks(remote),
            },
            on_demand: true,
        }],
        routing: RoutingSpec {
            mode: RoutesMode::Selectors,
            remote: prefixes(remote),
            local: prefixes(local),
            peer: Some(outer_address(remote, false)),
            outer_local: Some(outer_address(local, false)),
            addresses: vec![],
            bypass: vec![],
        },
    }
}

fn outer_address(host: u8, v6: bool) -> IpAddr {
    if v6 {
        format!("2001:db8:ff::{host}").parse().unwrap()
    } else {
        format!("192.0.2.{host}").parse().unwrap()
    }
}

/// An SA of one gateway. SPI and keys follow from the sending side's number.
fn sa_spec(direction: Direction, local: u8, remote: u8, v6: bool, encap: bool) -> SaSpec {
    let (id, sender) = match direction {
        Direction::Inbound => (SaId(1), remote),
        Direction::Outbound => (SaId(2), local),
    };
    SaSpec {
        id,
        tunnel: TunnelId(1),
        child: ChildId(0),
        direction,
        spi: Spi(0x1000 + u32::from(sender)),
        suite: EspSuite::AesCbc {
            key_bytes: 32,
            integrity: Integrity::HmacSha512,
        },
        keys: EspKeys {
            cipher: vec![sender; 32].into(),
            integrity: vec![sender; 64].into(),
        },
        esn: true,
        replay_window: 4096,
        outer: Outer {
            local: outer_address(local, v6),
            remote: outer_address(remote, v6),
            encap: encap.then_some(UdpEncap {
                local_port: 4500,
                remote_port: 4500,
            }),
        },
        selectors: SelectorPair {
            local: networks(local),
            remote: networks(remote),
        },
        lifetime: Lifetime {
            soft_packets: u64::MAX,
            hard_packets: u64::MAX,
            soft_bytes: u64::MAX,
            hard_bytes: u64::MAX,
        },
    }
}

/// Installs both SAs of one gateway.
fn install(gateway: &Gateway, local: u8, remote: u8, v6: bool, encap: bool) {
    for direction in [Direction::Inbound, Direction::Outbound] {
        let spec = sa_spec(direction, local, remote, v6, encap);
        gateway.command(Command::Install(Box::new(spec)));
    }
    gateway.command(Command::SetCarrier(TunnelId(1), true));
}

/// Two gateways with their tunnel up.
fn gateways(net: &Net, v6: bool, encap: bool) -> (Gateway, Gateway) {
    let (a, b) = (Gateway::start(net, "ga"), Gateway::start(net, "gb"));
    a.command(Command::SetTunnel(Box::new(tunnel(1, 2))));
    b.command(Command::SetTunnel(Box::new(tunnel(2, 1))));
    install(&a, 1, 2, v6, encap);
    install(&b, 2, 1, v6, encap);
    let start = Instant::now();
    while !net.exec("ga", "ip route get 10.2.0.2").1.contains("office")
        || !net.exec("gb", "ip route get 10.1.0.2").1.contains("office")
    {
        assert!(start.elapsed() < Duration::from_secs(5), "routes appear");
        thread::sleep(Duration::from_millis(20));
    }
    (a, b)
}

#[test]
fn hosts_reach_each_other_through_two_slow_paths() {
    for (v6, encap) in [(false, false), (false, true), (true, false), (true, true)] {
        let Some(net) = Net::new(&format!("ping{}{}", u8::from(v6), u8::from(encap))) else {
            return;
        };
        let (a, b) = gateways(&net, v6, encap);
        echo(&net);
        for destination in ["10.2.0.2", "2001:db8:2::2"] {
            let socket = client(&net, destination, false);
            for _ in 0..20 {
                // Two routers on the way: each takes one from the TTL, once.
                let Ok(ttl) = exchange(&socket, 100) else {
                    panic!(
                        "no echo from {destination}, outer IPv6 {v6}, UDP {encap}: {:?} {:?}",
                        a.dropped(),
                        b.dropped()
                    );
                };
                assert_eq!(ttl, 62, "outer IPv6 {v6}, UDP {encap}, to {destination}");
            }
        }
        for gateway in [&a, &b] {
            let packets = gateway.run(|_, engine, _| {
                let stats = engine.sa_stats();
                (stats[0].slow.packets, stats[1].slow.packets)
            });
            assert_eq!(packets, (40, 40));
        }
    }
}

#[test]
fn packets_as_long_as_the_tunnel_pass_and_longer_ones_are_answered() {
    let Some(net) = Net::new("mtu") else { return };
    let (a, _b) = gateways(&net, false, false);
    let (_, link) = net.exec("ga", "ip link show office");
    assert!(link.contains("mtu 1422"), "{link}");
    echo(&net);
    let socket = client(&net, "10.2.0.2", false);
    // The echo, which is a byte longer, fills the tunnel: 1394 bytes of data, 8 of UDP, 20 of IPv4.
    assert_eq!(exchange(&socket, 1393).unwrap(), 62);
    socket.send(&[0; 1395]).unwrap();
    thread::sleep(Duration::from_millis(300));
    let told = socket
        .take_error()
        .unwrap()
        .and_then(|error| error.raw_os_error());
    assert_eq!(told, Some(libc::EMSGSIZE));
    // The ICMP answer of gateway A has arrived, and the host's own kernel refuses the next one.
    let refused = socket.send(&[0; 1395]).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EMSGSIZE));
    let _ = socket.take_error();
    assert_eq!(exchange(&socket, 1393).unwrap(), 62);
    let socket = client(&net, "10.2.0.2", true);
    assert_eq!(
        exchange(&socket, 4000).unwrap(),
        62,
        "without DF it is fragmented"
    );
    assert_eq!(a.count(Reason::SendFailed), 0);
}

#[test]
fn a_packet_without_an_sa_asks_for_one_and_never_leaves_in_the_clear() {
    let Some(net) = Net::new("acquire") else {
        return;
    };
    let a = Gateway::start(&net, "ga");
    a.command(Command::SetTunnel(Box::new(tunnel(1, 2))));
    a.command(Command::SetCarrier(TunnelId(1), true));
    thread::sleep(Duration::from_millis(500));
    let socket = client(&net, "10.2.0.2", false);
    for _ in 0..2 {
        socket.send(b"hello").unwrap();
        thread::sleep(Duration::from_millis(100));
    }
    let flow = a.event(|event| match event {
        Event::Acquire { flow, .. } => Some(flow),
        _ => None,
    });
    let flow = flow.expect("an Acquire event");
    assert_eq!(flow.destination, "10.2.0.2".parse::<IpAddr>().unwrap());
    assert_eq!(a.count(Reason::NoSa), 2);
    // The device goes down under our hands: it comes back, with its routes.
    net.exec("ga", "ip link set office down");
    thread::sleep(Duration::from_millis(700));
    let (_, route) = net.exec("ga", "ip route get 10.2.0.2");
    assert!(route.contains("office"), "{route}");
    a.command(Command::RemoveTunnel(TunnelId(1)));
    thread::sleep(Duration::from_millis(500));
    assert!(
        !net.exec("ga", "ip link show office").0,
        "the device is gone"
    );
    let (_, routes) = net.exec("ga", "ip route show table all proto 84");
    assert_eq!(routes, "");
}

#[test]
fn ike_datagrams_cross_the_seam_in_both_directions() {
    let Some(net) = Net::new("ike") else { return };
    let (a, b) = (Gateway::start(&net, "ga"), Gateway::start(&net, "gb"));
    for (v6, port) in [(false, 500), (false, 4500), (true, 500), (true, 4500)] {
        let (local, remote) = (outer_address(1, v6), outer_address(2, v6));
        let datagram = IkeDatagram {
            local: (local, port).into(),
            remote: (remote, port).into(),
            bytes: vec![7; 100],
        };
        a.command(Command::SendIke(datagram.clone()));
        let arrived = b.event(|event| match event {
            Event::Ike(datagram) => Some(datagram),
            _ => None,
        });
        let expected = IkeDatagram {
            local: datagram.remote,
            remote: datagram.local,
            bytes: datagram.bytes,
        };
        assert_eq!(arrived, Some(expected));
    }
}

/// Sends from gateway B what a router would say to gateway A about its ESP packet with this SPI and sequence number.
fn send_too_big(net: &Net, spi: u32, sequence: u32, mtu: u16) {
    let mut message = vec![3, 4, 0, 0, 0, 0];
    message.extend(mtu.to_be_bytes());
    message.extend([0x45, 0, 5, 0xdc, 0, 0, 0x40, 0, 64, 50, 0, 0]);
    message.extend([192, 0, 2, 1, 192, 0, 2, 2]);
    message.extend(spi.to_be_bytes());
    message.extend(sequence.to_be_bytes());
    let sum: u32 = message
        .chunks(2)
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum();
    let checksum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    net.inside("gb", move || {
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)).unwrap();
        let to: SocketAddr = (outer_address(1, false), 0).into();
        socket.send_to(&message, &to.into()).unwrap();
    });
}

#[test]
fn a_narrow_path_lowers_the_device_mtu_but_a_forged_message_does_not() {
    let Some(net) = Net::new("path") else { return };
    let (a, _b) = gateways(&net, false, false);
    echo(&net);
    let socket = client(&net, "10.2.0.2", false);
    assert_eq!(exchange(&socket, 100).unwrap(), 62);
    send_too_big(&net, 0x9999, 1, 1300);
    thread::sleep(Duration::from_millis(1500));
    assert!(net.exec("ga", "ip link show office").1.contains("mtu 1422"));
    send_too_big(&net, 0x1001, 1, 1400);
    let mtu = a.event(|event| match event {
        Event::MtuChanged { mtu, .. } if mtu < 1422 => Some(mtu),
        _ => None,
    });
    // 1400 - 20 of IPv4 - 8 of ESP - 16 of IV - 32 of ICV = 1324, of which 1312 are whole blocks, less 2 of trailer.
    assert_eq!(mtu, Some(1310));
    assert!(net.exec("ga", "ip link show office").1.contains("mtu 1310"));
    assert_eq!(exchange(&socket, 1000).unwrap(), 62);
}

#[test]
fn a_thousand_tunnels_are_set_up_in_seconds() {
    let Some(net) = Net::new("many") else { return };
    let a = Gateway::start(&net, "ga");
    let start = Instant::now();
    for number in 1..=1000_u32 {
        let network = format!("10.{}.{}.0/24", 16 + number / 256, number % 256);
        let mut spec = tunnel(1, 2);
        spec.id = TunnelId(number);
        spec.device = format!("t{number}");
        spec.routing.remote = vec![network.parse().unwrap()];
        a.command(Command::SetTunnel(Box::new(spec)));
    }
    let created = start.elapsed();
    for number in 1..=1000_u32 {
        for direction in [Direction::Inbound, Direction::Outbound] {
            let mut spec = sa_spec(direction, 1, 2, false, false);
            spec.tunnel = TunnelId(number);
            spec.id = SaId(u64::from(2 * number) + u64::from(direction == Direction::Inbound));
            spec.spi = Spi(0x1000 + number);
            a.command(Command::Install(Box::new(spec)));
        }
    }
    let installed = start.elapsed();
    eprintln!("1,000 tunnels in {created:?}, with their SAs in {installed:?}");
    assert!(installed < Duration::from_secs(60));
    let last = Instant::now();
    while !net
        .exec("ga", "ip route get 10.19.232.1")
        .1
        .contains("dev t1000 ")
    {
        assert!(
            last.elapsed() < Duration::from_secs(30),
            "its route appears"
        );
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(a.run(|_, engine, _| engine.sa_stats().len()), 2000);
}
