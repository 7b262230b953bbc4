//! Memory shared with the kernel: the frames of a UMEM and the rings of a socket.
//!
//! Only owns and bounds the memory; who may touch which part of it when is the business of [`super::ring`] and
//! [`super::umem`].
#![expect(
    unsafe_code,
    reason = "mmap and the pointers into it are the edge to the kernel"
)]

use std::{io, os::fd::AsRawFd, ptr::NonNull};

/// A memory mapping, unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping is plain memory that belongs to no thread; types that access it bring their own synchronisation.
unsafe impl Send for Mapping {}
// SAFETY: as above; a shared reference gives out nothing but the address and the size.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Zeroed memory of our own, in huge pages if there are some.
    ///
    /// # Errors
    ///
    /// What mmap answers.
    pub fn anonymous(bytes: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
        Self::map(bytes, flags | libc::MAP_HUGETLB, -1, 0)
            .or_else(|_| Self::map(bytes, flags, -1, 0))
    }

    /// A ring of an AF_XDP socket, which the kernel keeps at this offset.
    ///
    /// # Errors
    ///
    /// What mmap answers.
    pub(super) fn of_socket(
        fd: &impl AsRawFd,
        bytes: usize,
        offset: libc::off_t,
    ) -> io::Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        Self::map(bytes, flags, fd.as_raw_fd(), offset)
    }

    fn map(
        bytes: usize,
        flags: libc::c_int,
        fd: libc::c_int,
        offset: libc::off_t,
    ) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, fd, offset) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base =
            NonNull::new(base.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Self { base, bytes })
    }

    /// Where it starts; page-aligned.
    pub(super) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Address of `count` values of `T` at this byte offset, if they are inside and aligned.
    pub(super) fn place<T>(&self, offset: u64, count: usize) -> Option<NonNull<T>> {
        let offset = usize::try_from(offset).ok()?;
        let end = size_of::<T>().checked_mul(count)?.checked_add(offset)?;
        // SAFETY: the offset was just found to be inside the mapping.
        let place = (end <= self.bytes).then(|| unsafe { self.base.add(offset) })?;
        (place.addr().get() % align_of::<T>() == 0).then(|| place.cast())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: every pointer into the mapping lives in a value that owns it. An error leaves it mapped: harmless.
        let _ = unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}
