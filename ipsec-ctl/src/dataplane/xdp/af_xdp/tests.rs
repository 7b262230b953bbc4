//! AF_XDP sockets on veth pairs in namespaces of their own. Needs root; without it the tests say so and pass.
#![expect(unsafe_code, reason = "AF_PACKET and ioctl in tests")]

use std::{
    io,
    net::UdpSocket,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    process::Command,
    time::{Duration, Instant},
};

use super::{
    ring::Descriptor,
    socket::{CopyMode, QueueId, Socket, open_all},
    umem::{HEADROOM, Umem},
};

/// Runs a test on a thread of its own in a fresh network namespace with two veth pairs, a0-a1 and b0-b1.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        return crate::skip::skip("a network namespace needs root");
    }
    std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        for pair in ["a", "b"] {
            ip(&format!("link add {pair}0 type veth peer name {pair}1"));
            for end in 0..2 {
                ip(&format!("link set {pair}{end} up"));
            }
        }
        test();
    })
    .join()
    .unwrap();
}

/// Runs `ip` in the namespace of this thread.
fn ip(arguments: &str) {
    let status = Command::new("ip")
        .args(arguments.split(' '))
        .status()
        .unwrap();
    assert!(status.success(), "ip {arguments}");
}

fn ifindex(name: &str) -> u32 {
    // Any socket of this namespace answers for it.
    let _socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    nix::net::if_::if_nametoindex(name).unwrap()
}

fn queue(name: &str) -> QueueId {
    QueueId {
        ifindex: ifindex(name),
        queue: 0,
    }
}

/// A packet socket that sees what arrives on an interface.
fn capture(name: &str) -> OwnedFd {
    let all = u16::try_from(libc::ETH_P_ALL).unwrap().to_be();
    // SAFETY: takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(all)) };
    assert!(fd >= 0);
    // SAFETY: a new descriptor.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: any bytes are a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    address.sll_protocol = all;
    address.sll_ifindex = i32::try_from(ifindex(name)).unwrap();
    let length = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).unwrap();
    // SAFETY: the address has the length given.
    let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) };
    assert_eq!(bound, 0, "{}", io::Error::last_os_error());
    fd
}

/// Waits for a captured packet of this type.
fn captured(fd: &OwnedFd, ethertype: [u8; 2]) -> Vec<u8> {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut buffer = [0_u8; 4096];
    loop {
        assert!(Instant::now() < deadline, "nothing was captured");
        if let Ok(bytes) = nix::sys::socket::recv(
            fd.as_raw_fd(),
            &mut buffer,
            nix::sys::socket::MsgFlags::MSG_DONTWAIT,
        ) {
            if buffer[12..14] == ethertype {
                return buffer[..bytes].to_vec();
            }
        } else {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A broadcast of an experimental EtherType.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
fn broadcast(last: u8) -> Vec<u8> {
    let mut packet = vec![0xff; 6];
    packet.extend([2, 0, 0, 0, 0, 1]);
    packet.extend(ETHERTYPE);
    packet.resize(100, last);
    packet
}

fn send(umem: &mut Umem, socket: &mut Socket, packet: &[u8]) {
    let frame = umem.allocate().unwrap();
    umem.bytes(&frame)[HEADROOM..HEADROOM + packet.len()].copy_from_slice(packet);
    let address = umem.lend(frame, HEADROOM);
    let length = u32::try_from(packet.len()).unwrap();
    assert!(socket.tx.push(Descriptor {
        address,
        length,
        options: 0
    }));
    socket.tx.publish();
    while !socket.kick_tx().unwrap() {}
}

/// Collects completions until all frames are back.
fn complete(umem: &mut Umem, sockets: &mut [Socket]) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while umem.free_frames() < umem.frames() as usize {
        assert!(Instant::now() < deadline, "frames were lost");
        for socket in &mut *sockets {
            while let Some(address) = socket.completion.pop() {
                let frame = umem.take_back(address).expect("a frame that was sent");
                umem.free(frame);
            }
            socket.completion.release();
        }
    }
}

#[test]
fn packets_leave_on_every_socket_of_a_shared_umem() {
    in_namespace(|| {
        let mut umem = Umem::new(64).unwrap();
        let (mut sockets, mode) = open_all(&umem, &[queue("a0"), queue("b0")]).unwrap();
        assert_eq!(mode, CopyMode::Copy, "veth has no zero-copy");
        let peers = [capture("a1"), capture("b1")];
        for round in 0..100 {
            for (socket, peer) in sockets.iter_mut().zip(&peers) {
                let packet = broadcast(round);
                send(&mut umem, socket, &packet);
                assert_eq!(captured(peer, ETHERTYPE), packet);
            }
            complete(&mut umem, &mut sockets);
        }
        assert_eq!(umem.lent_frames(), 0);
        for socket in &sockets {
            assert_eq!(socket.statistics().unwrap().tx_invalid, 0);
        }
    });
}

#[test]
fn a_queue_that_does_not_exist_is_named_in_the_error() {
    in_namespace(|| {
        let umem = Umem::new(64).unwrap();
        let missing = QueueId {
            queue: 77,
            ..queue("b0")
        };
        let error = open_all(&umem, &[queue("a0"), missing]).unwrap_err();
        assert_eq!(error.at, missing);
        open_all(&umem, &[queue("a0"), queue("b0")])
            .expect("failed attempts leave the queues free");
    });
}
