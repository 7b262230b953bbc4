//! The loop against a model of the kernel on rings in plain memory.

use std::{collections::VecDeque, sync::Arc};

use proptest::prelude::*;

use super::*;
use crate::dataplane::xdp::af_xdp::{
    mapping::Mapping,
    ring::{Consumer, Item, Layout, Producer},
};

const LAYOUT: Layout = Layout {
    producer: 0,
    consumer: 64,
    flags: 128,
    slots: 192,
};

fn ends<T: Item>(size: u32) -> (Producer<T>, Consumer<T>) {
    let mapping = Arc::new(Mapping::anonymous(8192).unwrap());
    (
        Producer::new(Arc::clone(&mapping), LAYOUT, size).unwrap(),
        Consumer::new(mapping, LAYOUT, size).unwrap(),
    )
}

/// The kernel's ends of one socket's rings.
struct Kernel {
    rx: Producer<Descriptor>,
    tx: Consumer<Descriptor>,
    fill: Consumer<u64>,
    completion: Producer<u64>,
    /// Packets taken from the TX ring and not completed yet.
    in_flight: VecDeque<u64>,
}

fn socket(slots: u32) -> (Socket, Kernel) {
    let ((fill_us, fill_it), (rx_it, rx_us)) = (ends(slots), ends(slots));
    let ((tx_us, tx_it), (completion_it, completion_us)) = (ends(slots), ends(slots));
    let socket = Socket::of_rings(rx_us, tx_us, fill_us, completion_us);
    let kernel = Kernel {
        rx: rx_it,
        tx: tx_it,
        fill: fill_it,
        completion: completion_it,
        in_flight: VecDeque::new(),
    };
    (socket, kernel)
}

impl Kernel {
    /// A packet arrives, if there are a frame and a place for it.
    fn receive(&mut self, length: u32) {
        if self.rx.free(1) == 0 {
            return;
        }
        if let Some(frame) = self.fill.pop() {
            self.fill.release();
            assert!(self.rx.push(Descriptor {
                address: frame + HEADROOM as u64,
                length,
                options: 0,
            }));
            self.rx.publish();
        }
    }

    fn take(&mut self) {
        if let Some(packet) = self.tx.pop() {
            self.tx.release();
            self.in_flight.push_back(packet.address);
        }
    }

    fn complete(&mut self) {
        if self.completion.free(1) > 0
            && let Some(address) = self.in_flight.pop_front()
        {
            assert!(self.completion.push(address));
            self.completion.publish();
        }
    }
}

/// Follows a script of verdicts.
struct Script {
    verdicts: VecDeque<(usize, usize)>,
    failed: u32,
    announced: u32,
    prepared: u32,
    handled: u32,
}

impl Script {
    fn new(verdicts: impl IntoIterator<Item = (usize, usize)>) -> Self {
        Self {
            verdicts: verdicts.into_iter().collect(),
            failed: 0,
            announced: 0,
            prepared: 0,
            handled: 0,
        }
    }
}

impl Handler for Script {
    fn begin(&mut self) {}

    fn announce(&mut self, _: &[u8], _: &Range<usize>) {
        self.announced += 1;
    }

    fn prepare(&mut self, _: &[u8], _: &Range<usize>) {
        self.prepared += 1;
        assert!(self.prepared <= self.announced);
    }

    fn handle(&mut self, _: usize, _: &mut [u8], packet: Range<usize>) -> Verdict {
        self.handled += 1;
        assert!(self.handled <= self.prepared);
        match self.verdicts.pop_front() {
            Some((socket, grow)) if socket < 3 => {
                Verdict::Send(socket, packet.start - 50..packet.end + grow)
            }
            _ => Verdict::Done,
        }
    }

    fn send_failed(&mut self) {
        self.failed += 1;
    }
}

#[derive(Clone, Debug)]
enum Step {
    Receive(usize, u32),
    Take(usize),
    Complete(usize),
    Batch,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..2_usize, 1..5000_u32).prop_map(|(socket, length)| Step::Receive(socket, length)),
        2 => (0..2_usize).prop_map(Step::Take),
        2 => (0..2_usize).prop_map(Step::Complete),
        2 => Just(Step::Batch),
    ]
}

proptest! {
    #[test]
    fn every_frame_is_accounted_for_whatever_happens(
        steps in prop::collection::vec(step(), 1..500),
        verdicts in prop::collection::vec((0..5_usize, 0..4000_usize), 0..300),
        frames in 4..40_u32,
    ) {
        let (sockets, mut kernels): (Vec<_>, Vec<_>) = (0..2).map(|_| socket(8)).unzip();
        let mut forwarder = Forwarder::new(Umem::new(frames).unwrap(), sockets);
        let mut script = Script::new(verdicts);
        for step in steps {
            match step {
                Step::Receive(socket, length) => kernels[socket].receive(length),
                Step::Take(socket) => kernels[socket].take(),
                Step::Complete(socket) => kernels[socket].complete(),
                Step::Batch => { forwarder.batch(&mut script); }
            }
            prop_assert_eq!(script.handled, script.prepared);
            let umem = &forwarder.umem;
            prop_assert_eq!(umem.free_frames() + umem.lent_frames(), frames as usize);
        }
        // Once the kernel has sent everything, only the fill rings hold frames.
        for _ in 0..100 {
            for kernel in &mut kernels {
                kernel.take();
                kernel.complete();
            }
            forwarder.batch(&mut script);
        }
        let umem = &forwarder.umem;
        prop_assert_eq!(umem.lent_frames(), (frames as usize).min(16));
        prop_assert_eq!(umem.free_frames() + umem.lent_frames(), frames as usize);
    }
}

#[test]
fn a_full_ring_is_reported_and_its_frames_return() {
    let (socket, mut kernel) = socket(8);
    let mut forwarder = Forwarder::new(Umem::new(64).unwrap(), vec![socket]);
    let mut script = Script::new(std::iter::repeat_n((0, 0), 100));
    for _ in 0..3 {
        for _ in 0..8 {
            kernel.receive(100);
        }
        forwarder.batch(&mut script);
    }
    assert_eq!(script.failed, 16);
    assert!(forwarder.sending());
}
