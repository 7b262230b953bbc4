//! Packets that wait for the SA that they asked for: few of each child, for a short time, in their order.
//!
//! While some wait, later ones line up behind them, so that a flow is not reordered when the SA comes.

use std::{
    collections::VecDeque,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

/// Packets of one child that wait at most.
const MOST_PACKETS: usize = 16;
/// Bytes of one child that wait at most.
const MOST_BYTES: usize = 64 * 1024;
/// Seconds that a packet waits: who sent it has given up or repeated it by then.
const PATIENCE: u64 = 10;
/// Rounds of sending what came meanwhile; a sender that is faster than we are is let past then.
const ROUNDS: usize = 64;

/// What became of a packet that was to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It waits.
    Waits,
    /// There is an SA, and nobody to wait for.
    Now,
    /// There is no SA, and no room.
    Full,
}

/// The packets of one child that wait.
#[derive(Debug, Default)]
pub struct Waiting {
    /// Whether there are any, for those who must not take a lock.
    any: AtomicBool,
    line: Mutex<Line>,
}

#[derive(Debug, Default)]
struct Line {
    packets: VecDeque<Packet>,
    bytes: usize,
}

#[derive(Debug)]
struct Packet {
    bytes: Vec<u8>,
    /// Second in which it came.
    since: u64,
}

impl Waiting {
    /// Whether packets wait.
    pub fn any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// Lines a packet up if it has to wait. `has_sa` is asked in such a way that an SA which is installed before
    /// [`Self::release`] is called is never missed.
    pub fn line_up(&self, packet: Vec<u8>, now: u64, has_sa: impl FnOnce() -> bool) -> Turn {
        let mut line = self.line();
        let has_sa = has_sa();
        if has_sa && !self.any() {
            return Turn::Now;
        }
        if line.packets.len() >= MOST_PACKETS || line.bytes + packet.len() > MOST_BYTES {
            // To be overtaken is better than to be lost.
            return if has_sa { Turn::Now } else { Turn::Full };
        }
        line.bytes += packet.len();
        line.packets.push_back(Packet {
            bytes: packet,
            since: now,
        });
        self.any.store(true, Ordering::Release);
        Turn::Waits
    }

    /// Sends what waits, in its order, and what lines up meanwhile. To be called after an SA was installed.
    pub fn release(&self, mut send: impl FnMut(&[u8])) {
        for round in 1.. {
            let packets = {
                let mut line = self.line();
                line.bytes = 0;
                let packets = std::mem::take(&mut line.packets);
                if packets.is_empty() || round == ROUNDS {
                    self.any.store(false, Ordering::Release);
                }
                packets
            };
            for packet in &packets {
                send(&packet.bytes);
            }
            if packets.is_empty() || round == ROUNDS {
                return;
            }
        }
    }

    /// Drops what has waited for too long, and tells how many packets those were.
    pub fn expire(&self, now: u64) -> u64 {
        if !self.any() {
            return 0;
        }
        let mut line = self.line();
        let mut expired = 0;
        while let Some(packet) = line
            .packets
            .pop_front_if(|packet| now.saturating_sub(packet.since) >= PATIENCE)
        {
            line.bytes -= packet.bytes.len();
            expired += 1;
        }
        if line.packets.is_empty() {
            self.any.store(false, Ordering::Release);
        }
        expired
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(waiting: &Waiting) -> Vec<Vec<u8>> {
        let mut sent = Vec::new();
        waiting.release(|packet| sent.push(packet.to_vec()));
        sent
    }

    #[test]
    fn packets_wait_in_their_order_and_later_ones_behind_them() {
        let waiting = Waiting::default();
        assert_eq!(waiting.line_up(vec![0], 1, || true), Turn::Now);
        assert!(!waiting.any());
        assert_eq!(waiting.line_up(vec![1], 1, || false), Turn::Waits);
        assert_eq!(waiting.line_up(vec![2], 1, || false), Turn::Waits);
        assert_eq!(waiting.line_up(vec![3], 1, || true), Turn::Waits);
        let mut order = Vec::new();
        waiting.release(|packet| {
            order.push(packet[0]);
            if packet[0] == 1 {
                assert_eq!(waiting.line_up(vec![4], 1, || true), Turn::Waits);
            }
        });
        assert_eq!(order, [1, 2, 3, 4]);
        assert_eq!(waiting.line_up(vec![5], 1, || true), Turn::Now);
    }

    #[test]
    fn few_packets_and_few_bytes_wait() {
        let waiting = Waiting::default();
        for number in 0..MOST_PACKETS {
            let packet = vec![u8::try_from(number).unwrap()];
            assert_eq!(waiting.line_up(packet, 1, || false), Turn::Waits);
        }
        assert_eq!(waiting.line_up(vec![99], 1, || false), Turn::Full);
        assert_eq!(waiting.line_up(vec![99], 1, || true), Turn::Now);
        assert_eq!(sent(&waiting).len(), MOST_PACKETS);
        assert_eq!(
            waiting.line_up(vec![0; MOST_BYTES], 1, || false),
            Turn::Waits
        );
        assert_eq!(waiting.line_up(vec![1], 1, || false), Turn::Full);
    }

    #[test]
    fn nobody_waits_for_ever() {
        let waiting = Waiting::default();
        waiting.line_up(vec![1], 1, || false);
        waiting.line_up(vec![2], 5, || false);
        assert_eq!(waiting.expire(10), 0);
        assert_eq!(waiting.expire(11), 1);
        assert!(waiting.any());
        assert_eq!(waiting.expire(99), 1);
        assert!(!waiting.any());
        assert!(sent(&waiting).is_empty());
    }
}
