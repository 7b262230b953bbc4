//! TUN devices: where plaintext enters and leaves the slow path (Documentation/networking/tuntap.rst).
//!
//! They persist, so that the routes into them outlive a crash; whoever opens one by name takes it over.
#![expect(unsafe_code, reason = "the ioctls of TUN devices have no safe wrapper")]

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::OpenOptionsExt,
    },
};

// include/uapi/linux/if_tun.h
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
const TUNSETCARRIER: libc::c_ulong = 0x4004_54e2;
const IFF_TUN: libc::c_short = 0x0001;
const IFF_NO_PI: libc::c_short = 0x1000;

/// Longest name of an interface in bytes.
pub const LONGEST_NAME: usize = libc::IFNAMSIZ - 1;

/// An open TUN device, non-blocking.
#[derive(Debug)]
pub struct Tun {
    file: File,
}

impl Tun {
    /// Creates the device, or takes over one that a dead process left. It persists until [`Self::remove`].
    ///
    /// # Errors
    ///
    /// As for [`Self::open_fleeting`].
    pub fn open(name: &str) -> io::Result<Self> {
        let tun = Self::open_fleeting(name)?;
        tun.persist(true)?;
        Ok(tun)
    }

    /// As [`Self::open`], but a new device ends with the process unless it is told to [persist](Self::persist).
    ///
    /// # Errors
    ///
    /// `EBUSY` if a living process has it, `EPERM` without CAP_NET_ADMIN, `ENOENT` where there is no /dev/net/tun.
    pub fn open_fleeting(name: &str) -> io::Result<Self> {
        if name.is_empty() || name.len() > LONGEST_NAME {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")?;
        // SAFETY: an `ifreq` of zeros is a valid value: integers and a union of integers and addresses.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = IFF_TUN | IFF_NO_PI;
        // SAFETY: the descriptor is open, and the request is a valid `ifreq` that outlives the call.
        check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw const request) })?;
        Ok(Self { file })
    }

    /// Whether the device outlives the process.
    ///
    /// # Errors
    ///
    /// Those of the ioctl.
    pub fn persist(&self, persist: bool) -> io::Result<()> {
        // SAFETY: the descriptor is open; the argument is an integer by value.
        check(unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                TUNSETPERSIST,
                libc::c_ulong::from(persist),
            )
        })
    }

    /// Reports a carrier, or that there is none, to whoever watches the link.
    ///
    /// # Errors
    ///
    /// Those of the ioctl.
    pub fn set_carrier(&self, on: bool) -> io::Result<()> {
        let on = libc::c_int::from(on);
        // SAFETY: the descriptor is open, and the argument points to an integer that outlives the call.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETCARRIER, &raw const on) })
    }

    /// Reads one packet: `WouldBlock` if there is none.
    ///
    /// # Errors
    ///
    /// Those of read(2).
    pub fn read(&self, packet: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(packet)
    }

    /// Writes one packet, which the kernel takes as received on the device.
    ///
    /// # Errors
    ///
    /// Those of write(2); `EIO` while the device is down.
    pub fn write(&self, packet: &[u8]) -> io::Result<()> {
        (&self.file).write(packet).map(|_| ())
    }

    /// Removes the device with its routes and addresses, as soon as nobody has it open any more.
    ///
    /// # Errors
    ///
    /// Those of the ioctl.
    pub fn remove(&self) -> io::Result<()> {
        self.persist(false)
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
