//! Netlink messages of nf_tables, written and read (include/uapi/linux/netfilter/nf_tables.h).
//!
//! Only what our one table needs; no library of a licence that fits speaks this protocol without the `nft` program.

use std::{io, time::Duration};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nix::sys::{
    socket::{setsockopt, sockopt},
    time::TimeVal,
};

/// Bytes of `struct nfgenmsg`, which begins every body.
pub(super) const FAMILY_HEADER: usize = 4;
/// Tables for IPv4 and IPv6 together.
pub(super) const NFPROTO_INET: u8 = 1;

const NLM_F_REQUEST: u16 = 0x001;
const NLM_F_ACK: u16 = 0x004;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NFNL_SUBSYS_NFTABLES: u8 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE_MASK: u16 = 0x3fff;
const MESSAGE_HEADER: usize = 16;
const ATTRIBUTE_HEADER: usize = 4;
/// A kernel that does not answer for so long does not answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Attributes one after another.
#[derive(Clone, Debug, Default)]
pub(super) struct Attributes(pub(super) Vec<u8>);

impl Attributes {
    /// Adds one of bytes.
    pub(super) fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        // Longer ones are never made: elements are split over messages.
        let length = u16::try_from(ATTRIBUTE_HEADER + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// Adds a number, in network order as nf_tables has them.
    pub(super) fn number(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// Adds a name.
    pub(super) fn name(self, kind: u16, name: &str) -> Self {
        let mut bytes = name.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    /// Adds attributes within one.
    pub(super) fn nested(self, kind: u16, inner: &Self) -> Self {
        self.bytes(NLA_F_NESTED | kind, &inner.0)
    }
}

/// Changes that are done together or not at all.
#[derive(Debug)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    sequence: u32,
}

impl Batch {
    pub(super) fn new() -> Self {
        let mut batch = Self {
            bytes: Vec::new(),
            sequence: 0,
        };
        batch.mark(NFNL_MSG_BATCH_BEGIN);
        batch
    }

    /// Adds a change; things that are made are appended to what is there.
    pub(super) fn change(&mut self, kind: u8, attributes: &Attributes) {
        let flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_APPEND;
        let kind = u16::from(NFNL_SUBSYS_NFTABLES) << 8 | u16::from(kind);
        self.sequence += 1;
        let family = [NFPROTO_INET, 0, 0, 0];
        push(
            &mut self.bytes,
            kind,
            flags,
            self.sequence,
            family,
            &attributes.0,
        );
    }

    fn mark(&mut self, kind: u16) {
        let family = [0, 0, 0, NFNL_SUBSYS_NFTABLES];
        push(
            &mut self.bytes,
            kind,
            NLM_F_REQUEST,
            self.sequence,
            family,
            &[],
        );
    }
}

fn push(
    bytes: &mut Vec<u8>,
    kind: u16,
    flags: u16,
    sequence: u32,
    family: [u8; FAMILY_HEADER],
    attributes: &[u8],
) {
    let length = MESSAGE_HEADER + FAMILY_HEADER + attributes.len();
    bytes.extend(u32::try_from(length).unwrap_or_default().to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]); // port
    bytes.extend(family);
    bytes.extend(attributes);
}

/// A socket to netfilter.
pub(super) struct Conversation(Socket);

impl Conversation {
    /// Opens it in the network namespace that the caller is in; `None` where the kernel has no netfilter.
    ///
    /// # Errors
    ///
    /// Those of the socket.
    pub(super) fn open() -> io::Result<Option<Self>> {
        let socket = match Socket::new(NETLINK_NETFILTER) {
            Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(None),
            other => other?,
        };
        socket.connect(&SocketAddr::new(0, 0))?;
        let seconds = i64::try_from(PATIENCE.as_secs()).unwrap_or_default();
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(seconds, 0))?;
        // Older kernels answer in full, which takes longer to read.
        let _ = socket.set_cap_ack(true);
        Ok(Some(Self(socket)))
    }

    /// Asks for all of something of all families, and shows type (within nf_tables) and body of each.
    ///
    /// # Errors
    ///
    /// What the kernel refused.
    pub(super) fn dump(&mut self, kind: u8, mut each: impl FnMut(u8, &[u8])) -> io::Result<()> {
        let kind = u16::from(NFNL_SUBSYS_NFTABLES) << 8 | u16::from(kind);
        let mut request = Vec::new();
        let flags = NLM_F_REQUEST | NLM_F_DUMP;
        push(&mut request, kind, flags, 0, [0; FAMILY_HEADER], &[]);
        self.0.send(&request, 0)?;
        loop {
            let (bytes, _) = self.0.recv_from_full()?;
            let mut rest = bytes.as_slice();
            while let Some((message, next)) = Message::read(rest) {
                match message.kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => return message.error(),
                    _ => {
                        if let [kind, NFNL_SUBSYS_NFTABLES] = message.kind.to_le_bytes() {
                            each(kind, message.body);
                        }
                    }
                }
                rest = next;
            }
        }
    }

    /// Does all of a batch, or nothing.
    ///
    /// # Errors
    ///
    /// The first change that the kernel refused.
    pub(super) fn commit(&mut self, mut batch: Batch) -> io::Result<()> {
        batch.mark(NFNL_MSG_BATCH_END);
        // The kernel takes a batch in one piece; each change is answered.
        let room = batch.bytes.len() * 2 + 64 * 1024;
        setsockopt(&self.0, sockopt::SndBufForce, &room)?;
        setsockopt(&self.0, sockopt::RcvBufForce, &(room + 1024 * 1024))?;
        self.0.send(&batch.bytes, 0)?;
        loop {
            let (bytes, _) = self.0.recv_from_full()?;
            let mut rest = bytes.as_slice();
            while let Some((message, next)) = Message::read(rest) {
                if message.kind == NLMSG_ERROR {
                    message.error()?;
                    if message.sequence == batch.sequence {
                        return Ok(());
                    }
                }
                rest = next;
            }
        }
    }
}

/// A message as it was received.
pub(super) struct Message<'a> {
    kind: u16,
    sequence: u32,
    body: &'a [u8],
}

impl<'a> Message<'a> {
    /// The first message, and what follows it.
    pub(super) fn read(bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let header = bytes.first_chunk::<MESSAGE_HEADER>()?;
        let [l0, l1, l2, l3, k0, k1, _, _, s0, s1, s2, s3, ..] = *header;
        let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).ok()?;
        let message = Self {
            kind: u16::from_ne_bytes([k0, k1]),
            sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
            body: bytes.get(MESSAGE_HEADER..length)?,
        };
        let next = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((message, next))
    }

    /// What an NLMSG_ERROR says; 0 acknowledges.
    fn error(&self) -> io::Result<()> {
        match self
            .body
            .first_chunk::<4>()
            .map(|code| i32::from_ne_bytes(*code))
        {
            Some(0) => Ok(()),
            Some(code) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
            None => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// Type and value of the first attribute, and what follows it.
fn attribute(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let [l0, l1, k0, k1] = *bytes.first_chunk::<ATTRIBUTE_HEADER>()?;
    let length = usize::from(u16::from_ne_bytes([l0, l1]));
    let value = bytes.get(ATTRIBUTE_HEADER..length)?;
    let next = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((u16::from_ne_bytes([k0, k1]) & NLA_TYPE_MASK, value, next))
}

/// The value of an attribute in the body of a message, after its family header.
pub(super) fn value(body: &[u8], wanted: u16) -> Option<&[u8]> {
    find(body.get(FAMILY_HEADER..)?, wanted)
}

/// The value of an attribute among others.
pub(super) fn find(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    while let Some((kind, value, next)) = attribute(bytes) {
        if kind == wanted {
            return Some(value);
        }
        bytes = next;
    }
    None
}

/// Whether an attribute is this name.
pub(super) fn is_name(value: &[u8], name: &str) -> bool {
    value.strip_suffix(&[0]).unwrap_or(value) == name.as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let inner = Attributes::default().number(2, 7).name(3, "abc");
        let body = [
            vec![1, 0, 0, 0],
            Attributes::default().bytes(5, &[9]).nested(4, &inner).0,
        ];
        let mut bytes = Vec::new();
        let [family, attributes] = &body;
        let family = *family.first_chunk().unwrap();
        push(&mut bytes, 0x0a03, 0, 8, family, attributes);
        let (message, rest) = Message::read(&bytes).unwrap();
        assert_eq!((message.kind, message.sequence, rest.len()), (0x0a03, 8, 0));
        assert_eq!(value(message.body, 5), Some(&[9][..]));
        let nested = value(message.body, 4).unwrap();
        assert_eq!(find(nested, 2), Some(&7_u32.to_be_bytes()[..]));
        assert!(is_name(find(nested, 3).unwrap(), "abc"));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            let mut rest = bytes.as_slice();
            while let Some((message, next)) = Message::read(rest) {
                let _ = (value(message.body, 1), message.error());
                rest = next;
            }
        }
    }
}
