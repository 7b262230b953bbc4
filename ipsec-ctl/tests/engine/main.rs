//! Two engines in network namespaces, keys installed by hand, and real packets through them.
#![expect(
    clippy::unwrap_used,
    reason = "a test fails by panicking, helpers included"
)]

mod fast;
mod gateway;
mod net;
mod rekey;
#[path = "../support/skip.rs"]
mod skip;

use std::{
    net::{IpAddr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use ipsec_common::{Reason, Spi};
use ipsec_ctl::dataplane::seam::{
    Command, Direction, Event, FastPath, IkeDatagram, InterfaceStatus, Offload, OffloadReason,
    SaId, TunnelId,
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    gateway::{Gateway, gateways, outer_address, sa_spec, tunnel},
    net::{Net, client, echo, eventually, exchange},
};

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
    let mut told = None;
    eventually("the host is told", || {
        told = socket.take_error().unwrap();
        told.is_some()
    });
    let told = told.and_then(|error| error.raw_os_error());
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
    a.command(Command::Configured);
    eventually("routes appear", || net.leads_into_tunnel("ga", "10.2.0.2"));
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
    // They wait, but not for ever.
    assert_eq!(a.count(Reason::NoSa), 0);
    eventually("both are given up", || a.count(Reason::Unanswered) == 2);
    // The device goes down under our hands: it comes back, with its routes.
    net.exec("ga", "ip link set office down");
    eventually("it is up again", || {
        net.exec("ga", "ip link show up dev office")
            .1
            .contains("office")
    });
    eventually("its routes are back", || {
        net.leads_into_tunnel("ga", "10.2.0.2")
    });
    a.command(Command::RemoveTunnel(TunnelId(1)));
    eventually("the device is gone", || {
        !net.exec("ga", "ip link show office").0
    });
    eventually("its routes are gone", || {
        net.exec("ga", "ip route show table all proto 84")
            .1
            .is_empty()
    });
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
    eventually("the device has it", || {
        net.exec("ga", "ip link show office").1.contains("mtu 1310")
    });
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
    eventually("the route of the last appears", || {
        let (_, route) = net.exec("ga", "ip route get 10.19.232.1");
        route.contains("dev t1000 ")
    });
    assert_eq!(a.run(|_, engine, _| engine.sa_stats().len()), 2000);
}

#[test]
fn ipv6_keeps_its_least_mtu_over_a_path_that_is_narrower() {
    let Some(net) = Net::new("least") else { return };
    for gateway in ["ga", "gb"] {
        net.exec(gateway, "ip link set wan mtu 1300");
    }
    let (_a, _b) = gateways(&net, false, false);
    echo(&net);
    assert!(net.exec("ga", "ip link show office").1.contains("mtu 1280"));
    // The echo, a byte longer, fills the tunnel: 1232 bytes of data, 8 of UDP, 40 of IPv6.
    let socket = client(&net, "2001:db8:2::2", false);
    assert_eq!(exchange(&socket, 1231).unwrap(), 62);
}

#[test]
fn bulk_packets_take_the_fast_path_and_a_firewall_takes_them_off_it() {
    let Some(net) = Net::new("fast") else { return };
    let (a, b) = gateways(&net, false, false);
    for (gateway, local, remote) in [(&a, 1, 2), (&b, 2, 1)] {
        let mut spec = tunnel(local, remote);
        spec.fast_path = FastPath::Auto;
        gateway.command(Command::SetTunnel(Box::new(spec)));
    }
    echo(&net);
    let interfaces: Vec<InterfaceStatus> = a.run(|_, engine, _| engine.interfaces());
    if interfaces
        .iter()
        .any(|interface| interface.reason.is_some())
    {
        return skip::skip(format_args!("no fast path here: {interfaces:?}"));
    }
    for destination in ["10.2.0.2", "2001:db8:2::2"] {
        let socket = client(&net, destination, false);
        for _ in 0..200 {
            let Ok(ttl) = exchange(&socket, 100) else {
                panic!(
                    "no echo from {destination}: {:?} {:?}",
                    a.dropped(),
                    b.dropped()
                );
            };
            assert_eq!(ttl, 62);
        }
    }
    for gateway in [&a, &b] {
        for stats in gateway.run(|_, engine, _| engine.sa_stats()) {
            assert_eq!(stats.fast.packets + stats.slow.packets, 400);
            assert!(
                stats.fast.packets > 350,
                "{stats:?} {:?}",
                gateway.dropped()
            );
        }
    }
    net.exec("ga", "nft add table ip fw");
    net.exec(
        "ga",
        "nft add chain ip fw f { type filter hook forward priority 0 ; }",
    );
    let declined = a.event(|event| match event {
        Event::LedgerChanged(ledger) => Some(ledger.offload).filter(|new| *new != Offload::Full),
        _ => None,
    });
    let by_rules = Offload::Declined(OffloadReason::NetfilterRules);
    assert_eq!(declined, Some(by_rules));
    net.exec("ga", "nft add rule ip fw f drop");
    let socket = client(&net, "10.2.0.2", false);
    assert!(exchange(&socket, 100).is_err(), "the firewall drops it");
}
