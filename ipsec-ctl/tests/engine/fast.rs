//! The fast path between two engines: how much of the traffic it carries, and what it follows.

use std::{net::UdpSocket, time::Duration};

use ipsec_ctl::dataplane::seam::{Command, FastPath, PathCounters};

use crate::{
    gateway::{Gateway, gateways, tunnel},
    net::{Net, client, echo, eventually, exchange},
    skip::skip,
};

/// Two gateways whose tunnel is on the fast path; none where there is no fast path.
pub(crate) fn fast_gateways(net: &Net, v6: bool, encap: bool) -> Option<(Gateway, Gateway)> {
    let (a, b) = gateways(net, v6, encap);
    for (gateway, local, remote) in [(&a, 1, 2), (&b, 2, 1)] {
        let mut spec = tunnel(local, remote);
        spec.fast_path = FastPath::On;
        gateway.command(Command::SetTunnel(Box::new(spec)));
        let interfaces = gateway.run(|_, engine, _| engine.interfaces());
        if interfaces
            .iter()
            .any(|interface| interface.reason.is_some())
        {
            skip(format_args!("no fast path here: {interfaces:?}"));
            return None;
        }
    }
    Some((a, b))
}

/// Packets of both SAs that took the fast and the slow path.
fn shares(gateway: &Gateway) -> (u64, u64) {
    let stats = gateway.run(|_, engine, _| engine.sa_stats());
    let sum = |of: fn(&PathCounters) -> u64, fast: bool| {
        stats
            .iter()
            .map(|sa| of(if fast { &sa.fast } else { &sa.slow }))
            .sum()
    };
    (
        sum(|path| path.packets, true),
        sum(|path| path.packets, false),
    )
}

/// Exchanges so many packets, and tells how many were answered.
fn exchanges(socket: &UdpSocket, count: u32, bytes: usize) -> u32 {
    (0..count)
        .map(|_| u32::from(exchange(socket, bytes).is_ok()))
        .sum()
}

#[test]
fn more_than_99_of_100_bulk_packets_take_the_fast_path_over_every_kind_of_tunnel() {
    for (v6, encap) in [(false, false), (false, true), (true, false), (true, true)] {
        let Some(net) = Net::new(&format!("bulk{}{}", u8::from(v6), u8::from(encap))) else {
            return;
        };
        let Some((a, b)) = fast_gateways(&net, v6, encap) else {
            return;
        };
        echo(&net);
        for destination in ["10.2.0.2", "2001:db8:2::2"] {
            let socket = client(&net, destination, false);
            // The first packets find out the next hops.
            exchanges(&socket, 3, 100);
            let before = [shares(&a), shares(&b)];
            assert_eq!(exchanges(&socket, 1000, 1200), 1000, "no packet is lost");
            for (gateway, before) in [&a, &b].into_iter().zip(before) {
                let after = shares(gateway);
                let (fast, slow) = (after.0 - before.0, after.1 - before.1);
                assert_eq!(fast + slow, 2000);
                assert!(
                    slow < 20,
                    "{fast} fast, {slow} slow to {destination}, outer IPv6 {v6}, UDP {encap}: {:?}",
                    gateway.dropped()
                );
            }
        }
    }
}

#[test]
fn a_host_that_is_replaced_is_followed() {
    let Some(net) = Net::new("replaced") else {
        return;
    };
    let Some((_a, b)) = fast_gateways(&net, false, false) else {
        return;
    };
    // The kernel's usual timeouts are half a minute and more.
    for (setting, value) in [
        ("base_reachable_time_ms", "1000"),
        ("delay_first_probe_time", "1"),
        ("retrans_time_ms", "300"),
    ] {
        net.inside("gb", move || {
            let path = format!("/proc/sys/net/ipv4/neigh/lan/{setting}");
            std::fs::write(path, value).unwrap();
        });
    }
    echo(&net);
    let socket = client(&net, "10.2.0.2", false);
    assert!(exchanges(&socket, 100, 100) > 90);
    net.exec("hb", "ip link set eth0 address 02:00:00:00:77:77");
    socket
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    eventually("traffic follows", || exchange(&socket, 100).is_ok());
    eventually("and it is fast again", || {
        let before = shares(&b);
        let answered = exchanges(&socket, 100, 100);
        answered > 90 && shares(&b).0 - before.0 > 100
    });
}
