//! The words that all users of one SA share: workers, slow path, the XDP program and the next process after a crash.
//!
//! An element of a memory-mapped BPF array, or of anonymous memory where there is no BPF. Only layout and meaning stand
//! here; the replay window's algorithm is in [`crate::replay`], and who maps the memory is userspace's concern.

use core::sync::atomic::AtomicU64;

/// Words of a replay window: 48 packets and a tag each, so that there is room for more than 4096 packets.
pub const REPLAY_WORDS: usize = 128;

/// Shared words of one SA. All zero is an SA that has carried nothing and has no limits set yet.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct SaWords {
    /// Outbound: the last sequence number given out. Inbound: the highest one authenticated.
    pub sequence: AtomicU64,
    /// Packets that AF_XDP workers carried.
    pub fast_packets: AtomicU64,
    /// Bytes of inner packets that AF_XDP workers carried, headers included.
    pub fast_bytes: AtomicU64,
    /// Packets that the slow path carried.
    pub slow_packets: AtomicU64,
    /// Bytes of inner packets that the slow path carried, headers included.
    pub slow_bytes: AtomicU64,
    /// Packets refused as replayed or too old.
    pub replayed: AtomicU64,
    /// Packets whose ICV was wrong.
    pub forged: AtomicU64,
    /// Hard limit in packets, both paths together; `u64::MAX` is none.
    pub hard_packets: AtomicU64,
    /// Hard limit in bytes of inner packets, both paths together; `u64::MAX` is none.
    pub hard_bytes: AtomicU64,
    /// Seconds of CLOCK_MONOTONIC when the SA last carried a packet, for liveness checks.
    pub last_used: AtomicU64,
    /// Which SA counts here, as a digest of its keys: who comes after a crash goes on with no other. Zero is none.
    pub tag: [AtomicU64; 2],
    /// In the first element only: second of CLOCK_MONOTONIC when the array was made.
    pub array_since: AtomicU64,
    reserved: [AtomicU64; 3],
    /// The replay window of an inbound SA.
    pub replay: [AtomicU64; REPLAY_WORDS],
}

impl SaWords {
    /// Whether the SA has carried all that its hard limits allow; a limit of 0 is not set yet.
    ///
    /// `load` reads a word: LLVM knows no atomic loads for the BPF target, where an aligned load is one anyway.
    #[inline(always)]
    pub fn is_past_hard_limit(&self, load: impl Fn(&AtomicU64) -> u64) -> bool {
        let packets = load(&self.fast_packets).wrapping_add(load(&self.slow_packets));
        let bytes = load(&self.fast_bytes).wrapping_add(load(&self.slow_bytes));
        let past = |carried: u64, limit: u64| limit != 0 && carried >= limit;
        past(packets, load(&self.hard_packets)) || past(bytes, load(&self.hard_bytes))
    }
}

#[cfg(not(target_arch = "bpf"))]
impl Default for SaWords {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            sequence: zero(),
            fast_packets: zero(),
            fast_bytes: zero(),
            slow_packets: zero(),
            slow_bytes: zero(),
            replayed: zero(),
            forged: zero(),
            hard_packets: zero(),
            hard_bytes: zero(),
            last_used: zero(),
            tag: [const { AtomicU64::new(0) }; 2],
            array_since: zero(),
            reserved: [const { AtomicU64::new(0) }; 3],
            replay: [const { AtomicU64::new(0) }; REPLAY_WORDS],
        }
    }
}

const _: () = assert!(
    size_of::<SaWords>() == 1152,
    "pins of this ABI hold elements of 1152 bytes"
);
