//! Whether somebody's firewall looks at forwarded packets: base chains of nf_tables, and tables of the old iptables.
//!
//! Reads only. Of nf_tables' netlink protocol just the dump of chains is spoken (include/uapi/linux/netfilter/nf_tables.h).

use std::{fs, io};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

/// Name of our own nf_tables table.
pub const OUR_TABLE: &str = "ipsec-xdp";

const NLM_F_REQUEST_DUMP: u16 = 0x301;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_GETCHAIN: u16 = 4;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NLA_TYPE_MASK: u16 = 0x3fff;
const MESSAGE_HEADER: usize = 16;
const FAMILY_HEADER: usize = 4;
const ATTRIBUTE_HEADER: usize = 4;

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
    let socket = match Socket::new(NETLINK_NETFILTER) {
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(false),
        other => other?,
    };
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&request(), 0)?;
    let mut found = false;
    loop {
        let (bytes, _) = socket.recv_from_full()?;
        let mut rest = bytes.as_slice();
        while let Some((kind, body, next)) = message(rest) {
            match kind {
                NLMSG_DONE => return Ok(found),
                // The kernel has no nf_tables, or we may not ask: then nobody else may have set any up here either.
                NLMSG_ERROR => return Ok(found),
                _ => found |= is_foreign(kind, body),
            }
            rest = next;
        }
    }
}

fn request() -> Vec<u8> {
    let length = MESSAGE_HEADER + FAMILY_HEADER;
    let mut request = Vec::with_capacity(length);
    request.extend(u32::try_from(length).unwrap_or_default().to_ne_bytes());
    request.extend((NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETCHAIN).to_ne_bytes());
    request.extend(NLM_F_REQUEST_DUMP.to_ne_bytes());
    request.extend([0; 8]); // sequence number, port
    request.extend([0; FAMILY_HEADER]); // all families
    request
}

/// Type and body of the first message, and what follows it.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let header = bytes.first_chunk::<MESSAGE_HEADER>()?;
    let [l0, l1, l2, l3, k0, k1, ..] = *header;
    let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).ok()?;
    let body = bytes.get(MESSAGE_HEADER..length)?;
    let next = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((u16::from_ne_bytes([k0, k1]), body, next))
}

/// Type and value of the first attribute, and what follows it.
fn attribute(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let [l0, l1, k0, k1] = *bytes.first_chunk::<ATTRIBUTE_HEADER>()?;
    let length = usize::from(u16::from_ne_bytes([l0, l1]));
    let value = bytes.get(ATTRIBUTE_HEADER..length)?;
    let next = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((u16::from_ne_bytes([k0, k1]) & NLA_TYPE_MASK, value, next))
}

fn find(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    while let Some((kind, value, next)) = attribute(bytes) {
        if kind == wanted {
            return Some(value);
        }
        bytes = next;
    }
    None
}

/// Whether a message announces a base chain of somebody else where forwarded IP packets pass.
fn is_foreign(kind: u16, body: &[u8]) -> bool {
    const INET: u8 = 1;
    const IPV4: u8 = 2;
    const IPV6: u8 = 10;
    const PREROUTING: u32 = 0;
    const FORWARD: u32 = 2;
    const POSTROUTING: u32 = 4;
    let Some((&[family, ..], attributes)) = body.split_first_chunk::<FAMILY_HEADER>() else {
        return false;
    };
    if kind != (NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWCHAIN)
        || !matches!(family, INET | IPV4 | IPV6)
    {
        return false;
    }
    let table = find(attributes, NFTA_CHAIN_TABLE).unwrap_or_default();
    let hook = find(attributes, NFTA_CHAIN_HOOK)
        .and_then(|hook| find(hook, NFTA_HOOK_HOOKNUM))
        .and_then(|number| number.first_chunk::<4>())
        .map(|number| u32::from_be_bytes(*number));
    table.strip_suffix(&[0]).unwrap_or(table) != OUR_TABLE.as_bytes()
        && matches!(hook, Some(PREROUTING | FORWARD | POSTROUTING))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute_of(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(ATTRIBUTE_HEADER + value.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn chain(family: u8, table: &str, hook: Option<u32>) -> Vec<u8> {
        let mut body = vec![family, 0, 0, 0];
        body.extend(attribute_of(NFTA_CHAIN_TABLE, table.as_bytes()));
        if let Some(hook) = hook {
            let number = attribute_of(NFTA_HOOK_HOOKNUM, &hook.to_be_bytes());
            body.extend(attribute_of(0x8000 | NFTA_CHAIN_HOOK, &number));
        }
        body
    }

    #[test]
    fn base_chains_of_others_on_the_way_of_forwarded_packets_count() {
        let kind = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWCHAIN;
        for (body, expected) in [
            (chain(2, "filter\0", Some(2)), true),
            (chain(1, "fw\0", Some(0)), true),
            (chain(10, "fw\0", Some(4)), true),
            (chain(2, "filter\0", Some(1)), false),
            (chain(2, "filter\0", None), false),
            (chain(5, "fw\0", Some(0)), false),
            (chain(2, "ipsec-xdp\0", Some(2)), false),
        ] {
            assert_eq!(is_foreign(kind, &body), expected, "{body:?}");
        }
    }

    #[test]
    fn the_kernel_answers_or_has_no_netfilter() {
        foreign_chains().unwrap();
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            let mut rest = bytes.as_slice();
            while let Some((_, body, next)) = message(rest) {
                is_foreign(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWCHAIN, body);
                rest = next;
            }
        }
    }
}
