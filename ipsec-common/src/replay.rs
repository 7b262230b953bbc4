//! Anti-replay window of one inbound SA (RFC 4303 section 3.4.3), shared by all threads without a lock.
//!
//! Look before opening a packet ([`check`]), record after its ICV was good ([`accept`]); never the other way round.
//!
//! A word of the window holds the bits of [`BLOCK`] consecutive sequence numbers, and as a tag which round through the
//! words they belong to. So nothing is cleared when the window moves: a word with another tag is an empty one. One
//! compare-and-swap both tests and marks; of two threads with the same packet one wins.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::{Reason, SaWords, words::REPLAY_WORDS};

/// Sequence numbers in a word; the 16 bits above are its tag.
const BLOCK: u64 = 48;
const WORDS: u64 = REPLAY_WORDS as u64;

/// The largest window in packets: all words but one, for a window seldom begins where a word does.
pub const MAX_WINDOW: u32 = 127 * 48;
const _: () = assert!(MAX_WINDOW as u64 == (WORDS - 1) * BLOCK);

/// The full sequence number that a packet with these low 32 bits must have.
// RFC 4303 appendix A2.2: of the two candidates, the one that is in the window or closest above it.
pub fn recover(words: &SaWords, window: u32, esn: bool, low: u32) -> u64 {
    if !esn {
        return u64::from(low);
    }
    let highest = words.sequence.load(Ordering::Acquire);
    let (high_half, low_half) = (highest >> 32, highest & 0xffff_ffff);
    // Without a window the nearer of the two candidates is taken.
    let window = if window == 0 {
        1 << 31
    } else {
        u64::from(window.min(MAX_WINDOW))
    };
    let low = u64::from(low);
    let high_half = match (low_half + 1).checked_sub(window) {
        Some(bottom) if low >= bottom => high_half,
        Some(_) => high_half.wrapping_add(1),
        // The window begins below the last wrap of the low half.
        None if low >= low_half + 1 + (1 << 32) - window => high_half.saturating_sub(1),
        None => high_half,
    };
    (high_half << 32) | low
}

/// Whether a packet may be new, before its ICV is known to be good. Changes nothing.
///
/// # Errors
///
/// [`Reason::TooOld`], [`Reason::Replayed`].
pub fn check(words: &SaWords, window: u32, sequence: u64) -> Result<(), Reason> {
    if window == 0 {
        return Ok(());
    }
    let place = Place::of(words, sequence);
    let word = place.word.load(Ordering::Acquire);
    inside(words, window, sequence)?;
    if word >> BLOCK == place.tag && word & place.bit != 0 {
        return Err(Reason::Replayed);
    }
    Ok(())
}

/// Records an authenticated packet, or refuses it if another thread was first.
///
/// # Errors
///
/// [`Reason::TooOld`], [`Reason::Replayed`].
pub fn accept(words: &SaWords, window: u32, sequence: u64) -> Result<(), Reason> {
    // The window moves first: who finds a word with a later tag also finds the window that it belongs to.
    words.sequence.fetch_max(sequence, Ordering::AcqRel);
    if window == 0 {
        return Ok(());
    }
    let place = Place::of(words, sequence);
    let mut word = place.word.load(Ordering::Acquire);
    loop {
        inside(words, window, sequence)?;
        let marked = if word >> BLOCK != place.tag {
            (place.tag << BLOCK) | place.bit
        } else if word & place.bit == 0 {
            word | place.bit
        } else {
            return Err(Reason::Replayed);
        };
        match place
            .word
            .compare_exchange_weak(word, marked, Ordering::AcqRel, Ordering::Acquire)
        {
            Ok(_) => return Ok(()),
            Err(now) => word = now,
        }
    }
}

fn inside(words: &SaWords, window: u32, sequence: u64) -> Result<(), Reason> {
    // RFC 4303 section 3.3.3: the first packet has number 1, so none has 0.
    if sequence == 0 {
        return Err(Reason::TooOld);
    }
    let highest = words.sequence.load(Ordering::Acquire);
    if sequence.saturating_add(u64::from(window.min(MAX_WINDOW))) <= highest {
        return Err(Reason::TooOld);
    }
    Ok(())
}

/// Where a sequence number is marked.
struct Place<'a> {
    word: &'a AtomicU64,
    /// Round through the words, modulo 2^16.
    tag: u64,
    bit: u64,
}

/// Index of the word in which a sequence number is marked.
pub fn word(sequence: u64) -> usize {
    (sequence / BLOCK % WORDS) as usize
}

impl<'a> Place<'a> {
    fn of(words: &'a SaWords, sequence: u64) -> Self {
        let block = sequence / BLOCK;
        Self {
            word: &words.replay[word(sequence)],
            tag: (block / WORDS) & 0xffff,
            bit: 1 << (sequence % BLOCK),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{boxed::Box, collections::HashSet, vec::Vec};

    use super::*;

    const WINDOW: u32 = 4096;

    fn words() -> Box<SaWords> {
        Box::default()
    }

    fn offer(words: &SaWords, window: u32, sequence: u64) -> Result<(), Reason> {
        check(words, window, sequence)?;
        accept(words, window, sequence)
    }

    #[test]
    fn a_number_passes_once_and_within_the_window_only() {
        let words = words();
        assert_eq!(offer(&words, WINDOW, 0), Err(Reason::TooOld));
        assert_eq!(offer(&words, WINDOW, 1), Ok(()));
        assert_eq!(offer(&words, WINDOW, 1), Err(Reason::Replayed));
        assert_eq!(offer(&words, WINDOW, 5000), Ok(()));
        assert_eq!(offer(&words, WINDOW, 905), Ok(()), "the oldest one inside");
        assert_eq!(offer(&words, WINDOW, 904), Err(Reason::TooOld));
        assert_eq!(offer(&words, WINDOW, 905), Err(Reason::Replayed));
        assert_eq!(words.sequence.load(Ordering::Relaxed), 5000);
    }

    #[test]
    fn a_leap_of_any_length_leaves_an_empty_window() {
        for leap in [6144, 6145, 402_653_184, 402_653_185, 1 << 31, 0xffff_0000] {
            let words = words();
            assert_eq!(offer(&words, WINDOW, 7), Ok(()));
            assert_eq!(offer(&words, WINDOW, leap), Ok(()));
            assert_eq!(offer(&words, WINDOW, leap), Err(Reason::Replayed));
            assert_eq!(offer(&words, WINDOW, leap - 1), Ok(()));
        }
    }

    #[test]
    fn a_window_of_zero_accepts_replays() {
        let words = words();
        for _ in 0..2 {
            assert_eq!(offer(&words, 0, 9), Ok(()));
        }
        assert_eq!(words.sequence.load(Ordering::Relaxed), 9);
    }

    /// The window as the RFC tells it, without any cleverness.
    #[test]
    fn random_orders_agree_with_a_set_of_numbers() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for window in [1, 32, 64, 1000, WINDOW, MAX_WINDOW] {
            let words = words();
            let (mut seen, mut highest, mut base) = (HashSet::new(), 0_u64, 1_u64);
            for _ in 0..20_000 {
                base += random() % 64;
                let sequence = (base + random() % 8000).saturating_sub(4000).max(1);
                let expected = if sequence + u64::from(window) <= highest {
                    Err(Reason::TooOld)
                } else if seen.contains(&sequence) {
                    Err(Reason::Replayed)
                } else {
                    Ok(())
                };
                assert_eq!(offer(&words, window, sequence), expected, "{sequence}");
                seen.insert(sequence);
                highest = highest.max(sequence);
            }
        }
    }

    #[test]
    fn of_threads_with_the_same_packets_each_packet_passes_once() {
        let words = words();
        let passed: Vec<u64> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        (1..20_000_u64)
                            .filter(|sequence| offer(&words, WINDOW, *sequence).is_ok())
                            .collect::<Vec<_>>()
                    })
                })
                .collect();
            threads
                .into_iter()
                .flat_map(|thread| thread.join().unwrap())
                .collect()
        });
        let distinct: HashSet<_> = passed.iter().collect();
        assert_eq!(passed.len(), distinct.len(), "none passed twice");
    }

    #[test]
    fn the_high_half_of_an_extended_number_is_recovered() {
        let words = words();
        let recovered = |highest, low| {
            words.sequence.store(highest, Ordering::Relaxed);
            recover(&words, WINDOW, true, low)
        };
        assert_eq!(recovered(0, 1), 1);
        assert_eq!(recovered(0xffff_fff0, 5), 0x1_0000_0005, "the next round");
        assert_eq!(recovered(0x1_0000_0005, 0xffff_fff0), 0xffff_fff0, "late");
        assert_eq!(recovered(0x1_0000_0005, 6), 0x1_0000_0006);
        assert_eq!(recovered(0x1_0010_0000, 0x000f_fff0), 0x1_000f_fff0);
        assert_eq!(recovered(0x1_0010_0000, 0x0000_0001), 0x2_0000_0001);
        words.sequence.store(0x1_0000_0005, Ordering::Relaxed);
        assert_eq!(recover(&words, WINDOW, false, 7), 7);
    }
}
