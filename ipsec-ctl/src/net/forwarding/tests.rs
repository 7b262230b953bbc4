//! Against the real kernel, in a network namespace of a thread's own that ends with the thread.

use std::{process::Command, time::Duration};

use super::{
    super::{netlink::Netlink, tests::in_namespace},
    *,
};

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.unwrap().success(), "ip {arguments}");
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A veth pair, a TUN device and a gateway behind the pair. Returns the indices of both devices.
async fn topology(netlink: &Netlink) -> (u32, u32) {
    ip("link add wan0 address 02:00:00:00:00:01 type veth peer name wan1");
    ip("link set wan0 up");
    ip("link set wan1 up");
    ip("address add 192.0.2.1/24 dev wan0");
    ip("tuntap add dev tun0 mode tun");
    ip("address add 10.9.0.1/24 dev tun0");
    ip("link set tun0 up");
    ip("route add 10.7.0.0/16 via 192.0.2.254 mtu 1300");
    std::fs::write(
        "/proc/thread-self/net/../../../sys/net/ipv4/ip_forward",
        "1",
    )
    .ok();
    let index = async |name| netlink.link(name).await.unwrap().unwrap().index;
    (index("wan0").await, index("tun0").await)
}

#[test]
fn a_sent_packet_goes_to_the_gateway_with_the_mtu_of_its_route() {
    in_namespace(async || {
        let netlink = Netlink::open().unwrap();
        let (wan, _) = topology(&netlink).await;
        let packet = |destination| Packet {
            source: address("192.0.2.1"),
            destination: address(destination),
            tos: 0,
            origin: PacketOrigin::Sent(0),
        };
        let out = Routed::Out {
            device: wan,
            neighbour: address("192.0.2.254"),
            mtu: Some(1300),
        };
        assert_eq!(
            netlink.route_packet(&packet("10.7.3.1")).await.unwrap(),
            out
        );
        let direct = Routed::Out {
            device: wan,
            neighbour: address("192.0.2.77"),
            mtu: None,
        };
        assert_eq!(
            netlink.route_packet(&packet("192.0.2.77")).await.unwrap(),
            direct
        );
        assert_eq!(
            netlink.route_packet(&packet("192.0.2.1")).await.unwrap(),
            Routed::Local
        );
        assert_eq!(
            netlink.route_packet(&packet("203.0.113.1")).await.unwrap(),
            Routed::Nowhere
        );
        let egress = netlink.egress(wan).await.unwrap().expect("Ethernet");
        assert_eq!((egress.device, egress.vlan, egress.mtu), (wan, None, 1500));
        assert_eq!(egress.mac, [2, 0, 0, 0, 0, 1]);
    });
}

#[test]
fn a_packet_from_a_tunnel_for_this_host_is_local() {
    in_namespace(async || {
        let netlink = Netlink::open().unwrap();
        let (_, tun) = topology(&netlink).await;
        let packet = Packet {
            source: address("10.9.0.7"),
            destination: address("192.0.2.1"),
            tos: 0,
            origin: PacketOrigin::Received(tun),
        };
        assert_eq!(netlink.route_packet(&packet).await.unwrap(), Routed::Local);
        assert_eq!(
            netlink.egress(tun).await.unwrap(),
            None,
            "a TUN is no Ethernet"
        );
    });
}

#[test]
fn a_neighbour_is_unknown_then_known_then_replaced() {
    in_namespace(async || {
        let netlink = Netlink::open().unwrap();
        let (wan, _) = topology(&netlink).await;
        let gateway = address("192.0.2.254");
        assert_eq!(netlink.neighbour(wan, gateway).await.unwrap(), None);
        netlink.use_neighbour(wan, gateway, false).await.unwrap();
        let mut changes = watch_neighbours().unwrap();
        ip("neighbour replace 192.0.2.254 lladdr 02:00:00:00:00:fe dev wan0 nud reachable");
        assert_eq!(
            netlink.neighbour(wan, gateway).await.unwrap(),
            Some(Neighbour {
                mac: Some([2, 0, 0, 0, 0, 0xfe]),
                permanent: false,
                managed: false
            })
        );
        ip("neighbour replace 192.0.2.254 lladdr 02:00:00:00:00:aa dev wan0 nud reachable");
        netlink.use_neighbour(wan, gateway, false).await.unwrap();
        let replaced = async {
            while let Some(change) = changes.recv().await {
                let change = change.expect("none was lost");
                assert_eq!((change.link, change.address), (wan, gateway));
                if change.mac == Some([2, 0, 0, 0, 0, 0xaa]) {
                    return;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(60), replaced)
            .await
            .expect("the change is told");
    });
}

#[test]
fn a_neighbour_is_kept_by_the_kernel_until_it_is_told_otherwise() {
    in_namespace(async || {
        let netlink = Netlink::open().unwrap();
        let (wan, _) = topology(&netlink).await;
        let gateway = address("192.0.2.254");
        for managed in [true, true, false] {
            netlink.use_neighbour(wan, gateway, managed).await.unwrap();
            let neighbour = netlink.neighbour(wan, gateway).await.unwrap();
            assert_eq!(neighbour.unwrap().managed, managed);
        }
    });
}

#[test]
fn a_permanent_neighbour_is_told_apart() {
    in_namespace(async || {
        let netlink = Netlink::open().unwrap();
        let (wan, _) = topology(&netlink).await;
        ip("neighbour add 192.0.2.9 lladdr 02:00:00:00:00:09 dev wan0 nud permanent");
        let neighbour = netlink.neighbour(wan, address("192.0.2.9")).await.unwrap();
        assert!(neighbour.unwrap().permanent);
    });
}
