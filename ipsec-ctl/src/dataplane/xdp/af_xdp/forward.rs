//! The batch loop of a worker: packets from the RX rings through a [`Handler`] into the TX rings.
//!
//! Moves frames, never looks into them. Every frame is at any time either free, lent to the kernel, or in the hands of
//! this loop for the length of one packet: none is lost, whatever the handler or a full ring says.

use std::{collections::VecDeque, io, mem, ops::Range};

use super::{
    super::prefetch::fetch_bytes,
    ring::Descriptor,
    socket::{QueueId, RING_SLOTS, Socket, Statistics},
    umem::{Frame, HEADROOM, Umem},
};

/// Packets taken from one RX ring before the others have their turn.
pub const BATCH: u32 = 64;
/// Packets whose needs are fetched at a time: enough that the fetches overlap, few enough that what is fetched is still
/// there when it is needed.
const AHEAD: usize = 8;
/// Bytes of a packet that are fetched before anybody looks at it: its headers, and what the XDP program has noted.
const HEADERS: usize = 128;
const NOTES: usize = 64;
/// System calls after which a batch that does not want to leave waits for the next turn.
const MOST_KICKS: u32 = 64;
/// Frames per socket: a full fill ring, and a full TX ring of packets that came in elsewhere.
pub const FRAMES_PER_SOCKET: u32 = 2 * RING_SLOTS;

/// What becomes of a packet.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It leaves through the socket of this index, from this range of its frame.
    Send(usize, Range<usize>),
    /// It is done with: delivered elsewhere, or dropped and counted.
    Done,
}

/// What a worker does to packets.
pub trait Handler {
    /// Called before each batch that has packets.
    fn begin(&mut self);

    /// Called for each packet of a batch before any is handled.
    fn announce(&mut self, frame: &[u8], packet: &Range<usize>);

    /// Called some packets before that packet is handled, to have fetched into the cache what will be needed for it.
    fn prepare(&mut self, frame: &[u8], packet: &Range<usize>);

    /// Handles the packet at `packet` in `frame`, received by the socket of index `socket`.
    fn handle(&mut self, socket: usize, frame: &mut [u8], packet: Range<usize>) -> Verdict;

    /// A packet could not be sent, because the ring of its socket was full or its range is outside the frame.
    fn send_failed(&mut self);
}

/// The frames and sockets of one worker.
#[derive(Debug)]
pub struct Forwarder {
    umem: Umem,
    sockets: Vec<Socket>,
    /// Packets of this batch that are still to be handled. Empty between batches.
    taken: VecDeque<(Frame, Range<usize>)>,
}

impl Forwarder {
    /// Takes over sockets that were opened on this UMEM and provides them with frames to receive into.
    pub fn new(umem: Umem, sockets: Vec<Socket>) -> Self {
        let mut forwarder = Self {
            umem,
            sockets,
            taken: VecDeque::with_capacity(BATCH as usize),
        };
        forwarder.refill();
        forwarder
    }

    /// The sockets, in the order of their indices.
    pub fn sockets(&self) -> &[Socket] {
        &self.sockets
    }

    /// What the kernel counted for each socket.
    pub fn statistics(&self) -> impl Iterator<Item = (QueueId, io::Result<Statistics>)> {
        self.sockets
            .iter()
            .map(|socket| (socket.at(), socket.statistics()))
    }

    /// Takes what waits, at most [`BATCH`] packets of each socket, through the handler. Returns how many packets there
    /// were.
    pub fn batch(&mut self, handler: &mut impl Handler) -> u32 {
        self.reap();
        let mut packets = 0;
        for index in 0..self.sockets.len() {
            packets += self.receive(index, handler);
        }
        self.refill();
        self.send();
        packets
    }

    /// Whether packets wait for the kernel to take them.
    pub fn sending(&mut self) -> bool {
        self.sockets
            .iter_mut()
            .any(|socket| socket.tx.pending() > 0)
    }

    /// Sends a packet that no socket received, for instance a generated one. False: no frame or no room in the ring.
    pub fn inject(&mut self, socket: usize, packet: &[u8]) -> bool {
        let range = HEADROOM..HEADROOM + packet.len();
        let Some(frame) = self.umem.allocate() else {
            return false;
        };
        match self.umem.bytes(&frame).get_mut(range.clone()) {
            Some(bytes) => bytes.copy_from_slice(packet),
            None => {
                self.umem.free(frame);
                return false;
            }
        }
        self.enqueue(socket, frame, range)
    }

    fn receive(&mut self, index: usize, handler: &mut impl Handler) -> u32 {
        let packets = self.take(index, handler);
        if packets == 0 {
            return 0;
        }
        handler.begin();
        let mut taken = mem::take(&mut self.taken);
        for (frame, packet) in &taken {
            handler.announce(self.umem.bytes(frame), packet);
        }
        // Always one or two groups ahead of the packet that is handled.
        self.prepare(taken.iter().take(AHEAD), handler);
        let mut turn = 0;
        while let Some((frame, packet)) = taken.pop_front() {
            if turn % AHEAD == 0 {
                self.prepare(taken.iter().skip(AHEAD - 1).take(AHEAD), handler);
            }
            turn += 1;
            self.pass(index, frame, packet, handler);
        }
        self.taken = taken;
        packets
    }

    /// Takes the packets of a batch from an RX ring. Returns how many there were, good or not.
    fn take(&mut self, index: usize, handler: &mut impl Handler) -> u32 {
        let Some(socket) = self.sockets.get_mut(index) else {
            return 0;
        };
        let mut packets = 0;
        while packets < BATCH
            && let Some(descriptor) = socket.rx.pop()
        {
            packets += 1;
            let packet = self.umem.take_packet(descriptor.address, descriptor.length);
            let Some((frame, packet)) = packet else {
                handler.send_failed();
                continue;
            };
            let start = packet.start.saturating_sub(NOTES);
            fetch_bytes(self.umem.bytes(&frame), start, NOTES + HEADERS);
            self.taken.push_back((frame, packet));
        }
        socket.rx.release();
        packets
    }

    fn prepare<'a>(
        &mut self,
        packets: impl Iterator<Item = &'a (Frame, Range<usize>)>,
        handler: &mut impl Handler,
    ) {
        for (frame, packet) in packets {
            handler.prepare(self.umem.bytes(frame), packet);
        }
    }

    fn pass(
        &mut self,
        index: usize,
        frame: Frame,
        packet: Range<usize>,
        handler: &mut impl Handler,
    ) {
        match handler.handle(index, self.umem.bytes(&frame), packet) {
            Verdict::Done => self.umem.free(frame),
            Verdict::Send(socket, packet) => {
                if !self.enqueue(socket, frame, packet) {
                    handler.send_failed();
                }
            }
        }
    }

    /// Puts a packet into a TX ring, or frees its frame where that is not possible.
    fn enqueue(&mut self, socket: usize, frame: Frame, packet: Range<usize>) -> bool {
        let length = u32::try_from(packet.len()).unwrap_or(u32::MAX);
        let fits = length > 0 && packet.end <= self.umem.bytes(&frame).len();
        let target = self.sockets.get_mut(socket).filter(|_| fits);
        if let Some(target) = target
            && target.tx.free(1) > 0
        {
            let address = self.umem.lend(frame, packet.start);
            return target.tx.push(Descriptor {
                address,
                length,
                options: 0,
            });
        }
        self.umem.free(frame);
        false
    }

    /// Takes back the frames of packets that were sent.
    fn reap(&mut self) {
        for socket in &mut self.sockets {
            while let Some(address) = socket.completion.pop() {
                if let Some(frame) = self.umem.take_back(address) {
                    self.umem.free(frame);
                }
            }
            socket.completion.release();
        }
    }

    /// Fills the fill rings.
    fn refill(&mut self) {
        for socket in &mut self.sockets {
            while socket.fill.free(1) > 0 {
                let Some(frame) = self.umem.allocate() else {
                    break;
                };
                // Never false: there was room, and only we push.
                if !socket.fill.push(self.umem.lend(frame, 0)) {
                    break;
                }
            }
            socket.fill.publish();
            socket.kick_rx();
        }
    }

    /// Has the kernel send what is in the TX rings.
    fn send(&mut self) {
        for socket in &mut self.sockets {
            if socket.tx.pending() == 0 {
                continue;
            }
            socket.tx.publish();
            for _ in 0..MOST_KICKS {
                // An error (the interface is down) leaves the packets in the ring; once it is full, they are counted.
                if socket.kick_tx().unwrap_or(true) {
                    break;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
