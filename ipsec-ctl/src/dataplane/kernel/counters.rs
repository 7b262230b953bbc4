//! What the kernel's IPsec has dropped, under the names that our own ESP counts by (`/proc/net/xfrm_stat`).
//!
//! The kernel counts for the whole network namespace, other programs' SAs included. ESP without a state is left out: where
//! the other engine has SAs too, the kernel counts all of theirs.

use std::{collections::HashMap, fs};

use ipsec_common::Reason;

/// Packets by reason; empty where the kernel does not count (`CONFIG_XFRM_STATISTICS`).
pub fn dropped() -> HashMap<Reason, u64> {
    fs::read_to_string("/proc/thread-self/net/xfrm_stat")
        .map(|text| parse(&text))
        .unwrap_or_default()
}

fn parse(text: &str) -> HashMap<Reason, u64> {
    let mut counted = HashMap::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), Some(count)) = (words.next(), words.next()) else {
            continue;
        };
        if let (Some(reason), Ok(count)) = (reason(name), count.parse::<u64>()) {
            *counted.entry(reason).or_default() += count;
        }
    }
    counted
}

// Documentation/networking/xfrm_proc.rst
fn reason(name: &str) -> Option<Reason> {
    Some(match name {
        "XfrmInHdrError" => Reason::Malformed,
        "XfrmInStateProtoError" => Reason::BadIcv,
        "XfrmInStateSeqError" => Reason::Replayed,
        "XfrmInStateExpired" | "XfrmOutStateExpired" => Reason::HardLimit,
        // The inner packet met no policy that lets its SA through, or the one that blocks.
        "XfrmInTmplMismatch" | "XfrmInNoPols" | "XfrmInPolBlock" => Reason::InboundSelectors,
        "XfrmOutNoStates" => Reason::NoSa,
        "XfrmOutPolBlock" => Reason::OutboundSelectors,
        "XfrmOutStateSeqError" => Reason::SequenceExhausted,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_drops_have_our_names() {
        let counted = parse(
            "XfrmInNoStates          \t7\nXfrmInStateProtoError   \t3\nXfrmInTmplMismatch\t1\nXfrmInNoPols\t2\nnonsense\n",
        );
        assert_eq!(counted.get(&Reason::BadIcv), Some(&3));
        assert_eq!(counted.get(&Reason::InboundSelectors), Some(&3));
        assert_eq!(counted.len(), 2);
    }
}
