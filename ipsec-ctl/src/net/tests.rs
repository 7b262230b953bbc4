//! Against the real kernel, in a network namespace of a thread's own that ends with the thread.

use std::{net::IpAddr, thread};

use nix::sched::{CloneFlags, unshare};

use super::{
    netlink::{Netlink, Route, Rule, Service, Target},
    tun::Tun,
    watch::{Fallen, fallen_links},
};

/// Runs a test in a fresh network namespace. Without root there is none to be had, and the test says so.
pub(super) fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        crate::skip::skip("a network namespace needs root");
        return;
    }
    let result = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(test());
    })
    .join();
    if let Err(cause) = result {
        std::panic::resume_unwind(cause);
    }
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A TUN device that is up and has an address.
async fn device(netlink: &Netlink, name: &str, address: &str) -> (Tun, u32) {
    let tun = Tun::open(name).unwrap();
    let link = netlink
        .link(name)
        .await
        .unwrap()
        .expect("the device is there");
    netlink.set_up(link.index).await.unwrap();
    netlink
        .add_address(link.index, address.parse().unwrap())
        .await
        .unwrap();
    (tun, link.index)
}

#[test]
fn a_tun_device_outlives_its_process_and_is_taken_over() {
    in_namespace(async || {
        let netlink = Netlink::open().unwrap();
        let (tun, index) = device(&netlink, "ipx0", "10.9.0.1/24").await;
        netlink.set_mtu(index, 1422).await.unwrap();
        assert!(Tun::open("ipx0").is_err(), "it is in use");
        drop(tun);
        let link = netlink.link("ipx0").await.unwrap().expect("it persists");
        assert_eq!((link.index, link.mtu), (index, 1422));
        Tun::open("ipx0").unwrap().remove().unwrap();
        assert_eq!(netlink.link("ipx0").await.unwrap(), None);
    });
}

#[test]
fn routes_and_rules_of_ours_are_added_known_again_and_removed() {
    in_namespace(async || {
        let netlink = Netlink::open().unwrap();
        let (_tun, index) = device(&netlink, "ipx0", "10.9.0.1/24").await;
        let (_other, other) = device(&netlink, "ipx1", "10.8.0.1/24").await;
        let route = |prefix: &str, table, metric, target| Route {
            prefix: prefix.parse().unwrap(),
            table,
            metric,
            target,
            source: None,
        };
        let mut routes = vec![
            route("10.2.0.0/24", 254, 0, Target::Device(index, None)),
            route("10.2.0.0/24", 254, 4_000_000, Target::Blackhole),
            route(
                "0.0.0.0/0",
                5000,
                0,
                Target::Device(other, Some(address("10.8.0.9"))),
            ),
            route("2001:db8::/32", 254, 4_000_000, Target::Blackhole),
        ];
        let rule = Rule {
            priority: 100,
            v6: false,
            from: Some("10.2.0.0/24".parse().unwrap()),
            to: None,
            mark: Some(0x4958),
            local: false,
            service: None,
            table: 5000,
            suppress: Some(0),
        };
        let service = |priority, service| Rule {
            priority,
            local: priority != 101,
            service: Some(service),
            suppress: None,
            ..rule
        };
        let rules = [
            rule,
            service(101, Service::Udp(4500)),
            service(102, Service::Esp),
        ];
        for route in &routes {
            netlink.add_route(route).await.unwrap();
            netlink.add_route(route).await.unwrap();
        }
        for rule in &rules {
            netlink.add_rule(rule).await.unwrap();
            netlink.add_rule(rule).await.unwrap();
        }
        let mut found = netlink.our_routes().await.unwrap();
        found.sort();
        routes.sort();
        assert_eq!(found, routes);
        assert_eq!(netlink.our_rules().await.unwrap(), rules);

        let way = netlink.way(address("10.2.0.7"), None, None).await.unwrap();
        assert_eq!(way.unwrap().device, index);
        let nowhere = netlink
            .way(address("203.0.113.1"), None, None)
            .await
            .unwrap();
        assert_eq!(nowhere, None);

        for rule in &rules {
            netlink.remove_rule(rule).await.unwrap();
            netlink.remove_rule(rule).await.unwrap();
        }
        for route in &routes {
            netlink.remove_route(route).await.unwrap();
            netlink.remove_route(route).await.unwrap();
        }
        assert_eq!(netlink.our_routes().await.unwrap(), []);
        assert_eq!(netlink.our_rules().await.unwrap(), []);
    });
}

#[test]
fn changes_are_noticed() {
    in_namespace(async || {
        let mut changes = super::watch::start().unwrap();
        let netlink = Netlink::open().unwrap();
        let (_tun, _) = device(&netlink, "ipx0", "10.9.0.1/24").await;
        let mut seen = std::collections::HashSet::new();
        while seen.len() < 3 {
            seen.insert(changes.recv().await.unwrap());
        }
    });
}

#[test]
fn links_that_go_down_or_away_are_noticed() {
    in_namespace(async || {
        let netlink = Netlink::open().unwrap();
        let (_tun, index) = device(&netlink, "ipx0", "10.9.0.1/24").await;
        let link = netlink.link_at(index).await.unwrap();
        assert_eq!(link, netlink.link("ipx0").await.unwrap());
        let mut fallen = fallen_links().unwrap();
        netlink.set_mtu(index, 1300).await.unwrap();
        netlink.remove_link(index).await.unwrap();
        assert_eq!(fallen.recv().await, Some(Fallen::Link(index)));
        assert_eq!(netlink.link_at(index).await.unwrap(), None);
    });
}

#[test]
fn a_link_inherits_routes_addresses_and_the_name_of_another() {
    in_namespace(async || {
        let netlink = Netlink::open().unwrap();
        let (_old, from) = device(&netlink, "ipx0", "10.9.0.1/24").await;
        let (_new, to) = device(&netlink, "ipx1", "10.8.0.1/24").await;
        let route = |prefix: &str, gateway: Option<&str>, device| Route {
            prefix: prefix.parse().unwrap(),
            table: 254,
            metric: 50,
            target: Target::Device(device, gateway.map(address)),
            source: Some(address("10.9.0.1")),
        };
        let routes = |device| {
            vec![
                route("10.2.0.0/24", None, device),
                route("10.3.0.0/24", Some("10.9.0.9"), device),
            ]
        };
        for route in routes(from) {
            netlink.add_route(&route).await.unwrap();
        }
        netlink.inherit_addresses(from, to).await.unwrap();
        netlink.inherit_routes(from, to).await.unwrap();
        assert!(!netlink.rename(from, "ipx2").await.unwrap());
        assert!(!netlink.rename(to, "ipx0").await.unwrap());
        netlink.remove_addresses(from).await.unwrap();
        let mut found = netlink.our_routes().await.unwrap();
        found.sort();
        assert_eq!(found, routes(to));
        let addresses = netlink.addresses().await.unwrap();
        assert!(addresses.contains(&(to, "10.9.0.1/24".parse().unwrap())));
        assert!(addresses.iter().all(|(index, _)| *index != from));
        let link = netlink.link("ipx0").await.unwrap().unwrap();
        assert_eq!(link.index, to);
    });
}
