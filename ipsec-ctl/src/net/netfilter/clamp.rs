//! A table of ours that lowers the MSS in TCP SYNs which are forwarded through devices, in both directions.
//!
//! For devices whose packets the kernel alone carries. `nft list table inet ipsec-xdp-mss` shows it.

use std::{collections::BTreeMap, io};

use super::{
    CLAMP_TABLE,
    expression::{
        META_IIFNAME, META_L4PROTO, META_NFPROTO, META_OIFNAME, compare, data, expression, list,
        mask, meta, transport,
    },
    message::{Attributes, Batch, Conversation},
};

const NFT_MSG_NEWTABLE: u8 = 0;
const NFT_MSG_DELTABLE: u8 = 2;
const NFT_MSG_NEWCHAIN: u8 = 3;
const NFT_MSG_NEWRULE: u8 = 6;
const NFT_MSG_NEWSET: u8 = 9;
const NFT_MSG_NEWSETELEM: u8 = 12;
/// First attribute of tables, chains, rules, sets and elements alike: the name of the table.
const TABLE: u16 = 1;
const CHAIN: &str = "forward";
/// Where `nft` mangles packets by custom.
const PRIORITY: i32 = -150;
/// Elements in one message, whose attributes are of 64 KiB at most.
const CHUNK: usize = 400;
/// Bytes of an interface name in a map.
const NAME: usize = 16;
/// IP and TCP header without options.
const OVERHEAD_V4: u16 = 40;
const OVERHEAD_V6: u16 = 60;

/// A map from interfaces to the MSS of a family: its name, the family's number, and what its headers take.
const MAPS: [(&str, u8, u16); 2] = [("mss4", 2, OVERHEAD_V4), ("mss6", 10, OVERHEAD_V6)];

/// Makes the table clamp for these devices, each with its MTU, in one step; without any it is removed.
///
/// # Errors
///
/// What the kernel refused, with nothing changed; `Unsupported` where it has no netfilter.
pub fn install(devices: &BTreeMap<String, u16>) -> io::Result<()> {
    let mut kernel = Conversation::open()?.ok_or(io::ErrorKind::Unsupported)?;
    let mut batch = Batch::new();
    let table = || Attributes::default().name(TABLE, CLAMP_TABLE);
    // Made if it is not there, so that it can be removed, and made anew.
    batch.change(NFT_MSG_NEWTABLE, &table());
    batch.change(NFT_MSG_DELTABLE, &table());
    if devices.is_empty() {
        return kernel.commit(batch);
    }
    batch.change(NFT_MSG_NEWTABLE, &table());
    chain(&mut batch);
    for ((name, _, overhead), id) in MAPS.into_iter().zip(1..) {
        map(&mut batch, name, id, devices, overhead);
    }
    for expressions in rules() {
        let rule = table().name(2, CHAIN).nested(4, &list(expressions));
        batch.change(NFT_MSG_NEWRULE, &rule);
    }
    kernel.commit(batch)
}

fn chain(batch: &mut Batch) {
    const NF_INET_FORWARD: u32 = 2;
    const ACCEPT: u32 = 1;
    let hook = Attributes::default()
        .number(1, NF_INET_FORWARD)
        .bytes(2, &PRIORITY.to_be_bytes());
    let base = Attributes::default()
        .name(TABLE, CLAMP_TABLE)
        .name(3, CHAIN)
        .nested(4, &hook)
        .number(5, ACCEPT)
        .name(7, "filter");
    batch.change(NFT_MSG_NEWCHAIN, &base);
}

fn map(batch: &mut Batch, name: &str, id: u32, devices: &BTreeMap<String, u16>, overhead: u16) {
    /// Flag and types as `nft` numbers them, which needs them to show the map.
    const MAP: u32 = 0x08;
    const IFNAME: u32 = 41;
    const INTEGER: u32 = 4;
    let map = Attributes::default()
        .name(TABLE, CLAMP_TABLE)
        .name(2, name)
        .number(3, MAP)
        .number(4, IFNAME)
        .number(5, 16)
        .number(6, INTEGER)
        .number(7, 2)
        .number(10, id);
    batch.change(NFT_MSG_NEWSET, &map);
    let elements: Vec<Attributes> = devices
        .iter()
        .map(|(device, mtu)| {
            let mut key = device.as_bytes().to_vec();
            key.resize(NAME, 0);
            let mss = mtu.saturating_sub(overhead);
            Attributes::default()
                .nested(1, &data(&key))
                .nested(2, &data(&mss.to_be_bytes()))
        })
        .collect();
    for chunk in elements.chunks(CHUNK) {
        let elements = Attributes::default()
            .name(TABLE, CLAMP_TABLE)
            .name(2, name)
            .nested(3, &list(chunk.to_vec()));
        batch.change(NFT_MSG_NEWSETELEM, &elements);
    }
}

fn rules() -> Vec<Vec<Attributes>> {
    const TCP: u8 = 6;
    /// SYN of SYN and RST, in the two bytes that have the flags.
    const SYN: [u8; 2] = [0, 0x02];
    const SYN_AND_RST: [u8; 2] = [0, 0x06];
    let mut rules = Vec::new();
    for (map, family, _) in MAPS {
        for device in [META_IIFNAME, META_OIFNAME] {
            rules.push(vec![
                meta(META_L4PROTO),
                compare(true, &[TCP]),
                transport(12, 2),
                mask(SYN_AND_RST),
                compare(true, &SYN),
                meta(META_NFPROTO),
                compare(true, &[family]),
                meta(device),
                look_up(map),
                lower_mss(),
            ]);
        }
    }
    rules
}

/// Goes on only if what is in register 1 is in a map, with what it stands for in register 2.
fn look_up(map: &str) -> Attributes {
    let data = Attributes::default().name(1, map).number(2, 1).number(3, 2);
    expression("lookup", &data)
}

/// Puts register 2 into the MSS option if it is less than what is there: the kernel never raises it.
fn lower_mss() -> Attributes {
    const TCP_OPTION: u32 = 1;
    const MSS: u8 = 2;
    let data = Attributes::default()
        .bytes(2, &[MSS])
        .number(3, 2)
        .number(4, 2)
        .number(6, TCP_OPTION)
        .number(7, 2);
    expression("exthdr", &data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::{netfilter::guard, tests::in_namespace};

    #[test]
    fn the_kernel_takes_the_table_and_forgets_it() {
        in_namespace(async || {
            if !guard::is_supported().unwrap() {
                return crate::skip::skip("no nf_tables");
            }
            let devices = BTreeMap::from([("site".to_owned(), 1400), ("other".to_owned(), 1280)]);
            install(&devices).unwrap();
            install(&devices).unwrap();
            assert!(!crate::net::netfilter::foreign_chains().unwrap());
            install(&BTreeMap::new()).unwrap();
        });
    }
}
