//! `cargo xtask soak`: two gateways over a bad network, for as long as wanted, and the table of what must always hold.
//!
//! Rounds of traffic follow each other. Every child is rekeyed every few seconds; in the middle of a round something
//! happens that the seed decides. After each round the books are closed: what was sent and neither arrived nor was
//! lost by the network on purpose, was lost by us.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use ipsec_tests::{
    capture::Capture,
    gateway::{Gateway, Tunnel},
    impairment::{Behind, Dice, Impairment, Rates},
    netns,
    topology::{Family, Options, Side, Topology},
    udp::Flow,
};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Packets a second each way.
const RATE: u32 = 500;
/// Packets an SA carries: a rekeying every few seconds.
const SA_PACKETS: u32 = 2500;
/// Traffic of a round.
const ROUND: Duration = Duration::from_secs(12);
/// Longest that a tunnel may take to be whole again.
const RECOVERY: Duration = Duration::from_secs(60);
const RATES: Rates = Rates {
    lost: 2,
    reordered: 10,
};

/// What happens in the middle of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Incident {
    Nothing,
    NatRebinds,
    InitiatorKilled,
    ResponderKilled,
    InitiatorRestarted,
    DataPlaneKilled,
}

impl Incident {
    fn roll(dice: &mut Dice) -> Self {
        match dice.below(8) {
            0 => Self::NatRebinds,
            1 => Self::InitiatorKilled,
            2 => Self::ResponderKilled,
            3 => Self::InitiatorRestarted,
            4 => Self::DataPlaneKilled,
            5.. => Self::Nothing,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Nothing => "rekeying only",
            Self::NatRebinds => "the NAT rebinds",
            Self::InitiatorKilled => "the initiator's daemon is killed",
            Self::ResponderKilled => "the responder's daemon is killed",
            Self::InitiatorRestarted => "the initiator is stopped and started",
            Self::DataPlaneKilled => "the initiator's data plane is killed",
        }
    }
}

/// The books of all rounds with one kind of incident.
#[derive(Clone, Copy, Debug, Default)]
struct Account {
    rounds: u64,
    sent: u64,
    arrived: u64,
    lost_by_network: u64,
    duplicated: u64,
    damaged: u64,
}

impl Account {
    fn lost_by_us(&self) -> u64 {
        (self.sent - self.arrived).saturating_sub(self.lost_by_network)
    }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn interrupt(_: i32) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<bool> {
    let mut arguments = std::env::args().skip(1);
    let minutes: u64 = arguments.next().context("how many minutes?")?.parse()?;
    let seed = match arguments.next() {
        Some(seed) => seed.parse()?,
        None => u64::from(std::process::id()),
    };
    catch_interrupts()?;
    netns::sweep();
    say(&format!("seed {seed}, {minutes} minutes"))?;
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let network = Impairment::start(&topology, seed, RATES)?;
    let mut gateway_b = Gateway::start(&topology.gateway_b, &[responder()])?;
    let mut gateway_a = Gateway::start(&topology.gateway_a, &[initiator()])?;
    gateway_a.wait_up("site", RECOVERY)?;
    gateway_b.wait_up("site", RECOVERY)?;
    let start = Instant::now();
    let mut dice = Dice::new(seed ^ 0x50_41_4b);
    let mut accounts: BTreeMap<Incident, Account> = BTreeMap::new();
    let mut memory = Vec::new();
    while start.elapsed() < Duration::from_secs(minutes * 60)
        && !INTERRUPTED.load(Ordering::Relaxed)
    {
        let incident = Incident::roll(&mut dice);
        let account = round(
            &topology,
            &network,
            incident,
            (&mut gateway_a, &mut gateway_b),
        )?;
        // The first round warms caches up.
        if incident == Incident::Nothing {
            memory.push(resident(&gateway_a)? + resident(&gateway_b)?);
        }
        say(&format!(
            "{:>5} s  {:<38} {:>6} sent, {:>3} lost by the network, {:>4} by us",
            start.elapsed().as_secs(),
            incident.name(),
            account.sent,
            account.lost_by_network,
            account.lost_by_us()
        ))?;
        let total = accounts.entry(incident).or_default();
        total.rounds += 1;
        total.sent += account.sent;
        total.arrived += account.arrived;
        total.lost_by_network += account.lost_by_network;
        total.duplicated += account.duplicated;
        total.damaged += account.damaged;
    }
    let agreed = agree(&gateway_a, &gateway_b);
    network.stop()?;
    let clean = capture.stop().is_clean();
    report(&accounts, &memory, agreed, clean)
}

/// SIGINT and SIGTERM end the round, and then everything is removed.
#[expect(unsafe_code, reason = "a signal handler")]
fn catch_interrupts() -> anyhow::Result<()> {
    let action = SigAction::new(
        SigHandler::Handler(interrupt),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler only stores to an atomic.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

fn say(line: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{line}")?;
    Ok(())
}

fn settings(side: Side) -> Tunnel {
    let mut tunnel = Tunnel::between_sites(side, Family::V4)
        .with("dpd = { interval = \"2s\", timeout = \"8s\" }");
    tunnel.children[0]
        .lines
        .push(format!("lifetime_packets = {SA_PACKETS}"));
    tunnel
}

fn initiator() -> Tunnel {
    settings(Side::A)
}

fn responder() -> Tunnel {
    settings(Side::B).respond_to_any()
}

/// One round: traffic each way with an incident in its middle, then a tunnel that is whole.
fn round(
    topology: &Topology,
    network: &Impairment,
    incident: Incident,
    (gateway_a, gateway_b): (&mut Gateway<'_>, &mut Gateway<'_>),
) -> anyhow::Result<Account> {
    let before = network.losses();
    let start = |from: Side| {
        let flow = Flow {
            rate: Some(RATE),
            time: ROUND,
            ..Flow::to(from.other().host(Family::V4))
        };
        flow.start(topology.host(from), topology.host(from.other()))
    };
    let flows = [start(Side::A)?, start(Side::B)?];
    thread::sleep(ROUND / 2);
    match incident {
        Incident::Nothing => {}
        Incident::NatRebinds => network.rebind(Behind::GatewayA),
        Incident::InitiatorKilled => {
            gateway_a.kill()?;
            gateway_a.run()?;
        }
        Incident::ResponderKilled => {
            gateway_b.kill()?;
            gateway_b.run()?;
        }
        Incident::InitiatorRestarted => {
            gateway_a.stop()?;
            gateway_a.run()?;
        }
        Incident::DataPlaneKilled => gateway_a.kill_data_plane()?,
    }
    let mut account = Account::default();
    for flow in flows {
        let report = flow.finish()?;
        account.sent += report.sent;
        account.arrived += report.received;
        account.duplicated += report.duplicated;
        account.damaged += report.damaged;
    }
    let after = network.losses();
    account.lost_by_network = (0..2)
        .map(|way| after.lost[way] - before.lost[way])
        .sum::<u64>()
        + after.unbound
        - before.unbound;
    gateway_a.wait_up("site", RECOVERY)?;
    gateway_b.wait_up("site", RECOVERY)?;
    agree(gateway_a, gateway_b).with_context(|| format!("after: {}", incident.name()))?;
    Ok(account)
}

/// Both ends use the same pair of SAs, each other's way round.
fn agree(a: &Gateway<'_>, b: &Gateway<'_>) -> anyhow::Result<()> {
    let spis = |gateway: &Gateway<'_>| {
        let [inbound, outbound] = gateway.directions("site")?;
        anyhow::Ok((inbound.spi, outbound.spi))
    };
    // A rekeying may be under way.
    ipsec_tests::command::wait_for("both ends to agree", RECOVERY, || {
        let (a, b) = (spis(a)?, spis(b)?);
        ensure!(a.0 == b.1 && a.1 == b.0, "{a:x?} and {b:x?}");
        Ok(Some(()))
    })
}

/// Resident memory of a gateway's processes in KiB.
fn resident(gateway: &Gateway<'_>) -> anyhow::Result<u64> {
    let pids = [gateway.pid(), gateway.data_plane()];
    pids.into_iter().flatten().try_fold(0, |sum, pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let size = line.and_then(|rest| rest.trim().split(' ').next()?.parse::<u64>().ok());
        Ok(sum + size.context("no VmRSS")?)
    })
}

/// The table; true if all that must hold, holds.
fn report(
    accounts: &BTreeMap<Incident, Account>,
    memory: &[u64],
    agreed: anyhow::Result<()>,
    clean: anyhow::Result<()>,
) -> anyhow::Result<bool> {
    say(
        "\n| in the middle of a round | rounds | sent | arrived | lost by the network | lost by us |\n|---|---|---|---|---|---|",
    )?;
    for (incident, account) in accounts {
        say(&format!(
            "| {} | {} | {} | {} | {} | {} |",
            incident.name(),
            account.rounds,
            account.sent,
            account.arrived,
            account.lost_by_network,
            account.lost_by_us()
        ))?;
    }
    let calm = accounts
        .get(&Incident::Nothing)
        .copied()
        .unwrap_or_default();
    let sum = |of: fn(&Account) -> u64| accounts.values().map(of).sum::<u64>();
    let growth = match (memory.first(), memory.last()) {
        (Some(first), Some(last)) => last.saturating_sub(*first),
        _ => 0,
    };
    let checks = [
        (
            "nothing in the clear on the network",
            clean.err().map(|error| error.to_string()),
        ),
        (
            "both ends agree on their SAs in the end",
            agreed.err().map(|error| error.to_string()),
        ),
        (
            "nothing lost by us while only rekeying",
            failure(calm.lost_by_us()),
        ),
        (
            "nothing delivered twice",
            failure(sum(|account| account.duplicated)),
        ),
        (
            "nothing delivered damaged",
            failure(sum(|account| account.damaged)),
        ),
        (
            "memory grew by less than 16 MiB",
            failure(growth.saturating_sub(16 << 10)),
        ),
    ];
    say(&format!(
        "\nmemory of all processes grew by {growth} KiB\n\n| invariant | holds |\n|---|---|"
    ))?;
    for (invariant, broken) in &checks {
        say(&format!(
            "| {invariant} | {} |",
            broken.as_deref().unwrap_or("yes")
        ))?;
    }
    Ok(checks.iter().all(|(_, broken)| broken.is_none()))
}

fn failure(number: u64) -> Option<String> {
    (number > 0).then(|| format!("no: {number}"))
}
