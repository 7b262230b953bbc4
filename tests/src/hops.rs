//! Counting sealed packets where they pass the router, so that a lost packet has a culprit.

use anyhow::Context;
use serde_json::Value;

use crate::topology::{Side, Topology};

/// Shortest IP packet that counts as a packet of a flow and not as a keep-alive.
const SHORTEST: u16 = 100;

/// Counters in the router.
#[derive(Debug)]
pub struct Hops<'a> {
    topology: &'a Topology,
}

impl<'a> Hops<'a> {
    /// Starts to count. IKE on port 4500 begins with four zero bytes (RFC 3948 section 2.2), and is left out.
    ///
    /// # Errors
    ///
    /// nft's.
    pub fn count(topology: &'a Topology) -> anyhow::Result<Self> {
        let nft = |rest: &str| topology.router.exec(&format!("nft {rest}"));
        nft("add table inet hops")?;
        nft("add chain inet hops pass { type filter hook forward priority 0 ; }")?;
        for side in [Side::A, Side::B] {
            let letter = side.letter();
            nft(&format!("add counter inet hops to-{letter}"))?;
            nft(&format!(
                "add rule inet hops pass oifname to-{letter} udp dport 1-65535 meta length > {SHORTEST} @th,64,32 != 0 counter name to-{letter}"
            ))?;
            nft(&format!(
                "add rule inet hops pass oifname to-{letter} meta l4proto esp meta length > {SHORTEST} counter name to-{letter}"
            ))?;
        }
        Ok(Self { topology })
    }

    /// Sealed packets that passed towards a side so far.
    ///
    /// # Errors
    ///
    /// nft's.
    pub fn towards(&self, side: Side) -> anyhow::Result<u64> {
        let command = format!("nft -j list counter inet hops to-{}", side.letter());
        let answer: Value = serde_json::from_str(&self.topology.router.exec(&command)?)?;
        answer["nftables"]
            .as_array()
            .into_iter()
            .flatten()
            .find_map(|item| item["counter"]["packets"].as_u64())
            .context("no counter")
    }
}
