//! Requests to the kernel and its answers.

use std::{
    io,
    sync::{Mutex, PoisonError},
};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_xfrm::{XFRM_MSG_GETPOLICY, XfrmMessage, state::GetDumpMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_XFRM};
use zeroize::Zeroizing;

use super::{Policy, State, StateId, StateStatus, messages, parse};
use crate::net::netlink::NetlinkError;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// The error number and the header of the request.
const ERROR_BYTES: usize = 20;
const NLMSGERR_ATTR_MSG: u16 = 1;
/// A dump comes in pieces of at most so many bytes.
const BUFFER: usize = 64 * 1024;

/// A connection to the XFRM of the network namespace that it was opened in.
///
/// Calls do not wait: the kernel answers a request before the system call that sends it returns. The one exception is
/// the first use of an algorithm whose module must be loaded.
#[derive(Debug)]
pub struct Xfrm {
    socket: Mutex<Socket>,
}

impl Xfrm {
    /// Opens a connection.
    ///
    /// # Errors
    ///
    /// `EPROTONOSUPPORT` where the kernel has no XFRM.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_XFRM)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // The kernel's own words about what it refuses; without the request, in which keys may be.
        socket.set_cap_ack(true)?;
        socket.set_ext_ack(true)?;
        Ok(Self {
            socket: Mutex::new(socket),
        })
    }

    /// Adds a state.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`]: `EEXIST` if there is one, `ENOSYS` for algorithms that the kernel lacks,
    /// `EPROTONOSUPPORT` where it has no ESP.
    pub fn add_state(&self, state: &State) -> Result<(), NetlinkError> {
        let step = || format!("add the IPsec state {}", state.id());
        self.change(
            XfrmMessage::AddSa(state.message()),
            NLM_F_CREATE | NLM_F_EXCL,
            &step,
        )
    }

    /// Changes what can be changed of a state that lives: the ports of its encapsulation, and its limits.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub fn update_state(&self, state: &State) -> Result<(), NetlinkError> {
        let step = || format!("change the IPsec state {}", state.id());
        self.change(XfrmMessage::UpdateSa(state.message()), 0, &step)
    }

    /// Removes a state; it may be gone already.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub fn remove_state(&self, id: &StateId) -> Result<(), NetlinkError> {
        let step = || format!("remove the IPsec state {id}");
        gone_is_fine(self.change(XfrmMessage::DeleteSa(id.message()), 0, &step))
    }

    /// What the kernel knows of a state; none if there is no such state.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub fn state(&self, id: &StateId) -> Result<Option<StateStatus>, NetlinkError> {
        let step = || format!("look the IPsec state {id} up");
        match self.ask(XfrmMessage::GetSa(id.message()), NLM_F_ACK, &step) {
            Ok(answers) => Ok(answers.iter().find_map(StateStatus::of)),
            Err(error) if error.errno == Some(libc::ESRCH) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All states, of us and of others.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub fn states(&self) -> Result<Vec<StateStatus>, NetlinkError> {
        let step = || "list the IPsec states".to_owned();
        let dump = XfrmMessage::GetDumpSa(GetDumpMessage::default());
        let answers = self.ask(dump, NLM_F_DUMP, &step)?;
        Ok(answers.iter().filter_map(StateStatus::of).collect())
    }

    /// Adds a policy, or puts it in the place of the one that has its selector, direction and interface.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub fn set_policy(&self, policy: &Policy) -> Result<(), NetlinkError> {
        let step = || format!("set the IPsec policy {policy}");
        self.change(XfrmMessage::UpdatePolicy(policy.message()), 0, &step)
    }

    /// Adds a policy.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`]: `EEXIST` if there is one with its selector, direction and interface, whoever has set it.
    pub fn add_policy(&self, policy: &Policy) -> Result<(), NetlinkError> {
        let step = || format!("add the IPsec policy {policy}");
        self.change(XfrmMessage::AddPolicy(policy.message()), 0, &step)
    }

    /// Removes a policy; it may be gone already.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub fn remove_policy(&self, policy: &Policy) -> Result<(), NetlinkError> {
        let step = || format!("remove the IPsec policy {policy}");
        let message = XfrmMessage::DeletePolicy(policy.id_message());
        gone_is_fine(self.change(message, 0, &step))
    }

    /// All policies that we could have set, of us and of others.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub fn policies(&self) -> Result<Vec<Policy>, NetlinkError> {
        let step = || "list the IPsec policies".to_owned();
        let dump = XfrmMessage::Other((XFRM_MSG_GETPOLICY, Vec::new()));
        let answers = self.ask(dump, NLM_F_DUMP, &step)?;
        Ok(answers.iter().filter_map(Policy::of).collect())
    }

    fn change(
        &self,
        message: XfrmMessage,
        flags: u16,
        step: &dyn Fn() -> String,
    ) -> Result<(), NetlinkError> {
        self.ask(message, NLM_F_ACK | flags, step).map(|_| ())
    }

    fn ask(
        &self,
        message: XfrmMessage,
        flags: u16,
        step: &dyn Fn() -> String,
    ) -> Result<Vec<XfrmMessage>, NetlinkError> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = |error: &io::Error| NetlinkError {
            step: step(),
            reason: error.to_string(),
            errno: error.raw_os_error(),
        };
        socket
            .send(&request(message, flags), 0)
            .map_err(|error| failed(&error))?;
        let mut answers = Vec::new();
        // Answers hold keys, for the kernel shows them to whoever may ask.
        let mut buffer = Zeroizing::new(Vec::with_capacity(BUFFER));
        loop {
            buffer.clear();
            socket
                .recv(&mut *buffer, 0)
                .map_err(|error| failed(&error))?;
            for (kind, flags, body) in messages(&buffer) {
                match kind {
                    NLMSG_DONE => return Ok(answers),
                    NLMSG_ERROR => match refusal(flags, body) {
                        None => return Ok(answers),
                        Some((errno, reason)) => {
                            return Err(NetlinkError {
                                step: step(),
                                reason,
                                errno: Some(errno),
                            });
                        }
                    },
                    _ => answers.extend(parse(kind, body)),
                }
            }
        }
    }
}

/// A message as it is sent, wiped after use like the keys within.
pub(super) fn request(message: XfrmMessage, flags: u16) -> Zeroizing<Vec<u8>> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
    message.finalize();
    let mut bytes = Zeroizing::new(vec![0; message.buffer_len()]);
    message.serialize(&mut bytes);
    if let NetlinkPayload::InnerMessage(message) = &mut message.payload {
        super::state::wipe(message);
    }
    bytes
}

fn gone_is_fine(removed: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    match removed {
        Err(error) if matches!(error.errno, Some(libc::ESRCH | libc::ENOENT)) => Ok(()),
        other => other,
    }
}

/// The errno and the words of a refusal; none for an acknowledgement.
fn refusal(flags: u16, body: &[u8]) -> Option<(i32, String)> {
    let errno = body
        .first_chunk::<4>()
        .map_or(libc::EIO, |bytes| -i32::from_ne_bytes(*bytes));
    if errno == 0 {
        return None;
    }
    let plain = io::Error::from_raw_os_error(errno).to_string();
    let words = (flags & NLM_F_ACK_TLVS != 0)
        .then(|| explanation(body.get(ERROR_BYTES..)?))
        .flatten();
    let reason = words.map_or_else(|| plain.clone(), |words| format!("{words} ({plain})"));
    Some((errno, reason))
}

/// What the kernel says beside the error number.
fn explanation(mut attributes: &[u8]) -> Option<String> {
    loop {
        let [l0, l1, k0, k1] = *attributes.first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = attributes.get(4..length)?;
        if u16::from_ne_bytes([k0, k1]) == NLMSGERR_ATTR_MSG {
            let text = value.strip_suffix(&[0]).unwrap_or(value);
            return Some(String::from_utf8_lossy(text).into_owned());
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}
