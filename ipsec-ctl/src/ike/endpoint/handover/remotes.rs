//! Which pairs of a child may be for the same traffic, found without a look at the others: thousands may have come in under one
//! tunnel, each with its own.

use std::{collections::BTreeSet, net::IpAddr, ops::RangeInclusive};

use ipsec_common::TrafficSelector;

use crate::ike::{
    config::{ChildName, PeerId},
    event::ChildSaId,
};

/// A configured child.
type Owner = (PeerId, ChildName);
/// Whether it is of IPv6, and the binary digits of how far the end of a range is from its beginning.
type Kind = (bool, u32);
type Entry = (Owner, Kind, u128, ChildSaId);

const FIRST: ChildSaId = ChildSaId(u64::MIN);
const LAST: ChildSaId = ChildSaId(u64::MAX);
/// The longest range: all addresses of IPv6.
const LONGEST: u32 = 128;

/// Addresses on the peer's side of all pairs, each range under its kind and where it begins.
///
/// Whatever meets a range begins before that ends, and at most as far before it as ranges of its kind are long. So each kind
/// has one stretch to look at.
#[derive(Clone, Debug, Default)]
pub(super) struct Remotes(BTreeSet<Entry>);

impl Remotes {
    pub(super) fn insert(&mut self, owner: Owner, sa: ChildSaId, remote: &[TrafficSelector]) {
        self.0
            .extend(remote.iter().map(|one| entry(owner, sa, one)));
    }

    pub(super) fn remove(&mut self, owner: Owner, sa: ChildSaId, remote: &[TrafficSelector]) {
        for one in remote {
            self.0.remove(&entry(owner, sa, one));
        }
    }

    /// Pairs of a child among which are all that have an address in common with these; hardly any others.
    pub(super) fn near(&self, owner: Owner, remote: &[TrafficSelector]) -> BTreeSet<ChildSaId> {
        let mut near = BTreeSet::new();
        for one in remote {
            let (v6, begin, end) = bounds(one);
            for kind in self.kinds(owner, v6) {
                let reach = match kind.1 {
                    LONGEST => u128::MAX,
                    digits => (1 << digits) - 1,
                };
                let first = (owner, kind, begin.saturating_sub(reach), FIRST);
                near.extend(self.ids(first..=(owner, kind, end, LAST)));
            }
        }
        near
    }

    /// The kinds of a family that a child has ranges of.
    fn kinds(&self, owner: Owner, v6: bool) -> impl Iterator<Item = Kind> {
        let mut least = 0;
        std::iter::from_fn(move || {
            let first = (owner, (v6, least), u128::MIN, FIRST);
            let last = (owner, (v6, LONGEST), u128::MAX, LAST);
            let mut left = (least <= LONGEST).then(|| self.0.range(first..=last))?;
            let (_, kind, ..) = left.next()?;
            least = kind.1 + 1;
            Some(*kind)
        })
    }

    fn ids(&self, entries: RangeInclusive<Entry>) -> impl Iterator<Item = ChildSaId> {
        self.0.range(entries).map(|(.., sa)| *sa)
    }
}

fn entry(owner: Owner, sa: ChildSaId, selector: &TrafficSelector) -> Entry {
    let (v6, begin, end) = bounds(selector);
    let kind = (v6, u128::BITS - (end - begin).leading_zeros());
    (owner, kind, begin, sa)
}

/// The family of a selector's addresses, and the first and the last of them as numbers.
fn bounds(selector: &TrafficSelector) -> (bool, u128, u128) {
    let number = |address: IpAddr| match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    };
    let (begin, end) = selector.addresses;
    (
        begin.is_ipv6(),
        number(begin),
        number(end).max(number(begin)),
    )
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    const CHILD: Owner = (PeerId(1), ChildName(2));

    fn range(begin: IpAddr, end: IpAddr) -> TrafficSelector {
        TrafficSelector {
            protocol: 0,
            ports: (0, u16::MAX),
            addresses: (begin, end),
        }
    }

    fn v4(begin: u32, end: u32) -> TrafficSelector {
        range(Ipv4Addr::from(begin).into(), Ipv4Addr::from(end).into())
    }

    fn some_range() -> impl Strategy<Value = TrafficSelector> {
        let v4 = (any::<u32>(), 0..33_u32, any::<u32>()).prop_map(|(begin, digits, length)| {
            let most = u32::try_from((1_u64 << digits) - 1).unwrap();
            v4(begin, begin.saturating_add(length & most))
        });
        let v6 = (any::<u128>(), 0..128_u32, any::<u128>()).prop_map(|(begin, digits, length)| {
            let end = begin.saturating_add(length & ((1 << digits) - 1));
            range(Ipv6Addr::from(begin).into(), Ipv6Addr::from(end).into())
        });
        prop_oneof![4 => v4, 2 => v6, 1 => Just(range(
            Ipv6Addr::from(u128::MIN).into(),
            Ipv6Addr::from(u128::MAX).into(),
        ))]
    }

    proptest! {
        #[test]
        fn all_that_share_an_address_are_near(ranges in prop::collection::vec(some_range(), 1..40)) {
            let mut remotes = Remotes::default();
            for (id, one) in (0..).zip(&ranges) {
                remotes.insert(CHILD, ChildSaId(id), &[*one]);
            }
            for one in &ranges {
                let near = remotes.near(CHILD, &[*one]);
                for (id, other) in (0..).zip(&ranges) {
                    let (this, that) = (one.addresses, other.addresses);
                    let share = this.0 <= that.1 && that.0 <= this.1;
                    prop_assert!(!share || near.contains(&ChildSaId(id)), "{one} {other}");
                }
            }
            for (id, one) in (0..).zip(&ranges) {
                remotes.remove(CHILD, ChildSaId(id), &[*one]);
            }
            prop_assert!(remotes.0.is_empty());
        }
    }

    #[test]
    fn of_ten_thousand_with_addresses_of_their_own_hardly_any_are_near() {
        let mut remotes = Remotes::default();
        let mut all = Vec::new();
        for number in 0..10_000_u32 {
            // Hosts and networks of all lengths, beside each other.
            let begin = 0x0a00_0000 + number * 256;
            all.push(v4(begin, begin + (number % 256)));
        }
        for (id, one) in (0..).zip(&all) {
            remotes.insert(CHILD, ChildSaId(id), &[*one]);
            remotes.insert((PeerId(9), ChildName(0)), ChildSaId(id), &[*one]);
        }
        for (id, one) in (0..).zip(&all) {
            let near = remotes.near(CHILD, &[*one]);
            assert!(near.contains(&ChildSaId(id)));
            assert!(near.len() <= 2, "{near:?}");
        }
    }
}
