//! A name server for a namespace, which knows what a test tells it.
//!
//! It answers at the address that this machine's resolver asks, and at 127.0.0.1 for programs that see no resolv.conf.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Context;

use crate::netns::Netns;

const HEADER: usize = 12;
/// Type A of class IN.
const A_IN: [u8; 4] = [0, 1, 0, 1];

/// A running name server; ends on drop.
#[derive(Debug)]
pub struct NameServer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl NameServer {
    /// Starts it. Every name stands for the same address.
    ///
    /// # Errors
    ///
    /// The addresses or the port cannot be had.
    pub fn start(netns: &Netns, address: Ipv4Addr) -> anyhow::Result<Self> {
        netns.ip("link set lo up")?;
        for server in resolvers() {
            netns.ip(&format!("addr replace {server}/32 dev lo"))?;
        }
        let socket = netns
            .run(|| Ok(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 53))?))
            .context("port 53")?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name("names".to_owned())
            .spawn(move || {
                let mut query = [0; 512];
                while !stopped.load(Relaxed) {
                    let Ok((length, from)) = socket.recv_from(&mut query) else {
                        continue;
                    };
                    if let Some(answer) = answer(&query[..length], address) {
                        let _ = socket.send_to(&answer, from);
                    }
                }
            })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The IPv4 addresses at which this machine asks for names.
fn resolvers() -> Vec<Ipv4Addr> {
    let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let words = text.lines().filter_map(|line| {
        let address = line.strip_prefix("nameserver")?.trim();
        match address.parse() {
            Ok(IpAddr::V4(address)) if !address.is_loopback() => Some(address),
            _ => None,
        }
    });
    words.collect()
}

/// The answer to a query: the address if one of its family is asked for, else none.
fn answer(query: &[u8], address: Ipv4Addr) -> Option<Vec<u8>> {
    let question = query.get(HEADER..)?;
    let name = question.iter().position(|byte| *byte == 0)? + 1;
    let asked = question.get(name..name + A_IN.len())?;
    let found = u8::from(asked == A_IN);
    let mut answer = query.get(..2)?.to_vec();
    // A response without error, one question, so many answers.
    answer.extend([0x81, 0x80, 0, 1, 0, found, 0, 0, 0, 0]);
    answer.extend(question.get(..name + A_IN.len())?);
    if found == 1 {
        // The name of the question, for a minute, four bytes.
        answer.extend([0xc0, 0x0c]);
        answer.extend(A_IN);
        answer.extend([0, 0, 0, 60, 0, 4]);
        answer.extend(address.octets());
    }
    Some(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_given_to_who_asks_for_one_of_its_family() {
        let query = |kind| {
            let mut query = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, b'a', 0];
            query.extend([0, kind, 0, 1]);
            query
        };
        let address = Ipv4Addr::new(192, 0, 2, 7);
        let yes = answer(&query(1), address).unwrap();
        assert_eq!(yes[..2], [0xab, 0xcd]);
        assert_eq!(yes[7], 1);
        assert!(yes.ends_with(&[0, 4, 192, 0, 2, 7]));
        let no = answer(&query(28), address).unwrap();
        assert_eq!((no[7], no.len()), (0, 19));
        assert_eq!(answer(&[0; 5], address), None);
    }
}
