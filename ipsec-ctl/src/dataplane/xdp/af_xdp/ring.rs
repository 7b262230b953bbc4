//! The single-producer, single-consumer rings that a socket shares with the kernel: fill, completion, RX and TX.
//!
//! One [`Cursor`] does the arithmetic and the memory ordering for both ends. Indices run freely through 32 bits; the
//! slot is the index modulo the size, a power of two.
#![expect(
    unsafe_code,
    reason = "descriptors and indices live in memory shared with the kernel"
)]

use std::{
    io,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use super::mapping::Mapping;

/// A packet in an RX or TX ring: `struct xdp_desc`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Byte offset of its first byte in the UMEM.
    pub address: u64,
    /// Its bytes.
    pub length: u32,
    /// Flags; `XDP_PKT_CONTD` never occurs, for we do not ask for multi-buffer packets.
    pub options: u32,
}

/// What a ring may hold: values that any bytes are valid for.
pub trait Item: Copy + sealed::Sealed {}
impl Item for u64 {}
impl Item for Descriptor {}

mod sealed {
    pub trait Sealed {}
    impl Sealed for u64 {}
    impl Sealed for super::Descriptor {}
}

/// Where the parts of a ring lie in its mapping, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Producer's index.
    pub producer: u64,
    /// Consumer's index.
    pub consumer: u64,
    /// Flags, written by the kernel.
    pub flags: u64,
    /// Slots.
    pub slots: u64,
}

/// One end of a ring.
///
/// Slots `mine..limit` are this end's to access. `published` is what the other end knows of `mine`.
#[derive(Debug)]
struct Cursor<T> {
    /// Our index: we alone write it.
    index: NonNull<AtomicU32>,
    /// The other end's index.
    other: NonNull<AtomicU32>,
    flags: NonNull<AtomicU32>,
    slots: NonNull<T>,
    size: u32,
    mine: u32,
    limit: u32,
    published: u32,
    /// What `other` must be advanced by to become `limit`: a producer may run `size` ahead of the consumer.
    lead: u32,
    _mapping: Arc<Mapping>,
}

// SAFETY: a cursor owns its end of the ring; the other end synchronises through the atomic indices.
unsafe impl<T: Item> Send for Cursor<T> {}

impl<T: Item> Cursor<T> {
    fn new(
        mapping: Arc<Mapping>,
        layout: Layout,
        size: u32,
        index: u64,
        other: u64,
        lead: u32,
    ) -> io::Result<Self> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let slots = usize::try_from(size).map_err(|_| invalid())?;
        if !size.is_power_of_two() {
            return Err(invalid());
        }
        let mut cursor = Self {
            index: mapping.place(index, 1).ok_or_else(invalid)?,
            other: mapping.place(other, 1).ok_or_else(invalid)?,
            flags: mapping.place(layout.flags, 1).ok_or_else(invalid)?,
            slots: mapping.place(layout.slots, slots).ok_or_else(invalid)?,
            size,
            mine: 0,
            limit: 0,
            published: 0,
            lead,
            _mapping: mapping,
        };
        cursor.mine = cursor.index().load(Ordering::Relaxed);
        cursor.published = cursor.mine;
        cursor.refresh();
        Ok(cursor)
    }

    fn index(&self) -> &AtomicU32 {
        // SAFETY: `Mapping::place` found it inside the mapping, which we keep alive, and aligned.
        unsafe { self.index.as_ref() }
    }

    /// Learns how far the other end is. Acquire: what it did to the slots before it published happened before.
    fn refresh(&mut self) {
        // SAFETY: as for `index`.
        let other = unsafe { self.other.as_ref() }.load(Ordering::Acquire);
        self.limit = other.wrapping_add(self.lead);
    }

    /// Slots that are ours to access. Asks the other end's index only when fewer than `want` are known of.
    fn available(&mut self, want: u32) -> u32 {
        if self.limit.wrapping_sub(self.mine) < want {
            self.refresh();
        }
        // The other end is the kernel; should its index ever be nonsense, we still stay inside the ring's size.
        self.limit.wrapping_sub(self.mine).min(self.size)
    }

    fn slot(&self) -> NonNull<T> {
        let slot = self.mine & (self.size - 1);
        // SAFETY: `slot` is less than `size`, and that many slots lie inside the mapping.
        unsafe { self.slots.add(slot as usize) }
    }

    /// Hands over all slots before `mine`. Release: what we did to them happens before the other end sees it.
    fn publish(&mut self) {
        if self.published != self.mine {
            self.index().store(self.mine, Ordering::Release);
            self.published = self.mine;
        }
    }

    fn needs_wakeup(&self) -> bool {
        // SAFETY: as for `index`.
        let flags = unsafe { self.flags.as_ref() }.load(Ordering::Relaxed);
        flags & libc::XDP_RING_NEED_WAKEUP != 0
    }
}

/// Our end of a fill or TX ring.
#[derive(Debug)]
pub struct Producer<T>(Cursor<T>);

impl<T: Item> Producer<T> {
    /// Takes the producer's end of a ring of `size` slots.
    ///
    /// # Errors
    ///
    /// `InvalidInput` where the ring does not fit its mapping or the size is no power of two.
    pub fn new(mapping: Arc<Mapping>, layout: Layout, size: u32) -> io::Result<Self> {
        Cursor::new(
            mapping,
            layout,
            size,
            layout.producer,
            layout.consumer,
            size,
        )
        .map(Self)
    }

    /// Free slots, at least if fewer than `want`; up to the ring's size.
    pub fn free(&mut self, want: u32) -> u32 {
        self.0.available(want)
    }

    /// Puts an item into the next slot; the consumer sees it after [`Self::publish`]. False: the ring is full.
    #[must_use = "an item that does not fit is still the caller's"]
    pub fn push(&mut self, item: T) -> bool {
        if self.0.available(1) == 0 {
            return false;
        }
        // SAFETY: the slot is free, so the consumer does not read it before we publish.
        unsafe { self.0.slot().write(item) };
        self.0.mine = self.0.mine.wrapping_add(1);
        true
    }

    /// Shows the consumer what was pushed.
    pub fn publish(&mut self) {
        self.0.publish();
    }

    /// Items that the consumer has not taken yet.
    pub fn pending(&mut self) -> u32 {
        self.0.size - self.0.available(self.0.size)
    }

    /// Whether the kernel asked for a system call before it goes on.
    pub fn needs_wakeup(&self) -> bool {
        self.0.needs_wakeup()
    }
}

/// Our end of a completion or RX ring.
#[derive(Debug)]
pub struct Consumer<T>(Cursor<T>);

impl<T: Item> Consumer<T> {
    /// Takes the consumer's end of a ring of `size` slots.
    ///
    /// # Errors
    ///
    /// As for [`Producer::new`].
    pub fn new(mapping: Arc<Mapping>, layout: Layout, size: u32) -> io::Result<Self> {
        Cursor::new(mapping, layout, size, layout.consumer, layout.producer, 0).map(Self)
    }

    /// Items that wait, at least if fewer than `want`.
    pub fn waiting(&mut self, want: u32) -> u32 {
        self.0.available(want)
    }

    /// Takes the next item; its slot is the producer's again after [`Self::release`].
    pub fn pop(&mut self) -> Option<T> {
        if self.0.available(1) == 0 {
            return None;
        }
        // SAFETY: the producer published the slot and does not write it again before we release it; any bytes are a
        // valid `T`.
        let item = unsafe { self.0.slot().read() };
        self.0.mine = self.0.mine.wrapping_add(1);
        Some(item)
    }

    /// Gives the slots of everything popped back to the producer.
    pub fn release(&mut self) {
        self.0.publish();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    const LAYOUT: Layout = Layout {
        producer: 0,
        consumer: 64,
        flags: 128,
        slots: 192,
    };

    /// Both ends of a ring in plain memory, whose indices start at `start`.
    fn ring(size: u32, start: u32) -> (Producer<u64>, Consumer<u64>) {
        let mapping = Arc::new(Mapping::anonymous(4096).unwrap());
        for offset in [LAYOUT.producer, LAYOUT.consumer] {
            let index = mapping.place::<AtomicU32>(offset, 1).unwrap();
            // SAFETY: inside the mapping and aligned.
            unsafe { index.as_ref() }.store(start, Ordering::Relaxed);
        }
        (
            Producer::new(Arc::clone(&mapping), LAYOUT, size).unwrap(),
            Consumer::new(mapping, LAYOUT, size).unwrap(),
        )
    }

    #[derive(Clone, Debug)]
    enum Step {
        Push(u64),
        Publish,
        Pop,
        Release,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => any::<u64>().prop_map(Step::Push),
            1 => Just(Step::Publish),
            4 => Just(Step::Pop),
            1 => Just(Step::Release),
        ]
    }

    proptest! {
        #[test]
        fn a_ring_behaves_like_a_bounded_queue(
            steps in prop::collection::vec(step(), 1..400),
            size in prop::sample::select(vec![1_u32, 2, 8, 64]),
            start in prop_oneof![Just(0), Just(u32::MAX - 3), any::<u32>()],
        ) {
            let (mut producer, mut consumer) = ring(size, start);
            let (mut hidden, mut shown) = (VecDeque::new(), VecDeque::new());
            let mut unreleased = 0_usize;
            for step in steps {
                match step {
                    Step::Push(item) => {
                        let used = hidden.len() + shown.len() + unreleased;
                        prop_assert_eq!(producer.push(item), used < size as usize);
                        if used < size as usize {
                            hidden.push_back(item);
                        }
                    }
                    Step::Publish => {
                        producer.publish();
                        shown.append(&mut hidden);
                    }
                    Step::Pop => {
                        prop_assert_eq!(consumer.waiting(size) as usize, shown.len());
                        let item = shown.pop_front();
                        unreleased += usize::from(item.is_some());
                        prop_assert_eq!(consumer.pop(), item);
                    }
                    Step::Release => {
                        consumer.release();
                        unreleased = 0;
                    }
                }
                let used = hidden.len() + shown.len() + unreleased;
                prop_assert_eq!(producer.free(size) as usize, size as usize - used);
                prop_assert_eq!(producer.pending() as usize, used);
            }
        }
    }

    #[test]
    fn two_threads_hand_over_every_item_in_order() {
        let (mut producer, mut consumer) = ring(8, u32::MAX - 100);
        let items = 100_000_u64;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for item in 0..items {
                    while !producer.push(item) {
                        std::thread::yield_now();
                    }
                    producer.publish();
                }
            });
            for item in 0..items {
                let popped = loop {
                    match consumer.pop() {
                        Some(popped) => break popped,
                        None => std::thread::yield_now(),
                    }
                };
                assert_eq!(popped, item);
                consumer.release();
            }
        });
    }

    #[test]
    fn a_ring_that_does_not_fit_its_memory_is_refused() {
        let mapping = Arc::new(Mapping::anonymous(4096).unwrap());
        assert!(Producer::<u64>::new(Arc::clone(&mapping), LAYOUT, 1024).is_err());
        assert!(Consumer::<u64>::new(Arc::clone(&mapping), LAYOUT, 3).is_err());
        let misaligned = Layout {
            slots: 193,
            ..LAYOUT
        };
        assert!(Consumer::<Descriptor>::new(mapping, misaligned, 4).is_err());
    }
}
