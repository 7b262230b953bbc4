//! How many queues an interface receives on.
#![expect(unsafe_code, reason = "the ethtool ioctl has no safe wrapper")]

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

// include/uapi/linux/sockios.h and ethtool.h
const SIOCETHTOOL: libc::c_ulong = 0x8946;
const ETHTOOL_GCHANNELS: u32 = 0x3c;

/// `struct ethtool_channels`.
#[repr(C)]
#[derive(Default)]
struct Channels {
    command: u32,
    most_rx: u32,
    most_tx: u32,
    most_other: u32,
    most_combined: u32,
    rx: u32,
    tx: u32,
    other: u32,
    combined: u32,
}

/// Receive queues in use on the interface of this name, in the network namespace that the caller is in (`ethtool -l`).
/// One where the driver does not say: then it has no queues to choose from.
///
/// # Errors
///
/// `ENODEV` where there is no such interface; those of socket(2).
pub fn receive_queues(name: &str) -> io::Result<u32> {
    // SAFETY: takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut channels = Channels {
        command: ETHTOOL_GCHANNELS,
        ..Channels::default()
    };
    // SAFETY: zero bytes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = (&raw mut channels).cast();
    // SAFETY: the request names a structure of the command's type, and both live through the call.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    if answer < 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => Ok(1),
            _ => Err(error),
        };
    }
    Ok(channels.rx.saturating_add(channels.combined).max(1))
}

#[cfg(test)]
mod tests {
    use super::{super::tests::in_namespace, *};

    fn ip(arguments: &str) {
        let status = std::process::Command::new("ip")
            .args(arguments.split(' '))
            .status();
        assert!(status.unwrap().success(), "ip {arguments}");
    }

    #[test]
    fn queues_are_counted_and_a_missing_interface_is_an_error() {
        in_namespace(async || {
            ip("link add a0 numrxqueues 3 numtxqueues 3 type veth peer name a1 numrxqueues 1");
            assert_eq!(receive_queues("a0").unwrap(), 3);
            assert_eq!(receive_queues("a1").unwrap(), 1);
            assert_eq!(receive_queues("lo").unwrap(), 1);
            let missing = receive_queues("none").unwrap_err();
            assert_eq!(missing.raw_os_error(), Some(libc::ENODEV));
        });
    }
}
