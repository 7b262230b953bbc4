//! The maps, by the names that userspace finds them under. Layouts and meanings are in `ipsec_common::maps`.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray, XskMap},
};
use ipsec_common::{
    REASONS, Reason, SaWords,
    classify::ike::{IkeSpi, STAGES},
    maps::{
        ADDRESS_SLOTS, Header, IKE_PEER_SLOTS, IKE_SOURCE_BUCKETS, IKE_SPI_SLOTS, InboundEntry,
        InboundKey, LINK_SLOTS, Limiter, LinkEntry, MappedAddress, SA_SLOTS, SOCKET_SLOTS,
        Settings, TUNNEL_SLOTS, TunnelEntry, VlanKey,
    },
};

#[map]
pub static HEADER: Array<Header> = Array::pinned(1, 0);
#[map]
pub static SETTINGS: Array<Settings> = Array::pinned(1, 0);
#[map]
pub static SA_WORDS: Array<SaWords> = Array::pinned(SA_SLOTS, BPF_F_MMAPABLE);
#[map]
pub static INBOUND: HashMap<InboundKey, InboundEntry> =
    HashMap::pinned(SA_SLOTS, BPF_F_NO_PREALLOC);
#[map]
pub static TUNNELS: HashMap<u32, TunnelEntry> = HashMap::pinned(TUNNEL_SLOTS, BPF_F_NO_PREALLOC);
#[map]
pub static ADDRESSES: HashMap<MappedAddress, u32> =
    HashMap::pinned(ADDRESS_SLOTS, BPF_F_NO_PREALLOC);
#[map]
pub static LINKS: HashMap<u32, LinkEntry> = HashMap::pinned(LINK_SLOTS, BPF_F_NO_PREALLOC);
#[map]
pub static VLANS: HashMap<VlanKey, u32> = HashMap::pinned(LINK_SLOTS, BPF_F_NO_PREALLOC);
#[map]
pub static SOCKETS: XskMap = XskMap::pinned(SOCKET_SLOTS, 0);
#[map]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::pinned(REASONS, 0);
#[map]
pub static LIMITER: PerCpuArray<Limiter> = PerCpuArray::pinned(1, 0);
/// Addresses of peers that are configured or were up.
#[map]
pub static IKE_PEERS: LruHashMap<MappedAddress, u32> = LruHashMap::pinned(IKE_PEER_SLOTS, 0);
/// SPIs of ours that the daemon has sent.
#[map]
pub static IKE_SPIS: LruHashMap<IkeSpi, u32> = LruHashMap::pinned(IKE_SPI_SLOTS, 0);
#[map]
pub static IKE_SOURCES: Array<Limiter> = Array::pinned(IKE_SOURCE_BUCKETS, 0);
#[map]
pub static IKE_TOTALS: Array<Limiter> = Array::pinned(STAGES, 0);

/// Counts one packet.
#[inline(always)]
pub fn count(reason: Reason) {
    if let Some(counter) = COUNTERS.get_ptr_mut(reason as u32) {
        // SAFETY: the element is this CPU's own, and an XDP program is not interrupted by another on its CPU.
        unsafe { *counter += 1 };
    }
}
