//! The packet memory of a worker, in frames, and who owns which of them.
//!
//! A [`Frame`] is a right: whoever holds it, and nobody else, may touch those bytes. It is given up to the kernel by
//! turning it into an address and comes back as an address from a ring.
#![expect(
    unsafe_code,
    reason = "frames are slices of memory that the kernel shares"
)]

use std::{io, ops::Range, sync::Arc};

use super::mapping::Mapping;

/// Bytes of a frame: what the kernel takes without huge pages.
pub const FRAME_BYTES: usize = 4096;
/// Bytes that the kernel leaves free before a received packet (`XDP_PACKET_HEADROOM`): outer headers grow into them.
pub const HEADROOM: usize = 256;
/// Bytes kept behind a received packet for padding and ICV.
pub const TAILROOM: usize = 128;
/// Longest Ethernet frame that can be received and sealed in one frame.
pub const LONGEST_PACKET: usize = FRAME_BYTES - HEADROOM - TAILROOM;

/// The right to use one frame of a UMEM. Dropping it loses the frame until the worker ends: give it back instead.
#[must_use = "a frame that is dropped is lost"]
#[derive(Debug, PartialEq, Eq)]
pub struct Frame(u32);

/// Packet memory of one worker, shared by its sockets.
#[derive(Debug)]
pub struct Umem {
    mapping: Arc<Mapping>,
    frames: u32,
    free: Vec<u32>,
    /// Per frame: true while a [`Frame`] for it exists or it is free, false while the kernel has it. An address that
    /// comes back twice must not make two rights of one.
    ours: Vec<bool>,
}

impl Umem {
    /// Memory for that many frames, all free.
    ///
    /// # Errors
    ///
    /// What mmap answers, or `InvalidInput` where the size overflows.
    pub fn new(frames: u32) -> io::Result<Self> {
        let count = usize::try_from(frames).ok();
        let bytes = count.and_then(|count| count.checked_mul(FRAME_BYTES));
        let (Some(count), Some(bytes)) = (count, bytes) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        Ok(Self {
            mapping: Arc::new(Mapping::anonymous(bytes)?),
            frames,
            free: (0..frames).rev().collect(),
            ours: vec![true; count],
        })
    }

    /// Takes a free frame.
    pub fn allocate(&mut self) -> Option<Frame> {
        self.free.pop().map(Frame)
    }

    /// Gives a frame back.
    pub fn free(&mut self, frame: Frame) {
        self.free.push(frame.0);
    }

    /// Frames that nobody uses.
    pub fn free_frames(&self) -> usize {
        self.free.len()
    }

    /// Frames in all.
    pub fn frames(&self) -> u32 {
        self.frames
    }

    /// All bytes of a frame.
    pub fn bytes(&mut self, frame: &Frame) -> &mut [u8] {
        let offset = frame.0 as usize * FRAME_BYTES;
        debug_assert!(
            frame.0 < self.frames,
            "rights are made for frames of this UMEM"
        );
        let offset = offset.min(self.mapping.bytes() - FRAME_BYTES);
        // SAFETY: the frame lies inside the mapping; its right exists once, the kernel does not have it, and the slice
        // borrows the whole UMEM mutably.
        unsafe {
            std::slice::from_raw_parts_mut(self.mapping.base().add(offset).as_ptr(), FRAME_BYTES)
        }
    }

    /// Gives a frame to the kernel: the address of byte `start` in it, for a ring.
    pub fn lend(&mut self, frame: Frame, start: usize) -> u64 {
        if let Some(ours) = self.ours.get_mut(frame.0 as usize) {
            *ours = false;
        }
        u64::from(frame.0) * FRAME_BYTES as u64 + (start % FRAME_BYTES) as u64
    }

    /// Takes back what [`Self::lend`] gave away, by any address inside the frame. `None` where the kernel does not
    /// have that frame.
    pub fn take_back(&mut self, address: u64) -> Option<Frame> {
        let index = u32::try_from(address / FRAME_BYTES as u64).ok()?;
        let ours = self.ours.get_mut(index as usize)?;
        (!std::mem::replace(ours, true)).then_some(Frame(index))
    }

    /// Takes back a received packet: its frame, and where in the frame it is.
    pub fn take_packet(&mut self, address: u64, length: u32) -> Option<(Frame, Range<usize>)> {
        let frame = self.take_back(address)?;
        let start = usize::try_from(address % FRAME_BYTES as u64).ok()?;
        let end = start + usize::try_from(length).ok()?;
        if end > FRAME_BYTES {
            self.free(frame);
            return None;
        }
        Some((frame, start..end))
    }

    /// Frames that the kernel has. Always all frames less the free ones and those in somebody's hands.
    pub fn lent_frames(&self) -> usize {
        self.ours.iter().filter(|ours| !**ours).count()
    }

    /// The memory, for registering it with a socket.
    pub(super) fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_frame_is_lost_or_doubled(steps in prop::collection::vec((0_u8..4, any::<u64>()), 1..300)) {
            let mut umem = Umem::new(8).unwrap();
            let (mut held, mut lent) = (Vec::new(), Vec::new());
            for (step, number) in steps {
                let pick = |length: usize| usize::try_from(number).unwrap() % length;
                match step {
                    0 => held.extend(umem.allocate()),
                    1 if !held.is_empty() => umem.free(held.swap_remove(pick(held.len()))),
                    2 if !held.is_empty() => {
                        let frame = held.swap_remove(pick(held.len()));
                        lent.push(umem.lend(frame, pick(FRAME_BYTES)));
                    }
                    3 if !lent.is_empty() => {
                        let address = lent.swap_remove(pick(lent.len()));
                        held.push(umem.take_back(address).unwrap());
                        prop_assert_eq!(umem.take_back(address), None);
                    }
                    _ => prop_assert_eq!(umem.take_back(8 * 4096 + number / 2), None),
                }
                prop_assert_eq!(umem.free_frames() + held.len() + lent.len(), 8);
                prop_assert_eq!(umem.lent_frames(), lent.len());
                let mut indices: Vec<u32> = held.iter().map(|frame| frame.0).collect();
                indices.dedup();
                prop_assert_eq!(indices.len(), held.len());
            }
        }
    }

    #[test]
    fn a_packet_that_would_leave_its_frame_is_refused_and_its_frame_freed() {
        let mut umem = Umem::new(1).unwrap();
        let frame = umem.allocate().unwrap();
        let address = umem.lend(frame, 4000);
        assert_eq!(umem.take_packet(address, 97), None);
        assert_eq!(umem.free_frames(), 1);
    }

    #[test]
    fn a_frame_keeps_its_bytes() {
        let mut umem = Umem::new(2).unwrap();
        let (first, second) = (umem.allocate().unwrap(), umem.allocate().unwrap());
        umem.bytes(&first).fill(1);
        umem.bytes(&second).fill(2);
        assert!(umem.bytes(&first).iter().all(|byte| *byte == 1));
    }
}
