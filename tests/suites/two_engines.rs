//! Both engines on one gateway: tunnels of each at once, and tunnels that go from one to the other whatever dies meanwhile.

use std::{net::IpAddr, process::ExitCode};

use anyhow::{Context, ensure};
use ipsec_ctl::api::model::{DeviceChanged, State};
use ipsec_tests::{
    branches::{self, OTHER},
    capture::Capture,
    carried::{
        KERNEL, XDP, index_of, is_by_the_kernel, is_by_xdp, leaves_nothing, of_two_families,
    },
    cases,
    command::wait_for,
    gateway::{Gateway, Tunnel},
    impairment::{Behind, Impairment, NAT_ADDRESS, Rates},
    netns::Netns,
    pair::{Flows, PATIENCE, hosts_talk, start},
    ping::Ping,
    suite::{self, Need::*},
    topology::{Family, Options, Side, Topology},
    udp::Flow,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

fn main() -> ExitCode {
    suite::main(&cases![
        [XfrmInterfaces] peers_behind_nats_are_carried_by_either_engine_at_once_and_followed,
        [XfrmInterfaces] esp_alone_tells_either_engine_that_a_nat_has_given_its_peer_another_port,
        [XfrmInterfaces] a_tunnel_that_is_up_moves_to_the_other_engine_and_loses_nothing,
        [XfrmInterfaces] long a_tunnel_moves_there_and_back_with_what_others_have_given_its_device,
        [XfrmInterfaces] long a_tunnel_that_is_sent_back_on_its_way_goes_back_when_it_has_arrived,
        [XfrmInterfaces] long the_next_daemon_moves_what_the_configuration_has_elsewhere_and_loses_nothing,
        [XfrmInterfaces] long the_next_daemons_move_it_there_and_back_and_lose_nothing,
        [XfrmInterfaces] a_daemon_that_is_killed_during_a_move_costs_no_packet,
        [XfrmInterfaces] long daemons_that_are_killed_anywhere_in_a_move_cost_no_packet,
        [XfrmInterfaces] long a_data_plane_that_is_killed_during_a_move_leaves_nothing_behind,
        [XfrmInterfaces] long data_planes_that_are_killed_anywhere_in_a_move_leave_nothing_behind,
        [XfrmInterfaces, Nftables] long a_tunnel_behind_a_nat_moves_and_loses_little,
    ])
}

const V4: Family = Family::V4;
const V6: Family = Family::V6;

/// Pings, after one more that finds neighbours.
fn talk(from: &Netns, to: IpAddr) -> anyhow::Result<()> {
    Ping::to(to).count(1).run(from)?;
    Ping::to(to).run(from)?.all_answered()
}

/// Numbered packets between gateway B's site and both branches, all at once and both ways.
fn all_at_once(topology: &Topology) -> anyhow::Result<()> {
    let (site, branch) = (Side::A.host(V4), OTHER.1.into());
    let here = Side::B.host(V4);
    let ways = [
        (&topology.host_a, &topology.host_b, here),
        (&topology.host_b, &topology.host_a, site),
        (&topology.host_b, &topology.attacker, branch),
    ];
    let flows: Vec<_> = ways
        .into_iter()
        .map(|(from, into, to)| {
            // Four of them, through three gateways on one processor.
            let flow = Flow {
                rate: Some(100),
                ..Flow::to(to)
            };
            Ok((to, flow.start(from, into)?))
        })
        .collect::<anyhow::Result<_>>()?;
    for (to, flow) in flows {
        let report = flow.finish()?;
        report.is_perfect().with_context(|| format!("to {to}"))?;
    }
    talk(&topology.attacker, here)
}

/// Two branches behind NATs that share an address, one carried by our own ESP and the other by the kernel's.
fn peers_behind_nats_are_carried_by_either_engine_at_once_and_followed() -> anyhow::Result<()> {
    const SOON: &str = "dpd = { interval = \"1s\", timeout = \"20s\" }";
    let by_xdp = |gateway: &Gateway<'_>, tunnel: &str| is_by_xdp(gateway, tunnel);
    let by_kernel = |gateway: &Gateway<'_>, tunnel: &str| is_by_the_kernel(gateway, tunnel);
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let nat = Impairment::nat_before_both(&topology)?;
    let site = Tunnel::between_sites(Side::B, V4)
        .respond_to_any()
        .with(XDP);
    let mut branch = site.clone();
    branch.name = "branch".to_owned();
    branch.remote_id = "c.example".to_owned();
    branch.lines = vec![KERNEL.to_owned()];
    branch.children[0].remote = vec![OTHER.0.to_owned()];
    let b = Gateway::start(&topology.gateway_b, &[site, branch])?;
    let a = Gateway::start(
        &topology.gateway_a,
        &[Tunnel::between_sites(Side::A, V4).with(SOON)],
    )?;
    let c = branches::other_branch(&topology, SOON)?;
    for gateway in [&a, &c] {
        gateway
            .wait_up("site", PATIENCE)
            .with_context(|| b.log(40))?;
    }
    for tunnel in ["site", "branch"] {
        b.wait_up(tunnel, PATIENCE)?;
    }
    talk(&topology.attacker, Side::B.host(V4))?;
    hosts_talk(&topology, V4)?;
    wait_for("both tunnels to carry at once", PATIENCE, || {
        all_at_once(&topology).map(Some)
    })?;
    let remotes = || {
        let of = |name| anyhow::Ok(b.tunnel(name)?.ike.context("no IKE SA")?.remote);
        anyhow::Ok([of("site")?, of("branch")?])
    };
    let mut before = remotes()?;
    for (number, who) in [Behind::GatewayA, Behind::Attacker].into_iter().enumerate() {
        nat.rebind(who);
        wait_for(
            "the peer to be found at its other ports",
            PATIENCE * 2,
            || {
                // What asks whether the peer lives.
                Ping::to(Side::B.host(V4)).count(2).run(&topology.host_a)?;
                Ping::to(Side::B.host(V4))
                    .count(2)
                    .run(&topology.attacker)?;
                let now = remotes()?;
                ensure!(now[number] != before[number], "{now:?}");
                ensure!(
                    now.iter().all(|remote| remote.ip() == NAT_ADDRESS),
                    "{now:?}"
                );
                all_at_once(&topology)?;
                Ok(Some(()))
            },
        )
        .with_context(|| format!("{who:?}\n{}", b.log(40)))?;
        let now = remotes()?;
        ensure!(now[1 - number] == before[1 - number], "{before:?}, {now:?}");
        before = now;
        by_xdp(&b, "site")?;
        by_kernel(&b, "branch")?;
    }
    nat.stop()?;
    capture.stop().is_clean()
}

// RFC 7296 section 2.23: the address and port of any authenticated packet from behind a NAT are the peer's new ones.
fn esp_alone_tells_either_engine_that_a_nat_has_given_its_peer_another_port() -> anyhow::Result<()>
{
    for engine in [XDP, KERNEL] {
        let topology = Topology::build(Options::default())?;
        let capture = Capture::start(&topology.router)?;
        let nat = Impairment::start(&topology, 1, Rates::NONE)?;
        let tunnel = |side| Tunnel::between_sites(side, V4).with("dpd = { mode = \"off\" }");
        let (a, b) = start(
            &topology,
            tunnel(Side::A).with(XDP),
            tunnel(Side::B).respond_to_any().with(engine),
        )?;
        hosts_talk(&topology, V4)?;
        let remote = || {
            let ike = b.tunnel("site")?.ike;
            anyhow::Ok(ike.context("no IKE SA")?.remote)
        };
        let (before, spis) = (remote()?, b.spis("site")?);
        const A_SECOND: u32 = 200;
        let flows = Flows::at(&topology, A_SECOND)?;
        nat.rebind(Behind::GatewayA);
        wait_for("the peer to be found at its other ports", PATIENCE, || {
            Ok((remote()? != before).then_some(()))
        })
        .with_context(|| format!("{engine}\n{}", b.log(40)))?;
        // What is lost is on its way to the old ports, and what comes before the socket; a busy machine takes its time.
        flows.lose_less_than(2 * A_SECOND).context(engine)?;
        hosts_talk(&topology, V4).context(engine)?;
        ensure!(b.spis("site")? == spis, "other SAs took the place of these");
        ensure!(a.tunnel("site")?.state == State::Up);
        nat.stop()?;
        capture.stop().is_clean()?;
    }
    Ok(())
}

/// Waits until gateway A's tunnel has another device than that of this index, and the old one is gone.
fn has_changed_engine(
    topology: &Topology,
    gateway: &Gateway<'_>,
    before: u32,
) -> anyhow::Result<DeviceChanged> {
    let moved = gateway.wait("site", "with the other engine", PATIENCE, |tunnel| {
        let changed = tunnel.device_changed;
        changed.is_some_and(|changed| changed.from == before)
    })?;
    wait_for("the old device to go", PATIENCE, || {
        let links = topology.gateway_a.ip("-o link show")?;
        Ok((!links.contains("ipsec")).then_some(()))
    })?;
    moved.device_changed.context("no other index")
}

/// Has a tunnel moved by `how` while packets flow, and waits until nothing of it is with the engine that it was with.
fn changes_engine(
    topology: &Topology,
    gateway: &Gateway<'_>,
    how: impl FnOnce() -> anyhow::Result<String>,
) -> anyhow::Result<()> {
    let before = index_of(&topology.gateway_a, "site")?;
    let flows = Flows::start(topology)?;
    how()?;
    let changed = has_changed_engine(topology, gateway, before)?;
    flows.are_perfect()?;
    ensure!(
        index_of(&topology.gateway_a, "site")? == changed.to,
        "{changed:?}"
    );
    hosts_talk(topology, V6)
}

fn a_tunnel_that_is_up_moves_to_the_other_engine_and_loses_nothing() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (a, b) = (of_two_families(Side::A), of_two_families(Side::B));
    let (gateway, _b) = start(&topology, a.clone(), b.respond())?;
    let ike = gateway.spis("site")?.0;
    changes_engine(&topology, &gateway, || {
        gateway.configure("", &[a.with(KERNEL)])?;
        gateway.reload()
    })?;
    is_by_the_kernel(&gateway, "site")?;
    ensure!(
        gateway.spis("site")?.0 == ike,
        "the IKE SA is another one: {}",
        gateway.log(40)
    );
    capture.stop().is_clean()
}

fn a_tunnel_moves_there_and_back_with_what_others_have_given_its_device() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let gate = &topology.gateway_a;
    gate.exec("sysctl -qw net.ipv4.conf.all.rp_filter=1")?;
    let (a, b) = (of_two_families(Side::A), of_two_families(Side::B));
    let (gateway, _b) = start(&topology, a, b.respond())?;
    gate.ip("address add 169.254.77.1/30 dev site")?;
    gate.ip("route add 100.64.0.0/24 dev site metric 7")?;
    gate.ip("route add 100.65.0.0/24 via 169.254.77.2 dev site table 77")?;
    for engine in ["kernel", "xdp", "kernel"] {
        changes_engine(&topology, &gateway, || gateway.move_to("site", engine)).context(engine)?;
        let carried = is_by_the_kernel(&gateway, "site");
        ensure!(
            carried.is_ok() == (engine == "kernel"),
            "{engine}: {carried:?}"
        );
        let addresses = gate.ip("address show dev site")?;
        ensure!(addresses.contains("169.254.77.1/30"), "{addresses}");
        for route in [
            "100.64.0.0/24 dev site",
            "100.65.0.0/24 via 169.254.77.2 dev site",
        ] {
            let routes = gate.ip("route show table all")?;
            ensure!(routes.contains(route), "{engine}: {routes}");
        }
        // It comes up there, too.
        gateway.rekey("site")?;
    }
    Ok(())
}

/// Both gateways with two children, A's tunnel with one engine.
fn with_engine<'a>(
    topology: &'a Topology,
    engine: &str,
) -> anyhow::Result<(Gateway<'a>, Gateway<'a>)> {
    let (a, b) = (of_two_families(Side::A), of_two_families(Side::B));
    let gateways = start(topology, a.with(engine), b.respond())?;
    both_talk(topology)?;
    Ok(gateways)
}

/// Waits until nothing of gateway A's tunnel, which carries packets, is with the other engine, and all of it with this one.
fn is_wholly(topology: &Topology, gateway: &Gateway<'_>, engine: &str) -> anyhow::Result<()> {
    let by = match engine {
        KERNEL => is_by_the_kernel,
        _ => is_by_xdp,
    };
    // Two children with two SAs each.
    let states = if engine == KERNEL { 4 } else { 0 };
    wait_for("the tunnel to be with its engine", 2 * PATIENCE, || {
        by(gateway, "site").map(Some)
    })
    .and_then(|()| leaves_nothing(&topology.gateway_a, states))
    .with_context(|| gateway.log(60))
}

/// Both children carry packets both ways.
fn both_talk(topology: &Topology) -> anyhow::Result<()> {
    hosts_talk(topology, V4)?;
    hosts_talk(topology, V6)
}

fn a_tunnel_that_is_sent_back_on_its_way_goes_back_when_it_has_arrived() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (a, _b) = with_engine(&topology, XDP)?;
    let before = index_of(&topology.gateway_a, "site")?;
    let flows = Flows::start(&topology)?;
    a.move_to("site", "kernel")?;
    a.move_to("site", "xdp")?;
    wait_for(
        "the tunnel to have been there and to be back",
        PATIENCE * 2,
        || {
            let changed = a.tunnel("site")?.device_changed.context("not yet")?;
            ensure!(
                changed.from != before && changed.to != before,
                "{changed:?}"
            );
            Ok(Some(()))
        },
    )
    .with_context(|| a.log(40))?;
    is_wholly(&topology, &a, XDP)?;
    flows.are_perfect()?;
    both_talk(&topology)?;
    capture.stop().is_clean()
}

fn the_next_daemon_moves_what_the_configuration_has_elsewhere_and_loses_nothing()
-> anyhow::Result<()> {
    next_daemons_want(&[KERNEL])
}

fn the_next_daemons_move_it_there_and_back_and_lose_nothing() -> anyhow::Result<()> {
    next_daemons_want(&[KERNEL, XDP, KERNEL])
}

fn next_daemons_want(engines: &[&str]) -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (mut a, _b) = with_engine(&topology, XDP)?;
    let ike = a.spis("site")?.0;
    let flows = Flows::start(&topology)?;
    for engine in engines {
        a.kill()?;
        a.configure("", &[of_two_families(Side::A).with(engine)])?;
        a.run()?;
        is_wholly(&topology, &a, engine)?;
    }
    flows.are_perfect()?;
    both_talk(&topology)?;
    ensure!(a.spis("site")?.0 == ike, "another IKE SA\n{}", a.log(60));
    capture.stop().is_clean()
}

/// How far a move has come when something dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Devices of both engines are there, and the peer is still to answer.
    Begun,
    /// The routes lead into the new device, and the old one takes what comes late.
    Switched,
}

/// Begins to move gateway A's tunnel and lets something die at a stage of that.
fn dies_during_a_move(
    topology: &Topology,
    (a, b): (&mut Gateway<'_>, &Gateway<'_>),
    to: &str,
    stage: Stage,
    dies: impl FnOnce(&mut Gateway<'_>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let peer = Pid::from_raw(b.pid().context("no daemon")?.try_into()?);
    let device = match stage {
        Stage::Begun => "ipsecmv",
        Stage::Switched => "ipsecol",
    };
    if stage == Stage::Begun {
        // It answers nothing, so that the move stays where it is.
        kill(peer, Signal::SIGSTOP)?;
    }
    let died = a.move_to("site", to).and_then(|_| {
        wait_for("the move to be under way", PATIENCE, || {
            let links = topology.gateway_a.ip("-o link show")?;
            Ok(links.contains(device).then_some(()))
        })?;
        dies(a)
    });
    if stage == Stage::Begun {
        kill(peer, Signal::SIGCONT)?;
    }
    died
}

/// Where a tunnel is, and where it is sent.
const WAYS: [(&str, &str, &str); 2] = [(XDP, "kernel", KERNEL), (KERNEL, "xdp", XDP)];

/// The daemon dies, and the one that comes after it wants the tunnel where the configuration has it: where it came from.
fn a_daemon_is_killed(way: (&str, &str, &str), stage: Stage) -> anyhow::Result<()> {
    let (from, to, _) = way;
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (mut a, b) = with_engine(&topology, from)?;
    let ike = a.spis("site")?.0;
    let flows = Flows::start(&topology)?;
    dies_during_a_move(&topology, (&mut a, &b), to, stage, |a| a.kill())?;
    a.run()?;
    is_wholly(&topology, &a, from)?;
    flows.are_perfect()?;
    both_talk(&topology)?;
    ensure!(a.spis("site")?.0 == ike, "another IKE SA\n{}", a.log(60));
    capture.stop().is_clean()
}

fn a_daemon_that_is_killed_during_a_move_costs_no_packet() -> anyhow::Result<()> {
    a_daemon_is_killed(WAYS[0], Stage::Begun)
}

fn daemons_that_are_killed_anywhere_in_a_move_cost_no_packet() -> anyhow::Result<()> {
    for way in WAYS {
        for stage in [Stage::Begun, Stage::Switched] {
            a_daemon_is_killed(way, stage).with_context(|| format!("{way:?}, {stage:?}"))?;
        }
    }
    Ok(())
}

/// The data plane dies, and the daemon has another one carry the tunnel where it was sent; with `both` the daemon dies, too, and the
/// next one has it where it came from.
fn a_data_plane_is_killed(way: (&str, &str, &str), stage: Stage, both: bool) -> anyhow::Result<()> {
    let (from, to, there) = way;
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (mut a, b) = with_engine(&topology, from)?;
    dies_during_a_move(&topology, (&mut a, &b), to, stage, |a| {
        if both {
            a.kill()?;
        }
        a.kill_data_plane()
    })?;
    if both {
        a.run()?;
    }
    wait_for("the tunnel to carry again", 2 * PATIENCE, || {
        both_talk(&topology).map(Some)
    })
    .with_context(|| a.log(60))?;
    is_wholly(&topology, &a, if both { from } else { there })?;
    capture.stop().is_clean()
}

fn a_data_plane_that_is_killed_during_a_move_leaves_nothing_behind() -> anyhow::Result<()> {
    a_data_plane_is_killed(WAYS[1], Stage::Switched, false)
}

fn data_planes_that_are_killed_anywhere_in_a_move_leave_nothing_behind() -> anyhow::Result<()> {
    for way in WAYS {
        for stage in [Stage::Begun, Stage::Switched] {
            for both in [false, true] {
                a_data_plane_is_killed(way, stage, both)
                    .with_context(|| format!("{way:?}, {stage:?}, the daemon, too: {both}"))?;
            }
        }
    }
    Ok(())
}

/// Of one peer only one engine can have the socket, so that what comes in between may be lost.
fn a_tunnel_behind_a_nat_moves_and_loses_little() -> anyhow::Result<()> {
    /// Packets a second, and how many may be lost: those of so many milliseconds.
    const RATE: u32 = 1000;
    const MOST: u64 = 300;
    for fast_path in ["auto", "off"] {
        let topology = Topology::build(Options {
            nat: true,
            ..Options::default()
        })?;
        let capture = Capture::start(&topology.router)?;
        let line = format!("fast_path = \"{fast_path}\"");
        let a = Tunnel::between_sites(Side::A, V4).with(&line).with(XDP);
        let b = Tunnel::between_sites(Side::B, V4).respond_to_any();
        let (a, _b) = start(&topology, a, b)?;
        hosts_talk(&topology, V4)?;
        for engine in ["kernel", "xdp", "kernel"] {
            let before = index_of(&topology.gateway_a, "site")?;
            let flows = Flows::at(&topology, RATE)?;
            a.move_to("site", engine)?;
            has_changed_engine(&topology, &a, before)?;
            let [out, back] = flows.cut()?;
            eprintln!("fast path {fast_path}, to {engine}: out {out}; back {back}");
            for report in [out, back] {
                ensure!(
                    report.lost() <= MOST && report.duplicated == 0,
                    "fast path {fast_path}, to {engine}: out {out}; back {back}"
                );
            }
            hosts_talk(&topology, V4)?;
        }
        capture.stop().is_clean()?;
    }
    Ok(())
}
