//! The tools of the integration tests: network namespaces, gateways, peers, traffic, captures.
//!
//! Everything here runs on one machine, as root, and cleans up behind itself: names carry a prefix with the process
//! that made them, so that whatever a killed run left is found and removed by the next one. What a test must hold on
//! to (a namespace, a process, a capture) is a value whose drop removes it. The tests are in `suites/`.

pub mod attack;
pub mod bench;
pub mod branches;
pub mod capture;
pub mod carried;
pub mod command;
pub mod connection;
mod decode;
pub mod flood;
pub mod gateway;
pub mod hops;
pub mod impairment;
pub mod injection;
pub mod interop;
pub mod kernel_esp;
pub mod libreswan;
pub mod many;
pub mod names;
pub mod netdevsim;
pub mod netns;
pub mod pair;
pub mod ping;
pub mod release;
pub mod strongswan;
pub mod suite;
pub mod tcp;
pub mod topology;
pub mod udp;
mod watchdog;
