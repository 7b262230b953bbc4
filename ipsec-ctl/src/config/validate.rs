//! From what the file says to what the daemon uses; every problem is collected, not just the first.

mod engine;
mod policies;

use std::{
    collections::BTreeMap,
    net::IpAddr,
    ops::Range,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use ipnet::IpNet;
use ipsec_common::TrafficSelector;
use toml::Spanned;

use super::{
    diagnostic::Problem,
    model::{Child, Config, Dpd, Host, Limits, Peer, Ports, Role, Tunnel},
    schema::{self, OnDead, OneOrMany, RoleSetting, Text},
    secret::{KeyFileError, Secret},
    value,
};
use crate::{
    dataplane::seam::EngineChoice,
    ike::{
        Identity,
        crypto::{EspProposal, IkeProposal},
    },
};

/// Longest device name: IFNAMSIZ of the kernel's linux/if.h less the closing zero.
const DEVICE_NAME_BYTES: usize = 15;
/// Largest replay window, in packets: that of the Linux kernel's own ESP.
const REPLAY_WINDOW_MAX: u32 = 4096;
/// Longest IKE datagram by default: what a FortiGate takes, and what fits any path that carries IPv6.
const FRAGMENT_SIZE: u16 = 1200;
/// RFC 7383 section 2.5.1: 576 bytes pass everywhere.
const FRAGMENT_LEAST: u16 = 576;
/// Fewest bytes of an MTU that IPv4 lets us ask for (RFC 791).
const MTU_LEAST: u16 = 576;
/// The mark of our own packets unless configured: "IX" in ASCII, unlikely to be anybody else's.
const DEFAULT_MARK: u32 = 0x4958;

/// Most addresses and names of one peer.
const HOSTS_MOST: usize = 8;

type ReadKey<'a> = &'a dyn Fn(&Path) -> Result<Secret, KeyFileError>;

/// Checks the whole file.
pub(super) fn config(raw: schema::File, read_key: ReadKey<'_>) -> Result<Config, Vec<Problem>> {
    let mut problems = Problems::default();
    let instance = instance(raw.instance.as_ref(), &mut problems);
    let spans: Vec<Range<usize>> = raw
        .tunnels
        .iter()
        .map(|tunnel| tunnel.get_ref().name.span())
        .collect();
    let tunnels: Vec<Tunnel> = raw
        .tunnels
        .into_iter()
        .map(|table| tunnel(table, raw.engine, read_key, &mut problems))
        .collect();
    indistinguishable(&tunnels, &spans, &mut problems);
    policies::shadowed(&tunnels, &spans, &mut problems);
    let config = Config {
        control_socket: raw.control_socket.map_or_else(
            || PathBuf::from(format!("/run/ipsec-xdp/{instance}.sock")),
            PathBuf::from,
        ),
        instance,
        interfaces: raw.interfaces,
        mark: mark(raw.mark.as_ref(), &mut problems),
        sysctl: raw.sysctl,
        workers: at_least_one(raw.workers.as_ref(), "workers", &mut problems),
        busy_poll: raw.busy_poll,
        ports: ports(&raw.ports, &mut problems),
        limits: limits(&raw.limits, &mut problems),
        tunnels,
    };
    problems.finish(config)
}

/// Problems found so far.
#[derive(Default)]
struct Problems(Vec<Problem>);

impl Problems {
    fn add(&mut self, problem: Problem) {
        self.0.push(problem);
    }

    fn finish<T>(self, value: T) -> Result<T, Vec<Problem>> {
        if self.0.is_empty() {
            Ok(value)
        } else {
            Err(self.0)
        }
    }

    /// Keeps a problem and goes on with `instead`, so that the rest of the file is checked too.
    fn keep<T>(&mut self, result: Result<T, Problem>, instead: T) -> T {
        result.unwrap_or_else(|problem| {
            self.add(problem);
            instead
        })
    }
}

fn instance(raw: Option<&Text>, problems: &mut Problems) -> String {
    let Some(text) = raw else {
        return "default".to_owned();
    };
    let name = text.get_ref();
    let usable = (1..=32).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if !usable {
        problems.add(
            Problem::new("the instance name becomes a folder name")
                .at(text.span(), "not usable as one")
                .help("use 1 to 32 letters, digits and hyphens"),
        );
    }
    name.clone()
}

fn mark(raw: Option<&Spanned<u32>>, problems: &mut Problems) -> u32 {
    match raw {
        Some(mark) if *mark.get_ref() == 0 => {
            problems.add(
                Problem::new("the mark must not be 0, which is the mark of every ordinary packet")
                    .at(mark.span(), "0")
                    .help("choose a number that no other firewall or policy rule uses"),
            );
            DEFAULT_MARK
        }
        Some(mark) => *mark.get_ref(),
        None => DEFAULT_MARK,
    }
}

fn at_least_one<T: Copy + PartialEq + Default>(
    raw: Option<&Spanned<T>>,
    key: &str,
    problems: &mut Problems,
) -> Option<T> {
    if let Some(value) = raw.filter(|value| *value.get_ref() == T::default()) {
        problems.add(Problem::new(format!("`{key}` must be at least 1")).at(value.span(), "0"));
    }
    raw.map(|value| *value.get_ref())
}

fn ports(raw: &schema::PortsTable, problems: &mut Problems) -> Ports {
    let ike = at_least_one(raw.ike.as_ref(), "ike", problems).unwrap_or(500);
    let nat_traversal =
        at_least_one(raw.nat_traversal.as_ref(), "nat_traversal", problems).unwrap_or(4500);
    if ike == nat_traversal
        && let Some(place) = raw.ike.as_ref().or(raw.nat_traversal.as_ref())
    {
        problems.add(
            Problem::new("IKE and NAT traversal cannot share a port").at(place.span(), "both use this one").help(
                "RFC 7296 section 2.23: only messages to the second port carry the marker that tells IKE from ESP",
            ),
        );
    }
    Ports { ike, nat_traversal }
}

fn limits(raw: &schema::LimitsTable, problems: &mut Problems) -> Limits {
    Limits {
        cookie_threshold: raw.cookie_threshold.unwrap_or(32),
        half_open: at_least_one(raw.half_open.as_ref(), "half_open", problems).unwrap_or(4096),
        half_open_per_source: at_least_one(
            raw.half_open_per_source.as_ref(),
            "half_open_per_source",
            problems,
        )
        .unwrap_or(16),
    }
}

fn tunnel(
    table: Spanned<schema::TunnelTable>,
    default_engine: EngineChoice,
    read_key: ReadKey<'_>,
    problems: &mut Problems,
) -> Tunnel {
    let whole = table.span();
    let raw = table.into_inner();
    let place = raw.peer.span();
    let peer = peer(&raw.peer, problems);
    let role = problems.keep(role(raw.role, &peer, place.clone()), Role::Respond);
    let local = raw.local.as_ref().and_then(|text| {
        let address = parsed::<IpAddr>(text, "an address", "write for example \"198.51.100.1\"");
        problems.keep(address.map(Some), None)
    });
    if let (Some(local), Some(text)) = (local, &raw.local)
        && peer
            .addresses()
            .any(|peer| peer.is_ipv4() != local.is_ipv4())
    {
        problems.add(
            Problem::new("one end of the tunnel is IPv4 and the other IPv6")
                .at(text.span(), "our address")
                .at(place, "the peer's address"),
        );
    }
    let children = children(&raw, role, whole, problems);
    let dpd = dpd(&raw.dpd, problems);
    let engine = raw.engine.unwrap_or(default_engine);
    let mode = engine::mode(&raw, engine, (&peer, local), &children, problems);
    let policy_based = policies::policy_based(&raw, engine, mode, &children, problems);
    Tunnel {
        device: device(&raw, problems),
        peer,
        local,
        local_id: identity(raw.local_id.as_ref(), problems),
        remote_id: identity(raw.remote_id.as_ref(), problems),
        psk: psk(&raw.psk_file, read_key, problems),
        role,
        ike: proposals::<IkeProposal>(raw.ike.as_deref(), problems)
            .unwrap_or_else(IkeProposal::defaults),
        nat: raw.nat,
        keepalive: duration(raw.keepalive.as_ref(), 20, 1, problems),
        fragment_size: fragment_size(raw.fragment_size.as_ref(), problems),
        mobike: raw.mobike.unwrap_or(true),
        return_routability: raw.return_routability.unwrap_or(true),
        childless: raw.childless.unwrap_or(false),
        dpd,
        unique: raw.unique,
        lifetime: duration(raw.lifetime.as_ref(), 86_400, 60, problems),
        reauth: raw.reauth.unwrap_or(false),
        mtu: mtu(raw.mtu.as_ref(), &children, problems),
        engine,
        mode,
        policy_based,
        fast_path: raw.fast_path,
        offload: engine::offload(raw.offload.as_ref(), engine, problems),
        df: engine::df(raw.df.as_ref(), engine, problems),
        clamp_mss: raw.clamp_mss.unwrap_or(true),
        copy_dscp: raw.copy_dscp.unwrap_or(true),
        routes: raw.routes.unwrap_or_default(),
        address: prefixes(&raw.address, Prefix::Host, problems),
        bypass: prefixes(&raw.bypass, Prefix::Network, problems),
        children,
        name: raw.name.into_inner(),
    }
}

/// The peer; where it cannot be read, one that asks for no further checks.
fn peer(raw: &Spanned<OneOrMany>, problems: &mut Problems) -> Peer {
    let texts = match raw.get_ref() {
        OneOrMany::One(text) if text == "any" => return Peer::Any,
        OneOrMany::One(text) => vec![(text, raw.span())],
        OneOrMany::Many(texts) => texts
            .iter()
            .map(|text| (text.get_ref(), text.span()))
            .collect(),
    };
    if !(1..=HOSTS_MOST).contains(&texts.len()) {
        problems.add(
            Problem::new("a peer has 1 to 8 addresses and names").at(raw.span(), "in this list"),
        );
    }
    let mut hosts: Vec<Host> = Vec::new();
    for (text, place) in texts {
        match host(text) {
            Some(host) if hosts.contains(&host) => problems.add(
                Problem::new(format!("`{host}` is listed twice")).at(place, "here again"),
            ),
            Some(host) => hosts.push(host),
            None => problems.add(
                Problem::new(format!("`{text}` is not an address or a DNS name"))
                    .at(place, "here")
                    .help("write an address, a name with a dot in it, a list of both, or \"any\" alone for a peer that calls us from anywhere"),
            ),
        }
    }
    if hosts.is_empty() {
        Peer::Any
    } else {
        Peer::At(hosts)
    }
}

fn host(text: &str) -> Option<Host> {
    let text = text.trim();
    if let Ok(address) = text.parse() {
        return Some(Host::Address(address));
    }
    // RFC 1123 section 2.1: letters, digits and hyphens, and the last label is not all digits, so that no mistyped
    // address becomes a name. A name without a dot is more often a slip than a host.
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    };
    let name = text.strip_suffix('.').unwrap_or(text);
    let last = name.rsplit_once('.')?.1;
    let usable = name.len() <= 253
        && name.split('.').all(label)
        && last.bytes().any(|b| b.is_ascii_alphabetic());
    usable.then(|| Host::Name(name.to_ascii_lowercase()))
}

fn dpd(raw: &schema::DpdTable, problems: &mut Problems) -> Dpd {
    let interval = duration(raw.interval.as_ref(), 20, 1, problems);
    let retries = at_least_one(raw.retries.as_ref(), "retries", problems).unwrap_or(3);
    if let (Some(retries), Some(timeout)) = (&raw.retries, &raw.timeout) {
        problems.add(
            Problem::new("`retries` and `timeout` say the same thing twice")
                .at(retries.span(), "so many intervals")
                .at(timeout.span(), "this time")
                .help("keep one of them"),
        );
    }
    let timeout = match &raw.timeout {
        Some(text) => duration(Some(text), 60, 5, problems),
        None => interval.saturating_mul(retries).max(Duration::from_secs(5)),
    };
    Dpd {
        mode: raw.mode,
        interval,
        timeout,
    }
}

fn role(raw: Option<RoleSetting>, peer: &Peer, place: Range<usize>) -> Result<Role, Problem> {
    match (raw, peer) {
        (None | Some(RoleSetting::Respond), Peer::Any)
        | (Some(RoleSetting::Respond), Peer::At(_)) => Ok(Role::Respond),
        (None | Some(RoleSetting::Initiate), Peer::At(_)) => Ok(Role::Initiate),
        (Some(RoleSetting::OnDemand), Peer::At(_)) => Ok(Role::OnDemand),
        (Some(RoleSetting::Initiate | RoleSetting::OnDemand), Peer::Any) => Err(Problem::new(
            "a tunnel to a peer at any address cannot be started from here",
        )
        .at(place, "has no address to call")
        .help("set role = \"respond\", or write the peer's address")),
    }
}

fn device(raw: &schema::TunnelTable, problems: &mut Problems) -> String {
    let text = raw.device.as_ref().unwrap_or(&raw.name);
    let name = text.get_ref();
    // linux/net/core/dev.c, dev_valid_name (6.18): no slash, colon or white space, not "." or "..".
    let usable = (1..=DEVICE_NAME_BYTES).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && !matches!(name.as_str(), "." | ".." | "all" | "default" | "lo");
    if !usable {
        problems.add(
            Problem::new("a tunnel's device carries its name, and the kernel would not take this one")
                .at(text.span(), "not a device name")
                .help("use at most 15 letters, digits, hyphens, dots and underscores, or add device = \"..\""),
        );
    }
    name.clone()
}

fn identity(raw: Option<&Text>, problems: &mut Problems) -> Option<Identity> {
    let text = raw?;
    let help =
        "write an address, a name (gw.example.com), a mailbox (admin@example.com) or keyid:TEXT";
    problems.keep(parsed(text, "an identity", help).map(Some), None)
}

fn psk(text: &Text, read_key: ReadKey<'_>, problems: &mut Problems) -> Secret {
    let read = read_key(Path::new(text.get_ref())).map_err(|error| {
        Problem::new(error.to_string())
            .at(text.span(), "named here")
            .help(error.help())
    });
    problems.keep(read, Secret::new(Vec::new()))
}

fn duration(
    raw: Option<&Text>,
    default_seconds: u64,
    least_seconds: u64,
    problems: &mut Problems,
) -> Duration {
    let default = Duration::from_secs(default_seconds);
    let Some(text) = raw else { return default };
    let result = value::duration(text.get_ref())
        .ok_or_else(|| {
            Problem::new("not a duration")
                .at(text.span(), "here")
                .help("write a number and s, m, h or d: \"90s\", \"24h\"")
        })
        .and_then(|value| {
            if value >= Duration::from_secs(least_seconds) {
                return Ok(value);
            }
            Err(Problem::new("too short a time")
                .at(text.span(), format!("must be at least {least_seconds}s")))
        });
    problems.keep(result, default)
}

fn fragment_size(raw: Option<&Spanned<u16>>, problems: &mut Problems) -> Option<u16> {
    let Some(size) = raw else {
        return Some(FRAGMENT_SIZE);
    };
    let bytes = *size.get_ref();
    if bytes != 0 && bytes < FRAGMENT_LEAST {
        problems.add(
            Problem::new("the fragment size is too small")
                .at(size.span(), "bytes of an IP datagram")
                .help(format!(
                    "write 0 to split no message, or at least {FRAGMENT_LEAST}"
                )),
        );
    }
    Some(bytes).filter(|bytes| *bytes != 0)
}

fn mtu(raw: Option<&Spanned<u16>>, children: &[Child], problems: &mut Problems) -> Option<u16> {
    let mtu = raw?;
    let ipv6 = children
        .iter()
        .flat_map(|child| &child.remote)
        .any(|selector| selector.addresses.0.is_ipv6());
    // RFC 8200 section 5: every link that carries IPv6 takes packets of 1280 bytes.
    let least = if ipv6 { 1280 } else { MTU_LEAST };
    if *mtu.get_ref() < least {
        problems.add(
            Problem::new("the MTU is too small")
                .at(mtu.span(), format!("must be at least {least}")),
        );
    }
    Some(*mtu.get_ref())
}

enum Prefix {
    /// Bits behind the length are the host's.
    Host,
    /// They must be clear.
    Network,
}

fn prefixes(raw: &[Text], kind: Prefix, problems: &mut Problems) -> Vec<IpNet> {
    let mut prefixes = Vec::with_capacity(raw.len());
    for text in raw {
        match text.get_ref().parse::<IpNet>() {
            Ok(prefix) if matches!(kind, Prefix::Network) && prefix.trunc() != prefix => problems
                .add(
                    Problem::new("the prefix has bits set behind its length")
                        .at(text.span(), "here")
                        .help(format!("write \"{}\"", prefix.trunc())),
                ),
            Ok(prefix) => prefixes.push(prefix),
            Err(_) => problems.add(
                Problem::new("not an address with a prefix length")
                    .at(text.span(), "here")
                    .help("write for example \"10.1.0.1/24\""),
            ),
        }
    }
    prefixes
}

/// Reads proposals; `None` if the key is absent.
fn proposals<P>(raw: Option<&[Text]>, problems: &mut Problems) -> Option<Vec<P>>
where
    P: FromStr,
    P::Err: std::fmt::Display,
{
    let texts = raw?;
    let mut proposals = Vec::with_capacity(texts.len());
    for text in texts {
        match text.get_ref().parse() {
            Ok(proposal) => proposals.push(proposal),
            Err(error) => problems.add(
                Problem::new(format!("unusable proposal: {error}"))
                    .at(text.span(), "in this proposal")
                    .help("docs/configuration.md lists the algorithms by the names that proposals are made of"),
            ),
        }
    }
    // An empty list would mean "nothing is acceptable", which nobody wants to configure.
    (!proposals.is_empty()).then_some(proposals)
}

fn children(
    raw: &schema::TunnelTable,
    role: Role,
    whole: Range<usize>,
    problems: &mut Problems,
) -> Vec<Child> {
    if raw.children.is_empty() {
        problems.add(
            Problem::new(format!(
                "tunnel `{}` has no child, so there is nothing it could carry",
                raw.name.get_ref()
            ))
            .at(whole, "this tunnel")
            .help("add [[tunnel.child]] with name, local and remote"),
        );
    }
    let mut seen: BTreeMap<&str, Range<usize>> = BTreeMap::new();
    for table in &raw.children {
        let name = &table.get_ref().name;
        if let Some(first) = seen.insert(name.get_ref(), name.span()) {
            problems.add(
                Problem::new("two children of one tunnel have the same name")
                    .at(first, "first here")
                    .at(name.span(), "and again here"),
            );
        }
    }
    raw.children
        .iter()
        .map(|table| child(table.get_ref(), role, problems))
        .collect()
}

fn child(raw: &schema::ChildTable, role: Role, problems: &mut Problems) -> Child {
    let local = selectors(&raw.local, &raw.name, "local", problems);
    let remote = selectors(&raw.remote, &raw.name, "remote", problems);
    let families = |side: &[TrafficSelector]| {
        (
            side.iter().any(|s| s.addresses.0.is_ipv4()),
            side.iter().any(|s| s.addresses.0.is_ipv6()),
        )
    };
    if !local.is_empty() && !remote.is_empty() && families(&local) != families(&remote) {
        problems.add(
            Problem::new("one side of the child has an address family that the other lacks")
                .at(raw.name.span(), "in this child")
                .help("give both sides IPv4, both IPv6, or both of each"),
        );
    }
    Child {
        name: raw.name.get_ref().clone(),
        local,
        remote,
        esp: proposals::<EspProposal>(raw.esp.as_deref(), problems)
            .unwrap_or_else(EspProposal::defaults),
        on_dead: on_dead(raw, role, problems),
        lifetime: duration(raw.lifetime.as_ref(), 28_800, 60, problems),
        lifetime_bytes: raw
            .lifetime_bytes
            .as_ref()
            .and_then(|text| volume(text, problems)),
        lifetime_packets: at_least_one(raw.lifetime_packets.as_ref(), "lifetime_packets", problems),
        replay_window: replay_window(raw.replay_window.as_ref(), problems),
    }
}

/// What becomes of a child when the peer is dead: unless told otherwise, it is started again by whoever has started it.
fn on_dead(raw: &schema::ChildTable, role: Role, problems: &mut Problems) -> OnDead {
    match (raw.on_dead, role) {
        (Some(OnDead::Restart | OnDead::Trap), Role::Respond) => {
            problems.add(
                Problem::new(
                    "a child whose tunnel the peer starts cannot be started again from here",
                )
                .at(raw.name.span(), "this child")
                .help("set on_dead = \"clear\", or another role"),
            );
            OnDead::Clear
        }
        (Some(on_dead), Role::Initiate | Role::OnDemand | Role::Respond) => on_dead,
        (None, Role::Initiate) => OnDead::Restart,
        (None, Role::OnDemand) => OnDead::Trap,
        (None, Role::Respond) => OnDead::Clear,
    }
}

fn volume(text: &Text, problems: &mut Problems) -> Option<u64> {
    let bytes = value::volume_bytes(text.get_ref()).filter(|&bytes| bytes >= 1 << 20);
    let result = bytes.map(Some).ok_or_else(|| {
        Problem::new("not a volume of at least 1MiB")
            .at(text.span(), "here")
            .help("write for example \"100GiB\"")
    });
    problems.keep(result, None)
}

fn replay_window(raw: Option<&Spanned<u32>>, problems: &mut Problems) -> u32 {
    let Some(window) = raw else {
        return REPLAY_WINDOW_MAX;
    };
    let packets = *window.get_ref();
    if packets > REPLAY_WINDOW_MAX || (1..32).contains(&packets) {
        problems.add(
            // RFC 4303 section 3.4.3: a window of 32 packets is the least that must be supported.
            Problem::new("the replay window is out of range")
                .at(window.span(), "packets")
                .help(format!(
                    "write 0 to accept replays, or 32 to {REPLAY_WINDOW_MAX}"
                )),
        );
    }
    packets
}

fn selectors(
    raw: &[Text],
    child: &Text,
    key: &str,
    problems: &mut Problems,
) -> Vec<TrafficSelector> {
    if raw.is_empty() {
        problems.add(
            Problem::new(format!("`{key}` is empty, so no packet could match"))
                .at(child.span(), "in this child")
                .help(format!("write {key} = [\"0.0.0.0/0\"] for everything")),
        );
    }
    let mut selectors = Vec::with_capacity(raw.len());
    for text in raw {
        match value::selector(text.get_ref()) {
            Ok(selector) => selectors.push(selector),
            Err(error) => {
                problems.add(
                    Problem::new(error.to_string())
                        .at(text.span(), "here")
                        .help(error.help()),
                );
            }
        }
    }
    selectors
}

/// Finds tunnels that share a name or device, and tunnels that an arriving peer could not be told apart for.
fn indistinguishable(tunnels: &[Tunnel], spans: &[Range<usize>], problems: &mut Problems) {
    let places = tunnels.iter().zip(spans);
    for (i, (later, later_span)) in places.clone().enumerate() {
        for (earlier, span) in places.clone().take(i) {
            let what = if later.name == earlier.name {
                "two tunnels have the same name"
            } else if later.device == earlier.device {
                "two tunnels would share one device"
            } else if same_peer(later, earlier) {
                "these tunnels cannot be told apart: same addresses, same identities"
            } else {
                continue;
            };
            problems.add(
                Problem::new(what).at(span.clone(), "this one").at(later_span.clone(), "and this one").help(
                    "give each its own name and device, and its own peer, remote_id or local address",
                ),
            );
        }
    }
}

fn same_peer(a: &Tunnel, b: &Tunnel) -> bool {
    let (here, there) = (a.peer.hosts(), b.peer.hosts());
    let overlaps = a.peer == b.peer || here.iter().any(|host| there.contains(host));
    overlaps && a.remote_id == b.remote_id && a.local == b.local && a.local_id == b.local_id
}

fn parsed<T: FromStr>(text: &Text, what: &str, help: &str) -> Result<T, Problem> {
    let found = text.get_ref().trim();
    found.parse().map_err(|_| {
        Problem::new(format!("`{found}` is not {what}"))
            .at(text.span(), "here")
            .help(help)
    })
}
