//! `cargo xtask demo`: two gateways, a tunnel, real traffic, and what an eavesdropper between them saw.
//!
//! Narrates what it does and ends with a table of checks; the exit status tells whether all of them held.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use ipsec_ctl::api::model::Status;
use ipsec_tests::{
    capture::Capture,
    gateway::{Gateway, Tunnel, no_fast_path},
    many::{self, Many},
    netns::Scope,
    ping::Ping,
    tcp,
    topology::{Family, Options, Side, Topology},
    udp::Flow,
};

/// What the demo shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scenario {
    Plain,
    Nat,
    Ipv6,
    Any,
    Many,
}

fn main() -> ExitCode {
    let mut scenario = Scenario::Plain;
    let mut keep = false;
    let mut engine = "xdp";
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--keep" => keep = true,
            "nat" => scenario = Scenario::Nat,
            "ipv6" => scenario = Scenario::Ipv6,
            "any" => scenario = Scenario::Any,
            "many" => scenario = Scenario::Many,
            "many-kernel" => {
                scenario = Scenario::Many;
                engine = "kernel";
            }
            "plain" => scenario = Scenario::Plain,
            other => {
                eprintln!(
                    "unknown scenario `{other}`: there are plain, nat, ipv6, any, many and many-kernel"
                );
                return ExitCode::FAILURE;
            }
        }
    }
    let result = if scenario == Scenario::Many {
        many(engine)
    } else {
        demo(scenario, keep)
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("the demo broke off: {error:?}");
            ExitCode::FAILURE
        }
    }
}

/// Prints a sentence of the story.
#[expect(clippy::print_stdout, reason = "the demo talks to a person")]
fn say(text: &str) {
    println!("{text}");
}

/// The checks and their results.
#[derive(Default)]
struct Table(Vec<(String, bool, String)>);

impl Table {
    fn check(&mut self, what: &str, result: anyhow::Result<String>) {
        let (good, words) = match result {
            Ok(words) => (true, words),
            Err(error) => (false, format!("{error:#}")),
        };
        self.0.push((what.to_owned(), good, words));
    }

    fn print(&self) -> bool {
        let width = self.0.iter().map(|row| row.0.len()).max().unwrap_or(0);
        say("");
        for (what, good, words) in &self.0 {
            say(&format!(
                "  {}  {what:width$}  {words}",
                if *good { "ok  " } else { "FAIL" }
            ));
        }
        self.0.iter().all(|row| row.1)
    }
}

fn demo(scenario: Scenario, keep: bool) -> anyhow::Result<bool> {
    let family = if scenario == Scenario::Ipv6 {
        Family::V6
    } else {
        Family::V4
    };
    let scope = Scope::tagged("demo");
    scope.sweep();
    say(
        "Two sites: a host behind a gateway each, and a router between the gateways that sees everything.",
    );
    let mut topology = Topology::build_as(
        scope,
        Options {
            nat: scenario == Scenario::Nat,
            ..Options::default()
        },
    )?;
    if scenario == Scenario::Nat {
        say("The router hides gateway A behind its own address (NAT).");
    }
    let mut table = Table::default();
    let kept = {
        let capture = Capture::start(&topology.router)?;
        say("Both gateways run `ipsec-ctl run`; A starts the tunnel.");
        let (config_a, config_b) = tunnels(scenario, family);
        let gateway_b = Gateway::start(&topology.gateway_b, &[config_b])?;
        let start = Instant::now();
        let mut gateway_a = Gateway::start(&topology.gateway_a, &[config_a])?;
        gateway_a
            .wait_up("site", Duration::from_secs(20))
            .with_context(|| format!("log of gateway A:\n{}", gateway_a.log(30)))?;
        table.check(
            "tunnel",
            Ok(format!(
                "up {:.2} s after the start of the daemon",
                start.elapsed().as_secs_f64()
            )),
        );
        traffic(&mut table, &topology, family);
        for (name, gateway) in [("A", &gateway_a), ("B", &gateway_b)] {
            say(&format!("\n`ipsec-ctl status` of gateway {name}:\n"));
            say(&gateway.shown_status()?);
        }
        table.check("fast path", fast_share(&gateway_a.status()?));
        say(
            "The daemon of gateway A is killed (kill -9): its data plane goes on, and nothing leaves in the clear.",
        );
        gateway_a.kill()?;
        table.check("after kill -9", goes_on(&topology, family));
        say("It starts again and takes over what it left behind.");
        gateway_a.run()?;
        let start = Instant::now();
        let up = gateway_a.wait_up("site", Duration::from_secs(40));
        table.check(
            "restart",
            up.and_then(|_| {
                Ping::to(Side::B.host(family))
                    .run(&topology.host_a)?
                    .all_answered()
            })
            .map(|()| format!("traffic again after {:.2} s", start.elapsed().as_secs_f64())),
        );
        let report = capture.stop();
        table.check(
            "the eavesdropper",
            report.is_clean().map(|()| report.summary()),
        );
        if keep {
            say(&play(&topology, &gateway_a));
            gateway_a.keep();
            gateway_b.keep();
        }
        keep
    };
    if kept {
        topology.keep();
    }
    Ok(table.print())
}

/// The tunnel as each side configures it.
fn tunnels(scenario: Scenario, family: Family) -> (Tunnel, Tunnel) {
    let mut sides = [Side::A, Side::B].map(|side| Tunnel::between_sites(side, family));
    if scenario == Scenario::Any {
        for tunnel in &mut sides {
            for child in &mut tunnel.children {
                child.local = vec!["0.0.0.0/0".to_owned()];
                child.remote = vec!["0.0.0.0/0".to_owned()];
            }
        }
    }
    let [a, b] = sides;
    let b = if scenario == Scenario::Nat {
        b.respond_to_any()
    } else {
        b.respond()
    };
    (a, b)
}

fn traffic(table: &mut Table, topology: &Topology, family: Family) {
    let to = Side::B.host(family);
    say("Host A pings host B, sends UDP at a steady rate, then TCP as fast as it goes.");
    table.check(
        "ping",
        Ping::to(to)
            .count(50)
            .run(&topology.host_a)
            .and_then(|report| {
                report.all_answered()?;
                Ok(format!("{report}, {:.0}% lost", report.loss_percent()))
            }),
    );
    table.check(
        "UDP, 2000 packets/s for 5 s",
        Flow {
            rate: Some(2000),
            time: Duration::from_secs(5),
            ..Flow::to(to)
        }
        .run(&topology.host_a, &topology.host_b)
        .and_then(|report| report.is_perfect().map(|()| report.to_string())),
    );
    table.check(
        "UDP, as fast as it goes for 3 s",
        Flow {
            rate: None,
            time: Duration::from_secs(3),
            size: 1300,
            to,
        }
        .run(&topology.host_a, &topology.host_b)
        .and_then(|report| {
            ensure!(report.received > 0 && report.damaged == 0, "{report}");
            Ok(format!(
                "{:.0} Mbit/s, {:.0} packets/s arrived",
                report.bits_per_second() / 1e6,
                report.packets_per_second()
            ))
        }),
    );
    for (name, from, into, to) in [
        ("TCP, A to B", &topology.host_a, &topology.host_b, to),
        (
            "TCP, B to A",
            &topology.host_b,
            &topology.host_a,
            Side::A.host(family),
        ),
    ] {
        table.check(
            name,
            tcp::transfer(from, into, to, Duration::from_secs(4), 4 << 30)
                .map(|report| report.to_string()),
        );
    }
}

/// Share of packets that took the fast path, and why others did not.
#[expect(clippy::cast_precision_loss, reason = "a percentage for people")]
fn fast_share(status: &Status) -> anyhow::Result<String> {
    let (mut fast, mut all) = (0, 0);
    let mut reasons = Vec::new();
    for child in status.tunnels.iter().flat_map(|tunnel| &tunnel.children) {
        for direction in [&child.inbound, &child.outbound].into_iter().flatten() {
            fast += direction.fast.packets;
            all += direction.fast.packets + direction.slow.packets;
            reasons.push(format!("{:?}", direction.offload));
        }
    }
    ensure!(all > 0, "no packet was counted");
    reasons.dedup();
    let share = fast as f64 * 100.0 / all as f64;
    let words = format!("{share:.2}% of {all} packets ({})", reasons.join(", "));
    if share > 99.0 {
        return Ok(words);
    }
    match no_fast_path()? {
        Some(reason) => Ok(format!("{words}: this machine has none ({reason})")),
        None => bail!("{words}"),
    }
}

/// With the daemon dead the data plane carries what comes, and the capture will tell whether anything left in the clear.
fn goes_on(topology: &Topology, family: Family) -> anyhow::Result<String> {
    let report = Ping::to(Side::B.host(family)).run(&topology.host_a)?;
    report.all_answered()?;
    Ok(report.to_string())
}

fn play(topology: &Topology, gateway: &Gateway<'_>) -> String {
    format!(
        "\nEverything stays up. To play with it:\n\n  \
         ip netns exec {} ping {}\n  \
         ipsec-ctl status --socket {}\n\n\
         The next `cargo xtask demo`, or `cargo xtask clean`, removes it.",
        topology.host_a.name(),
        Side::B.host(Family::V4),
        gateway.socket().display(),
    )
}

/// A thousand tunnels between the two gateways.
fn many(engine: &str) -> anyhow::Result<bool> {
    let scope = Scope::tagged("demo");
    scope.sweep();
    let topology = Topology::build_as(scope, Options::default())?;
    let capture = Capture::start(&topology.router)?;
    say(&format!(
        "{} tunnels between two gateways, each with a device, an IKE SA and a child of its own.",
        many::TUNNELS
    ));
    let many = Many::start(&topology, engine, |up, after| {
        say(&format!("  {up} up after {:.1} s", after.as_secs_f64()));
    })?;
    let mut table = Table::default();
    table.check("set-up", Ok(many.set_up()));
    table.check("ping through one in a hundred", many.pings());
    table.check(
        "the eavesdropper",
        capture
            .stop()
            .is_clean()
            .map(|()| "nothing in the clear".to_owned()),
    );
    table.check("memory", many.memory());
    Ok(table.print())
}
