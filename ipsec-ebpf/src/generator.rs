//! The load generator of the benchmarks, run by BPF_PROG_TEST_RUN with live frames; never attached to an interface.
//!
//! A test run repeats one frame. This program makes each repetition another frame of a list, as replay protection
//! demands, and sends it out of an interface at the price of a copy.
#![no_std]
#![no_main]

use aya_ebpf::{
    bindings::xdp_action::XDP_ABORTED,
    helpers::generated::{bpf_redirect, bpf_xdp_adjust_tail, bpf_xdp_store_bytes},
    macros::{map, xdp},
    maps::Array,
    programs::XdpContext,
};
use ipsec_common::generator::{BLANK_BYTES, Course, Frame};

#[map]
static COURSE: Array<Course> = Array::with_max_entries(1, 0);
/// As long as the list is: userspace says so when it loads this.
#[map]
static FRAMES: Array<Frame> = Array::with_max_entries(1, 0);

/// Sends the next frame of the list.
#[xdp]
pub fn generate(ctx: XdpContext) -> u32 {
    send(&ctx).unwrap_or(XDP_ABORTED)
}

#[inline(always)]
fn send(ctx: &XdpContext) -> Option<u32> {
    let course = COURSE.get_ptr_mut(0)?;
    // SAFETY: a test run is on one CPU, and only one runs at a time.
    let Course {
        sent,
        frames,
        egress,
    } = unsafe { *course };
    // SAFETY: as above.
    unsafe { (*course).sent = sent + 1 };
    if frames == 0 {
        return None;
    }
    let frame = FRAMES.get((sent % u64::from(frames)) as u32)?;
    let last = frame.last;
    if last as usize >= BLANK_BYTES {
        return None;
    }
    let length = last + 1;
    let shorter = length as i32 - (ctx.data_end() - ctx.data()) as i32;
    // SAFETY: the context is valid; the helper moves the end or fails.
    if shorter != 0 && unsafe { bpf_xdp_adjust_tail(ctx.ctx, shorter) } != 0 {
        return None;
    }
    let bytes = frame.bytes.as_ptr().cast_mut().cast();
    // SAFETY: the frame has that many bytes, and the helper checks that the packet has them.
    if unsafe { bpf_xdp_store_bytes(ctx.ctx, 0, bytes, length) } != 0 {
        return None;
    }
    // SAFETY: takes no pointers.
    u32::try_from(unsafe { bpf_redirect(egress, 0) }).ok()
}

/// Never reached: a program that could panic does not pass the verifier.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// The licence that the kernel checks before it lends its helpers.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
