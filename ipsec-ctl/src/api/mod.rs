//! The control socket: HTTP and JSON over a Unix socket that only its owner may open.
//!
//! [`model`] is what is said, [`client`] and [`server`] are the two ends. The server knows nothing of tunnels: it hands
//! each [`Request`] to the daemon and renders the answer.
#![forbid(unsafe_code)]

pub mod client;
pub mod model;
pub mod server;

use tokio::sync::oneshot;

use crate::dataplane::seam::EngineChoice;

/// What a command asks of the daemon, each with the place for its answer.
#[derive(Debug)]
pub enum Request {
    /// The state of everything.
    Status(oneshot::Sender<model::Status>),
    /// Counters of packets by reason.
    Counters(oneshot::Sender<Vec<model::Counter>>),
    /// Brings a tunnel up.
    Up(String, oneshot::Sender<Result<model::Done, model::Refused>>),
    /// Takes a tunnel down, until it is brought up again.
    Down(String, oneshot::Sender<Result<model::Done, model::Refused>>),
    /// Rekeys a tunnel's children, or its IKE SA, before their time.
    Rekey(
        String,
        model::Rekey,
        oneshot::Sender<Result<model::Done, model::Refused>>,
    ),
    /// Has another engine carry a tunnel.
    Move(
        String,
        EngineChoice,
        oneshot::Sender<Result<model::Done, model::Refused>>,
    ),
    /// Reads the configuration again and changes what differs.
    Reload(oneshot::Sender<Result<model::Done, model::Refused>>),
}
