//! Fetches into the cache what a packet will need while the packets before it are worked on.
//!
//! Where many SAs are in use each packet needs the keys, counters and selectors of another one: some twenty cache lines,
//! reached one through the other, so that without this a packet waits for each of them in turn. A worker remembers
//! where they were when an SA was used last. That is a hint and nothing else: an address is fetched, never read.

use std::{ops::Range, sync::Arc};

/// Bytes of a cache line.
const LINE: usize = 64;
/// Ranges of memory remembered of one SA or tunnel.
const MOST_RANGES: usize = 20;
/// Low bits of a range that tell how many lines follow its first one.
const COUNT_BITS: u32 = 6;
/// Bytes of a range: 48 bits, which take every address that a program has, without its low 6 bits, and the count.
const RANGE_BYTES: usize = 6;
/// The reference counts in front of what an [`Arc`] holds.
const COUNTS: usize = 2 * size_of::<usize>();

/// Where the memory is that the packets of one SA or tunnel need. It takes two lines itself.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub struct Places {
    /// One more than the second in which they were noted; 0 is never.
    noted: u32,
    ranges: [Range48; MOST_RANGES],
}

/// The number of a first line, and in the low bits how many lines follow it. 0 is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range48([u8; RANGE_BYTES]);

impl Range48 {
    const NONE: Self = Self([0; RANGE_BYTES]);

    fn new(first: usize, further: usize) -> Self {
        let most = (1 << COUNT_BITS) - 1;
        let word = (first / LINE) << COUNT_BITS | further.min(most);
        let mut bytes = [0; RANGE_BYTES];
        for (to, from) in bytes.iter_mut().zip(word.to_le_bytes()) {
            *to = from;
        }
        Self(bytes)
    }

    /// Addresses of the lines.
    fn lines(self) -> impl Iterator<Item = usize> {
        let [a, b, c, d, e, f] = self.0;
        let word = u64::from_le_bytes([a, b, c, d, e, f, 0, 0]);
        // Where addresses are shorter, so were those that it is made of.
        let word = usize::try_from(word).unwrap_or_default();
        let (line, further) = (word >> COUNT_BITS, word % (1 << COUNT_BITS));
        (line..=line + further).map(|line| line * LINE)
    }
}

impl Places {
    const NONE: Self = Self {
        noted: 0,
        ranges: [Range48::NONE; MOST_RANGES],
    };

    /// Adds a value. What is too much is left out.
    pub fn add<T: ?Sized>(&mut self, value: &T) {
        let start = address(value);
        self.add_addresses(start..start + size_of_val(value));
    }

    /// Adds a value with its reference counts.
    pub fn add_shared<T>(&mut self, value: &Arc<T>) {
        let start = address(&**value);
        self.add_addresses(start - COUNTS..start + size_of::<T>());
    }

    /// Adds what lies at these addresses.
    pub fn add_addresses(&mut self, addresses: Range<usize>) {
        let mut ranges = self.ranges.iter_mut();
        if let Some(free) = ranges.find(|range| **range == Range48::NONE)
            && !addresses.is_empty()
        {
            let further = (addresses.end - 1) / LINE - addresses.start / LINE;
            *free = Range48::new(addresses.start, further);
        }
    }

    /// Lines that are fetched.
    #[cfg(test)]
    pub fn lines(&self) -> usize {
        let ranges = self.ranges.iter().filter(|range| **range != Range48::NONE);
        ranges.map(|range| range.lines().count()).sum()
    }

    fn fetch(&self) {
        for range in self.ranges {
            if range == Range48::NONE {
                break;
            }
            range.lines().for_each(fetch_line);
        }
    }
}

/// What a worker remembers of all SAs of a direction.
#[derive(Debug)]
pub struct Hints(Box<[Places]>);

impl Hints {
    /// Remembers so many SAs; of two whose numbers differ by a multiple of that, the one that comes first in a second.
    pub fn new(count: u32) -> Self {
        Self((0..count.max(1)).map(|_| Places::NONE).collect())
    }

    /// Fetches what is remembered of that number.
    pub fn announce(&self, number: u32) {
        let start = address(&self.0[number as usize % self.0.len()]);
        for line in 0..size_of::<Places>() / LINE {
            fetch_line(start + line * LINE);
        }
    }

    /// Fetches what the packets of that number need, which was announced.
    pub fn fetch(&self, number: u32) {
        self.0[number as usize % self.0.len()].fetch();
    }

    /// Has `note` say again where that is, once a second at most. `now` is in seconds.
    pub fn renew(&mut self, number: u32, now: u64, note: impl FnOnce(&mut Places)) {
        let index = number as usize % self.0.len();
        let places = &mut self.0[index];
        let noted = u32::try_from(now + 1).unwrap_or(u32::MAX);
        if places.noted != noted {
            *places = Places {
                noted,
                ..Places::NONE
            };
            note(places);
        }
    }
}

/// Fetches the lines of a range of a packet's frame, as far as they are in it.
pub fn fetch_bytes(frame: &[u8], start: usize, bytes: usize) {
    let end = frame.len().min(start + bytes);
    for at in (start..end).step_by(LINE) {
        fetch_line(address(frame) + at);
    }
}

fn address<T: ?Sized>(value: &T) -> usize {
    std::ptr::from_ref(value).cast::<u8>().addr()
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "the intrinsic takes an address")]
fn fetch_line(address: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a prefetch reads nothing that a program could see, and does not fault whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::without_provenance(address)) };
}

/// Stable Rust has no such instruction here.
#[cfg(not(target_arch = "x86_64"))]
fn fetch_line(_: usize) {}

const _: () = assert!(size_of::<Places>() == 2 * LINE);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_that_a_value_touches_is_fetched() {
        #[repr(align(64))]
        struct Aligned([u8; 256]);
        let value = Aligned([0; 256]);
        let count = |range: std::ops::Range<usize>| {
            let mut places = Places::NONE;
            places.add(&value.0[range]);
            places.lines()
        };
        assert_eq!(count(0..0), 0);
        assert_eq!(count(0..64), 1);
        assert_eq!(count(63..65), 2);
        assert_eq!(count(0..256), 4);
        let mut places = Places::NONE;
        for _ in 0..100 {
            places.add(&value);
        }
        places.fetch();
        assert_eq!(places.lines(), 4 * MOST_RANGES, "more is left out");
    }

    #[test]
    fn places_are_noted_once_a_second_and_belong_to_one_number() {
        let mut hints = Hints::new(8);
        let mut noted = 0;
        for (number, now) in [(1, 0), (1, 0), (9, 0), (2, 0), (1, 1)] {
            hints.announce(number);
            hints.fetch(number);
            hints.renew(number, now, |_| noted += 1);
        }
        assert_eq!(noted, 3);
    }
}
