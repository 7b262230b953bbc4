//! Tunnels between a gateway of ours and strongSwan, in both roles.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context, ensure};
use ipsec_ctl::api::model::State;
use ipsec_tests::{
    capture::Capture,
    cases,
    command::wait_for,
    gateway::{ChildSettings, Gateway, Tunnel},
    impairment::{Behind, Impairment, Rates},
    pair::{PATIENCE, hosts_are_apart, hosts_talk},
    ping::Ping,
    strongswan::{ChildConnection, Connection, StrongSwan},
    suite::{self, Need::*},
    tcp,
    topology::{Family, Options, Side, Topology},
    udp::Flow,
};

fn main() -> ExitCode {
    suite::main(&cases![
        [StrongSwan] aes256_sha512_ecp521_in_both_roles,
        [StrongSwan] aes256gcm16_prfsha384_x25519_in_both_roles,
        [StrongSwan] chacha20poly1305_prfsha256_x25519_in_both_roles,
        [StrongSwan] aes128_sha256_modp2048_in_both_roles,
        [StrongSwan] we_narrow_to_our_selectors_as_responder,
        [StrongSwan] we_accept_its_narrower_selectors_as_initiator,
        [StrongSwan] two_children_carry_what_is_theirs,
        [StrongSwan, Nftables] long_messages_cross_a_small_mtu_in_both_roles,
        [StrongSwan] everything_goes_into_a_tunnel,
        [StrongSwan] a_wrong_key_is_refused_in_both_roles,
        [StrongSwan] no_common_proposal_is_refused_in_both_roles,
        [StrongSwan] a_delete_from_either_side_ends_the_tunnel_at_both,
        [StrongSwan] strongswan_killed_and_restarted_is_found_again,
        [StrongSwan] a_strongswan_that_restarts_and_calls_is_followed_whether_it_says_so_or_not,
        [StrongSwan] a_frozen_strongswan_is_given_up_and_found_again,
        [StrongSwan] we_are_found_again_after_a_kill,
        [StrongSwan] long a_strongswan_that_we_cannot_call_begins_the_fresh_ike_sa_that_we_ask_for,
        [StrongSwan, Nftables] a_nat_in_between_is_crossed_by_us,
        [StrongSwan, Nftables] a_nat_in_between_is_crossed_by_strongswan,
        [StrongSwan] a_nat_that_rebinds_under_traffic_is_followed_in_both_roles,
    ])
}

const V4: Family = Family::V4;
const SUITE: (&str, &str) = ("aes256gcm16-prfsha384-x25519", "aes256gcm16");

/// Our end; strongSwan's userspace ESP needs encapsulation.
fn ours(side: Side, (ike, esp): (&str, &str)) -> Tunnel {
    Tunnel::between_sites(side, V4)
        .suite(ike, esp)
        .with("nat = \"force\"")
}

fn theirs(side: Side, (ike, esp): (&str, &str)) -> Connection {
    Connection::between_sites(side, ike, esp)
}

/// We at site A start, strongSwan at site B answers.
fn we_start<'a>(
    topology: &'a Topology,
    ours: Tunnel,
    theirs: &Connection,
) -> anyhow::Result<(Gateway<'a>, StrongSwan)> {
    let swan = StrongSwan::start(&topology.gateway_b)?;
    swan.load(theirs)?;
    let gateway = Gateway::start(&topology.gateway_a, &[ours])?;
    gateway
        .wait_up("site", PATIENCE)
        .with_context(|| format!("log of strongSwan:\n{}", swan.log(40)))?;
    Ok((gateway, swan))
}

/// strongSwan at site A starts, we at site B answer.
fn they_start<'a>(
    topology: &'a Topology,
    ours: Tunnel,
    theirs: &Connection,
) -> anyhow::Result<(Gateway<'a>, StrongSwan)> {
    let gateway = Gateway::start(&topology.gateway_b, &[ours])?;
    let swan = StrongSwan::start(&topology.gateway_a)?;
    swan.load(theirs)?;
    for child in &theirs.children {
        swan.initiate(&child.name)
            .with_context(|| format!("our log:\n{}", gateway.log(40)))?;
    }
    gateway.wait_up("site", PATIENCE)?;
    Ok((gateway, swan))
}

/// A suite with us as initiator, then as responder.
fn both_roles(suite: (&str, &str)) -> anyhow::Result<()> {
    for we_initiate in [true, false] {
        let topology = Topology::build(Options::default())?;
        let capture = Capture::start(&topology.router)?;
        let _ends = if we_initiate {
            we_start(&topology, ours(Side::A, suite), &theirs(Side::B, suite))?
        } else {
            they_start(
                &topology,
                ours(Side::B, suite).respond(),
                &theirs(Side::A, suite),
            )?
        };
        let role = || {
            format!(
                "we as {}",
                if we_initiate {
                    "initiator"
                } else {
                    "responder"
                }
            )
        };
        hosts_talk(&topology, V4).with_context(role)?;
        let transfer = tcp::transfer(
            &topology.host_a,
            &topology.host_b,
            Side::B.host(V4),
            Duration::from_secs(1),
            u64::MAX,
        )
        .with_context(role)?;
        ensure!(transfer.bytes > 500_000, "{transfer}");
        capture.stop().is_clean().with_context(role)?;
    }
    Ok(())
}

fn aes256_sha512_ecp521_in_both_roles() -> anyhow::Result<()> {
    both_roles(("aes256-sha512-ecp521", "aes256-sha512"))
}

fn aes256gcm16_prfsha384_x25519_in_both_roles() -> anyhow::Result<()> {
    both_roles(SUITE)
}

fn chacha20poly1305_prfsha256_x25519_in_both_roles() -> anyhow::Result<()> {
    both_roles(("chacha20poly1305-prfsha256-x25519", "chacha20poly1305"))
}

fn aes128_sha256_modp2048_in_both_roles() -> anyhow::Result<()> {
    both_roles(("aes128-sha256-modp2048", "aes128-sha256"))
}

fn we_narrow_to_our_selectors_as_responder() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let mut tunnel = ours(Side::B, SUITE).respond();
    tunnel.children[0].local = vec!["10.2.0.0/28".to_owned()];
    let (_gateway, swan) = they_start(&topology, tunnel, &theirs(Side::A, SUITE))?;
    ensure!(swan.sas()?.contains("10.2.0.0/28"), "{}", swan.sas()?);
    hosts_talk(&topology, V4)
}

fn we_accept_its_narrower_selectors_as_initiator() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let mut connection = theirs(Side::B, SUITE);
    "10.2.0.0/28".clone_into(&mut connection.children[0].local);
    let (gateway, _swan) = we_start(&topology, ours(Side::A, SUITE), &connection)?;
    let children = gateway.tunnel("site")?.children;
    ensure!(children[0].remote == ["10.2.0.0/28"], "{children:?}");
    hosts_talk(&topology, V4)
}

/// The network between takes 576 bytes, and drops fragments of IP.
fn narrow(topology: &Topology) -> anyhow::Result<()> {
    for netns in [&topology.gateway_a, &topology.gateway_b] {
        netns.ip("link set wan mtu 576")?;
    }
    for command in [
        "ip link set to-a mtu 576",
        "ip link set to-b mtu 576",
        "nft add table ip narrow",
        "nft add chain ip narrow pass { type filter hook prerouting priority -450 ; }",
        "nft add rule ip narrow pass ip frag-off & 0x3fff != 0 drop",
    ] {
        topology.router.exec(command)?;
    }
    Ok(())
}

// RFC 7383: with a dozen ESP proposals IKE_AUTH is longer than 576 bytes.
fn long_messages_cross_a_small_mtu_in_both_roles() -> anyhow::Result<()> {
    let ciphers = ["aes256", "aes192", "aes128"];
    let proposals: Vec<String> = ciphers
        .iter()
        .flat_map(|cipher| ["sha512", "sha384", "sha256"].map(|hash| format!("{cipher}-{hash}")))
        .chain(["aes256gcm16", "aes128gcm16", "chacha20poly1305"].map(str::to_owned))
        .collect();
    for we_initiate in [true, false] {
        let topology = Topology::build(Options::default())?;
        narrow(&topology)?;
        let side = if we_initiate { Side::A } else { Side::B };
        let mut tunnel = ours(side, SUITE).with("fragment_size = 576");
        tunnel.children[0].lines = vec![format!("esp = {proposals:?}")];
        let mut connection = theirs(side.other(), SUITE);
        connection.fragments = true;
        connection.children[0].esp = proposals.join(",");
        let (_gateway, swan) = if we_initiate {
            we_start(&topology, tunnel, &connection)?
        } else {
            they_start(&topology, tunnel.respond(), &connection)?
        };
        let says = if we_initiate {
            "received fragment #2 of 2"
        } else {
            "into 2 fragments"
        };
        ensure!(swan.has_logged(says), "{}", swan.log(60));
        hosts_talk(&topology, V4)?;
    }
    Ok(())
}

fn two_children_carry_what_is_theirs() -> anyhow::Result<()> {
    for we_initiate in [true, false] {
        let topology = Topology::build(Options::default())?;
        topology.host_b.ip("addr add 10.2.0.200/24 dev lan")?;
        // strongSwan installs a child's routes only with an address of its own inside the child's selectors.
        topology.gateway_b.ip("addr add 10.2.0.129/24 dev lan")?;
        let site_b = [("low", "10.2.0.0/25"), ("high", "10.2.0.128/25")];
        let (our_side, their_side) = if we_initiate {
            (Side::A, Side::B)
        } else {
            (Side::B, Side::A)
        };
        let mut tunnel = ours(our_side, SUITE);
        let mut connection = theirs(their_side, SUITE);
        let a = || "10.1.0.0/24".to_owned();
        let sides = |side, b: &str| match side {
            Side::A => (a(), b.to_owned()),
            Side::B => (b.to_owned(), a()),
        };
        tunnel.children = site_b
            .map(|(name, prefix)| {
                let (local, remote) = sides(our_side, prefix);
                ChildSettings {
                    name: name.to_owned(),
                    local: vec![local],
                    remote: vec![remote],
                    lines: vec!["esp = [\"aes256gcm16\"]".to_owned()],
                }
            })
            .to_vec();
        connection.children = site_b
            .map(|(name, prefix)| {
                let (local, remote) = sides(their_side, prefix);
                ChildConnection {
                    name: name.to_owned(),
                    local,
                    remote,
                    esp: SUITE.1.to_owned(),
                    lines: Vec::new(),
                }
            })
            .to_vec();
        let (gateway, _swan) = if we_initiate {
            we_start(&topology, tunnel, &connection)?
        } else {
            they_start(&topology, tunnel.respond(), &connection)?
        };
        for to in [[10, 2, 0, 10], [10, 2, 0, 200]] {
            Ping::to(to.into())
                .run(&topology.host_a)?
                .all_answered()
                .with_context(|| {
                    format!(
                        "we initiate: {we_initiate}, {}",
                        gateway.shown_status().unwrap_or_default()
                    )
                })?;
        }
    }
    Ok(())
}

fn everything_goes_into_a_tunnel() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let all = || "0.0.0.0/0".to_owned();
    let mut tunnel = ours(Side::A, SUITE);
    tunnel.children[0].local = vec![all()];
    tunnel.children[0].remote = vec![all()];
    let mut connection = theirs(Side::B, SUITE);
    connection.children[0].local = all();
    connection.children[0].remote = all();
    // strongSwan's route takes even what is for its own site, unless a rule comes before.
    topology
        .gateway_b
        .ip("rule add to 10.2.0.0/24 lookup main pref 100")?;
    let _ends = we_start(&topology, tunnel, &connection)?;
    hosts_talk(&topology, V4)?;
    capture.stop().is_clean()
}

fn a_wrong_key_is_refused_in_both_roles() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let mut wrong = ours(Side::A, SUITE);
    "another key".clone_into(&mut wrong.psk);
    {
        let swan = StrongSwan::start(&topology.gateway_b)?;
        swan.load(&theirs(Side::B, SUITE))?;
        let gateway = Gateway::start(&topology.gateway_a, &[wrong])?;
        let refused = gateway.wait("site", "refused", PATIENCE, |tunnel| {
            tunnel.last_failure.is_some()
        })?;
        ensure!(refused.state != State::Up, "{refused:?}");
        hosts_are_apart(&topology, V4)?;
    }
    let topology = Topology::build(Options::default())?;
    let mut wrong = ours(Side::B, SUITE).respond();
    "another key".clone_into(&mut wrong.psk);
    let gateway = Gateway::start(&topology.gateway_b, &[wrong])?;
    let swan = StrongSwan::start(&topology.gateway_a)?;
    swan.load(&theirs(Side::A, SUITE))?;
    ensure!(
        swan.initiate("net").is_err(),
        "strongSwan came up with a wrong key"
    );
    ensure!(swan.has_logged("AUTHENTICATION_FAILED"), "{}", swan.log(20));
    ensure!(
        gateway.has_logged("wrong PSK for ID"),
        "{}",
        gateway.log(20)
    );
    ensure!(gateway.tunnel("site")?.state != State::Up);
    Ok(())
}

fn no_common_proposal_is_refused_in_both_roles() -> anyhow::Result<()> {
    let other = ("aes128-sha256-modp2048", "aes128-sha256");
    {
        let topology = Topology::build(Options::default())?;
        let swan = StrongSwan::start(&topology.gateway_b)?;
        swan.load(&theirs(Side::B, other))?;
        let gateway = Gateway::start(&topology.gateway_a, &[ours(Side::A, SUITE)])?;
        gateway.wait("site", "refused", PATIENCE, |tunnel| {
            tunnel.last_failure.is_some()
        })?;
        ensure!(gateway.tunnel("site")?.state != State::Up);
    }
    let topology = Topology::build(Options::default())?;
    let gateway = Gateway::start(&topology.gateway_b, &[ours(Side::B, SUITE).respond()])?;
    let swan = StrongSwan::start(&topology.gateway_a)?;
    swan.load(&theirs(Side::A, other))?;
    ensure!(
        swan.initiate("net").is_err(),
        "strongSwan came up without a common proposal"
    );
    ensure!(swan.has_logged("NO_PROPOSAL_CHOSEN"), "{}", swan.log(20));
    ensure!(
        gateway.has_logged("aes128-sha256-prfsha256-modp2048"),
        "{}",
        gateway.log(20)
    );
    Ok(())
}

fn a_delete_from_either_side_ends_the_tunnel_at_both() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (gateway, swan) = they_start(
        &topology,
        ours(Side::B, SUITE).respond(),
        &theirs(Side::A, SUITE),
    )?;
    swan.terminate()?;
    gateway.wait("site", "down", PATIENCE, |tunnel| tunnel.state != State::Up)?;
    swan.initiate("net")?;
    gateway.wait_up("site", PATIENCE)?;
    hosts_talk(&topology, V4)?;
    swan.terminate_child("net")?;
    gateway.wait("site", "without child", PATIENCE, |tunnel| {
        tunnel.children[0].state != State::Up
    })?;
    swan.initiate("net")?;
    gateway.wait_up("site", PATIENCE)?;
    gateway.down("site")?;
    swan.wait_sas("our delete", PATIENCE, |sas| !sas.contains("INSTALLED"))?;
    capture.stop().is_clean()
}

fn strongswan_killed_and_restarted_is_found_again() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let dpd = "dpd = { interval = \"2s\", timeout = \"6s\" }";
    let (gateway, swan) = we_start(
        &topology,
        ours(Side::A, SUITE).with(dpd),
        &theirs(Side::B, SUITE),
    )?;
    let before = gateway
        .tunnel("site")?
        .ike
        .context("no IKE SA")?
        .initiator_spi;
    let _swan = swan.crash_and_restart(&topology.gateway_b)?;
    // Traffic makes us ask whether the peer still lives.
    Ping::to(Side::B.host(V4))
        .count(60)
        .interval(Duration::from_millis(200))
        .run(&topology.host_a)?;
    gateway.wait("site", "up anew", Duration::from_secs(40), |tunnel| {
        tunnel.state == State::Up
            && tunnel
                .ike
                .as_ref()
                .is_some_and(|ike| ike.initiator_spi != before)
    })?;
    hosts_talk(&topology, V4)
}

fn a_strongswan_that_we_cannot_call_begins_the_fresh_ike_sa_that_we_ask_for() -> anyhow::Result<()>
{
    let topology = Topology::build(Options::default())?;
    let tunnel = ours(Side::B, SUITE)
        .respond_to_any()
        .with("reauth = true")
        .with("lifetime = \"60s\"");
    let (gateway, swan) = they_start(&topology, tunnel, &theirs(Side::A, SUITE))?;
    let spi = || anyhow::Ok(gateway.tunnel("site")?.ike.map(|ike| ike.initiator_spi));
    let before = spi()?;
    wait_for("a fresh IKE SA", Duration::from_secs(90), || {
        let now = spi()?;
        Ok((now.is_some() && now != before).then_some(()))
    })
    .with_context(|| format!("{}\n{}", gateway.log(20), swan.log(40)))?;
    ensure!(swan.log(200).contains("AUTH_LFT"), "{}", swan.log(200));
    wait_for("traffic on it", PATIENCE, || {
        hosts_talk(&topology, V4).map(Some)
    })
}

// RFC 7296 section 2.4: with INITIAL_CONTACT the old SAs are gone at once; without it the new ones take the traffic.
fn a_strongswan_that_restarts_and_calls_is_followed_whether_it_says_so_or_not() -> anyhow::Result<()>
{
    for says_so in [true, false] {
        let topology = Topology::build(Options::default())?;
        let mut connection = theirs(Side::B, SUITE);
        connection.initial_contact = says_so;
        // We have started, just before: so both sides seem to have done so at once.
        let tunnel = ours(Side::A, SUITE).with("dpd = { mode = \"off\" }");
        let (gateway, swan) = we_start(&topology, tunnel, &connection)?;
        let spi = || {
            anyhow::Ok(
                gateway
                    .tunnel("site")?
                    .ike
                    .context("no IKE SA")?
                    .initiator_spi,
            )
        };
        let before = spi()?;
        let swan = swan.crash_and_restart(&topology.gateway_b)?;
        swan.initiate("net")?;
        wait_for("traffic on the new SAs", Duration::from_secs(8), || {
            hosts_talk(&topology, V4).map(Some)
        })
        .with_context(|| format!("says so: {says_so}\n{}", gateway.log(20)))?;
        ensure!(spi()? != before, "{}", gateway.log(20));
    }
    Ok(())
}

fn a_frozen_strongswan_is_given_up_and_found_again() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let tunnel = ours(Side::A, SUITE).with("dpd = { interval = \"1s\", timeout = \"5s\" }");
    let (gateway, swan) = we_start(&topology, tunnel, &theirs(Side::B, SUITE))?;
    swan.freeze()?;
    // Traffic makes us ask whether the peer still lives.
    let asking = Ping::to(Side::B.host(V4))
        .count(50)
        .interval(Duration::from_millis(200));
    let given_up = asking.run(&topology.host_a).and_then(|_| {
        gateway.wait("site", "given up", PATIENCE, |tunnel| {
            tunnel.state != State::Up
        })
    });
    swan.thaw()?;
    given_up?;
    gateway.wait_up("site", Duration::from_secs(40))?;
    wait_for("traffic", PATIENCE, || hosts_talk(&topology, V4).map(Some))
}

// RFC 7296 section 2.23, and with MOBIKE RFC 4555 section 3.8.
fn a_nat_that_rebinds_under_traffic_is_followed_in_both_roles() -> anyhow::Result<()> {
    for (we_initiate, mobike) in [(true, true), (true, false), (false, true)] {
        let topology = Topology::build(Options::default())?;
        let nat = Impairment::start(&topology, 1, Rates::NONE)?;
        let side = if we_initiate { Side::A } else { Side::B };
        // The side that starts is behind the NAT.
        let tunnel = Tunnel::between_sites(side, V4)
            .suite(SUITE.0, SUITE.1)
            .with("dpd = { interval = \"1s\", timeout = \"20s\" }");
        let mut connection = theirs(side.other(), SUITE);
        connection.mobike = mobike;
        connection.dpd = 1;
        let (gateway, swan) = if we_initiate {
            connection.remote = None;
            we_start(&topology, tunnel, &connection)?
        } else {
            connection.local = None;
            they_start(&topology, tunnel.respond_to_any(), &connection)?
        };
        let flow = Flow {
            time: Duration::from_secs(60),
            ..Flow::to(Side::A.host(V4))
        };
        let flow = flow.start(&topology.host_b, &topology.host_a)?;
        Ping::to(Side::B.host(V4)).run(&topology.host_a)?;
        nat.rebind(Behind::GatewayA);
        let case = || {
            format!(
                "we start: {we_initiate}, MOBIKE: {mobike}\n{}\n{}",
                gateway.log(20),
                swan.log(30)
            )
        };
        wait_for("traffic", PATIENCE, || hosts_talk(&topology, V4).map(Some)).with_context(case)?;
        let report = flow.cut()?;
        ensure!(report.lost() < report.sent / 2, "{report}, {}", case());
        ensure!(gateway.tunnel("site")?.state == State::Up, "{}", case());
        nat.stop()?;
    }
    Ok(())
}

fn we_are_found_again_after_a_kill() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (mut gateway, swan) = we_start(&topology, ours(Side::A, SUITE), &theirs(Side::B, SUITE))?;
    gateway.kill()?;
    gateway.run()?;
    gateway.wait_up("site", PATIENCE)?;
    hosts_talk(&topology, V4)?;
    // INITIAL_CONTACT has made it forget the SAs of the life before.
    let sas = swan.wait_sas("one IKE SA", PATIENCE, |sas| {
        sas.matches("ESTABLISHED").count() == 1
    })?;
    ensure!(sas.contains("INSTALLED"), "{sas}");
    Ok(())
}

fn a_nat_in_between_is_crossed_by_us() -> anyhow::Result<()> {
    let topology = Topology::build(Options {
        nat: true,
        ..Options::default()
    })?;
    let connection = Connection {
        remote: None,
        ..theirs(Side::B, SUITE)
    };
    let tunnel = Tunnel::between_sites(Side::A, V4).suite(SUITE.0, SUITE.1);
    let (_gateway, swan) = we_start(&topology, tunnel, &connection)?;
    ensure!(swan.sas()?.contains("203.0.113.1"), "{}", swan.sas()?);
    hosts_talk(&topology, V4)
}

fn a_nat_in_between_is_crossed_by_strongswan() -> anyhow::Result<()> {
    let topology = Topology::build(Options {
        nat: true,
        ..Options::default()
    })?;
    let tunnel = Tunnel::between_sites(Side::B, V4)
        .suite(SUITE.0, SUITE.1)
        .respond_to_any();
    let (gateway, _swan) = they_start(&topology, tunnel, &theirs(Side::A, SUITE))?;
    let peer = gateway.tunnel("site")?.ike.context("no IKE SA")?.remote;
    ensure!(peer.ip() == Side::B.router(V4), "{peer}");
    hosts_talk(&topology, V4)
}
