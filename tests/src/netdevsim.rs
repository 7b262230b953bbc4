//! Simulated network cards (`netdevsim`), which have IPsec offload without having any hardware.
//!
//! What such a card is to encrypt it sends as it is: traffic over it proves who was asked to do the work, not that the work was done.

use std::{
    fs::{self, File},
    os::fd::AsRawFd,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::Context;

use crate::netns::Netns;

const BUS: &str = "/sys/bus/netdevsim";
const FACTS: &str = "/sys/kernel/debug/netdevsim";

/// Two cards with a cable between them; removed when dropped.
#[derive(Debug)]
pub struct Cards {
    numbers: [u32; 2],
}

/// Whether this kernel has such cards.
pub fn is_there() -> bool {
    fs::exists(BUS).unwrap_or(false)
}

impl Cards {
    /// Makes them under these names in these namespaces, and sets them up.
    ///
    /// # Errors
    ///
    /// The kernel lacks them, or cables between them (Linux 6.9).
    pub fn cable(left: (&Netns, &str), right: (&Netns, &str)) -> anyhow::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let cards = Self {
            numbers: [(); 2].map(|()| NEXT.fetch_add(1, Ordering::Relaxed)),
        };
        let mut ends: Vec<(File, String)> = Vec::new();
        for (number, (netns, name)) in cards.numbers.iter().zip([left, right]) {
            tell("new_device", &format!("{number} 1"))?;
            let folder = format!("{BUS}/devices/netdevsim{number}/net");
            let entry = fs::read_dir(&folder)?
                .next()
                .context("a card without an interface")??;
            let made = entry.file_name().into_string().map_err(|name| {
                anyhow::anyhow!("an interface with a strange name: {}", name.display())
            })?;
            crate::command::line(&format!(
                "ip link set {made} netns {} name {name}",
                netns.name()
            ))?;
            let index = netns.ip(&format!("-o link show {name}"))?;
            let (index, _) = index
                .split_once(':')
                .context("an interface without an index")?;
            ends.push((netns.open()?, index.trim().to_owned()));
        }
        let words: Vec<String> = ends
            .iter()
            .map(|(file, index)| format!("{}:{index}", file.as_raw_fd()))
            .collect();
        tell("link_device", &words.join(" "))?;
        for (netns, name) in [left, right] {
            netns.ip(&format!("link set {name} up"))?;
        }
        Ok(cards)
    }

    /// How many SAs the left card has, and how many packets it was to encrypt.
    ///
    /// # Errors
    ///
    /// The kernel does not tell (debugfs).
    pub fn ipsec(&self) -> anyhow::Result<(u64, u64)> {
        let path = format!("{FACTS}/netdevsim{}/ports/0/ipsec", self.numbers[0]);
        let text = fs::read_to_string(&path).context(path)?;
        let value = |name: &str| {
            let (_, rest) = text.split_once(name)?;
            rest.split_whitespace().next()?.parse().ok()
        };
        Ok((
            value("count=").context("no number of SAs")?,
            value("tx=").context("no number of packets")?,
        ))
    }
}

impl Drop for Cards {
    fn drop(&mut self) {
        for number in self.numbers {
            if let Err(error) = tell("del_device", &number.to_string()) {
                eprintln!("{error:#}");
            }
        }
    }
}

fn tell(file: &str, words: &str) -> anyhow::Result<()> {
    fs::write(format!("{BUS}/{file}"), words).with_context(|| format!("{file}: {words}"))
}
