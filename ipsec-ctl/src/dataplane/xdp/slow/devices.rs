//! The TUN devices of all tunnels: plaintext comes out of them for the slow path, and goes into them from both paths.

use std::{
    collections::HashMap,
    io,
    os::fd::AsFd,
    sync::{Arc, Mutex, PoisonError},
};

use arc_swap::ArcSwap;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::{
    dataplane::{seam::TunnelId, xdp::table::Tunnel},
    net::tun::Tun,
};

/// A tunnel's device.
#[derive(Debug)]
pub struct Device {
    /// Its tunnel.
    pub tunnel: Arc<Tunnel>,
    /// The device.
    pub tun: Arc<Tun>,
}

/// All devices, and which of them have packets for us.
#[derive(Debug)]
pub struct Devices {
    ready: Epoll,
    by_tunnel: ArcSwap<HashMap<TunnelId, Arc<Device>>>,
    writers: Mutex<()>,
}

impl Devices {
    /// No devices yet.
    ///
    /// # Errors
    ///
    /// Those of epoll_create1(2).
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            ready: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            by_tunnel: ArcSwap::default(),
            writers: Mutex::default(),
        })
    }

    /// Adds the device of a tunnel, or replaces it.
    ///
    /// # Errors
    ///
    /// Those of epoll_ctl(2).
    pub fn insert(&self, device: Device) -> io::Result<()> {
        let _writer = self.writers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut devices = HashMap::clone(&self.by_tunnel.load());
        let id = device.tunnel.id;
        let known = devices
            .get(&id)
            .is_some_and(|old| Arc::ptr_eq(&old.tun, &device.tun));
        if !known {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, u64::from(id.0));
            self.ready.add(device.tun.as_fd(), event)?;
        }
        if let Some(old) = devices.insert(id, Arc::new(device))
            && !known
        {
            let _ = self.ready.delete(old.tun.as_fd());
        }
        self.by_tunnel.store(Arc::new(devices));
        Ok(())
    }

    /// Forgets the device of a tunnel.
    pub fn remove(&self, id: TunnelId) {
        let _writer = self.writers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut devices = HashMap::clone(&self.by_tunnel.load());
        if let Some(device) = devices.remove(&id) {
            // It fails only for a device that is not there any more.
            let _ = self.ready.delete(device.tun.as_fd());
        }
        self.by_tunnel.store(Arc::new(devices));
    }

    /// The device of a tunnel.
    pub fn get(&self, id: TunnelId) -> Option<Arc<Device>> {
        self.by_tunnel.load().get(&id).cloned()
    }

    /// All devices.
    pub fn all(&self) -> Vec<Arc<Device>> {
        self.by_tunnel.load().values().cloned().collect()
    }

    /// Hands an inner packet to the kernel, as received on the tunnel's device.
    ///
    /// # Errors
    ///
    /// `NotFound` without a device; `EIO` while it is down.
    pub fn write(&self, id: TunnelId, packet: &[u8]) -> io::Result<()> {
        let devices = self.by_tunnel.load();
        let device = devices
            .get(&id)
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        device.tun.write(packet)
    }

    /// Waits until devices have packets, for so long at most.
    pub(super) fn wait(&self, milliseconds: u8) -> Vec<Arc<Device>> {
        let mut events = [EpollEvent::empty(); 64];
        let count = self
            .ready
            .wait(&mut events, EpollTimeout::from(milliseconds))
            .unwrap_or_default();
        let devices = self.by_tunnel.load();
        events
            .iter()
            .take(count)
            .filter_map(|event| u32::try_from(event.data()).ok())
            .filter_map(|id| devices.get(&TunnelId(id)).cloned())
            .collect()
    }
}
