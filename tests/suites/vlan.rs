//! LAN and WAN on VLANs of one cable each: frames with tags take the fast path, too.

use std::process::ExitCode;

use anyhow::ensure;
use ipsec_ctl::dataplane::seam::Offload;
use ipsec_tests::{
    cases,
    pair::{hosts_talk, start_default},
    suite::{self, Need::*},
    topology::{Family, Options, Topology},
};

fn main() -> ExitCode {
    suite::main(&cases![
        [Vlan, FastPath] tagged_frames_take_the_fast_path,
    ])
}

fn tagged_frames_take_the_fast_path() -> anyhow::Result<()> {
    let topology = Topology::build(Options {
        vlan: true,
        ..Options::default()
    })?;
    let (a, b) = start_default(&topology)?;
    hosts_talk(&topology, Family::V4)?;
    for gateway in [&a, &b] {
        let interfaces = gateway.status()?.interfaces;
        ensure!(
            interfaces.len() == 2 && interfaces.iter().all(|one| one.name.ends_with("-trunk")),
            "{interfaces:?}"
        );
        for direction in gateway.directions("site")? {
            ensure!(direction.offload == Offload::Full, "{direction:?}");
            let (fast, slow) = (direction.fast.packets, direction.slow.packets);
            ensure!(fast > 20 * slow, "{fast} fast, {slow} slow");
        }
    }
    Ok(())
}
