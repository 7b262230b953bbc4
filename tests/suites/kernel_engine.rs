//! Tunnels that the kernel's ESP carries: on one side or on both, and what must hold whatever happens to its states.

use std::{
    net::{IpAddr, Ipv4Addr},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, ensure};
use ipsec_tests::{
    attack::{Attacker, captured, damaged},
    branches,
    capture::{Capture, Kind},
    carried::{KERNEL, XDP, is_by_the_kernel, states},
    cases,
    command::wait_for,
    gateway::{Gateway, Tunnel},
    injection::is_refused_whatever_becomes_of_the_daemon,
    kernel_esp::{self, goes_down_and_comes_up, heals},
    many::Many,
    pair::{Flows, PATIENCE, conversation, ends, hosts_talk, start, stop_and_release},
    ping::Ping,
    strongswan::{Connection, StrongSwan},
    suite::{self, Need::*},
    tcp,
    topology::{Family, Options, Side, Topology},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

fn main() -> ExitCode {
    suite::main(&cases![
        [XfrmInterfaces] the_kernel_carries_a_tunnel_between_two_gateways,
        [XfrmInterfaces] the_kernel_at_one_end_talks_to_our_own_esp_at_the_other,
        [XfrmInterfaces] long every_suite_is_carried_whichever_end_is_the_kernels,
        [XfrmInterfaces] long ipv6_travels_in_ipv6_and_both_families_in_ipv4,
        [XfrmInterfaces] long everything_goes_into_a_tunnel_beside_a_default_route,
        [XfrmInterfaces] esp_in_udp_reaches_the_kernel_and_ike_beside_it_the_daemon,
        [XfrmInterfaces, Nftables] long a_nat_in_between_is_crossed,
        [XfrmInterfaces, StrongSwan] strongswan_on_the_kernels_esp_is_understood_without_udp_and_with_esn,
        [XfrmInterfaces] the_first_packet_brings_up_a_tunnel_on_demand,
        [XfrmInterfaces] each_of_several_initiators_and_pairs_under_one_child_gets_its_own_traffic,
        [XfrmInterfaces] a_gateway_that_moves_keeps_its_ike_sa,
        [XfrmInterfaces] long a_gateway_that_moves_keeps_its_ike_sa_whichever_end_is_the_kernels,
        [XfrmInterfaces] nothing_is_lost_while_sas_are_replaced_by_volume,
        [XfrmInterfaces] what_others_flush_is_put_back_and_nothing_is_in_the_clear,
        [XfrmInterfaces, Nftables] the_device_and_its_states_are_as_the_other_engines,
        [XfrmInterfaces] long notifications_that_were_lost_are_made_up_for,
        [XfrmInterfaces, StrongSwan] long strongswan_on_the_kernels_esp_is_understood_over_ipv6,
        [XfrmInterfaces] nothing_is_in_the_clear_through_kill_and_restart,
        [XfrmInterfaces] protection_outlives_the_daemon_until_release_and_strangers_are_left_alone,
        [XfrmInterfaces] what_the_kernel_drops_is_counted_under_our_names,
        [XfrmInterfaces] daemons_that_are_killed_come_back_to_their_sas_and_no_packet_is_lost,
        [XfrmInterfaces] long packets_go_on_in_the_kernel_while_nothing_of_ours_runs,
        [XfrmInterfaces, Guard] plaintext_is_refused_as_by_the_other_engine,
        [XfrmInterfaces] long a_thousand_tunnels_come_up,
    ])
}

fn plaintext_is_refused_as_by_the_other_engine() -> anyhow::Result<()> {
    is_refused_whatever_becomes_of_the_daemon(KERNEL, V4)
}

fn a_thousand_tunnels_come_up() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let many = Many::start(&topology, "kernel", |_, _| ())?;
    eprintln!("{}", many.set_up());
    eprintln!("{}", many.pings()?);
    eprintln!("{}", many.memory()?);
    Ok(())
}

const V4: Family = Family::V4;
const V6: Family = Family::V6;

fn each_of_several_initiators_and_pairs_under_one_child_gets_its_own_traffic() -> anyhow::Result<()>
{
    branches::each_of_two_initiators_gets_its_own(KERNEL)?;
    branches::each_of_two_pairs_of_one_child_carries_its_own(KERNEL)
}

fn the_first_packet_brings_up_a_tunnel_on_demand() -> anyhow::Result<()> {
    kernel_esp::the_first_packet_brings_up_a_tunnel_on_demand(KERNEL)
}

fn nothing_is_lost_while_sas_are_replaced_by_volume() -> anyhow::Result<()> {
    kernel_esp::nothing_is_lost_while_sas_are_replaced_by_volume(KERNEL)
}

fn what_others_flush_is_put_back_and_nothing_is_in_the_clear() -> anyhow::Result<()> {
    kernel_esp::what_others_flush_is_put_back(KERNEL, Some("site"))
}

fn nothing_is_in_the_clear_through_kill_and_restart() -> anyhow::Result<()> {
    kernel_esp::nothing_is_in_the_clear_through_kill_and_restart(KERNEL)
}

fn the_kernel_carries_a_tunnel_between_two_gateways() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (a, b) = ends(V4);
    let (a, b) = start(&topology, a.with(KERNEL), b.with(KERNEL))?;
    let carried = conversation(&topology, V4)?;
    for from in [Side::A, Side::B] {
        let transfer = tcp::transfer(
            topology.host(from),
            topology.host(from.other()),
            from.other().host(V4),
            Duration::from_secs(2),
            u64::MAX,
        )?;
        ensure!(transfer.bytes > 1_000_000, "{transfer}");
    }
    is_by_the_kernel(&a, "site")?;
    is_by_the_kernel(&b, "site")?;
    capture.stop().is_sealed(carried, false)
}

fn mixed(ike: &str, esp: &str, engines: (&str, &str)) -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (a, b) = ends(V4);
    let _gateways = start(
        &topology,
        a.suite(ike, esp).with(engines.0),
        b.suite(ike, esp).with(engines.1),
    )?;
    hosts_talk(&topology, V4).with_context(|| format!("{esp}, {engines:?}"))
}

fn the_kernel_at_one_end_talks_to_our_own_esp_at_the_other() -> anyhow::Result<()> {
    mixed(
        "aes256gcm16-prfsha384-x25519",
        "aes256gcm16-esn",
        (KERNEL, XDP),
    )?;
    mixed("aes256-sha512-ecp521", "aes256-sha512", (XDP, KERNEL))
}

fn a_gateway_that_moves_keeps_its_ike_sa() -> anyhow::Result<()> {
    moves(&[(KERNEL, KERNEL)])
}

fn a_gateway_that_moves_keeps_its_ike_sa_whichever_end_is_the_kernels() -> anyhow::Result<()> {
    moves(&[(KERNEL, XDP), (XDP, KERNEL)])
}

/// The kernel cannot move a state between addresses: the children are rekeyed at the new ones.
fn moves(engines: &[(&str, &str)]) -> anyhow::Result<()> {
    for (at_a, at_b) in engines {
        let topology = Topology::build(Options::default())?;
        let (a, b) = ends(V4);
        let (a, b) = start(&topology, a.with(at_a), b.with(at_b))?;
        let spi = || anyhow::Ok(a.tunnel("site")?.ike.context("no IKE SA")?.initiator_spi);
        let before = spi()?;
        topology.renumber(Side::A, Side::A.outside(V4), Side::A.elsewhere())?;
        wait_for("packets after a move", PATIENCE, || {
            hosts_talk(&topology, V4).map(Some)
        })
        .with_context(|| format!("{at_a}, {at_b}\n{}\n{}", a.log(20), b.log(20)))?;
        ensure!(spi()? == before, "{at_a}, {at_b}: another IKE SA");
    }
    Ok(())
}

fn every_suite_is_carried_whichever_end_is_the_kernels() -> anyhow::Result<()> {
    for (ike, esp) in [
        ("aes256-sha512-ecp521", "aes256-sha512-esn"),
        ("aes256gcm16-prfsha384-x25519", "aes256gcm16"),
        ("chacha20poly1305-prfsha256-x25519", "chacha20poly1305"),
        ("chacha20poly1305-prfsha256-x25519", "chacha20poly1305-esn"),
        ("aes128-sha256-modp2048", "aes128-sha256-esn"),
        ("aes192-sha384-ecp384", "aes192-sha384"),
        ("aes128gcm16-prfsha256-ecp256", "aes128gcm16"),
    ] {
        for engines in [(KERNEL, XDP), (XDP, KERNEL)] {
            mixed(ike, esp, engines)?;
        }
    }
    Ok(())
}

fn ipv6_travels_in_ipv6_and_both_families_in_ipv4() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (a, b) = ends(V6);
    let gateways = start(&topology, a.with(KERNEL), b.with(KERNEL))?;
    hosts_talk(&topology, V6)?;
    capture.stop().is_clean()?;
    drop(gateways);
    drop(topology);
    let topology = Topology::build(Options::default())?;
    let (mut a, mut b) = ends(V4);
    for (tunnel, side) in [(&mut a, Side::A), (&mut b, Side::B)] {
        tunnel.children[0].local.push(side.prefix(V6));
        tunnel.children[0].remote.push(side.other().prefix(V6));
    }
    let _gateways = start(&topology, a.with(KERNEL), b.with(KERNEL))?;
    hosts_talk(&topology, V4)?;
    hosts_talk(&topology, V6)
}

fn everything_goes_into_a_tunnel_beside_a_default_route() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (mut a, mut b) = ends(V4);
    for tunnel in [&mut a, &mut b] {
        tunnel.children[0].local = vec!["0.0.0.0/0".to_owned()];
        tunnel.children[0].remote = vec!["0.0.0.0/0".to_owned()];
    }
    let (a, _b) = start(&topology, a.with(KERNEL), b.with(KERNEL))?;
    hosts_talk(&topology, V4)?;
    // The second key exchange must not go into the tunnel either.
    a.down("site")?;
    a.up("site")?;
    a.wait_up("site", PATIENCE)?;
    hosts_talk(&topology, V4)?;
    capture.stop().is_clean()
}

fn esp_in_udp_reaches_the_kernel_and_ike_beside_it_the_daemon() -> anyhow::Result<()> {
    for (family, engines) in [(V4, (KERNEL, XDP)), (V6, (KERNEL, KERNEL))] {
        let topology = Topology::build(Options::default())?;
        let capture = Capture::start(&topology.router)?;
        let (a, b) = ends(family);
        let (a, b) = start(
            &topology,
            a.with("nat = \"force\"").with(engines.0),
            b.with(engines.1),
        )?;
        hosts_talk(&topology, family).with_context(|| format!("{engines:?}"))?;
        // The Delete goes through the socket on which the kernel takes the ESP.
        goes_down_and_comes_up(&a, &b)?;
        let carried = conversation(&topology, family)?;
        capture.stop().is_sealed(carried, true)?;
    }
    Ok(())
}

fn a_nat_in_between_is_crossed() -> anyhow::Result<()> {
    let topology = Topology::build(Options {
        nat: true,
        ..Options::default()
    })?;
    let capture = Capture::start(&topology.router)?;
    let a = Tunnel::between_sites(Side::A, V4).with(KERNEL);
    let b = Tunnel::between_sites(Side::B, V4)
        .respond_to_any()
        .with(KERNEL);
    let (_a, b) = start(&topology, a, b)?;
    hosts_talk(&topology, V4)?;
    let peer = b.tunnel("site")?.ike.context("no IKE SA")?.remote;
    ensure!(peer.ip() == Side::B.router(V4), "{peer}");
    capture.stop().is_clean()
}

fn strongswan_on_the_kernels_esp_is_understood_without_udp_and_with_esn() -> anyhow::Result<()> {
    let (ike, esp) = ("aes256gcm16-prfsha384-x25519", "aes256gcm16-esn");
    for engine in [KERNEL, XDP] {
        let topology = Topology::build(Options::default())?;
        let capture = Capture::start(&topology.router)?;
        let swan = StrongSwan::start_with_kernel_esp(&topology.gateway_b)?;
        swan.load(&Connection {
            lines: vec!["encap = no".to_owned()],
            ..Connection::between_sites(Side::B, ike, esp)
        })?;
        let tunnel = Tunnel::between_sites(Side::A, V4)
            .suite(ike, esp)
            .with(engine);
        let gateway = Gateway::start(&topology.gateway_a, &[tunnel])?;
        gateway
            .wait_up("site", PATIENCE)
            .with_context(|| swan.log(40))?;
        let carried = conversation(&topology, V4).with_context(|| engine.to_owned())?;
        capture.stop().is_sealed(carried, false)?;
    }
    Ok(())
}

fn strongswan_on_the_kernels_esp_is_understood_over_ipv6() -> anyhow::Result<()> {
    let (ike, esp) = ("aes256gcm16-prfsha384-x25519", "aes256gcm16-esn");
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let swan = StrongSwan::start_with_kernel_esp(&topology.gateway_b)?;
    let mut connection = Connection {
        local: Some(Side::B.outside(V6)),
        remote: Some(Side::A.outside(V6).to_string()),
        lines: vec!["encap = no".to_owned()],
        ..Connection::between_sites(Side::B, ike, esp)
    };
    connection.children[0].local = Side::B.prefix(V6);
    connection.children[0].remote = Side::A.prefix(V6);
    swan.load(&connection)?;
    let tunnel = Tunnel::between_sites(Side::A, V6).suite(ike, esp);
    let gateway = Gateway::start(&topology.gateway_a, &[tunnel.with(KERNEL)])?;
    gateway
        .wait_up("site", PATIENCE)
        .with_context(|| swan.log(40))?;
    hosts_talk(&topology, V6)?;
    capture.stop().is_clean()
}

fn the_device_and_its_states_are_as_the_other_engines() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (a, b) = ends(V4);
    let (a, _b) = start(&topology, a.with(KERNEL), b.with(KERNEL))?;
    let states = topology.gateway_a.ip("-s xfrm state")?;
    // The child's eight hours, and what the daemon has to remove it.
    ensure!(states.contains("hard 288"), "no end by time in {states}");
    for from in [Side::A, Side::B] {
        let to = from.other();
        let mtu = a.tunnel("site")?.mtu.context("no MTU")?;
        wait_for("TCP to be clamped", PATIENCE, || {
            let hosts = (topology.host(from), topology.host(to));
            let mss = tcp::arriving_mss(hosts.0, hosts.1, to.host(V4))?;
            Ok((mss == mtu - 40).then_some(()))
        })
        .with_context(|| format!("from {from:?}, the MTU is {mtu}"))?;
    }
    let is = |state: &str| {
        let word = format!("state {state}");
        wait_for(&word, PATIENCE, || {
            let link = topology.gateway_a.ip("link show site")?;
            Ok(link.contains(&word).then_some(()))
        })
    };
    is("UP")?;
    a.down("site")?;
    is("DORMANT")?;
    a.up("site")?;
    is("UP")?;
    // It is up as soon as it receives, a moment before it sends.
    heals(&topology, "the tunnel to carry again")?;
    hosts_talk(&topology, V4)
}

fn notifications_that_were_lost_are_made_up_for() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (a, b) = ends(V4);
    let (a, _b) = start(&topology, a.with(KERNEL), b.with(KERNEL))?;
    hosts_talk(&topology, V4)?;
    let frozen = Pid::from_raw(a.data_plane().context("no data plane")?.try_into()?);
    kill(frozen, Signal::SIGSTOP)?;
    // More than its socket holds, so that it never hears of what comes behind.
    let batch = tempfile::NamedTempFile::new()?;
    let lines: String = (0..4000)
        .map(|number| {
            format!(
                "xfrm state add src 192.0.2.7 dst 192.0.2.8 proto esp spi {} mode tunnel \
                 aead rfc4106(gcm(aes)) 0x000102030405060708090a0b0c0d0e0f10111213 128 if_id 9\n",
                0x1000 + number
            )
        })
        .collect();
    std::fs::write(batch.path(), lines)?;
    topology
        .gateway_a
        .exec(&format!("ip -batch {}", batch.path().display()))?;
    for what in ["policy", "state"] {
        topology.gateway_a.ip(&format!("xfrm {what} flush"))?;
    }
    kill(frozen, Signal::SIGCONT)?;
    heals(&topology, "the tunnel to heal from what it was not told")?;
    ensure!(a.has_logged("were lost"), "{}", a.log(40));
    capture.stop().is_clean()
}

fn protection_outlives_the_daemon_until_release_and_strangers_are_left_alone() -> anyhow::Result<()>
{
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    topology.gateway_a.ip(
        "xfrm state add src 192.0.2.7 dst 192.0.2.8 proto esp spi 0x777 reqid 3 mode tunnel \
         aead rfc4106(gcm(aes)) 0x000102030405060708090a0b0c0d0e0f10111213 128 if_id 9",
    )?;
    topology
        .gateway_a
        .ip("link add foreign type xfrm if_id 9")?;
    topology
        .gateway_a
        .ip("xfrm policy add src 172.16.0.0/16 dst 172.17.0.0/16 dir out action block if_id 9")?;
    let (a, b) = ends(V4);
    let (mut a, mut b) = start(&topology, a.with(KERNEL), b.with(KERNEL))?;
    hosts_talk(&topology, V4)?;
    stop_and_release(&topology, capture, [&mut a, &mut b])?;
    let devices = topology.gateway_a.ip("link show")?;
    ensure!(devices.contains("foreign"), "{devices}");
    let states = topology.gateway_a.ip("xfrm state count")?;
    ensure!(states.contains("SAD count 1"), "{states}");
    let policies = topology.gateway_a.ip("xfrm policy")?;
    ensure!(
        policies.contains("172.16.0.0/16") && policies.matches("src").count() == 1,
        "{policies}"
    );
    Ok(())
}

/// Waits until a counter of gateway B has risen by so many at least.
fn rises(gateway: &Gateway<'_>, name: &str, before: u64, by: u64) -> anyhow::Result<()> {
    wait_for(name, PATIENCE, || {
        let risen = gateway.counter(name)? - before;
        ensure!(risen >= by, "{risen} of {by} were counted as {name}");
        Ok(Some(()))
    })
}

fn what_the_kernel_drops_is_counted_under_our_names() -> anyhow::Result<()> {
    const B: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 2));
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (a, b) = ends(V4);
    let (_a, b) = start(&topology, a, b.with(KERNEL))?;
    hosts_talk(&topology, V4)?;
    let seen = capture.stop();
    let packets = captured(&seen, Kind::Esp, B);
    ensure!(packets.len() > 100, "{}", seen.summary());
    let attacker = Attacker::new(&topology.attacker)?;
    let count = |name: &str| b.counter(name);
    for name in ["replayed", "bad-icv", "outbound-selectors"] {
        ensure!(count(name)? == 0, "{name} has counted already");
    }
    let replayed = attacker.send_all(packets.iter().copied().take(100));
    rises(&b, "replayed", 0, replayed)?;
    let forged: Vec<Vec<u8>> = packets
        .iter()
        .take(100)
        .map(|packet| {
            let mut packet = damaged(packet);
            // A number that the window has not seen.
            packet[24..28].copy_from_slice(&0x00ff_0000_u32.to_be_bytes());
            packet
        })
        .collect();
    let forged = attacker.send_all(forged.iter().map(Vec::as_slice));
    rises(&b, "bad-icv", 0, forged)?;
    ensure!(replayed == 100 && forged == 100, "{replayed}, {forged}");
    // Somebody routes into the tunnel what no child is for.
    topology
        .gateway_b
        .ip("route add 10.99.0.0/24 dev site metric 7")?;
    let ping = Ping::to(IpAddr::from([10, 99, 0, 1])).count(5);
    ping.run(&topology.host_b)?.none_answered()?;
    rises(&b, "outbound-selectors", 0, 5)?;
    hosts_talk(&topology, V4)
}

fn daemons_that_are_killed_come_back_to_their_sas_and_no_packet_is_lost() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (a, b) = ends(V4);
    let (mut a, mut b) = start(&topology, a.with(KERNEL), b.with(KERNEL))?;
    hosts_talk(&topology, V4)?;
    let before = [a.spis("site")?, b.spis("site")?];
    let planes = [a.data_plane(), b.data_plane()];
    let flows = Flows::start(&topology)?;
    for gateway in [&mut a, &mut b] {
        gateway.kill()?;
    }
    // Some packets come while nobody rekeys.
    std::thread::sleep(Duration::from_secs(1));
    for gateway in [&mut a, &mut b] {
        gateway.run()?;
        gateway.wait_up("site", PATIENCE)?;
    }
    flows.are_perfect()?;
    ensure!(
        [a.spis("site")?, b.spis("site")?] == before,
        "other SAs\n{}",
        a.log(40)
    );
    ensure!(
        planes == [a.data_plane(), b.data_plane()] && planes.iter().all(Option::is_some),
        "another data plane carries them"
    );
    is_by_the_kernel(&a, "site")?;
    capture.stop().is_clean()
}

/// Packets a second of a flow.
const RATE: u32 = 1000;

fn packets_go_on_in_the_kernel_while_nothing_of_ours_runs() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (a, b) = ends(V4);
    let (mut a, b) = start(&topology, a.with(KERNEL), b.with(KERNEL))?;
    hosts_talk(&topology, V4)?;
    let before = a.spis("site")?;
    a.kill()?;
    a.kill_data_plane()?;
    let flows = Flows::start(&topology)?;
    std::thread::sleep(Duration::from_secs(2));
    flows.are_perfect().context("with nothing of ours at A")?;
    // What comes back knows the IKE SA and not how far the states have counted for it: they go, and new ones come.
    let flows = Flows::at(&topology, RATE)?;
    a.run()?;
    a.wait_up("site", PATIENCE)?;
    heals(&topology, "the tunnel to carry again")?;
    flows.lose_less_than(RATE).with_context(|| a.log(40))?;
    let after = a.spis("site")?;
    ensure!(after.0 == before.0, "another IKE SA\n{}", a.log(40));
    ensure!(after.1 != before.1, "an SA was taken over");
    hosts_talk(&topology, V4)?;
    for netns in [&topology.gateway_a, &topology.gateway_b] {
        wait_for("states that nobody has to go", PATIENCE, || {
            let states = states(netns)?;
            ensure!(states == 2, "{states}\n{}", b.log(20));
            Ok(Some(()))
        })?;
    }
    capture.stop().is_clean()
}
