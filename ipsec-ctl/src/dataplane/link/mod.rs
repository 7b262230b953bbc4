//! A data plane in a process of its own: what a daemon and it say to each other on a Unix socket.
//!
//! Each side first sends the number of its protocol; the rest is in frames. A connection of calls carries requests and
//! replies, another one events, so that a daemon that waits for a reply is never in the way of its own events.

mod client;
mod frame;
mod server;

pub use client::{ConnectError, Remote, end};
pub use server::{ServeError, serve};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use super::seam::{EngineConfig, Event, Reply, Request};

/// What every connection begins with.
const MAGIC: [u8; 8] = *b"ipsecxdp";

/// A digest of the sources that define the values on the wire, by `build.rs`: who has another one is not understood.
const PROTOCOL: &str = env!("IPSEC_XDP_PROTOCOL");

/// What a daemon wants of a connection.
#[derive(Debug, Serialize, Deserialize)]
enum Hello {
    /// To make calls, of engines with these settings.
    Calls(EngineConfig),
    /// To be told events.
    Events,
}

/// The answer to [`Hello::Calls`].
#[derive(Debug, Serialize, Deserialize)]
enum Welcome {
    /// Go on.
    Attached,
    /// The engines run with other settings.
    OtherSettings,
    /// The engines do not start.
    Failed {
        /// What was being done.
        step: String,
        /// What the kernel said.
        reason: String,
    },
}

/// A request, and the number that its reply will have.
#[derive(Debug, Serialize, Deserialize)]
struct Call {
    number: u64,
    request: Request,
}

/// The reply to the call of that number.
#[derive(Debug, Serialize, Deserialize)]
struct Answer {
    number: u64,
    reply: Reply,
}

/// An event as a frame.
type Told = Event;

/// Sends our protocol and reads the other side's; tells whether they are the same.
async fn is_same_protocol(stream: &mut UnixStream) -> std::io::Result<bool> {
    let mut ours = Vec::from(MAGIC);
    ours.extend(PROTOCOL.as_bytes());
    stream.write_all(&ours).await?;
    let mut theirs = vec![0; ours.len()];
    stream.read_exact(&mut theirs).await?;
    Ok(ours == theirs)
}

/// Whether the process at the other end runs as the same user as we do.
fn is_one_of_us(stream: &UnixStream) -> bool {
    stream
        .peer_cred()
        .is_ok_and(|peer| peer.uid() == nix::unistd::geteuid().as_raw())
}
