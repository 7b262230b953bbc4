//! The memory of [`SaWords`]: an array of slots in anonymous memory, or in a memory-mapped BPF array that XDP shares.
//!
//! Gives slots out and takes them back. What the words mean is `ipsec_common::words`' business.
#![expect(
    unsafe_code,
    reason = "the words live in a mapping that the kernel may share, so no Rust type owns them"
)]

use std::{
    fmt, io,
    mem::offset_of,
    num::NonZeroUsize,
    ops::Deref,
    os::fd::{AsFd, OwnedFd},
    ptr::NonNull,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
};

use ipsec_common::SaWords;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::prefetch::Places;

/// An array of [`SaWords`], shared by all SAs of an engine.
pub struct WordsArray {
    base: NonNull<SaWords>,
    bytes: NonZeroUsize,
    slots: u32,
    free: Mutex<Vec<u32>>,
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

    /// The `slots` elements of a BPF array that was created with BPF_F_MMAPABLE and a value size of [`SaWords`].
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
        Arc::new(Self {
            base,
            bytes,
            slots,
            free: Mutex::new((0..slots).rev().collect()),
            _array: array,
        })
    }

    /// Takes a free slot with all its words zero; none is left if all are in use.
    pub fn allocate(self: &Arc<Self>) -> Option<WordsRef> {
        let slot = self
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop()?;
        let words = WordsRef(Arc::new(Slot {
            array: Arc::clone(self),
            slot,
        }));
        words.clear();
        Some(words)
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
pub struct WordsRef(Arc<Slot>);

struct Slot {
    array: Arc<WordsArray>,
    slot: u32,
}

impl WordsRef {
    /// Index of the slot in the array.
    pub fn slot(&self) -> u32 {
        self.0.slot
    }

    /// Where the memory is that every packet of the SA needs.
    pub fn note_places(&self, places: &mut Places) {
        places.add_shared(&self.0);
        let start = std::ptr::from_ref(&**self).addr();
        places.add_addresses(start..start + offset_of!(SaWords, replay));
    }

    fn clear(&self) {
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
        self.0.array.words(self.0.slot)
    }
}

impl fmt::Debug for WordsRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WordsRef").field(&self.0.slot).finish()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.array
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(self.slot);
    }
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

    #[test]
    fn a_slot_is_zero_again_after_it_was_used_and_freed() {
        let array = WordsArray::anonymous(1).unwrap();
        let first = array.allocate().unwrap();
        first.sequence.store(7, Ordering::Relaxed);
        first.replay[3].store(9, Ordering::Relaxed);
        assert!(array.allocate().is_none(), "the only slot is in use");
        let clone = first.clone();
        drop(first);
        assert!(array.allocate().is_none(), "a handle is left");
        drop(clone);
        let second = array.allocate().unwrap();
        assert_eq!(second.slot(), 0);
        assert_eq!(second.sequence.load(Ordering::Relaxed), 0);
        assert_eq!(second.replay[3].load(Ordering::Relaxed), 0);
    }

    #[test]
    fn threads_share_the_words_of_one_sa() {
        let words = WordsArray::anonymous(4).unwrap().allocate().unwrap();
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
