//! Round trips of one UDP packet at a time between the hosts of two sites.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow};

use super::cores::{LOAD, WORK, stay_on};
use crate::topology::{Family, Side, Topology};

/// Bytes of UDP payload.
const PAYLOAD: usize = 64;
/// Longest that an answer may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// Round trips before those that count.
const WARM_UP: usize = 20;

/// Microseconds of so many round trips.
///
/// # Errors
///
/// An answer does not come.
pub(super) fn round_trips(topology: &Topology, count: usize) -> anyhow::Result<Vec<f64>> {
    let open = |side: Side| {
        topology.host(side).run(move || {
            let socket = UdpSocket::bind(SocketAddr::new(side.host(Family::V4), 0))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            Ok(socket)
        })
    };
    let (here, there) = (open(Side::A)?, open(Side::B)?);
    here.connect(there.local_addr()?)?;
    there.connect(here.local_addr()?)?;
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let echo = scope.spawn(|| {
            stay_on(WORK)?;
            answer(&there, &done)
        });
        let times = scope.spawn(|| {
            stay_on(LOAD)?;
            ask(&here, WARM_UP + count)
        });
        let times = times.join().map_err(|_| anyhow!("a thread panicked"))?;
        done.store(true, Ordering::Release);
        // Wakes the other end up.
        here.send(&[0])?;
        echo.join().map_err(|_| anyhow!("a thread panicked"))??;
        Ok(times?.split_off(WARM_UP))
    })
}

fn answer(socket: &UdpSocket, done: &AtomicBool) -> anyhow::Result<()> {
    let mut buffer = [0; PAYLOAD];
    loop {
        let length = socket
            .recv(&mut buffer)
            .context("a packet that is asked for")?;
        if done.load(Ordering::Acquire) {
            return Ok(());
        }
        socket.send(&buffer[..length])?;
    }
}

fn ask(socket: &UdpSocket, count: usize) -> anyhow::Result<Vec<f64>> {
    let mut buffer = [0; PAYLOAD];
    (0..count)
        .map(|_| {
            let start = Instant::now();
            socket.send(&[7; PAYLOAD])?;
            socket.recv(&mut buffer).context("an answer")?;
            Ok(start.elapsed().as_secs_f64() * 1e6)
        })
        .collect()
}
