//! A socket filter that spares a raw socket the ESP of SAs that others open: the kernel copies every ESP packet to it.

use socket2::SockFilter;

/// Longest program that the kernel takes (`BPF_MAXINSNS` of linux/bpf_common.h).
const LONGEST: usize = 4096;

// Classes, sizes and modes of linux/filter.h, put together.
const LOAD_WORD: u16 = 0x20;
const LOAD_WORD_BEHIND_X: u16 = 0x40;
const LOAD_X_WITH_HEADER_LENGTH: u16 = 0xb1;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
/// As much of a packet as there is.
const ALL: u32 = u32::MAX;

/// The program that drops packets with these SPIs; one that drops none if there are too many for a program. Packets of
/// IPv4 begin with their IP header, those of IPv6 with the ESP header.
pub(super) fn without(v6: bool, spis: &[u32]) -> Vec<SockFilter> {
    let mut program = if v6 {
        vec![step(LOAD_WORD, 0, 0)]
    } else {
        vec![
            step(LOAD_X_WITH_HEADER_LENGTH, 0, 0),
            step(LOAD_WORD_BEHIND_X, 0, 0),
        ]
    };
    if program.len() + 2 * spis.len() < LONGEST {
        for &spi in spis {
            // A jump reaches 255 steps at most, so each SPI has an end of its own.
            program.extend([step(JUMP_IF_EQUAL, spi, 1), step(RETURN, 0, 0)]);
        }
    }
    program.push(step(RETURN, ALL, 0));
    program
}

/// One step; if it compares, so many are left out where the two differ.
fn step(code: u16, k: u32, otherwise: u8) -> SockFilter {
    SockFilter::new(code, 0, otherwise, k)
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        net::{IpAddr, SocketAddr},
        time::Duration,
    };

    use socket2::{Domain, Protocol, Socket, Type};

    use super::*;
    use crate::net::{netlink::Netlink, tests::in_namespace};

    #[test]
    fn a_program_is_never_longer_than_the_kernel_takes() {
        let spis: Vec<u32> = (1..5000).collect();
        for v6 in [false, true] {
            assert!(without(v6, &spis).len() < 4);
            assert_eq!(
                without(v6, &spis[..2000]).len(),
                4001 + usize::from(!v6) + 1
            );
        }
    }

    #[test]
    fn only_the_esp_of_these_spis_is_kept_from_a_raw_socket() {
        in_namespace(async || {
            const LOOPBACK: u32 = 1;
            Netlink::open().unwrap().set_up(LOOPBACK).await.unwrap();
            for address in ["127.0.0.1", "::1"].map(|text| text.parse::<IpAddr>().unwrap()) {
                let v6 = address.is_ipv6();
                let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
                let socket = || Socket::new(domain, Type::RAW, Some(Protocol::from(50))).unwrap();
                let (sender, mut receiver) = (socket(), socket());
                receiver
                    .set_read_timeout(Some(Duration::from_secs(60)))
                    .unwrap();
                receiver
                    .attach_filter(&without(v6, &[7, 0xc0ff_ee01]))
                    .unwrap();
                let to = SocketAddr::new(address, 0).into();
                for spi in [7_u32, 0xc0ff_ee01, 8] {
                    let packet = [spi.to_be_bytes(), 1_u32.to_be_bytes()].concat();
                    sender.send_to(&packet, &to).unwrap();
                }
                let mut buffer = [0; 64];
                let length = receiver.read(&mut buffer).unwrap();
                assert_eq!(buffer[length - 5], 8, "{address}");
            }
        });
    }
}
