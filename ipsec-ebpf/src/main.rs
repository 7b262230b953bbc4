//! The XDP program: one for every interface, with no role of its own. Entry point and the order of the decisions.
//!
//! What a frame is stands in `ipsec_common::classify`, what the maps mean in `ipsec_common::maps`.
#![no_std]
#![no_main]

mod fib;
mod ike;
mod maps;
mod packet;

use core::sync::atomic::AtomicU64;

use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT},
    macros::xdp,
    programs::XdpContext,
};
use ipsec_common::{
    Reason,
    classify::Outline,
    maps::{InboundEntry, InboundKey, LinkEntry, Note, VlanKey, Work},
};

use crate::{
    fib::{Egress, Way},
    maps::{
        ADDRESSES, INBOUND, LIMITER, LINKS, SA_WORDS, SETTINGS, SOCKETS, TUNNELS, VLANS, count,
    },
    packet::Packet,
};

/// Sends ESP of ours and what is routed into a tunnel to the AF_XDP workers; everything else to the kernel.
#[xdp]
pub fn gateway(ctx: XdpContext) -> u32 {
    let (reason, action) = decide(&Packet::of(&ctx));
    count(reason);
    action
}

const NOT_OURS: (Reason, u32) = (Reason::NotOurs, XDP_PASS);

#[inline(always)]
fn decide(packet: &Packet) -> (Reason, u32) {
    // SAFETY: entries are written whole by one writer; a mixture seen in passing misdirects one packet at worst.
    let (Some(link), Some(outline)) = (unsafe { LINKS.get(packet.link()) }, Outline::of(packet))
    else {
        return NOT_OURS;
    };
    let Some(ingress) = ingress(packet, link, &outline) else {
        return NOT_OURS;
    };
    let Some(settings) = SETTINGS.get(0) else {
        return NOT_OURS;
    };
    if let Some((spi, esp)) = outline.esp(packet, settings.nat_port) {
        let key = InboundKey {
            destination: outline.destination,
            spi,
        };
        // SAFETY: as above.
        if let Some(entry) = unsafe { INBOUND.get(key) } {
            return inbound(packet, link, &outline, entry, esp, ingress);
        }
        // SAFETY: as above.
        if unsafe { ADDRESSES.get(outline.destination) }.is_some() {
            return unknown_spi(settings.unknown_spi_per_second);
        }
    } else if let Some(message) = outline.ike(packet, settings.ike_port, settings.nat_port)
        // SAFETY: as above.
        && unsafe { ADDRESSES.get(outline.destination) }.is_some()
    {
        return match ike::refuse(&message, &outline, settings) {
            Some(reason) => (reason, XDP_DROP),
            None => NOT_OURS,
        };
    }
    outbound(packet, link, &outline, ingress)
}

/// Index of the interface whose routing the packet gets, if it is for us at all.
#[inline(always)]
fn ingress(packet: &Packet, link: &LinkEntry, outline: &Outline) -> Option<u32> {
    if outline.mac != link.mac {
        return None;
    }
    let (outer, inner) = outline.vlan;
    if outer == 0 && inner == 0 {
        return Some(packet.link());
    }
    let key = VlanKey {
        link: packet.link(),
        outer,
        inner,
    };
    // SAFETY: as for the other tables.
    unsafe { VLANS.get(key) }.copied()
}

#[inline(always)]
fn inbound(
    packet: &Packet,
    link: &LinkEntry,
    outline: &Outline,
    entry: &InboundEntry,
    esp: usize,
    ingress: u32,
) -> (Reason, u32) {
    let slot = entry.slot;
    let offloaded = entry.offloaded != 0;
    if SA_WORDS
        .get(slot)
        .is_some_and(|words| words.is_past_hard_limit(load))
    {
        return (Reason::HardLimit, XDP_DROP);
    }
    if !offloaded {
        return (Reason::SlowPolicy, XDP_PASS);
    }
    let note = note(Work::Inbound, outline, esp, slot, ingress);
    match hand_over(packet, link, note) {
        Handed::Over => (Reason::FastInbound, XDP_REDIRECT),
        Handed::NoSocket => (Reason::NoSocket, XDP_DROP),
        Handed::NoRoom => (Reason::SlowPolicy, XDP_PASS),
    }
}

#[inline(always)]
fn load(word: &AtomicU64) -> u64 {
    // SAFETY: valid and aligned, being a reference; all who share the word write it whole.
    unsafe { word.as_ptr().read_volatile() }
}

/// A few a second go on to the slow path, which reports them; a flood ends here.
#[inline(always)]
fn unknown_spi(per_second: u32) -> (Reason, u32) {
    let now = ike::seconds();
    let Some(limiter) = LIMITER.get_ptr_mut(0) else {
        return (Reason::UnknownSpi, XDP_DROP);
    };
    // SAFETY: the element is this CPU's own, and an XDP program is not interrupted by another on its CPU.
    let (admitted, next) = unsafe { *limiter }.admit(now, per_second);
    // SAFETY: as above.
    unsafe { *limiter = next };
    let action = if admitted { XDP_PASS } else { XDP_DROP };
    (Reason::UnknownSpi, action)
}

#[inline(always)]
fn outbound(packet: &Packet, link: &LinkEntry, outline: &Outline, ingress: u32) -> (Reason, u32) {
    let device = match fib::egress(packet, outline, ingress, Way::There) {
        Egress::Device(device) => device,
        Egress::TooLong => return (Reason::SlowTooLong, XDP_PASS),
        Egress::Blocked | Egress::None => return NOT_OURS,
    };
    // SAFETY: as for the other tables.
    let Some(tunnel) = (unsafe { TUNNELS.get(device) }) else {
        return NOT_OURS;
    };
    if let Some(reason) = outline.slow() {
        return (reason, XDP_PASS);
    }
    if u32::from(outline.bytes) > tunnel.mtu {
        return (Reason::SlowTooLong, XDP_PASS);
    }
    if tunnel.offloaded == 0 {
        return (Reason::SlowPolicy, XDP_PASS);
    }
    if tunnel.wary != 0 && pretends(packet, outline, ingress) {
        return (Reason::SlowGuard, XDP_PASS);
    }
    let note = note(Work::Outbound, outline, 0, device, ingress);
    match hand_over(packet, link, note) {
        Handed::Over => (Reason::FastOutbound, XDP_REDIRECT),
        // The FIB says tunnel, so the kernel hands it to the slow path: it cannot leak.
        Handed::NoSocket | Handed::NoRoom => (Reason::SlowPolicy, XDP_PASS),
    }
}

/// Whether an answer would go into a tunnel, so that the packet should have come out of one. The kernel's plaintext guard
/// decides: it knows the exemptions.
#[inline(always)]
fn pretends(packet: &Packet, outline: &Outline, ingress: u32) -> bool {
    match fib::egress(packet, outline, ingress, Way::Back) {
        // SAFETY: as for the other tables.
        Egress::Device(device) => unsafe { TUNNELS.get(device) }.is_some(),
        Egress::TooLong | Egress::Blocked => true,
        Egress::None => false,
    }
}

/// Offsets are below 256 by construction: 22 bytes of Ethernet, 40 of IPv6, 8 of UDP at most.
#[inline(always)]
fn note(work: Work, outline: &Outline, esp: usize, target: u32, link: u32) -> Note {
    Note {
        magic: Note::MAGIC,
        work: work as u8,
        network: outline.network as u8,
        esp: esp as u8,
        padding: 0,
        target,
        link,
    }
}

enum Handed {
    Over,
    /// This queue has no AF_XDP socket.
    NoSocket,
    /// The driver gives no room for metadata.
    NoRoom,
}

/// Redirects to this queue's socket, the note before the frame.
#[inline(always)]
fn hand_over(packet: &Packet, link: &LinkEntry, note: Note) -> Handed {
    let queue = packet.queue();
    if queue >= link.queues {
        return Handed::NoSocket;
    }
    let socket = link.sockets_base.wrapping_add(queue);
    if SOCKETS.redirect(socket, 0).is_err() {
        return Handed::NoSocket;
    }
    if packet.annotate(note) {
        Handed::Over
    } else {
        Handed::NoRoom
    }
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
