//! The packet at hand: bounds-checked reads for the classification, and the note before the frame.

use core::{mem, ptr};

use aya_ebpf::{helpers::generated::bpf_xdp_adjust_meta, programs::XdpContext};
use ipsec_common::{
    classify::Frame,
    maps::{NOTE_BYTES, Note},
};

/// No header that the classification reads lies farther from the start of the frame than this many bytes; the verifier wants a bound.
const FARTHEST_READ: usize = 128;

/// A packet on its way in.
pub struct Packet<'a> {
    context: &'a XdpContext,
}

impl<'a> Packet<'a> {
    #[inline(always)]
    pub const fn of(context: &'a XdpContext) -> Self {
        Self { context }
    }

    /// Index of the interface it came in on.
    #[inline(always)]
    pub fn link(&self) -> u32 {
        // SAFETY: the kernel passes a valid context.
        unsafe { (*self.context.ctx).ingress_ifindex }
    }

    /// The receive queue it came in on.
    #[inline(always)]
    pub fn queue(&self) -> u32 {
        self.context.rx_queue_index()
    }

    #[inline(always)]
    pub const fn context(&self) -> *mut core::ffi::c_void {
        self.context.ctx.cast()
    }

    /// Writes the note before the frame; false if the driver has no room for metadata.
    #[inline(always)]
    pub fn annotate(&self, note: Note) -> bool {
        // SAFETY: the context is valid; the helper moves `data_meta` or fails.
        if unsafe { bpf_xdp_adjust_meta(self.context.ctx, -(NOTE_BYTES as i32)) } != 0 {
            return false;
        }
        let start = self.context.metadata();
        if start + mem::size_of::<Note>() > self.context.data() {
            return false;
        }
        // SAFETY: the bytes from `start` to `data` are metadata, and there are enough of them.
        unsafe { ptr::write_unaligned(start as *mut Note, note) };
        true
    }
}

impl Frame for Packet<'_> {
    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        if offset > FARTHEST_READ {
            return None;
        }
        let start = self.context.data() + offset;
        if start + N > self.context.data_end() {
            return None;
        }
        // SAFETY: `N` bytes from `start` lie before `data_end`, checked just above; bytes need no alignment.
        Some(unsafe { ptr::read_unaligned(start as *const [u8; N]) })
    }

    #[inline(always)]
    fn length(&self) -> usize {
        self.context.data_end() - self.context.data()
    }
}
