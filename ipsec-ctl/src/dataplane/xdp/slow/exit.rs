//! The slow path as the way out for what AF_XDP workers cannot send themselves.

use std::{ops::Range, sync::Arc};

use ipsec_common::Reason;

use super::SlowPath;
use crate::dataplane::xdp::{
    gateway::SlowExit,
    inner::{Inner, decrement_ttl},
    outbound::Sealed,
    table::Tunnel,
};

impl SlowExit for Arc<SlowPath> {
    fn deliver(&self, tunnel: &Tunnel, packet: &[u8]) {
        if self.devices.write(tunnel.id, packet).is_err() {
            self.counters.count(Reason::SendFailed);
        }
    }

    fn send(&self, frame: &[u8], sealed: &Sealed) {
        SlowPath::send(self, frame, sealed);
    }

    fn too_long(&self, tunnel: &Tunnel, frame: &mut [u8], inner: Range<usize>, now: u64) {
        let Some(device) = self.devices.get(tunnel.id) else {
            return self.counters.count(Reason::NoSa);
        };
        // What comes out of a TUN device the kernel has routed; this packet it has not.
        let routed = frame.get_mut(inner.clone()).is_some_and(|packet| {
            Inner::parse(packet).is_ok_and(|parsed| decrement_ttl(packet, &parsed))
        });
        if routed {
            self.seal(&device, frame, inner, now);
        } else {
            self.counters.count(Reason::TtlExpired);
        }
    }
}
