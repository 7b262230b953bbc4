//! The sockets through which the kernel opens ESP in UDP: one for each peer behind a NAT, connected to it.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::SocketAddr,
};

use tokio::{net::UdpSocket, task::JoinHandle};

use crate::{
    dataplane::{
        seam::{Event, IkeDatagram},
        xdp::{engine::Lodge, slow::sockets::Datagram},
    },
    net::socket::encapsulated,
};

/// Our address and port, and the peer's.
type Pair = (SocketAddr, SocketAddr);

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    open: HashMap<Pair, Open>,
    /// Those that are open to find out whether a peer is there.
    trials: HashSet<Pair>,
}

/// Peers that are looked for at once: it takes only an SPI to make us look for one.
const MOST_TRIALS: usize = 16;

#[derive(Debug)]
struct Open {
    /// SAs that need it.
    users: usize,
    reader: JoinHandle<()>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Sockets {
    /// Has a socket for one more SA.
    pub(super) fn take(&mut self, pair: Pair, lodge: &Lodge) -> io::Result<()> {
        if let Some(open) = self.open.get_mut(&pair) {
            open.users += 1;
            return Ok(());
        }
        let (local, remote) = pair;
        let socket = encapsulated(local, remote, lodge.mark(), |source, bytes| {
            deliver(lodge, local, source, bytes);
        })?;
        let reader = tokio::spawn(read(UdpSocket::from_std(socket)?, local, lodge.clone()));
        self.open.insert(pair, Open { users: 1, reader });
        Ok(())
    }

    /// Has a socket for a peer that may be there now; tells whether there is one because of that.
    pub(super) fn try_out(&mut self, pair: Pair, lodge: &Lodge) -> io::Result<bool> {
        if self.open.contains_key(&pair) || self.trials.len() >= MOST_TRIALS {
            return Ok(false);
        }
        self.take(pair, lodge)?;
        self.trials.insert(pair);
        Ok(true)
    }

    /// Ends [`Self::try_out`]: the socket stays if SAs need it by now.
    pub(super) fn end_trial(&mut self, pair: Pair) {
        if self.trials.remove(&pair) {
            self.leave(pair);
        }
    }

    /// One SA needs it no more.
    pub(super) fn leave(&mut self, pair: Pair) {
        if let Some(open) = self.open.get_mut(&pair) {
            open.users -= 1;
            if open.users == 0 {
                self.open.remove(&pair);
            }
        }
    }
}

/// Hands what is no ESP to the daemon.
async fn read(socket: UdpSocket, local: SocketAddr, lodge: Lodge) {
    let mut buffer = vec![0; 65_535];
    loop {
        // Errors are those of earlier datagrams (ICMP), which reading them clears.
        if let Ok((length, source)) = socket.recv_from(&mut buffer).await {
            deliver(
                &lodge,
                local,
                source,
                buffer.get(..length).unwrap_or_default(),
            );
        }
    }
}

/// Only what is marked as IKE: ESP that comes out here belongs to no SA of the kernel.
fn deliver(lodge: &Lodge, local: SocketAddr, remote: SocketAddr, bytes: &[u8]) {
    if let Datagram::Ike(at) = Datagram::of(bytes) {
        lodge.send(Event::Ike(IkeDatagram {
            local,
            remote,
            bytes: bytes.get(at..).unwrap_or_default().to_vec(),
        }));
    }
}
