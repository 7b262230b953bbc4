//! The offload ledger: what carries each SA, and why not something faster.

use serde::{Deserialize, Serialize};

use super::SaId;
use crate::net::netlink::NetlinkError;

/// How one SA is carried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// The SA.
    pub sa: SaId,
    /// Fast path or not.
    pub offload: Offload,
    /// What the network card does for it, if it was asked.
    pub nic: Option<Nic>,
}

/// What a network card does for an SA of the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum Nic {
    /// It encrypts and decrypts; the rest is the kernel's.
    Crypto,
    /// It does all of ESP, and holds packets against the policies.
    Packet,
    /// Nothing: the kernel does it alone.
    Declined {
        /// Why.
        reason: NicReason,
        /// In the words of the kernel or of the card's driver; empty if there are none.
        words: String,
    },
}

/// Why a network card does nothing for an SA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NicReason {
    /// No device carries the peer: there is no route to it.
    NoDevice,
    /// The device that carries the peer has no such offload.
    Unsupported,
    /// The kernel or the card's driver refuses this SA.
    Refused,
    /// The card takes the SA, and not the policies that belong to it.
    PoliciesRefused,
}

impl NicReason {
    /// Its name in JSON, in `status` and in the docs.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoDevice => "no-device",
            Self::Unsupported => "unsupported",
            Self::Refused => "refused",
            Self::PoliciesRefused => "policies-refused",
        }
    }
}

/// Whether an SA takes the fast path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state", content = "reason")]
pub enum Offload {
    /// XDP and AF_XDP carry it.
    Full,
    /// They carry it on some interfaces only, for the reason given.
    Partial(OffloadReason),
    /// The slow path carries it, for the reason given.
    Declined(OffloadReason),
    /// The kernel's ESP carries it, for the reason given.
    Kernel(KernelReason),
    /// The kernel's ESP carries it by policies of the whole host, without a device, for the reason given.
    Policies(PoliciesReason),
}

/// Why a tunnel of the kernel's ESP has no device, and policies of the whole host alone lead packets into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PoliciesReason {
    /// `mode = "transport"`: packets leave as they are.
    TransportMode,
    /// `policy_based = true`.
    Configured,
    /// The kernel has no xfrm interfaces.
    NoXfrmInterfaces,
}

impl PoliciesReason {
    /// Its name in JSON, in `status` and in the docs.
    pub fn name(self) -> &'static str {
        match self {
            Self::TransportMode => "transport-mode",
            Self::Configured => "configured",
            Self::NoXfrmInterfaces => "no-xfrm-interfaces",
        }
    }
}

/// Why the kernel's ESP carries an SA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KernelReason {
    /// `engine = "kernel"`.
    Configured,
    /// `engine = "auto"`, and there is no fast path on this machine.
    NoFastPath,
}

impl KernelReason {
    /// Its name in JSON, in `status` and in the docs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Configured => "configured",
            Self::NoFastPath => "no-fast-path",
        }
    }
}

/// Why an SA is not, or not everywhere, on the fast path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OffloadReason {
    /// `fast_path = "off"`.
    Configured,
    /// `fast_path = "auto"`, and netfilter base chains of others hook forwarding.
    NetfilterRules,
    /// The process may not, or the kernel cannot, load XDP programs.
    NoXdp,
    /// No interface could take the program.
    NoInterface,
    /// An interface carries somebody else's XDP program.
    ForeignXdpProgram,
    /// An interface is a bond, bridge, macvlan or such, which AF_XDP does not reach.
    InterfaceKind,
    /// An interface's MTU does not fit one AF_XDP frame.
    MtuTooLarge,
    /// AF_XDP sockets could not be opened on an interface.
    NoAfXdp,
    /// The interfaces have several queues and their drivers cannot be steered.
    Queues,
}

impl OffloadReason {
    /// Its name in JSON, in `status` and in the docs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Configured => "configured",
            Self::NetfilterRules => "netfilter-rules",
            Self::NoXdp => "no-xdp",
            Self::NoInterface => "no-interface",
            Self::ForeignXdpProgram => "foreign-xdp-program",
            Self::InterfaceKind => "interface-kind",
            Self::MtuTooLarge => "mtu-too-large",
            Self::NoAfXdp => "no-af-xdp",
            Self::Queues => "queues",
        }
    }
}

/// Why a command was refused. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum Rejected {
    /// The command names a tunnel that does not exist.
    #[error("unknown tunnel")]
    UnknownTunnel,
    /// The command names an SA that does not exist.
    #[error("unknown SA")]
    UnknownSa,
    /// The id, or the inbound SPI on that address, is taken.
    #[error("the SA or its SPI exists already")]
    Exists,
    /// Nobody knows how far the SA has counted, or it has counted already and should begin at 1.
    #[error("how far the SA has counted is not known: its keys must not be used again")]
    Uncounted,
    /// All slots of the SA tables are in use.
    #[error("the SA tables are full")]
    Full,
    /// Key sizes do not fit the suite.
    #[error("the keys do not fit the algorithms")]
    BadKeys,
    /// With one of the two engines the tunnel has no device that routes could go over from or to.
    #[error(
        "the kernel has no xfrm interfaces, so it carries the tunnel by policies alone, to which no route can go over"
    )]
    Immovable,
    /// The kernel refused a step.
    #[error("{step}: {reason}")]
    Kernel {
        /// What was being done.
        step: String,
        /// What the kernel said.
        reason: String,
    },
    /// The engine has stopped.
    #[error("the data plane has stopped")]
    Stopped,
}

impl Rejected {
    /// The kernel refused a step.
    pub fn by_kernel(step: &str, reason: &dyn ToString) -> Self {
        Self::Kernel {
            step: step.to_owned(),
            reason: reason.to_string(),
        }
    }
}

impl From<NetlinkError> for Rejected {
    fn from(error: NetlinkError) -> Self {
        Self::Kernel {
            step: error.step,
            reason: error.reason,
        }
    }
}
