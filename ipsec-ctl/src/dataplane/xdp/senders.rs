//! The SAs that send for one child, and which of them takes a packet.
//!
//! A child has several at a time where its pairs were narrowed to different selectors, where several peers have come in
//! under one tunnel, and for a moment while it is rekeyed. What was negotiated decides: the SA with the most specific
//! remote selector takes the packet, of those then the one whose other selectors are narrower, and of SAs with equal
//! selectors the newest. A value never changes: who reads sees all of a change or nothing of it, so that a rekey moves
//! the traffic in one step.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use super::{
    prefetch::Places,
    sa::OutboundSa,
    selectors::{Cover, Flow, Match, Selectors},
};

/// The SAs of one child that send.
#[derive(Debug, Default)]
pub struct Senders {
    /// All of them, oldest first.
    all: Box<[Arc<OutboundSa>]>,
    /// Those that may take a packet, by the prefixes that cover their remote selectors: longest prefixes first.
    levels: Box<[Level]>,
    /// Between which addresses they send, sorted.
    outers: Box<[Ends]>,
}

/// Our address, the peer's, and our port if ESP goes in UDP.
pub type Ends = (IpAddr, IpAddr, Option<u16>);

/// All remote prefixes of one family and length.
#[derive(Debug)]
struct Level {
    v6: bool,
    length: u8,
    /// Places in [`Senders::all`], in the order in which they are asked.
    by_prefix: HashMap<u128, Box<[usize]>>,
}

impl Senders {
    /// Of these SAs, oldest first.
    pub fn new(all: Vec<Arc<OutboundSa>>) -> Self {
        let mut outers: Vec<Ends> = all.iter().map(|sa| ends(sa)).collect();
        outers.sort_unstable();
        outers.dedup();
        let levels = match all.as_slice() {
            // The usual case needs no search.
            [] | [_] => Box::default(),
            sas => levels(sas),
        };
        Self {
            all: all.into(),
            levels,
            outers: outers.into(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// All of them, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<OutboundSa>> {
        self.all.iter()
    }

    /// The one at a place that [`Self::choose`] has told.
    pub fn get(&self, place: usize) -> Option<&Arc<OutboundSa>> {
        self.all.get(place)
    }

    /// The place of the SA that takes a packet.
    ///
    /// # Errors
    ///
    /// Why none does.
    pub fn choose(&self, flow: &Flow) -> Result<usize, Match> {
        if let [only] = &*self.all {
            return match only.core.selectors.match_outbound(flow) {
                Match::Yes => Ok(0),
                no @ (Match::No | Match::NeedsPorts) => Err(no),
            };
        }
        let mut best = Match::No;
        for place in self.candidates(flow.destination) {
            let sa = self.all.get(place);
            match sa.map_or(Match::No, |sa| sa.core.selectors.match_outbound(flow)) {
                Match::Yes => return Ok(place),
                Match::NeedsPorts => best = Match::NeedsPorts,
                Match::No => {}
            }
        }
        Err(best)
    }

    /// Where the memory is that a packet needs which the newest one takes.
    pub fn note_places(&self, places: &mut Places) {
        places.add(&*self.all);
        places.add(&*self.outers);
        if let Some(sa) = self.all.last() {
            places.add_shared(sa);
            sa.core.note_places(places);
        }
    }

    /// Whether one of them sends between these addresses.
    pub fn send_between(&self, ends: &Ends) -> bool {
        self.outers.binary_search(ends).is_ok()
    }

    fn candidates(&self, destination: IpAddr) -> impl Iterator<Item = usize> {
        let v6 = destination.is_ipv6();
        self.levels
            .iter()
            .filter(move |level| level.v6 == v6)
            .filter_map(move |level| {
                let cover = Cover::new(destination, level.length);
                level.by_prefix.get(&cover.bits)
            })
            .flatten()
            .copied()
    }
}

/// Between which addresses an SA sends.
fn ends(sa: &OutboundSa) -> Ends {
    let outer = &sa.template.outer;
    let port = outer.encap.map(|encap| encap.local_port);
    (outer.local, outer.remote, port)
}

fn levels(sas: &[Arc<OutboundSa>]) -> Box<[Level]> {
    // Longest prefixes first.
    let mut levels: BTreeMap<(bool, Reverse<u8>), HashMap<u128, Vec<usize>>> = BTreeMap::new();
    let mut seen: HashSet<&Selectors> = HashSet::new();
    for (place, sa) in sas.iter().enumerate().rev() {
        // Behind a newer one with the same selectors it would never be asked.
        if !seen.insert(&sa.core.selectors) {
            continue;
        }
        let covers: HashSet<Cover> = sa.core.selectors.remote_covers().collect();
        for cover in covers {
            levels
                .entry((cover.v6, Reverse(cover.length)))
                .or_default()
                .entry(cover.bits)
                .or_default()
                .push(place);
        }
    }
    let breadth = |place: &usize| sas.get(*place).map(|sa| sa.core.selectors.breadth());
    levels
        .into_iter()
        .map(|((v6, Reverse(length)), by_prefix)| Level {
            v6,
            length,
            by_prefix: by_prefix
                .into_iter()
                .map(|(bits, mut places)| {
                    // Stable: what is equally broad stays newest first.
                    places.sort_by_cached_key(breadth);
                    (bits, places.into())
                })
                .collect(),
        })
        .collect()
}
