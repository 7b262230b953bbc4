//! The memory of [`SaWords`]: an array of slots in anonymous memory, or in a memory-mapped BPF array that XDP shares.
//!
//! Gives slots out and takes them back. A slot carries the tag of its SA, so that a process that takes the array over from
//! one that died finds the slot again, and with it how far the SA has counted. What the words mean is
//! `ipsec_common::words`' business.
#![expect(
    unsafe_code,
    reason = "the words live in a mapping that the kernel may share, so no Rust type owns them"
)]

use std::{
    collections::HashMap,
    fmt, io,
    mem::offset_of,
    num::NonZeroUsize,
    ops::Deref,
    os::fd::{AsFd, OwnedFd},
    ptr::NonNull,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
};

use ipsec_common::{SaWords, replay};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use ring::digest;

use super::{prefetch::Places, slow::monotonic_seconds};
use crate::dataplane::seam::{Direction, SaSpec};

/// Words of the replay window in a line of the cache.
const WINDOW_WORDS: usize = 8;

/// What an SA is known by whoever carries it: a digest of its keys, SPI and direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag([u64; 2]);

impl Tag {
    /// The tag of nobody's SA.
    #[cfg(test)]
    pub(super) const fn some(number: u64) -> Self {
        Self([number | 1, number])
    }

    /// The tag of an SA.
    pub fn of(spec: &SaSpec) -> Self {
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(b"words of an SA");
        context.update(&[match spec.direction {
            Direction::Inbound => 0,
            Direction::Outbound => 1,
        }]);
        context.update(&spec.spi.to_be_bytes());
        context.update(&(spec.keys.cipher.len() as u64).to_be_bytes());
        context.update(&spec.keys.cipher);
        context.update(&spec.keys.integrity);
        let digest = context.finish();
        let mut halves = [0; 2];
        for (half, bytes) in halves.iter_mut().zip(digest.as_ref().chunks_exact(8)) {
            *half = bytes
                .iter()
                .fold(0, |number, byte| (number << 8) | u64::from(*byte));
        }
        // Zero is no tag.
        halves[0] |= 1;
        Self(halves)
    }

    fn read(words: &SaWords) -> Option<Self> {
        let [first, second] = &words.tag;
        let first = first.load(Ordering::Acquire);
        (first != 0).then(|| Self([first, second.load(Ordering::Relaxed)]))
    }

    fn write(self, words: &SaWords) {
        let [first, second] = &words.tag;
        second.store(self.0[1], Ordering::Relaxed);
        // Last: what has a tag is complete, whenever this process dies.
        first.store(self.0[0], Ordering::Release);
    }
}

/// Why there is no slot for an SA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoSlot {
    /// All are in use.
    Full,
    /// An SA with these keys has counted already, or counts: it must not begin at 1 once more.
    Used,
    /// Nobody knows how far an SA with these keys has counted.
    Unknown,
}

/// Who has which slot.
struct Slots {
    free: Vec<u32>,
    /// Slots that an earlier process has left, by their SAs.
    left: HashMap<Tag, u32>,
    used: HashMap<Tag, u32>,
}

/// An array of [`SaWords`], shared by all SAs of an engine.
pub struct WordsArray {
    base: NonNull<SaWords>,
    bytes: NonZeroUsize,
    slots: u32,
    given: Mutex<Slots>,
    /// Keeps the BPF array, if there is one, for as long as it is mapped.
    _array: Option<OwnedFd>,
}

// SAFETY: the mapping is valid until drop, and `SaWords` consists of atomics only.
unsafe impl Send for WordsArray {}
// SAFETY: as above; the list of free slots is behind a mutex.
unsafe impl Sync for WordsArray {}

impl WordsArray {
    /// `slots` elements in anonymous memory, for an engine without XDP.
    pub fn anonymous(slots: u32) -> io::Result<Arc<Self>> {
        let bytes = mapping_bytes(slots)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe {
            mmap_anonymous(
                None,
                bytes,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_PRIVATE,
            )?
        };
        Ok(Self::over(base.cast(), bytes, slots, None))
    }

    /// The `slots` elements of a BPF array that was created with BPF_F_MMAPABLE and a value size of [`SaWords`]. Those that
    /// have a tag are kept for [`Self::resume`] until [`Self::forget_what_is_left`].
    pub fn of_bpf_array(array: OwnedFd, slots: u32) -> io::Result<Arc<Self>> {
        let bytes = mapping_bytes(slots)?;
        // SAFETY: as above; the kernel refuses a mapping that is longer than the array.
        let base = unsafe {
            mmap(
                None,
                bytes,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                array.as_fd(),
                0,
            )?
        };
        Ok(Self::over(base.cast(), bytes, slots, Some(array)))
    }

    fn over(
        base: NonNull<SaWords>,
        bytes: NonZeroUsize,
        slots: u32,
        array: Option<OwnedFd>,
    ) -> Arc<Self> {
        let array = Self {
            base,
            bytes,
            slots,
            given: Mutex::new(Slots {
                free: Vec::new(),
                left: HashMap::new(),
                used: HashMap::new(),
            }),
            _array: array,
        };
        array.sort_out();
        if array.since() == 0
            && let Some(words) = (slots > 0).then(|| array.words(0))
        {
            words
                .array_since
                .store(monotonic_seconds(), Ordering::Relaxed);
        }
        Arc::new(array)
    }

    /// When the array was made, in seconds of CLOCK_MONOTONIC. An SA that is younger and has no slot in it has never been in use,
    /// but for one that has ended.
    pub fn since(&self) -> u64 {
        if self.slots == 0 {
            return 0;
        }
        self.words(0).array_since.load(Ordering::Relaxed)
    }

    /// Tells the slots that an earlier process has left from those that are free.
    fn sort_out(&self) {
        let mut given = self.given();
        for slot in (0..self.slots).rev() {
            match Tag::read(self.words(slot)) {
                Some(tag) if !given.left.contains_key(&tag) => {
                    given.left.insert(tag, slot);
                }
                // The tag of two slots tells nothing: the one that is left out is never used.
                Some(_) => {}
                None => given.free.push(slot),
            }
        }
    }

    /// Takes a free slot with all its words zero for an SA that has never been in use.
    ///
    /// # Errors
    ///
    /// [`NoSlot::Full`], and [`NoSlot::Used`] if the SA has a slot already.
    pub fn allocate(self: &Arc<Self>, tag: Tag) -> Result<WordsRef, NoSlot> {
        let mut given = self.given();
        if given.left.contains_key(&tag) || given.used.contains_key(&tag) {
            return Err(NoSlot::Used);
        }
        let slot = given.free.pop().ok_or(NoSlot::Full)?;
        given.used.insert(tag, slot);
        drop(given);
        let words = self.reference(slot, tag);
        words.clear();
        tag.write(&words);
        Ok(words)
    }

    /// Takes the slot that an SA has had under an earlier process, with all that it has counted.
    ///
    /// # Errors
    ///
    /// [`NoSlot::Unknown`] if there is none.
    pub fn resume(self: &Arc<Self>, tag: Tag) -> Result<WordsRef, NoSlot> {
        let mut given = self.given();
        let slot = given.left.remove(&tag).ok_or(NoSlot::Unknown)?;
        given.used.insert(tag, slot);
        drop(given);
        Ok(self.reference(slot, tag))
    }

    /// Frees what earlier processes have left and nobody has resumed.
    pub fn forget_what_is_left(&self) {
        let mut given = self.given();
        let left: Vec<u32> = given.left.drain().map(|(_, slot)| slot).collect();
        for slot in left {
            untag(self.words(slot));
            given.free.push(slot);
        }
    }

    fn reference(self: &Arc<Self>, slot: u32, tag: Tag) -> WordsRef {
        WordsRef {
            words: self.words(slot).into(),
            slot: Arc::new(Slot {
                array: Arc::clone(self),
                slot,
                tag,
            }),
        }
    }

    fn given(&self) -> MutexGuard<'_, Slots> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Elements, free or not.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    fn words(&self, slot: u32) -> &SaWords {
        assert!(
            slot < self.slots,
            "only slots of this array are ever given out"
        );
        // SAFETY: the mapping holds `slots` elements, is valid while `self` is, is aligned to a page, and any bits are
        // valid `SaWords`; everybody who shares it accesses it with atomic operations only.
        unsafe { self.base.add(slot as usize).as_ref() }
    }
}

impl Drop for WordsArray {
    fn drop(&mut self) {
        // SAFETY: every `WordsRef` holds an `Arc` of this array, so nobody uses the mapping any more. An error leaves it
        // mapped, which harms nobody.
        let _ = unsafe { munmap(self.base.cast(), self.bytes.get()) };
    }
}

/// One slot, freed when the last handle goes. An SA that XDP knows must leave XDP's tables before that.
#[derive(Clone)]
pub struct WordsRef {
    slot: Arc<Slot>,
    /// The words of the slot: a packet needs nothing else of it.
    words: NonNull<SaWords>,
}

// SAFETY: `SaWords` consists of atomics only, and `slot` keeps the mapping that they are in.
unsafe impl Send for WordsRef {}
// SAFETY: as above.
unsafe impl Sync for WordsRef {}

struct Slot {
    array: Arc<WordsArray>,
    slot: u32,
    tag: Tag,
}

impl WordsRef {
    /// Index of the slot in the array.
    pub fn slot(&self) -> u32 {
        self.slot.slot
    }

    /// Where the memory is that every packet of the SA needs.
    pub fn note_places(&self, places: &mut Places) {
        let start = self.words.addr().get();
        places.add_addresses(start..start + offset_of!(SaWords, replay));
    }

    /// Where the word of the replay window is that the next packets of the SA need, and the one after.
    pub fn note_window(&self, places: &mut Places) {
        let word = replay::word(self.sequence.load(Ordering::Relaxed));
        let window = self.replay.get(word..).unwrap_or_default();
        places.add(window.get(..WINDOW_WORDS).unwrap_or(window));
    }

    /// Whose words these are.
    pub fn tag(&self) -> Tag {
        self.slot.tag
    }

    /// The SA has ended: nobody goes on with it. What ends with the process instead keeps its tag.
    pub fn retire(&self) {
        untag(self);
    }

    fn clear(&self) {
        self.retire();
        for word in [
            &self.sequence,
            &self.fast_packets,
            &self.fast_bytes,
            &self.slow_packets,
            &self.slow_bytes,
            &self.replayed,
            &self.forged,
            &self.hard_packets,
            &self.hard_bytes,
            &self.last_used,
        ]
        .into_iter()
        .chain(&self.replay)
        {
            word.store(0, Ordering::Relaxed);
        }
    }
}

impl Deref for WordsRef {
    type Target = SaWords;

    fn deref(&self) -> &SaWords {
        // SAFETY: `slot` keeps the mapping, in which they are valid as `WordsArray::words` tells.
        unsafe { self.words.as_ref() }
    }
}

impl fmt::Debug for WordsRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WordsRef").field(&self.slot()).finish()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut given = self.array.given();
        given.used.remove(&self.tag);
        given.free.push(self.slot);
    }
}

fn untag(words: &SaWords) {
    words.tag[0].store(0, Ordering::Release);
}

fn mapping_bytes(slots: u32) -> io::Result<NonZeroUsize> {
    usize::try_from(slots)
        .ok()
        .and_then(|slots| slots.checked_mul(size_of::<SaWords>()))
        .and_then(NonZeroUsize::new)
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Tag = Tag::some(1);
    const OTHER: Tag = Tag::some(3);

    /// An array in shared memory that outlives a process, as a pinned BPF array does.
    fn shared(slots: u32) -> OwnedFd {
        let memory =
            nix::sys::memfd::memfd_create(c"words", nix::sys::memfd::MFdFlags::empty()).unwrap();
        let bytes = mapping_bytes(slots).unwrap().get();
        nix::unistd::ftruncate(&memory, i64::try_from(bytes).unwrap()).unwrap();
        memory
    }

    /// What the next process sees of it.
    fn taken_over(memory: &OwnedFd, slots: u32) -> Arc<WordsArray> {
        WordsArray::of_bpf_array(memory.try_clone().unwrap(), slots).unwrap()
    }

    #[test]
    fn a_slot_is_zero_again_after_it_was_used_and_freed() {
        let array = WordsArray::anonymous(1).unwrap();
        let first = array.allocate(ONE).unwrap();
        first.sequence.store(7, Ordering::Relaxed);
        first.replay[3].store(9, Ordering::Relaxed);
        assert_eq!(
            array.allocate(OTHER).err(),
            Some(NoSlot::Full),
            "the only slot is in use"
        );
        let clone = first.clone();
        drop(first);
        assert_eq!(
            array.allocate(OTHER).err(),
            Some(NoSlot::Full),
            "a handle is left"
        );
        drop(clone);
        let second = array.allocate(OTHER).unwrap();
        assert_eq!(second.slot(), 0);
        assert_eq!(second.sequence.load(Ordering::Relaxed), 0);
        assert_eq!(second.replay[3].load(Ordering::Relaxed), 0);
    }

    #[test]
    fn an_sa_goes_on_counting_in_the_slot_that_a_dead_process_has_left() {
        let memory = shared(4);
        let before = taken_over(&memory, 4);
        let words = before.allocate(ONE).unwrap();
        let slot = words.slot();
        words.sequence.store(1234, Ordering::Relaxed);
        let after = taken_over(&memory, 4);
        assert_eq!(
            after.allocate(ONE).err(),
            Some(NoSlot::Used),
            "it would begin at 1 again"
        );
        assert_eq!(after.resume(OTHER).err(), Some(NoSlot::Unknown));
        let again = after.resume(ONE).unwrap();
        assert_eq!(
            (again.slot(), again.sequence.load(Ordering::Relaxed)),
            (slot, 1234)
        );
        assert_eq!(
            after.resume(ONE).err(),
            Some(NoSlot::Unknown),
            "it has one owner"
        );
        assert_eq!(after.allocate(ONE).err(), Some(NoSlot::Used));
    }

    #[test]
    fn what_has_ended_or_was_not_claimed_is_not_resumed_and_its_slot_is_free() {
        let memory = shared(2);
        let before = taken_over(&memory, 2);
        let ended = before.allocate(ONE).unwrap();
        let _unclaimed = before.allocate(OTHER).unwrap();
        ended.retire();
        let after = taken_over(&memory, 2);
        assert_eq!(after.resume(ONE).err(), Some(NoSlot::Unknown));
        let _taken = after.allocate(Tag::some(5)).unwrap();
        assert_eq!(
            after.allocate(Tag::some(7)).err(),
            Some(NoSlot::Full),
            "one slot is kept"
        );
        after.forget_what_is_left();
        assert_eq!(after.resume(OTHER).err(), Some(NoSlot::Unknown));
        assert!(after.allocate(Tag::some(9)).is_ok());
    }

    #[test]
    fn threads_share_the_words_of_one_sa() {
        let words = WordsArray::anonymous(4).unwrap().allocate(ONE).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                let words = words.clone();
                scope.spawn(move || {
                    for _ in 0..1000 {
                        words.sequence.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(words.sequence.load(Ordering::Relaxed), 2000);
    }
}
