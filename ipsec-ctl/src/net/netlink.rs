//! Links, addresses, routes and rules, asked for and changed over rtnetlink.

mod link;
mod route;
mod rule;

use rtnetlink::Handle;

pub(super) use self::route::unusable;
pub use self::{
    link::Link,
    route::{Route, Target, Way},
    rule::{Rule, Service},
};

/// Origin of our routes and rules, by which we know them again (`ip route show proto 84`).
pub const ORIGIN: u8 = 84;

/// A step that the kernel refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{step}: {reason}")]
pub struct NetlinkError {
    /// What was being done.
    pub step: String,
    /// What the kernel said.
    pub reason: String,
    /// Its errno, positive, if there was one.
    pub errno: Option<i32>,
}

impl NetlinkError {
    pub(super) fn new(step: impl Into<String>, error: &rtnetlink::Error) -> Self {
        let errno = match error {
            rtnetlink::Error::NetlinkError(message) => message.code.map(|code| -code.get()),
            _ => None,
        };
        Self {
            step: step.into(),
            reason: errno.map_or_else(
                || error.to_string(),
                |errno| std::io::Error::from_raw_os_error(errno).to_string(),
            ),
            errno,
        }
    }

    pub(super) fn is(&self, errno: i32) -> bool {
        self.errno == Some(errno)
    }
}

/// A connection to the kernel of the network namespace that it was opened in.
#[derive(Clone, Debug)]
pub struct Netlink {
    pub(super) handle: Handle,
}

impl Netlink {
    /// Opens a connection, driven by a task of the current runtime.
    ///
    /// # Errors
    ///
    /// Those of the socket.
    pub fn open() -> std::io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }
}
