//! The kernel's FIB is the policy: where would it send this packet?

use core::mem;

use aya_ebpf::{
    bindings::{
        BPF_FIB_LKUP_RET_BLACKHOLE, BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH,
        BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as Parameters,
    },
    helpers::generated::bpf_fib_lookup,
};
use ipsec_common::classify::Outline;

use crate::packet::Packet;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

pub enum Egress {
    /// Index of the interface that the packet would leave by.
    Device(u32),
    /// The packet is longer than the MTU of its route.
    TooLong,
    /// Its route leads nowhere on purpose, as a tunnel's backstop does.
    Blocked,
    /// It is for this host, has no route, or may not be forwarded.
    None,
}

/// Which way is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// To the packet's destination.
    There,
    /// To its source.
    Back,
}

/// Asks the FIB, policy rules included, as if the packet, or an answer to it, had come in on `ingress`.
///
/// Not inlined: it is asked twice, and the verifier looks at it once.
#[inline(never)]
pub fn egress(packet: &Packet, outline: &Outline, ingress: u32, way: Way) -> Egress {
    // SAFETY: all fields are integers, for which zero is a value.
    let mut parameters: Parameters = unsafe { mem::zeroed() };
    let ports = outline.ports(packet);
    let ends = (&outline.source, &outline.destination);
    let ((source_port, destination_port), (source, destination)) = match way {
        Way::There => (ports, ends),
        Way::Back => ((ports.1, ports.0), (ends.1, ends.0)),
    };
    parameters.l4_protocol = outline.protocol;
    parameters.sport = u16::from_ne_bytes(source_port);
    parameters.dport = u16::from_ne_bytes(destination_port);
    parameters.__bindgen_anon_1.tot_len = outline.bytes;
    parameters.ifindex = ingress;
    if outline.is_v6 {
        parameters.family = AF_INET6;
        // The kernel wants the flow information without the version.
        let [version, rest @ ..] = outline.flow;
        parameters.__bindgen_anon_2.flowinfo =
            u32::from_ne_bytes([version & 0xf, rest[0], rest[1], rest[2]]);
        parameters.__bindgen_anon_3.ipv6_src = words(source);
        parameters.__bindgen_anon_4.ipv6_dst = words(destination);
    } else {
        parameters.family = AF_INET;
        parameters.__bindgen_anon_2.tos = outline.tos;
        parameters.__bindgen_anon_3.ipv4_src = words(source)[3];
        parameters.__bindgen_anon_4.ipv4_dst = words(destination)[3];
    }
    // BPF_FIB_LOOKUP_SKIP_NEIGH would spare the kernel a look at the neighbours, but came with Linux 6.3; without it
    // a TUN device answers NO_NEIGH, with the interface index filled in since Linux 5.12 (net/core/filter.c).
    // SAFETY: the context is valid and the parameters are on the stack, of the size that is told.
    let answer = unsafe {
        bpf_fib_lookup(
            packet.context(),
            &mut parameters,
            mem::size_of::<Parameters>() as i32,
            0,
        )
    };
    match u32::try_from(answer) {
        Ok(BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH) => {
            Egress::Device(parameters.ifindex)
        }
        Ok(BPF_FIB_LKUP_RET_FRAG_NEEDED) => Egress::TooLong,
        Ok(BPF_FIB_LKUP_RET_BLACKHOLE) => Egress::Blocked,
        _ => Egress::None,
    }
}

#[inline(always)]
fn words(address: &[u8; 16]) -> [u32; 4] {
    let word = |at: usize| {
        u32::from_ne_bytes([
            address[at],
            address[at + 1],
            address[at + 2],
            address[at + 3],
        ])
    };
    [word(0), word(4), word(8), word(12)]
}
