//! One worker against its limits: ring alone, and the same forwarding without cryptography.

use ipsec_ctl::{dataplane::seam::Direction, esp::EspSuite};

use super::{
    Effort,
    bed::{Bed, direction_name},
    generator::Generator,
    packets::{Sealer, Size, outwards},
    report::{Many, WorkerLine},
    ring_alone::ring_alone,
    slice::Slice,
};

/// What is measured, by the names of the configuration.
pub(super) const SUITES: [(&str, EspSuite); 3] = [
    ("aes256gcm16", EspSuite::Aes256Gcm16),
    ("aes128gcm16", EspSuite::Aes128Gcm16),
    ("chacha20poly1305", EspSuite::ChaCha20Poly1305),
];
/// Tunnels of the last comparison, with an SA each way.
pub(super) const MANY: u16 = 1000;
/// Packets sealed beforehand beyond those that are measured.
const SPARE: u64 = 4096;
const DIRECTIONS: [Direction; 2] = [Direction::Outbound, Direction::Inbound];

/// Slices of one suite and direction, round by round.
#[derive(Default)]
struct Rounds {
    plain: Vec<Slice>,
    ring: Vec<Slice>,
    ours: Vec<Slice>,
}

/// Measures every suite at every size, each round all of them in turn. The thread is in a namespace of its own, and in
/// a runtime.
///
/// # Errors
///
/// The bed cannot be built, or packets are lost in it.
pub(super) fn measure(effort: &Effort) -> anyhow::Result<(String, Vec<WorkerLine>)> {
    let mut bed = Bed::new(SUITES.iter().map(|(_, suite)| *suite).collect())?;
    let mut lines = Vec::new();
    for size in Size::ALL {
        lines.extend(at_size(&mut bed, size, effort)?);
    }
    Ok((bed.mode(), lines))
}

fn at_size(bed: &mut Bed, size: Size, effort: &Effort) -> anyhow::Result<Vec<WorkerLine>> {
    let packets = effort.packets;
    let mut plain = outbound_load(bed, 0, size)?;
    let mut loads = Vec::new();
    for (number, (_, suite)) in (0..).zip(SUITES) {
        loads.push(outbound_load(bed, number, size)?);
        loads.push(inbound_load(bed, number..number + 1, suite, size, packets)?);
    }
    let mut rounds: Vec<Rounds> = loads.iter().map(|_| Rounds::default()).collect();
    for round in 0..=effort.rounds {
        let forwarding = bed.plain(&mut plain, packets)?;
        let cases = SUITES
            .iter()
            .flat_map(|suite| DIRECTIONS.map(|direction| (suite.1, direction)));
        for (((suite, direction), load), rounds) in cases.zip(&mut loads).zip(&mut rounds) {
            let ring = ring_alone(suite, direction, size, effort.ring)?;
            let ours = bed.tunnelled(direction, load, packets)?;
            // The first round only warms caches and next hops up.
            if round > 0 {
                rounds.plain.push(forwarding);
                rounds.ring.push(ring);
                rounds.ours.push(ours);
            }
        }
    }
    let names = SUITES
        .iter()
        .flat_map(|suite| DIRECTIONS.map(|direction| (suite.0, direction)));
    Ok(names
        .zip(rounds)
        .map(|((suite, direction), rounds)| WorkerLine {
            suite,
            direction: direction_name(direction),
            size: size.name(),
            plain: rounds.plain,
            ring: rounds.ring,
            ours: rounds.ours,
        })
        .collect())
}

/// Measures one SA of many against all of them in turn, each way. As for [`measure`].
///
/// # Errors
///
/// As for [`measure`].
pub(super) fn measure_many(effort: &Effort) -> anyhow::Result<Vec<Many>> {
    let suite = EspSuite::Aes256Gcm16;
    let mut bed = Bed::new(vec![suite; MANY.into()])?;
    let size = Size::Fixed(590);
    let packets = effort.packets;
    let one = outwards(0, 590)?;
    let all: Vec<_> = bed
        .numbers()
        .map(|number| outwards(number, 590))
        .collect::<Result<_, _>>()?;
    let mut result = Vec::new();
    for direction in DIRECTIONS {
        let (mut single, mut many) = match direction {
            Direction::Outbound => (
                bed.lan_load(std::iter::once(one.clone()))?,
                bed.lan_load(all.iter().cloned())?,
            ),
            Direction::Inbound => (
                inbound_load(&bed, 0..1, suite, size, packets)?,
                inbound_load(&bed, bed.numbers(), suite, size, packets)?,
            ),
        };
        let mut rounds = Vec::new();
        for round in 0..=effort.rounds {
            let pair = (
                bed.tunnelled(direction, &mut single, packets)?,
                bed.tunnelled(direction, &mut many, packets)?,
            );
            if round > 0 {
                rounds.push(pair);
            }
        }
        result.push(Many {
            direction: direction_name(direction),
            sas: MANY,
            rounds,
        });
    }
    Ok(result)
}

pub(super) fn outbound_load(bed: &Bed, number: u16, size: Size) -> anyhow::Result<Generator> {
    let packets: Vec<_> = size
        .pattern()
        .iter()
        .map(|bytes| outwards(number, *bytes))
        .collect::<Result<_, _>>()?;
    bed.lan_load(packets.into_iter())
}

/// Packets of these tunnels in turn, each with a sequence number of its own.
pub(super) fn inbound_load(
    bed: &Bed,
    numbers: std::ops::Range<u16>,
    suite: EspSuite,
    size: Size,
    packets: u64,
) -> anyhow::Result<Generator> {
    let mut sealers: Vec<_> = numbers
        .map(|number| Sealer::new(number, suite))
        .collect::<Result<_, _>>()?;
    let mut sizes = size.pattern().iter().cycle();
    let mut sealed = Vec::new();
    while (sealed.len() as u64) < packets + SPARE {
        for sealer in &mut sealers {
            if let Some(bytes) = sizes.next() {
                sealed.push(sealer.next(*bytes)?);
            }
        }
    }
    bed.wan_load(sealed.into_iter())
}

/// A second's proof that the bed works: every suite carries packets both ways.
///
/// # Errors
///
/// It does not.
pub(super) fn smoke() -> anyhow::Result<()> {
    let mut bed = Bed::new(SUITES.iter().map(|(_, suite)| *suite).collect())?;
    at_size(&mut bed, Size::Mixed, &Effort::smoke()).map(drop)
}
