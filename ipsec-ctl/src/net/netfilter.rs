//! Netfilter: whether somebody's firewall looks at forwarded packets, and the tables of our own.

pub mod clamp;
mod expression;
pub mod guard;
mod message;

use std::{fs, io};

use message::{Conversation, find, is_name, value};

/// Name of our own nf_tables table.
pub const OUR_TABLE: &str = "ipsec-xdp";
/// Name of the one that clamps.
const CLAMP_TABLE: &str = "ipsec-xdp-mss";

const NFT_MSG_NEWCHAIN: u8 = 3;
const NFT_MSG_GETCHAIN: u8 = 4;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_HOOK_HOOKNUM: u16 = 1;

/// Whether chains or tables other than ours see packets that are forwarded, in the network namespace that the caller is
/// in. A kernel without netfilter has none.
///
/// # Errors
///
/// Those of the netlink socket.
pub fn foreign_chains() -> io::Result<bool> {
    // iptables-legacy has no dump of its own; the tables exist as soon as anybody has used them.
    let legacy = ["ip_tables_names", "ip6_tables_names"]
        .iter()
        .filter_map(|name| fs::read_to_string(format!("/proc/self/net/{name}")).ok())
        .any(|names| !names.trim().is_empty());
    Ok(legacy || foreign_nf_tables()?)
}

fn foreign_nf_tables() -> io::Result<bool> {
    let Some(mut kernel) = Conversation::open()? else {
        return Ok(false);
    };
    let mut found = false;
    // The kernel may have no nf_tables, or we may not ask: then nobody else may have set any up here either.
    let _ = kernel.dump(NFT_MSG_GETCHAIN, |kind, body| {
        found |= is_foreign(kind, body)
    });
    Ok(found)
}

/// Whether a message announces a base chain of somebody else where forwarded IP packets pass.
fn is_foreign(kind: u8, body: &[u8]) -> bool {
    const INET: u8 = 1;
    const IPV4: u8 = 2;
    const IPV6: u8 = 10;
    const PREROUTING: u32 = 0;
    const FORWARD: u32 = 2;
    const POSTROUTING: u32 = 4;
    let Some(&family) = body.first() else {
        return false;
    };
    if kind != NFT_MSG_NEWCHAIN || !matches!(family, INET | IPV4 | IPV6) {
        return false;
    }
    let table = value(body, NFTA_CHAIN_TABLE).unwrap_or_default();
    let hook = value(body, NFTA_CHAIN_HOOK)
        .and_then(|hook| find(hook, NFTA_HOOK_HOOKNUM))
        .and_then(|number| number.first_chunk::<4>())
        .map(|number| u32::from_be_bytes(*number));
    let ours = is_name(table, OUR_TABLE) || is_name(table, CLAMP_TABLE);
    !ours && matches!(hook, Some(PREROUTING | FORWARD | POSTROUTING))
}

#[cfg(test)]
mod tests {
    use super::{message::Attributes, *};

    fn chain(family: u8, table: &str, hook: Option<u32>) -> Vec<u8> {
        let mut attributes = Attributes::default().name(NFTA_CHAIN_TABLE, table);
        if let Some(hook) = hook {
            let number = Attributes::default().number(NFTA_HOOK_HOOKNUM, hook);
            attributes = attributes.nested(NFTA_CHAIN_HOOK, &number);
        }
        let mut body = vec![family, 0, 0, 0];
        body.extend(attributes.0);
        body
    }

    #[test]
    fn base_chains_of_others_on_the_way_of_forwarded_packets_count() {
        for (body, expected) in [
            (chain(2, "filter", Some(2)), true),
            (chain(1, "fw", Some(0)), true),
            (chain(10, "fw", Some(4)), true),
            (chain(2, "filter", Some(1)), false),
            (chain(2, "filter", None), false),
            (chain(5, "fw", Some(0)), false),
            (chain(2, "ipsec-xdp", Some(2)), false),
            (chain(1, "ipsec-xdp-mss", Some(2)), false),
        ] {
            assert_eq!(is_foreign(NFT_MSG_NEWCHAIN, &body), expected, "{body:?}");
        }
    }

    #[test]
    fn the_kernel_answers_or_has_no_netfilter() {
        foreign_chains().unwrap();
    }
}
