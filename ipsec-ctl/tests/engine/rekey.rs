//! Traffic that goes on while SAs come and go: every packet is numbered.

use std::{
    net::UdpSocket,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use ipsec_common::Spi;
use ipsec_ctl::{
    dataplane::seam::{Command, Direction, SaId, SaSpec, TunnelId},
    esp::EspKeys,
};

use crate::{
    fast::fast_gateways,
    gateway::{Gateway, gateways, install, sa_spec, tunnel},
    net::{Net, client},
};

/// Time between two numbered packets.
const PACE: Duration = Duration::from_micros(500);
const REKEYS: u8 = 20;

/// Receives numbers on host B until it has heard nothing for some seconds.
fn receive(net: &Net) -> thread::JoinHandle<Vec<u64>> {
    let socket = net.inside("hb", || {
        let socket = UdpSocket::bind("10.2.0.2:7").unwrap();
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &(16 << 20))
            .unwrap();
        let patience = Some(Duration::from_secs(3));
        socket.set_read_timeout(patience).unwrap();
        socket
    });
    thread::spawn(move || {
        let (mut numbers, mut buffer) = (Vec::new(), [0; 64]);
        while let Ok(8) = socket.recv(&mut buffer) {
            numbers.push(u64::from_be_bytes(*buffer.first_chunk().unwrap()));
        }
        numbers
    })
}

/// Sends numbers from host A, one every [`PACE`], until it is told to stop; tells how many there were.
fn send(socket: UdpSocket, stop: &Arc<AtomicBool>) -> thread::JoinHandle<u64> {
    let stop = Arc::clone(stop);
    thread::spawn(move || {
        let (start, mut number) = (Instant::now(), 0_u64);
        while !stop.load(Ordering::Relaxed) {
            socket.send(&number.to_be_bytes()).unwrap();
            number += 1;
            let next = start + PACE * u32::try_from(number).unwrap();
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        number
    })
}

/// An SA of a later generation: SPI and keys of its own.
fn renewed(generation: u8, direction: Direction) -> SaSpec {
    let (id, local, remote) = match direction {
        Direction::Inbound => (SaId(100 + u64::from(generation)), 2, 1),
        Direction::Outbound => (SaId(100 + u64::from(generation)), 1, 2),
    };
    SaSpec {
        id,
        spi: Spi(0x2000 + u32::from(generation)),
        keys: EspKeys {
            cipher: vec![100 + generation; 32].into(),
            integrity: vec![100 + generation; 64].into(),
        },
        ..sa_spec(direction, local, remote, false, false)
    }
}

/// Moves A's traffic to B from one SA to the next, again and again, as the daemon does: inbound first, the old inbound
/// one removed after a grace period.
fn rekey(a: &Gateway, b: &Gateway) {
    let (mut old_inbound, mut old_outbound) = (SaId(1), SaId(2));
    for generation in 0..REKEYS {
        let [inbound, outbound] = [Direction::Inbound, Direction::Outbound]
            .map(|direction| renewed(generation, direction));
        let (new_inbound, new_outbound) = (inbound.id, outbound.id);
        b.command(Command::Install(Box::new(inbound)));
        a.command(Command::Install(Box::new(outbound)));
        thread::sleep(Duration::from_millis(50));
        a.command(Command::Remove(old_outbound));
        b.command(Command::Remove(old_inbound));
        (old_inbound, old_outbound) = (new_inbound, new_outbound);
    }
}

fn nothing_is_lost_or_reordered(net: &Net, a: &Gateway, b: &Gateway) {
    // The first packets find out the next hops.
    let warm_up = receive(net);
    let socket = client(net, "10.2.0.2", false);
    let stop = Arc::new(AtomicBool::new(false));
    let sent = send(socket.try_clone().unwrap(), &stop);
    thread::sleep(Duration::from_millis(500));
    stop.store(true, Ordering::Relaxed);
    assert!(sent.join().unwrap() > 0);
    assert!(!warm_up.join().unwrap().is_empty());

    let received = receive(net);
    stop.store(false, Ordering::Relaxed);
    let sent = send(socket, &stop);
    rekey(a, b);
    stop.store(true, Ordering::Relaxed);
    let sent = sent.join().unwrap();
    let received = received.join().unwrap();
    assert!(sent > 1000, "{sent} packets are no load");
    let all: Vec<u64> = (0..sent).collect();
    let reordered = received.windows(2).filter(|pair| pair[0] > pair[1]).count();
    assert!(
        received == all,
        "{} of {sent} arrived, {reordered} late: {:?} {:?}",
        received.len(),
        a.dropped(),
        b.dropped()
    );
}

#[test]
fn a_switch_of_sas_under_load_neither_loses_nor_reorders_on_the_slow_path() {
    let Some(net) = Net::new("switch-slow") else {
        return;
    };
    let (a, b) = gateways(&net, false, false);
    nothing_is_lost_or_reordered(&net, &a, &b);
}

#[test]
fn a_switch_of_sas_under_load_neither_loses_nor_reorders_on_the_fast_path() {
    let Some(net) = Net::new("switch-fast") else {
        return;
    };
    let Some((a, b)) = fast_gateways(&net, false, false) else {
        return;
    };
    nothing_is_lost_or_reordered(&net, &a, &b);
    let stats = a.run(|_, engine, _| engine.sa_stats());
    let last = stats.last().unwrap();
    assert!(last.fast.packets > 100 * last.slow.packets, "{last:?}");
}

#[test]
fn packets_wait_for_the_sa_that_they_asked_for_and_arrive_in_order() {
    let Some(net) = Net::new("wait") else { return };
    let (a, b) = (Gateway::start(&net, "ga"), Gateway::start(&net, "gb"));
    a.command(Command::SetTunnel(Box::new(tunnel(1, 2))));
    b.command(Command::SetTunnel(Box::new(tunnel(2, 1))));
    for gateway in [&a, &b] {
        gateway.command(Command::SetCarrier(TunnelId(1), true));
        gateway.command(Command::Configured);
    }
    let received = receive(&net);
    let socket = client(&net, "10.2.0.2", false);
    for number in 0..10_u64 {
        socket.send(&number.to_be_bytes()).unwrap();
    }
    install(&b, 2, 1, false, false);
    install(&a, 1, 2, false, false);
    let received = received.join().unwrap();
    assert_eq!(received, (0..10).collect::<Vec<u64>>(), "{:?}", a.dropped());
}
