//! The keeping of tables, workers and ledger, over real links and sockets and a program that only takes notes.

use std::{
    collections::BTreeSet,
    process::Command,
    sync::{Mutex, PoisonError},
};

use super::*;
use crate::{
    dataplane::xdp::{
        events::Events, inbound::InboundPipeline, outbound::OutboundPipeline, path_mtu::PathMtus,
        slow::sockets::Sockets, table::Tables, words::WordsArray,
    },
    net::{netlink::Netlink, tests::in_namespace},
};

/// What a program was told.
#[derive(Debug, Default, PartialEq, Eq)]
struct Told {
    active: BTreeSet<u32>,
    sockets: BTreeSet<(u32, u32)>,
    tunnels: BTreeMap<u32, (u32, bool)>,
    inbound: BTreeMap<u32, (u32, bool)>,
}

#[derive(Clone, Default)]
struct Notes(Arc<Mutex<Told>>);

impl Notes {
    fn with<T>(&self, look: impl FnOnce(&mut Told) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Classifier for Notes {
    fn attach(&mut self, _: u32) -> Result<XdpMode, OffloadReason> {
        Ok(XdpMode::Native)
    }

    fn detach(&mut self, ifindex: u32) {
        self.deactivate(ifindex);
    }

    fn enter_socket(&mut self, at: QueueId, _: u32, _: BorrowedFd<'_>) -> io::Result<()> {
        self.with(|told| told.sockets.insert((at.ifindex, at.queue)));
        Ok(())
    }

    fn activate(&mut self, ifindex: u32, _: [u8; 6]) -> Result<(), ProgramError> {
        self.with(|told| told.active.insert(ifindex));
        Ok(())
    }

    fn deactivate(&mut self, ifindex: u32) {
        self.with(|told| told.active.remove(&ifindex));
    }

    fn set_tunnel(&mut self, device: u32, mtu: u32, offloaded: bool) -> Result<(), ProgramError> {
        self.with(|told| told.tunnels.insert(device, (mtu, offloaded)));
        Ok(())
    }

    fn remove_tunnel(&mut self, device: u32) {
        self.with(|told| told.tunnels.remove(&device));
    }

    fn set_inbound(&mut self, sa: &FastSa, offloaded: bool) -> Result<(), ProgramError> {
        self.with(|told| told.inbound.insert(sa.spi.0, (sa.slot, offloaded)));
        Ok(())
    }

    fn remove_inbound(&mut self, sa: &FastSa) {
        self.with(|told| told.inbound.remove(&sa.spi.0));
    }

    fn set_addresses(&mut self, _: &[IpAddr]) -> Result<(), ProgramError> {
        Ok(())
    }

    fn count(&self, _: Reason) -> u64 {
        0
    }
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.unwrap().success(), "ip {arguments}");
}

/// A fast path in a namespace with the ends of two veth pairs up, a0 and b0.
fn fast_path(classifier: Option<Box<dyn Classifier>>) -> FastPath {
    for pair in ["a", "b"] {
        ip(&format!("link add {pair}0 type veth peer name {pair}1"));
        ip(&format!("link set {pair}0 up"));
    }
    let (events, _) = Events::channel(8);
    let tables = Arc::new(Tables::new(WordsArray::anonymous(8).unwrap()));
    let outbound = OutboundPipeline::new(events.clone());
    let inbound = InboundPipeline::new(Arc::clone(&tables), events.clone());
    let slow = SlowPath::new(
        Sockets::open(500, 4500, 0).unwrap(),
        outbound.clone(),
        inbound.clone(),
        Arc::new(PathMtus::default()),
        Arc::clone(&tables),
        events,
    );
    let config = FastConfig {
        interfaces: None,
        fleet: FleetConfig {
            workers: Some(1),
            busy_poll: false,
        },
        resolver: Resolver::start(Arc::clone(&tables), 0).unwrap(),
        shared: Shared {
            tables,
            outbound,
            inbound,
        },
        exit: Arc::new(slow.unwrap()),
    };
    FastPath::new(config, classifier)
}

const TUNNEL: TunnelId = TunnelId(1);
const DEVICE: FastTunnel = FastTunnel {
    device: 99,
    mtu: 1400,
    fast_path: Configured::Auto,
};

fn sa() -> FastSa {
    FastSa::new(
        TUNNEL,
        Direction::Inbound,
        Spi(0x1000),
        [192, 0, 2, 1].into(),
        3,
    )
}

#[test]
fn links_come_and_go_and_the_workers_follow() {
    in_namespace(async || {
        let netlink = Netlink::open().unwrap();
        let notes = Notes::default();
        let mut fast = fast_path(Some(Box::new(notes.clone())));
        fast.set_tunnel(TUNNEL, DEVICE);
        let offload = fast.install(SaId(1), sa());
        assert_eq!(offload, Offload::Declined(OffloadReason::NoInterface));
        assert_eq!(notes.with(|told| told.inbound[&0x1000]), (3, false));

        let full = Ledger {
            sa: SaId(1),
            offload: Offload::Full,
        };
        let links = netlink.links().await.unwrap();
        assert_eq!(fast.set_links(&links), [full]);
        assert_eq!(fast.set_links(&links), [], "nothing new");
        notes.with(|told| {
            assert_eq!(told.active.len(), 2);
            assert_eq!(told.sockets.iter().map(|(_, queue)| *queue).max(), Some(0));
            assert_eq!(told.inbound[&0x1000], (3, true));
            assert_eq!(told.tunnels[&99], (1400, true));
        });
        let status = fast.status();
        assert_eq!(status.len(), 2);
        assert_eq!(
            (status[0].xdp, status[0].queues),
            (Some(XdpMode::Native), 1)
        );

        ip("link set b0 down");
        fast.set_links(&netlink.links().await.unwrap());
        assert_eq!(notes.with(|told| told.active.len()), 1);
        ip("link set b0 mtu 9000");
        ip("link set b0 up");
        let partial = Ledger {
            sa: SaId(1),
            offload: Offload::Partial(OffloadReason::MtuTooLarge),
        };
        assert_eq!(fast.set_links(&netlink.links().await.unwrap()), [partial]);

        fast.remove_tunnel(TUNNEL);
        notes.with(|told| assert!(told.inbound.is_empty() && told.tunnels.is_empty()));
        fast.stop();
        assert!(notes.with(|told| told.active.is_empty()));
    });
}

#[test]
fn a_firewall_that_appears_takes_tunnels_off_the_fast_path_and_back() {
    in_namespace(async || {
        let notes = Notes::default();
        let mut fast = fast_path(Some(Box::new(notes.clone())));
        fast.set_links(&Netlink::open().unwrap().links().await.unwrap());
        fast.set_tunnel(TUNNEL, DEVICE);
        assert_eq!(fast.install(SaId(1), sa()), Offload::Full);
        let declined = Ledger {
            sa: SaId(1),
            offload: Offload::Declined(OffloadReason::NetfilterRules),
        };
        assert_eq!(fast.set_foreign_netfilter(true), [declined]);
        notes.with(|told| {
            assert_eq!(told.tunnels[&99], (1400, false));
            assert_eq!(told.inbound[&0x1000], (3, false));
        });
        assert_eq!(fast.set_foreign_netfilter(true), []);
        assert_eq!(fast.set_foreign_netfilter(false)[0].offload, Offload::Full);
        fast.set_mtu(TUNNEL, 1300);
        assert_eq!(notes.with(|told| told.tunnels[&99]), (1300, true));
    });
}

#[test]
fn without_a_program_everything_is_declined_for_that_reason() {
    in_namespace(async || {
        let mut fast = fast_path(None);
        fast.set_links(&Netlink::open().unwrap().links().await.unwrap());
        fast.set_tunnel(TUNNEL, DEVICE);
        let offload = fast.install(SaId(1), sa());
        assert_eq!(offload, Offload::Declined(OffloadReason::NoXdp));
        assert_eq!(fast.status()[0].reason, Some(OffloadReason::NoXdp));
    });
}
