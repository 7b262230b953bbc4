//! AF_XDP: packets between a NIC's queues and a worker's memory, without a copy of ours and without the kernel's stack.
//!
//! A worker owns one UMEM ([`umem`]) and, on every interface, one socket ([`socket`]) with its four rings ([`ring`]);
//! all sockets of a worker share the UMEM, so a packet leaves on another NIC in the frame it arrived in. What is done
//! to a packet between is not this layer's concern.

pub mod forward;
pub mod mapping;
pub mod ring;
pub mod socket;
pub mod umem;
pub mod worker;

#[cfg(test)]
mod tests;
