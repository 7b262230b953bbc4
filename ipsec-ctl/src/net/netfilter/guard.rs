//! The table that drops plaintext which should have come through a tunnel.
//!
//! Mechanism only: which packets these are is decided by the data plane (`dataplane::guard`). The table outlives the
//! process, as routes do. `nft list table inet ipsec-xdp` shows it.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::{
    OUR_TABLE,
    expression::{
        LIST_ELEMENT, META_IIFNAME, META_L4PROTO, META_NFPROTO, compare, data, expression, list,
        mask, meta, network, transport,
    },
    message::{Attributes, Batch, Conversation, find, is_name, value},
};

/// Addresses from the first to the last, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Range<A> {
    /// The first.
    pub first: A,
    /// The last.
    pub last: A,
}

/// Packets from one range to another. No two may overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pair<A> {
    /// Where they come from.
    pub source: Range<A>,
    /// Where they go.
    pub destination: Range<A>,
}

/// What must not arrive in the clear.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Guard {
    /// Devices of tunnels: what arrives there came through an SA.
    pub tunnels: BTreeSet<String>,
    /// Devices to which no route may lead back from what arrives elsewhere.
    pub routed: BTreeSet<String>,
    /// Whether nothing may arrive elsewhere either to whose source no route leads back: the devices are not there yet, and
    /// what stands in their place is a route that leads nowhere.
    pub without_devices: bool,
    /// What arrives at the devices of tunnels only.
    pub v4: Vec<Pair<Ipv4Addr>>,
    /// The same for IPv6.
    pub v6: Vec<Pair<Ipv6Addr>>,
    /// UDP ports of IKE and of ESP in UDP, which come in the clear themselves.
    pub ports: [u16; 2],
}

impl Guard {
    /// Whether there is anything to drop.
    pub fn is_empty(&self) -> bool {
        self.routed.is_empty() && self.v4.is_empty() && self.v6.is_empty()
    }
}

const NFT_MSG_NEWTABLE: u8 = 0;
const NFT_MSG_GETTABLE: u8 = 1;
const NFT_MSG_DELTABLE: u8 = 2;
const NFT_MSG_NEWCHAIN: u8 = 3;
const NFT_MSG_NEWRULE: u8 = 6;
const NFT_MSG_NEWSET: u8 = 9;
const NFT_MSG_NEWSETELEM: u8 = 12;
const NFT_MSG_NEWOBJ: u8 = 18;
const NFT_MSG_GETOBJ: u8 = 19;
/// First attribute of tables, chains, rules, sets, elements and objects alike: the name of the table.
const TABLE: u16 = 1;
const COUNTER: &str = "cleartext";
const CHAIN: &str = "guard";
const EXEMPT: &str = "exempt";
const TUNNELS: &str = "tunnels";
const ROUTED: &str = "routed";
const PAIRS_V4: &str = "protected4";
const PAIRS_V6: &str = "protected6";
/// Before connection tracking and everything that firewalls usually do.
const PRIORITY: i32 = -450;
/// Elements in one message, whose attributes are of 64 KiB at most.
const CHUNK: usize = 400;

/// Makes the table be for `guard`, in one step that leaves no moment without; the count of dropped packets is kept.
///
/// # Errors
///
/// What the kernel refused, with nothing changed; `Unsupported` where it has no nf_tables.
pub fn install(guard: &Guard) -> io::Result<()> {
    let mut kernel = Conversation::open()?.ok_or(io::ErrorKind::Unsupported)?;
    let dropped = dropped()?.unwrap_or_default();
    let mut batch = Batch::new();
    replace_table(&mut batch);
    let table = || Attributes::default().name(TABLE, OUR_TABLE);
    // NFTA_COUNTER_PACKETS within NFTA_OBJ_DATA of NFT_OBJECT_COUNTER.
    let count = Attributes::default().bytes(2, &dropped.to_be_bytes());
    let counter = table().name(2, COUNTER).number(3, 1).nested(4, &count);
    batch.change(NFT_MSG_NEWOBJ, &counter);
    chains(&mut batch);
    sets(&mut batch, guard);
    for (chain, expressions) in rules(guard) {
        let rule = table().name(2, chain).nested(4, &list(expressions));
        batch.change(NFT_MSG_NEWRULE, &rule);
    }
    kernel.commit(batch)
}

/// Removes the table; it may be gone already.
///
/// # Errors
///
/// What the kernel refused.
pub fn remove() -> io::Result<()> {
    if dropped()?.is_none() {
        return Ok(());
    }
    let mut batch = Batch::new();
    batch.change(
        NFT_MSG_DELTABLE,
        &Attributes::default().name(TABLE, OUR_TABLE),
    );
    match Conversation::open()? {
        Some(mut kernel) => kernel.commit(batch),
        None => Ok(()),
    }
}

/// Packets that the table has dropped; `None` where there is none.
///
/// # Errors
///
/// Those of the netlink socket.
pub fn dropped() -> io::Result<Option<u64>> {
    let Some(mut kernel) = Conversation::open()? else {
        return Ok(None);
    };
    let mut count = None;
    let dumped = kernel.dump(NFT_MSG_GETOBJ, |kind, body| {
        let named = |at, name| value(body, at).is_some_and(|value| is_name(value, name));
        if kind == NFT_MSG_NEWOBJ && named(TABLE, OUR_TABLE) && named(2, COUNTER) {
            count = value(body, 4)
                .and_then(|data| find(data, 2))
                .and_then(|packets| packets.first_chunk::<8>())
                .map(|packets| u64::from_be_bytes(*packets));
        }
    });
    match dumped {
        // A kernel without nf_tables has none of our tables.
        Err(error) if is_unsupported(&error) => Ok(None),
        other => other.map(|()| count),
    }
}

/// Whether the kernel has nf_tables.
///
/// # Errors
///
/// Those of the netlink socket; `PermissionDenied` for who may not ask.
pub fn is_supported() -> io::Result<bool> {
    let Some(mut kernel) = Conversation::open()? else {
        return Ok(false);
    };
    match kernel.dump(NFT_MSG_GETTABLE, |_, _| {}) {
        Err(error) if is_unsupported(&error) => Ok(false),
        other => other.map(|()| true),
    }
}

/// How netfilter answers for a subsystem that it does not have.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT)
    )
}

/// Made if it is not there, so that it can be removed, and made anew.
fn replace_table(batch: &mut Batch) {
    let table = Attributes::default().name(TABLE, OUR_TABLE);
    for step in [NFT_MSG_NEWTABLE, NFT_MSG_DELTABLE, NFT_MSG_NEWTABLE] {
        batch.change(step, &table);
    }
}

fn chains(batch: &mut Batch) {
    const NF_INET_PRE_ROUTING: u32 = 0;
    const ACCEPT: u32 = 1;
    let hook = Attributes::default()
        .number(1, NF_INET_PRE_ROUTING)
        .bytes(2, &PRIORITY.to_be_bytes());
    let base = Attributes::default()
        .name(TABLE, OUR_TABLE)
        .name(3, CHAIN)
        .nested(4, &hook)
        .number(5, ACCEPT)
        .name(7, "filter");
    batch.change(NFT_MSG_NEWCHAIN, &base);
    let exempt = Attributes::default().name(TABLE, OUR_TABLE).name(3, EXEMPT);
    batch.change(NFT_MSG_NEWCHAIN, &exempt);
}

/// Bytes of an interface name in a set.
const NAME: usize = 16;

fn sets(batch: &mut Batch, guard: &Guard) {
    /// Types as `nft` numbers them, which needs them to show the sets.
    const IFNAME: u32 = 41;
    const IPV4_PAIR: u32 = 7 << 6 | 7;
    const IPV6_PAIR: u32 = 8 << 6 | 8;
    // Loopback carries what this host sends to itself.
    let tunnels = guard.tunnels.iter().map(String::as_str).chain(["lo"]);
    let sets: [(_, _, _, Vec<Attributes>); 4] = [
        (TUNNELS, IFNAME, None, tunnels.map(named).collect()),
        (
            ROUTED,
            IFNAME,
            None,
            guard.routed.iter().map(|name| named(name)).collect(),
        ),
        (
            PAIRS_V4,
            IPV4_PAIR,
            Some(4),
            guard.v4.iter().map(paired).collect(),
        ),
        (
            PAIRS_V6,
            IPV6_PAIR,
            Some(16),
            guard.v6.iter().map(paired).collect(),
        ),
    ];
    for ((name, kind, address, elements), id) in sets.into_iter().zip(1..) {
        set(batch, name, id, kind, address, &elements);
    }
}

/// A set of names, or of pairs of ranges of addresses of so many bytes.
fn set(
    batch: &mut Batch,
    name: &str,
    id: u32,
    kind: u32,
    address: Option<u32>,
    elements: &[Attributes],
) {
    const INTERVAL_CONCAT: u32 = 0x04 | 0x80;
    let set = Attributes::default().name(TABLE, OUR_TABLE).name(2, name);
    let set = match address {
        None => set.number(3, 0).number(4, kind).number(5, 16),
        Some(bytes) => {
            let field = Attributes::default().number(1, bytes);
            let fields = Attributes::default()
                .nested(LIST_ELEMENT, &field)
                .nested(LIST_ELEMENT, &field);
            set.number(3, INTERVAL_CONCAT)
                .number(4, kind)
                .number(5, bytes * 2)
                .nested(9, &Attributes::default().nested(2, &fields))
        }
    };
    batch.change(NFT_MSG_NEWSET, &set.number(10, id));
    for chunk in elements.chunks(CHUNK) {
        let elements = Attributes::default()
            .name(TABLE, OUR_TABLE)
            .name(2, name)
            .nested(3, &list(chunk.to_vec()));
        batch.change(NFT_MSG_NEWSETELEM, &elements);
    }
}

/// A set's element: the name of an interface, filled up with zeros.
fn named(name: &str) -> Attributes {
    let mut key = name.as_bytes().to_vec();
    key.resize(NAME, 0);
    Attributes::default().nested(1, &data(&key))
}

/// A set's element: from the first of both ranges to the last of both.
fn paired<A: Copy + Into<IpAddr>>(pair: &Pair<A>) -> Attributes {
    let key = |source: A, destination: A| {
        let mut key = Vec::new();
        for address in [source, destination] {
            match address.into() {
                IpAddr::V4(address) => key.extend(address.octets()),
                IpAddr::V6(address) => key.extend(address.octets()),
            }
        }
        data(&key)
    };
    Attributes::default()
        .nested(1, &key(pair.source.first, pair.destination.first))
        .nested(10, &key(pair.source.last, pair.destination.last))
}

/// The rules, with their chains, in their order.
fn rules(guard: &Guard) -> Vec<(&'static str, Vec<Attributes>)> {
    const IPV4: u8 = 2;
    const IPV6: u8 = 10;
    const UNICAST: u32 = 1;
    const LOCAL: u32 = 2;
    const ESP: u8 = 50;
    const UDP: u8 = 17;
    const ICMP: u8 = 1;
    const ICMPV6: u8 = 58;
    let protocol = |number: u8| [meta(META_L4PROTO), compare(true, &[number])];
    let family = |number: u8| [meta(META_NFPROTO), compare(true, &[number])];
    let mut rules = vec![
        (CHAIN, vec![meta(META_IIFNAME), lookup(TUNNELS), accept()]),
        (
            CHAIN,
            // The type of an address is a number in host order.
            vec![
                fib(DESTINATION, FIB_TYPE),
                compare(true, &LOCAL.to_ne_bytes()),
                jump(EXEMPT),
            ],
        ),
        (
            CHAIN,
            [
                &family(IPV4)[..],
                &[
                    network(12, 4, 8),
                    network(16, 4, 9),
                    lookup_from(8, PAIRS_V4),
                    count(),
                    drop(),
                ],
            ]
            .concat(),
        ),
        (
            CHAIN,
            [
                &family(IPV6)[..],
                &[
                    network(8, 16, 1),
                    network(24, 16, 2),
                    lookup_from(1, PAIRS_V6),
                    count(),
                    drop(),
                ],
            ]
            .concat(),
        ),
        (
            CHAIN,
            vec![fib(SOURCE, FIB_NAME), lookup(ROUTED), count(), drop()],
        ),
        (EXEMPT, [&protocol(ESP)[..], &[accept()]].concat()),
    ];
    if guard.without_devices {
        // To us and to be forwarded: a broadcast may come from who has no address yet.
        for kind in [LOCAL, UNICAST] {
            let nowhere = vec![
                fib(DESTINATION, FIB_TYPE),
                compare(true, &kind.to_ne_bytes()),
                fib(SOURCE, FIB_INDEX),
                compare(true, &[0; 4]),
                count(),
                drop(),
            ];
            rules.push((CHAIN, nowhere));
        }
    }
    for port in guard.ports {
        let port = [
            transport(2, 2),
            compare(true, &port.to_be_bytes()),
            accept(),
        ];
        rules.push((EXEMPT, [&protocol(UDP)[..], &port].concat()));
    }
    // Fragments of IKE after the first have no ports. Those of anything else lead nowhere without their first.
    let later = [
        network(6, 2, 1),
        mask([0x1f, 0xff]),
        compare(false, &[0, 0]),
        accept(),
    ];
    rules.push((EXEMPT, [&family(IPV4)[..], &protocol(UDP), &later].concat()));
    // Errors about our own ESP come from anywhere on its way, and IPv6 finds its neighbours by ICMP.
    let errors = [
        (IPV4, ICMP, &[3, 11, 12][..]),
        (IPV6, ICMPV6, &[1, 2, 3, 4, 133, 134, 135, 136, 137]),
    ];
    for (family_number, number, kinds) in errors {
        for kind in kinds {
            let kind = [transport(0, 1), compare(true, &[*kind]), accept()];
            rules.push((
                EXEMPT,
                [&family(family_number)[..], &protocol(number), &kind].concat(),
            ));
        }
    }
    rules
}

const SOURCE: u32 = 1;
const DESTINATION: u32 = 2;
const FIB_INDEX: u32 = 1;
const FIB_NAME: u32 = 2;
const FIB_TYPE: u32 = 3;

/// Asks the kernel's routes about an address of the packet, into register 1.
fn fib(address: u32, result: u32) -> Attributes {
    expression(
        "fib",
        &Attributes::default()
            .number(1, 1)
            .number(2, result)
            .number(3, address),
    )
}

/// Goes on only if what is in register 1 is in a set.
fn lookup(set: &str) -> Attributes {
    lookup_from(1, set)
}

fn lookup_from(register: u32, set: &str) -> Attributes {
    expression(
        "lookup",
        &Attributes::default().name(1, set).number(2, register),
    )
}

fn count() -> Attributes {
    expression(
        "objref",
        &Attributes::default().number(1, 1).name(2, COUNTER),
    )
}

fn verdict(verdict: &Attributes) -> Attributes {
    let data = Attributes::default().nested(2, verdict);
    expression(
        "immediate",
        &Attributes::default().number(1, 0).nested(2, &data),
    )
}

fn accept() -> Attributes {
    verdict(&Attributes::default().number(1, 1))
}

fn drop() -> Attributes {
    verdict(&Attributes::default().number(1, 0))
}

fn jump(chain: &str) -> Attributes {
    const NFT_JUMP: i32 = -3;
    verdict(
        &Attributes::default()
            .bytes(1, &NFT_JUMP.to_be_bytes())
            .name(2, chain),
    )
}

#[cfg(test)]
mod tests;
