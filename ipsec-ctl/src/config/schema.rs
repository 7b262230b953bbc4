//! The file as it is written: what serde reads, before any value is judged.
//!
//! Every key here has its text in `reference.rs`; a test compares the two.

use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{SeqAccess, Visitor},
};
use toml::Spanned;

use crate::dataplane::{
    routing::RoutesMode,
    seam::{Df, EngineChoice, FastPath, Mode, NicOffload},
};

/// Text with its place in the file.
pub(super) type Text = Spanned<String>;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    pub(super) instance: Option<Text>,
    pub(super) interfaces: Option<Vec<String>>,
    #[serde(default)]
    pub(super) engine: EngineChoice,
    pub(super) mark: Option<Spanned<u32>>,
    #[serde(default)]
    pub(super) sysctl: SysctlSetting,
    pub(super) control_socket: Option<String>,
    pub(super) workers: Option<Spanned<u16>>,
    #[serde(default)]
    pub(super) busy_poll: bool,
    #[serde(default)]
    pub(super) ports: PortsTable,
    #[serde(default)]
    pub(super) limits: LimitsTable,
    #[serde(default, rename = "tunnel")]
    pub(super) tunnels: Vec<Spanned<TunnelTable>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PortsTable {
    pub(super) ike: Option<Spanned<u16>>,
    pub(super) nat_traversal: Option<Spanned<u16>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LimitsTable {
    pub(super) cookie_threshold: Option<u32>,
    pub(super) half_open: Option<Spanned<u32>>,
    pub(super) half_open_per_source: Option<Spanned<u32>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TunnelTable {
    pub(super) name: Text,
    pub(super) peer: Spanned<OneOrMany>,
    pub(super) local: Option<Text>,
    pub(super) local_id: Option<Text>,
    pub(super) remote_id: Option<Text>,
    pub(super) psk_file: Text,
    pub(super) role: Option<RoleSetting>,
    pub(super) ike: Option<Vec<Text>>,
    #[serde(default)]
    pub(super) nat: Nat,
    pub(super) fragment_size: Option<Spanned<u16>>,
    pub(super) keepalive: Option<Text>,
    pub(super) mobike: Option<bool>,
    pub(super) return_routability: Option<bool>,
    pub(super) childless: Option<bool>,
    #[serde(default)]
    pub(super) dpd: DpdTable,
    #[serde(default)]
    pub(super) unique: Unique,
    pub(super) lifetime: Option<Text>,
    pub(super) reauth: Option<bool>,
    pub(super) device: Option<Text>,
    pub(super) mtu: Option<Spanned<u16>>,
    pub(super) engine: Option<EngineChoice>,
    pub(super) mode: Option<Spanned<Mode>>,
    pub(super) policy_based: Option<Spanned<bool>>,
    #[serde(default)]
    pub(super) fast_path: FastPath,
    pub(super) offload: Option<Spanned<NicOffload>>,
    pub(super) df: Option<Spanned<Df>>,
    pub(super) clamp_mss: Option<bool>,
    pub(super) copy_dscp: Option<bool>,
    pub(super) routes: Option<RoutesMode>,
    #[serde(default)]
    pub(super) address: Vec<Text>,
    #[serde(default)]
    pub(super) bypass: Vec<Text>,
    #[serde(default, rename = "child")]
    pub(super) children: Vec<Spanned<ChildTable>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DpdTable {
    #[serde(default)]
    pub(super) mode: DpdMode,
    pub(super) interval: Option<Text>,
    pub(super) retries: Option<Spanned<u32>>,
    pub(super) timeout: Option<Text>,
}

/// One text, or a list of them.
#[derive(Debug)]
pub(super) enum OneOrMany {
    One(String),
    Many(Vec<Text>),
}

impl<'de> Deserialize<'de> for OneOrMany {
    // Not by an untagged enum: that would lose the places of the list's entries.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextOrList)
    }
}

struct TextOrList;

impl<'de> Visitor<'de> for TextOrList {
    type Value = OneOrMany;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text or a list of texts")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<OneOrMany, E> {
        Ok(OneOrMany::One(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<OneOrMany, A::Error> {
        let mut texts = Vec::new();
        while let Some(text) = list.next_element()? {
            texts.push(text);
        }
        Ok(OneOrMany::Many(texts))
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ChildTable {
    pub(super) name: Text,
    pub(super) local: Vec<Text>,
    pub(super) remote: Vec<Text>,
    pub(super) esp: Option<Vec<Text>>,
    pub(super) on_dead: Option<OnDead>,
    pub(super) lifetime: Option<Text>,
    pub(super) lifetime_bytes: Option<Text>,
    pub(super) lifetime_packets: Option<Spanned<u64>>,
    pub(super) replay_window: Option<Spanned<u32>>,
}

/// Who starts a tunnel, as the file says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum RoleSetting {
    Initiate,
    OnDemand,
    Respond,
}

/// UDP encapsulation of ESP (RFC 3948).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Nat {
    /// If NAT detection finds a NAT.
    #[default]
    Auto,
    /// Always.
    Force,
    /// Never; NAT detection is not sent either.
    Forbid,
}

/// When a silent peer is asked whether it lives (RFC 7296 section 2.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DpdMode {
    /// While we send to it.
    #[default]
    OnDemand,
    /// Always.
    Periodic,
    /// Never.
    Off,
}

/// What becomes of a child when its peer is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnDead {
    /// It is started again at once.
    Restart,
    /// It is started again by the next packet.
    Trap,
    /// It waits for the peer.
    Clear,
}

/// Which IKE SAs stay when an identity has several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unique {
    /// The newest.
    #[default]
    Replace,
    /// The oldest: others are refused.
    Keep,
    /// All of them.
    Never,
}

/// What is done about sysctls that stand in the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SysctlSetting {
    /// `check` and `run` tell what should be set.
    #[default]
    Report,
    /// They are set, and restored by `ipsec-ctl release`.
    Manage,
}
