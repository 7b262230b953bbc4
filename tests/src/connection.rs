//! The peer's end of a tunnel, whichever implementation the peer is.

use std::net::IpAddr;

use crate::{
    gateway::PSK,
    topology::{Family, Side},
};

/// A connection with one pre-shared key, as the peer has it.
#[derive(Clone, Debug)]
pub struct Connection {
    /// Its address; `None` leaves it to the kernel.
    pub local: Option<IpAddr>,
    /// The peer's address or name; `None` for any.
    pub remote: Option<String>,
    /// Its identity.
    pub local_id: String,
    /// The peer's identity.
    pub remote_id: String,
    /// The pre-shared key.
    pub psk: String,
    /// IKE proposals, comma-separated, written as in our own configuration.
    pub ike: String,
    /// Its children.
    pub children: Vec<ChildConnection>,
    /// Seconds without traffic after which it asks whether the peer lives; 0 is never.
    pub dpd: u32,
    /// It splits long messages (RFC 7383); strongSwan those whose IP datagram would be longer than 576 bytes.
    pub fragments: bool,
    /// Addresses may change while the IKE SA is up (MOBIKE, RFC 4555).
    pub mobike: bool,
    /// Where it knows of no other IKE SA with the peer, it says so (INITIAL_CONTACT).
    pub initial_contact: bool,
    /// Further lines of the connection, as the peer writes them: `reauth_time = 1h`.
    pub lines: Vec<String>,
}

/// A child of a connection.
#[derive(Clone, Debug)]
pub struct ChildConnection {
    /// Its name.
    pub name: String,
    /// Its side, comma-separated.
    pub local: String,
    /// The peer's side.
    pub remote: String,
    /// ESP proposals, comma-separated.
    pub esp: String,
    /// Further lines of the child: `rekey_time = 5s`.
    pub lines: Vec<String>,
}

impl Connection {
    /// A connection from one gateway of the topology to the other, with one child between the two sites.
    pub fn between_sites(side: Side, ike: &str, esp: &str) -> Self {
        let id = |side: Side| format!("{}.example", side.letter());
        Self {
            local: Some(side.outside(Family::V4)),
            remote: Some(side.other().outside(Family::V4).to_string()),
            local_id: id(side),
            remote_id: id(side.other()),
            psk: PSK.to_owned(),
            ike: ike.to_owned(),
            children: vec![ChildConnection {
                name: "net".to_owned(),
                local: side.prefix(Family::V4),
                remote: side.other().prefix(Family::V4),
                esp: esp.to_owned(),
                lines: Vec::new(),
            }],
            dpd: 0,
            fragments: false,
            mobike: false,
            initial_contact: true,
            lines: Vec::new(),
        }
    }
}
