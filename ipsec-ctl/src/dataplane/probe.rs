//! What this machine has for carrying tunnels fast: found out by trying, before there is a gateway.

use std::{fs, io};

use serde::{Deserialize, Serialize};

use super::{
    kernel::{
        algorithms::{all_suites, name},
        capabilities::{Capabilities, Incapable},
    },
    seam::OffloadReason,
    xdp::{
        offload::unsuitable,
        program::{self, Program},
    },
};
use crate::net::{netlink::Netlink, queues::receive_queues, socket, xfrm::Xfrm};

/// Something that was looked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What it is.
    pub what: String,
    /// Whether it is there.
    pub there: bool,
    /// What was found, or the kernel's words for its absence.
    pub found: String,
    /// What its absence costs, and how to get it.
    pub remedy: Option<String>,
}

impl Finding {
    fn new(what: &str, result: Result<String, String>, remedy: &str) -> Self {
        let there = result.is_ok();
        Self {
            what: what.to_owned(),
            there,
            found: result.unwrap_or_else(|reason| reason),
            remedy: (!there).then(|| remedy.to_owned()),
        }
    }
}

/// Looks at everything, in the network namespace that the caller is in. Nothing that it makes stays, but the BPF file system,
/// which it mounts where nobody has.
///
/// # Errors
///
/// Those of netlink sockets.
pub async fn findings() -> io::Result<Vec<Finding>> {
    let netlink = Netlink::open()?;
    let mut findings = vec![xdp_program(), af_xdp()];
    findings.extend(interfaces(&netlink).await);
    findings.extend(kernel(&netlink).await);
    findings.push(processor());
    Ok(findings)
}

fn xdp_program() -> Finding {
    // Its pins are its own, so a gateway that runs is not touched.
    let instance = format!("probe-{}", std::process::id());
    let loaded = Program::load(&instance).map(drop);
    let _ = program::release(&instance);
    Finding::new(
        "XDP program",
        loaded
            .map(|()| "loads".to_owned())
            .map_err(|error| error.to_string()),
        "without it there is no fast path: Linux 5.16 or later with CONFIG_BPF_SYSCALL, root, and a binary made by `cargo xtask build`",
    )
}

fn af_xdp() -> Finding {
    Finding::new(
        "AF_XDP",
        socket::has_af_xdp()
            .map(|()| {
                "there; whether packets are copied, `status` tells of a gateway that runs"
                    .to_owned()
            })
            .map_err(|error| error.to_string()),
        "without it there is no fast path: a kernel with CONFIG_XDP_SOCKETS",
    )
}

/// One line for each interface that is up.
async fn interfaces(netlink: &Netlink) -> Vec<Finding> {
    let links = netlink.links().await.unwrap_or_default();
    links
        .iter()
        .filter(|link| link.up && !link.loopback)
        .map(|link| {
            let queues = receive_queues(&link.name).unwrap_or(1);
            let suits = match unsuitable(link) {
                None => Ok(format!(
                    "suits the fast path, MTU {}, {queues} receive queue(s)",
                    link.mtu
                )),
                Some(reason) => Err(reason.name().to_owned()),
            };
            let remedy = if unsuitable(link) == Some(OffloadReason::MtuTooLarge) {
                "its packets take the slow path: set its MTU so that a packet fits one AF_XDP frame"
            } else {
                "its packets take the slow path: use the interfaces below it, or engine = \"kernel\""
            };
            Finding::new(&format!("interface {}", link.name), suits, remedy)
        })
        .collect()
}

async fn kernel(netlink: &Netlink) -> Vec<Finding> {
    let asked = match Xfrm::open() {
        Ok(xfrm) => Capabilities::ask(&xfrm, netlink).await,
        Err(error) => Err(Incapable::Xfrm(error.to_string())),
    };
    let remedy = "engine = \"kernel\" cannot be used: a kernel with CONFIG_XFRM_USER, CONFIG_INET_ESP and CONFIG_INET6_ESP";
    let capabilities = match asked {
        Ok(capabilities) => capabilities,
        Err(error) => return vec![Finding::new("kernel ESP", Err(error.to_string()), remedy)],
    };
    let there = Finding::new("kernel ESP", Ok("there".to_owned()), remedy);
    let interfaces = Finding::new(
        "xfrm interfaces",
        capabilities.interfaces.map(|()| "there".to_owned()),
        "engine = \"kernel\" carries tunnels by policies of the whole host alone, and engine = \"auto\" by the slow path: no device, no routes \
         of ours, no 0.0.0.0/0 on both sides, no move to the other engine while a tunnel is up. A kernel with CONFIG_XFRM_INTERFACE (Linux 4.19) has them",
    );
    let suites = all_suites().map(|suite| {
        let lacking = capabilities.lacking.iter().find(|(one, _)| *one == suite);
        let result = match lacking {
            None => Ok("there".to_owned()),
            Some((_, reason)) => Err(reason.clone()),
        };
        Finding::new(
            &format!("kernel ESP with {}", name(suite)),
            result,
            "a tunnel that negotiates it cannot be the kernel's: load or build the kernel's module for it",
        )
    });
    [there, interfaces].into_iter().chain(suites).collect()
}

/// What makes AES-GCM fast.
fn processor() -> Finding {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags: Vec<&str> = text
        .lines()
        .find(|line| line.starts_with("flags") || line.starts_with("Features"))
        .map(|line| line.split_whitespace().collect())
        .unwrap_or_default();
    let found: Vec<&str> = [
        "aes",
        "pclmulqdq",
        "pmull",
        "avx2",
        "vaes",
        "vpclmulqdq",
        "avx512f",
    ]
    .into_iter()
    .filter(|flag| flags.contains(flag))
    .collect();
    let result = if found.contains(&"aes") {
        Ok(found.join(" "))
    } else {
        Err(format!("no AES instructions ({})", found.join(" ")))
    };
    Finding::new(
        "processor",
        result,
        "AES is several times slower than ChaCha20-Poly1305: put esp = [\"chacha20poly1305\"] first",
    )
}
