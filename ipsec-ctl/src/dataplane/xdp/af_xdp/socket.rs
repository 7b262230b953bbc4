//! AF_XDP sockets: one queue of one interface each, all of a worker on one UMEM.
//!
//! Opening, kicking and statistics; what the descriptors mean is the worker's concern.
#![expect(
    unsafe_code,
    reason = "AF_XDP has no safe interface: socket options, mmap offsets and bind take C structures"
)]

use std::{
    io, mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use super::{
    mapping::Mapping,
    ring::{Consumer, Descriptor, Layout, Producer},
    umem::{FRAME_BYTES, Umem},
};

/// Slots of each ring.
pub const RING_SLOTS: u32 = 2048;
/// Packets that one system call sends in copy mode; the kernel's default is 32 (Linux 6.17 and newer let us choose).
const TX_BUDGET: u32 = 256;
/// How long a queue may be busy with a socket that was just closed.
const BUSY_QUEUE: Duration = Duration::from_secs(1);
/// `XDP_MAX_TX_SKB_BUDGET`, which libc does not know yet.
const XDP_MAX_TX_SKB_BUDGET: libc::c_int = 9;

/// How packets get into the UMEM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CopyMode {
    /// The NIC writes and reads the UMEM.
    ZeroCopy,
    /// The kernel copies between the driver's buffers and the UMEM.
    Copy,
}

/// A queue of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueId {
    /// Index of the interface.
    pub ifindex: u32,
    /// RX and TX queue.
    pub queue: u32,
}

/// Why a socket could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("AF_XDP socket on interface {} queue {}: {step}: {source}", .at.ifindex, .at.queue)]
pub struct OpenError {
    /// Where.
    pub at: QueueId,
    step: &'static str,
    /// What the kernel answered.
    pub source: io::Error,
}

/// What the kernel counted for a socket: `struct xdp_statistics`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Received packets dropped for other reasons than a full ring: no frame in the fill ring, or one that is too short.
    pub rx_dropped: u64,
    /// Fill ring entries that name no frame.
    pub rx_invalid: u64,
    /// TX ring entries that name no packet.
    pub tx_invalid: u64,
    /// Received packets dropped because the RX ring was full.
    pub rx_ring_full: u64,
    /// Received packets that found no frame in the fill ring.
    pub fill_ring_empty: u64,
    /// Times that sending found nothing to send.
    pub tx_ring_empty: u64,
}

/// An AF_XDP socket, bound to a queue.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    at: QueueId,
    /// Received packets.
    pub rx: Consumer<Descriptor>,
    /// Packets to send.
    pub tx: Producer<Descriptor>,
    /// Frames for packets to come.
    pub fill: Producer<u64>,
    /// Frames of packets sent.
    pub completion: Consumer<u64>,
}

/// Opens a socket on every queue, all on this UMEM: zero-copy if every one of them can, else all in copy mode.
///
/// # Errors
///
/// Names the first queue that takes no socket, so that the caller can go on without it.
pub fn open_all(umem: &Umem, queues: &[QueueId]) -> Result<(Vec<Socket>, CopyMode), OpenError> {
    // In one UMEM the first socket decides for all: the kernel binds the others in the same mode or refuses them.
    if let Ok(sockets) = open_in(umem, queues, CopyMode::ZeroCopy) {
        return Ok((sockets, CopyMode::ZeroCopy));
    }
    Ok((open_in(umem, queues, CopyMode::Copy)?, CopyMode::Copy))
}

fn open_in(umem: &Umem, queues: &[QueueId], mode: CopyMode) -> Result<Vec<Socket>, OpenError> {
    let mut sockets: Vec<Socket> = Vec::with_capacity(queues.len());
    for at in queues {
        sockets.push(Socket::open(umem, *at, sockets.first(), mode)?);
    }
    Ok(sockets)
}

impl Socket {
    /// Opens a socket; `first` is one that registered the UMEM before.
    fn open(
        umem: &Umem,
        at: QueueId,
        first: Option<&Self>,
        mode: CopyMode,
    ) -> Result<Self, OpenError> {
        let failed = |step| move |source| OpenError { at, step, source };
        let fd = new_fd().map_err(failed("socket"))?;
        if first.is_none() {
            register(&fd, umem).map_err(failed("registering the UMEM"))?;
        }
        for ring in [
            libc::XDP_UMEM_FILL_RING,
            libc::XDP_UMEM_COMPLETION_RING,
            libc::XDP_RX_RING,
            libc::XDP_TX_RING,
        ] {
            set_option(&fd, ring, &RING_SLOTS).map_err(failed("making a ring"))?;
        }
        // Only a matter of speed, and unknown before Linux 6.17.
        let _ = set_option(&fd, XDP_MAX_TX_SKB_BUDGET, &TX_BUDGET);
        let offsets: libc::xdp_mmap_offsets =
            get_option(&fd, libc::XDP_MMAP_OFFSETS).map_err(failed("asking ring offsets"))?;
        let rings = Rings::map(&fd, &offsets).map_err(failed("mapping the rings"))?;
        bind_when_free(&fd, at, first.map(|first| &first.fd), mode).map_err(failed("bind"))?;
        Ok(Self {
            fd,
            at,
            rx: rings.rx,
            tx: rings.tx,
            fill: rings.fill,
            completion: rings.completion,
        })
    }

    /// A socket of rings in plain memory, whose other ends a test plays.
    #[cfg(test)]
    pub(super) fn of_rings(
        rx: Consumer<Descriptor>,
        tx: Producer<Descriptor>,
        fill: Producer<u64>,
        completion: Consumer<u64>,
    ) -> Self {
        Self {
            fd: std::fs::File::open("/dev/null").unwrap().into(),
            at: QueueId {
                ifindex: 0,
                queue: 0,
            },
            rx,
            tx,
            fill,
            completion,
        }
    }

    /// The queue it is bound to.
    pub fn at(&self) -> QueueId {
        self.at
    }

    /// Makes the kernel send what the TX ring holds, if it waits to be told. Returns whether it took everything that
    /// it could take now.
    ///
    /// # Errors
    ///
    /// What sendto answers, except the answers that only mean "not now".
    pub fn kick_tx(&self) -> io::Result<bool> {
        if !self.tx.needs_wakeup() {
            return Ok(true);
        }
        // SAFETY: sends no bytes of ours: null and 0 are what AF_XDP expects.
        let sent = unsafe {
            libc::sendto(
                self.fd.as_raw_fd(),
                std::ptr::null(),
                0,
                libc::MSG_DONTWAIT,
                std::ptr::null(),
                0,
            )
        };
        if sent >= 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            // EAGAIN: the budget of one call is used up, there is more. The others: a busy queue or no memory, which
            // pass; the packets stay in the ring.
            Some(libc::EAGAIN) => Ok(false),
            Some(libc::EBUSY | libc::ENOBUFS) => Ok(true),
            _ => Err(error),
        }
    }

    /// Makes the driver look at the fill ring again, if it waits to be told.
    pub fn kick_rx(&self) {
        if !self.fill.needs_wakeup() {
            return;
        }
        // SAFETY: receives no bytes: null and 0 are what AF_XDP expects. The answer carries nothing to act on.
        let _ = unsafe {
            libc::recvfrom(
                self.fd.as_raw_fd(),
                std::ptr::null_mut(),
                0,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
            )
        };
    }

    /// What the kernel counted.
    ///
    /// # Errors
    ///
    /// What getsockopt answers.
    pub fn statistics(&self) -> io::Result<Statistics> {
        statistics(&self.fd)
    }

    /// A way to what the kernel counts, for others than the owner.
    ///
    /// # Errors
    ///
    /// No file descriptors are left.
    pub fn meter(&self) -> io::Result<Meter> {
        self.fd.try_clone().map(Meter)
    }
}

/// Reads what the kernel counts for a socket while a worker has it. Its queue is not free before this is dropped, too.
#[derive(Debug)]
pub struct Meter(OwnedFd);

impl Meter {
    /// What the kernel counted.
    ///
    /// # Errors
    ///
    /// What getsockopt answers.
    pub fn statistics(&self) -> io::Result<Statistics> {
        statistics(&self.0)
    }
}

fn statistics(fd: &OwnedFd) -> io::Result<Statistics> {
    let raw: libc::xdp_statistics = get_option(fd, libc::XDP_STATISTICS)?;
    Ok(Statistics {
        rx_dropped: raw.rx_dropped,
        rx_invalid: raw.rx_invalid_descs,
        tx_invalid: raw.tx_invalid_descs,
        rx_ring_full: raw.rx_ring_full,
        fill_ring_empty: raw.rx_fill_ring_empty_descs,
        tx_ring_empty: raw.tx_ring_empty_descs,
    })
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

struct Rings {
    rx: Consumer<Descriptor>,
    tx: Producer<Descriptor>,
    fill: Producer<u64>,
    completion: Consumer<u64>,
}

impl Rings {
    fn map(fd: &OwnedFd, offsets: &libc::xdp_mmap_offsets) -> io::Result<Self> {
        let map = |ring: &libc::xdp_ring_offset, slot: usize, page_offset: libc::off_t| {
            let bytes = usize::try_from(ring.desc)
                .ok()
                .and_then(|start| start.checked_add(slot.checked_mul(RING_SLOTS as usize)?))
                .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
            let mapping = Mapping::of_socket(fd, bytes, page_offset)?;
            let layout = Layout {
                producer: ring.producer,
                consumer: ring.consumer,
                flags: ring.flags,
                slots: ring.desc,
            };
            Ok::<_, io::Error>((Arc::new(mapping), layout))
        };
        let wide = |offset: libc::c_ulonglong| {
            libc::off_t::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::Unsupported))
        };
        let (packet, address) = (size_of::<Descriptor>(), size_of::<u64>());
        let (fill_at, completion_at) = (
            wide(libc::XDP_UMEM_PGOFF_FILL_RING)?,
            wide(libc::XDP_UMEM_PGOFF_COMPLETION_RING)?,
        );
        let (rx, rx_layout) = map(&offsets.rx, packet, libc::XDP_PGOFF_RX_RING)?;
        let (tx, tx_layout) = map(&offsets.tx, packet, libc::XDP_PGOFF_TX_RING)?;
        let (fill, fill_layout) = map(&offsets.fr, address, fill_at)?;
        let (completion, completion_layout) = map(&offsets.cr, address, completion_at)?;
        Ok(Self {
            rx: Consumer::new(rx, rx_layout, RING_SLOTS)?,
            tx: Producer::new(tx, tx_layout, RING_SLOTS)?,
            fill: Producer::new(fill, fill_layout, RING_SLOTS)?,
            completion: Consumer::new(completion, completion_layout, RING_SLOTS)?,
        })
    }
}

fn new_fd() -> io::Result<OwnedFd> {
    // SAFETY: takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn register(fd: &OwnedFd, umem: &Umem) -> io::Result<()> {
    let overflow = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let mapping = umem.mapping();
    let registration = libc::xdp_umem_reg {
        addr: u64::try_from(mapping.base().addr().get()).map_err(overflow)?,
        len: u64::try_from(mapping.bytes()).map_err(overflow)?,
        chunk_size: u32::try_from(FRAME_BYTES).map_err(overflow)?,
        headroom: 0,
        flags: 0,
        tx_metadata_len: 0,
    };
    set_option(fd, libc::XDP_UMEM_REG, &registration)
}

/// Binds, waiting for a queue that is busy: the kernel frees the queue of a closed socket a little later.
fn bind_when_free(
    fd: &OwnedFd,
    at: QueueId,
    first: Option<&OwnedFd>,
    mode: CopyMode,
) -> io::Result<()> {
    let deadline = Instant::now() + BUSY_QUEUE;
    loop {
        match bind(fd, at, first, mode) {
            Err(error)
                if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline =>
            {
                thread::sleep(Duration::from_millis(10));
            }
            bound => return bound,
        }
    }
}

fn bind(fd: &OwnedFd, at: QueueId, first: Option<&OwnedFd>, mode: CopyMode) -> io::Result<()> {
    let (flags, shared) = match first {
        // No other flag may stand beside this one: the mode of the UMEM's first socket holds.
        Some(first) => (libc::XDP_SHARED_UMEM, first.as_raw_fd()),
        None => {
            let mode = match mode {
                CopyMode::ZeroCopy => libc::XDP_ZEROCOPY,
                CopyMode::Copy => libc::XDP_COPY,
            };
            (mode | libc::XDP_USE_NEED_WAKEUP, 0)
        }
    };
    let family = libc::__u16::try_from(libc::AF_XDP).unwrap_or_default();
    let address = libc::sockaddr_xdp {
        sxdp_family: family,
        sxdp_flags: flags,
        sxdp_ifindex: at.ifindex,
        sxdp_queue_id: at.queue,
        sxdp_shared_umem_fd: shared.unsigned_abs(),
    };
    // SAFETY: the address is a `sockaddr_xdp` of the length given.
    let answer = unsafe {
        libc::bind(
            fd.as_raw_fd(),
            (&raw const address).cast(),
            socklen::<libc::sockaddr_xdp>(),
        )
    };
    if answer == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn set_option<T>(fd: &OwnedFd, name: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes of a value that lives through the call.
    let answer = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_XDP,
            name,
            (&raw const *value).cast(),
            socklen::<T>(),
        )
    };
    if answer == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// C structures of integers only, which any bytes are valid for.
trait Plain: Copy {}
impl Plain for libc::xdp_mmap_offsets {}
impl Plain for libc::xdp_statistics {}

fn get_option<T: Plain>(fd: &OwnedFd, name: libc::c_int) -> io::Result<T> {
    // SAFETY: zero bytes are a valid `Plain`.
    let mut value: T = unsafe { mem::zeroed() };
    let mut length = socklen::<T>();
    // SAFETY: the kernel writes at most `length` bytes into the value.
    let answer = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_XDP,
            name,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    if answer != 0 {
        return Err(io::Error::last_os_error());
    }
    // An older kernel knows a shorter structure without the flags that we rely on.
    if length < socklen::<T>() {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(value)
}

fn socklen<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).unwrap_or(libc::socklen_t::MAX)
}
