//! Tunnels whose ESP a network card is to do: what it takes, what it declines, and that the ledger tells.

use std::process::ExitCode;

use anyhow::{Context, ensure};
use ipsec_ctl::dataplane::seam::{Nic, NicReason};
use ipsec_tests::{
    cases,
    command::wait_for,
    gateway::{Gateway, Tunnel},
    pair::{PATIENCE, hosts_talk, start},
    ping::Ping,
    suite::{self, Need::*},
    topology::{Family, Options, Side, Topology},
};

fn main() -> ExitCode {
    suite::main(&cases![
        [XfrmInterfaces, Netdevsim] a_card_does_what_it_takes_and_the_ledger_tells_why_not_the_rest,
    ])
}

const V4: Family = Family::V4;
const KERNEL: &str = "engine = \"kernel\"";
const IKE: &str = "aes256gcm16-prfsha384-x25519";

/// What the card does for traffic in both directions.
fn card(gateway: &Gateway<'_>) -> anyhow::Result<[Nic; 2]> {
    let tunnel = gateway.tunnel("site")?;
    let child = tunnel.children.into_iter().next().context("no child")?;
    Ok([
        child.inbound_nic.context("nothing was asked inbound")?,
        child.outbound_nic.context("nothing was asked outbound")?,
    ])
}

fn is_declined(gateway: &Gateway<'_>, reason: NicReason, part: &str) -> anyhow::Result<()> {
    for nic in card(gateway)? {
        match &nic {
            Nic::Declined { reason: why, words } if *why == reason && words.contains(part) => {}
            Nic::Declined { .. } | Nic::Crypto | Nic::Packet => anyhow::bail!("{nic:?}"),
        }
    }
    Ok(())
}

fn a_card_does_what_it_takes_and_the_ledger_tells_why_not_the_rest() -> anyhow::Result<()> {
    let topology = Topology::build(Options {
        cards: true,
        ..Options::default()
    })?;
    let cards = topology.cards.as_ref().context("there are no cards")?;
    let a = |esp: &str, offload: &str| {
        Tunnel::between_sites(Side::A, V4)
            .suite(IKE, esp)
            .with(KERNEL)
            .with(&format!("offload = \"{offload}\""))
    };
    let mut b = Tunnel::between_sites(Side::B, V4)
        .suite(IKE, "aes128gcm16")
        .respond()
        .with(KERNEL)
        .with("offload = \"crypto\"");
    b.children[0].lines = vec!["esp = [\"aes128gcm16\", \"aes128gcm16-esn\"]".to_owned()];
    let (gateway, b) = start(&topology, a("aes128gcm16", "crypto"), b)?;
    // A veth pair has no offload; the kernel takes no notice of the wish.
    is_declined(&b, NicReason::Unsupported, "")?;
    ensure!(card(&gateway)? == [Nic::Crypto, Nic::Crypto]);
    ensure!(cards.ipsec()?.0 == 2, "{:?}", cards.ipsec()?);
    // The card encrypts nothing in truth, so that nobody answers.
    let _ = Ping::to(Side::B.host(V4)).count(3).run(&topology.host_a)?;
    ensure!(cards.ipsec()?.1 >= 3, "{:?}", cards.ipsec()?);
    for (esp, offload, words) in [
        ("aes128gcm16", "packet", "ipsec offload type"),
        ("aes128gcm16-esn", "crypto", "ESN"),
    ] {
        gateway.configure("", &[a(esp, offload)])?;
        gateway.reload()?;
        wait_for("the card to decline", PATIENCE, || {
            let declined = is_declined(&gateway, NicReason::Refused, words);
            Ok(declined.is_ok().then_some(()))
        })
        .with_context(|| format!("{:?}", card(&gateway)))?;
        let shown = gateway.shown_status()?;
        ensure!(
            shown.contains("not by the network card (refused: "),
            "{shown}"
        );
        hosts_talk(&topology, V4).context(offload)?;
    }
    Ok(())
}
