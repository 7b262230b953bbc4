//! The settings of a whole data plane.

use serde::{Deserialize, Serialize};

/// What an engine is started with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineConfig {
    /// The file that the daemon was started from, as far as it can be told from others: after an upgrade it is another.
    pub program: String,
    /// Tells engines on one host apart.
    pub instance: String,
    /// Firewall mark of all that the engine sends.
    pub mark: u32,
    /// UDP port of IKE, 500.
    pub ike_port: u16,
    /// UDP port of IKE and ESP behind NAT, 4500.
    pub nat_port: u16,
    /// Names of the interfaces that may carry the XDP program; all that can, if there are none.
    pub interfaces: Option<Vec<String>>,
    /// Number of AF_XDP workers, or as many as there are processors.
    pub workers: Option<u16>,
    /// Workers never sleep.
    pub busy_poll: bool,
}
