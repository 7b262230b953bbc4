//! Messages in fragments: their size, and putting them together again (RFC 7383).
//!
//! A fragment takes memory only after its integrity was checked and only for the message that is expected now, so what
//! is kept is bounded by what one authenticated peer may send in one message each way.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::IkeSa;
use crate::ike::{
    crypto::sk::MOST_PARTS,
    endpoint::Shared,
    message::{Header, PayloadType, payload::Part},
};

/// Content of one message in bytes, at most: what a whole datagram could hold.
const MOST_BYTES: usize = 65_535;
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const UDP_HEADER: usize = 8;
/// The marker in front of IKE on the port that it shares with ESP (RFC 3948 section 2.2).
const NON_ESP_MARKER: usize = 4;

/// What an IKE SA knows of fragments.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Fragments {
    /// Both sides have announced that they can.
    pub(super) agreed: bool,
    request: Option<Box<Partial>>,
    response: Option<Box<Partial>>,
}

/// A message of which some fragments have arrived.
#[derive(Debug, Serialize, Deserialize)]
struct Partial {
    message_id: u32,
    total: u16,
    /// Type of the first payload, once the first fragment is there.
    first: u8,
    parts: BTreeMap<u16, Zeroizing<Vec<u8>>>,
}

impl Fragments {
    /// What holds for an IKE SA that takes the place of this one, too.
    pub(super) fn inherited(&self) -> Self {
        Self {
            agreed: self.agreed,
            ..Self::default()
        }
    }

    /// Drops what has arrived of messages that will never be whole.
    pub(super) fn forget(&mut self) {
        self.request = None;
        self.response = None;
    }

    /// Takes the content of an authentic fragment; returns the whole chain of payloads and the type of its first, if this
    /// was the last that was missing.
    // RFC 7383 section 2.6: a repeated fragment is dropped; a larger total means that the peer has split the message anew
    // and more finely, so all before is worthless, and a smaller one is a late fragment from before.
    pub(super) fn take(
        &mut self,
        header: &Header,
        part: Part,
        first: PayloadType,
        content: Zeroizing<Vec<u8>>,
    ) -> Option<(PayloadType, Zeroizing<Vec<u8>>)> {
        if part.total > MOST_PARTS {
            return None;
        }
        let slot = if header.flags.response {
            &mut self.response
        } else {
            &mut self.request
        };
        let fresh = || {
            Box::new(Partial {
                message_id: header.message_id.0,
                total: part.total,
                first: PayloadType::NONE.0,
                parts: BTreeMap::new(),
            })
        };
        let partial = slot.get_or_insert_with(fresh);
        if partial.message_id != header.message_id.0 || partial.total < part.total {
            *partial = fresh();
        }
        if partial.total > part.total || partial.parts.contains_key(&part.number) {
            return None;
        }
        let bytes: usize = partial.parts.values().map(|part| part.len()).sum();
        if bytes + content.len() > MOST_BYTES {
            return None;
        }
        if part.number == 1 {
            partial.first = first.0;
        }
        partial.parts.insert(part.number, content);
        if partial.parts.len() < usize::from(partial.total) {
            return None;
        }
        let whole = slot.take()?;
        let mut chain = Zeroizing::new(Vec::with_capacity(
            MOST_BYTES.min(whole.parts.values().map(|part| part.len()).sum()),
        ));
        for part in whole.parts.values() {
            chain.extend_from_slice(part);
        }
        Some((PayloadType(whole.first), chain))
    }
}

impl IkeSa {
    /// Bytes that a datagram of ours may have, headers of IP and UDP not counted.
    pub(super) fn most_bytes(&self, shared: &Shared) -> usize {
        let size = self
            .peer_config(shared)
            .and_then(|peer| peer.fragment_size)
            .filter(|_| self.fragments.agreed);
        let Some(size) = size else { return usize::MAX };
        let ip = if self.remote.is_ipv4() {
            IPV4_HEADER
        } else {
            IPV6_HEADER
        };
        let marker = if self.local.port() == shared.config.nat_port {
            NON_ESP_MARKER
        } else {
            0
        };
        usize::from(size).saturating_sub(ip + UDP_HEADER + marker)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ike::message::{ExchangeType, Flags, IkeSpi, MessageId};

    fn header(id: u32) -> Header {
        Header {
            spi_i: IkeSpi(1),
            spi_r: IkeSpi(2),
            first: PayloadType::NONE,
            minor: 0,
            exchange: ExchangeType::IKE_AUTH,
            flags: Flags::default(),
            message_id: MessageId(id),
        }
    }

    fn take(
        fragments: &mut Fragments,
        id: u32,
        number: u16,
        total: u16,
        byte: u8,
    ) -> Option<Vec<u8>> {
        let first = if number == 1 {
            PayloadType::NONCE
        } else {
            PayloadType::NONE
        };
        let content = Zeroizing::new(vec![byte]);
        fragments
            .take(&header(id), Part { number, total }, first, content)
            .map(|(first, chain)| {
                assert_eq!(first, PayloadType::NONCE);
                chain.to_vec()
            })
    }

    #[test]
    fn a_finer_split_replaces_a_coarser_one_and_late_fragments_of_the_coarser_are_dropped() {
        let mut fragments = Fragments::default();
        assert_eq!(take(&mut fragments, 1, 1, 2, 9), None);
        assert_eq!(take(&mut fragments, 1, 1, 3, 1), None);
        assert_eq!(take(&mut fragments, 1, 2, 2, 9), None);
        assert_eq!(take(&mut fragments, 1, 2, 3, 2), None);
        assert_eq!(take(&mut fragments, 1, 3, 3, 3), Some(vec![1, 2, 3]));
    }

    #[test]
    fn fragments_of_another_message_do_not_mix() {
        let mut fragments = Fragments::default();
        assert_eq!(take(&mut fragments, 1, 1, 2, 1), None);
        assert_eq!(take(&mut fragments, 2, 2, 2, 4), None);
        assert_eq!(take(&mut fragments, 2, 1, 2, 3), Some(vec![3, 4]));
    }

    #[test]
    fn a_message_of_more_fragments_than_any_peer_sends_takes_no_memory() {
        let mut fragments = Fragments::default();
        assert_eq!(take(&mut fragments, 1, 1, MOST_PARTS + 1, 1), None);
        assert!(fragments.request.is_none());
    }

    #[test]
    fn a_message_that_grows_beyond_a_datagram_is_never_whole() {
        let mut fragments = Fragments::default();
        for number in 1..=3 {
            let content = Zeroizing::new(vec![0; 30_000]);
            let part = Part { number, total: 3 };
            assert!(
                fragments
                    .take(&header(1), part, PayloadType::NONE, content)
                    .is_none()
            );
        }
    }

    proptest! {
        #[test]
        fn any_order_with_repetitions_gives_the_message(
            order in prop::collection::vec(1_u16..=5, 0..40),
        ) {
            let mut fragments = Fragments::default();
            let mut seen = std::collections::BTreeSet::new();
            for number in order {
                let whole = take(&mut fragments, 1, number, 5, u8::try_from(number).unwrap());
                seen.insert(number);
                prop_assert_eq!(whole.is_some(), seen.len() == 5);
                if let Some(chain) = whole {
                    prop_assert_eq!(chain, vec![1, 2, 3, 4, 5]);
                    seen.clear();
                }
            }
        }
    }
}
