//! How much IKE of strangers the daemon is woken for: so much from one source, and so much in all.
//!
//! A message with an SPI that the daemon has used passes, whatever its source. Nothing here is allocated by strangers.

use aya_ebpf::helpers::bpf_ktime_get_ns;
use ipsec_common::{
    Reason,
    classify::{Outline, ike::Ike},
    maps::{Limiter, Settings, source_bucket},
};

use crate::maps::{IKE_PEERS, IKE_SOURCES, IKE_SPIS, IKE_TOTALS};

/// Why a datagram is not let through, if it is not.
#[inline(always)]
pub fn refuse(ike: &Ike, outline: &Outline, settings: &Settings) -> Option<Reason> {
    // SAFETY: only that there is an entry matters.
    if unsafe { IKE_SPIS.get(ike.ours) }.is_some() {
        return None;
    }
    // SAFETY: as above.
    let is_peer = unsafe { IKE_PEERS.get(outline.source) }.is_some();
    let most = if is_peer {
        settings.ike_per_peer
    } else {
        settings.ike_per_source
    };
    let now = seconds();
    let bucket = source_bucket(&outline.source, settings.seed);
    if !admit(IKE_SOURCES.get_ptr_mut(bucket), now, most) {
        return Some(Reason::IkeSource);
    }
    if is_peer {
        return None;
    }
    let total = IKE_TOTALS.get_ptr_mut(ike.stage as u32);
    (!admit(total, now, settings.ike_per_second)).then_some(Reason::IkeFlood)
}

/// All CPUs count on one element without a lock: some counts may be lost, so that a few more pass.
#[inline(always)]
fn admit(limiter: Option<*mut Limiter>, now: u64, per_second: u32) -> bool {
    let Some(limiter) = limiter else {
        return false;
    };
    // SAFETY: the element is there as long as the map, aligned, and any bytes are a value.
    let (admitted, next) = unsafe { limiter.read_volatile() }.admit(now, per_second);
    // SAFETY: as above.
    unsafe { limiter.write_volatile(next) };
    admitted
}

/// Seconds of CLOCK_MONOTONIC.
#[inline(always)]
pub fn seconds() -> u64 {
    // SAFETY: the helper has no preconditions.
    let nanoseconds = unsafe { bpf_ktime_get_ns() };
    nanoseconds / 1_000_000_000
}
