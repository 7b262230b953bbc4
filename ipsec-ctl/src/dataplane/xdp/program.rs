//! The XDP program in the kernel: loading, attaching and pinning it, and typed access to its maps.
//!
//! Everything is pinned under `/sys/fs/bpf/ipsec-xdp/INSTANCE/vABI`, so that it outlives this process; the next one
//! takes it over. What goes into the maps is the engine's decision, what it means stands in `ipsec_common::maps`.

use std::{
    collections::BTreeMap,
    fs, io,
    net::IpAddr,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader, Pod, include_bytes_aligned,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, XskMap},
    programs::{
        ProgramError as AyaError, Xdp, XdpMode,
        links::{FdLink, PinnedLink},
        xdp::XdpLink,
    },
};
use ipsec_common::{
    Reason, Spi,
    classify::ike::IkeSpi,
    maps::{
        ABI, Header, InboundEntry, InboundKey, LinkEntry, MappedAddress, SOCKET_SLOTS, Settings,
        TunnelEntry, VlanKey, mapped,
    },
};

use super::af_xdp::socket::QueueId;
use crate::{dataplane::seam::OffloadReason, net::bpf_fs};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/ipsec-ebpf.o"));

/// Above the folders of all instances.
const PINS: &str = "/sys/fs/bpf/ipsec-xdp";

/// Why the program is not in the kernel, or a map could not be written.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// The binary holds no program.
    #[error("built without the XDP program; use `cargo xtask build`")]
    NotBuilt,
    /// The instance's name cannot be the name of a folder.
    #[error("`{0}` cannot be the name of an instance")]
    Instance(String),
    /// The kernel or the file system refused a step.
    #[error("{step}: {reason}")]
    Kernel {
        /// What was being done.
        step: &'static str,
        /// What the kernel said, with the verifier's words where there are any.
        reason: String,
    },
}

/// Turns an error of a library into ours; the sources' texts are joined, since aya keeps the errno in the last of them.
fn refused<E: std::error::Error>(step: &'static str) -> impl Fn(E) -> ProgramError {
    move |error| {
        let mut reason = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            reason = format!("{reason}: {cause}");
            source = cause.source();
        }
        ProgramError::Kernel { step, reason }
    }
}

/// How the program sits on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachMode {
    /// In the driver.
    Native,
    /// Behind it, at a price: the driver has no XDP.
    Generic,
}

impl AttachMode {
    const ALL: [Self; 2] = [Self::Native, Self::Generic];

    /// Name in `status` and in pins.
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }
}

/// The loaded program and its maps.
pub struct Program {
    folder: PathBuf,
    ebpf: Ebpf,
    settings: Array<MapData, Settings>,
    inbound: HashMap<MapData, InboundKey, InboundEntry>,
    tunnels: HashMap<MapData, u32, TunnelEntry>,
    addresses: HashMap<MapData, MappedAddress, u32>,
    links: HashMap<MapData, u32, LinkEntry>,
    vlans: HashMap<MapData, VlanKey, u32>,
    sockets: XskMap<MapData>,
    counters: PerCpuArray<MapData, u64>,
    ike_peers: HashMap<MapData, MappedAddress, u32>,
    ike_spis: HashMap<MapData, IkeSpi, u32>,
    words: MapData,
    /// Interfaces and their elements of the XSKMAP: first and number.
    regions: BTreeMap<u32, (u32, u32)>,
}

impl Program {
    /// Loads the program, or takes over what a process of this instance left pinned. SAs, tunnels, addresses and VLANs of
    /// that process are forgotten; its attachments, its counters and whose IKE it knew stay.
    ///
    /// # Errors
    ///
    /// [`ProgramError`].
    pub fn load(instance: &str) -> Result<Self, ProgramError> {
        if OBJECT.is_empty() {
            return Err(ProgramError::NotBuilt);
        }
        let folder = folder(instance)?.join(format!("v{ABI}"));
        bpf_fs::ensure_mounted().map_err(refused("mount the BPF file system"))?;
        fs::create_dir_all(folder.join("links")).map_err(refused("create the folder of pins"))?;
        if !pins_are_current(&folder) {
            remove_files(&folder).map_err(refused("remove pins of another version"))?;
        }
        let mut ebpf = EbpfLoader::new()
            // The program looks into no structure of the kernel, so that one without /sys/kernel/btf takes it as well.
            .btf(None)
            .default_map_pin_directory(&folder)
            .load(OBJECT)
            .map_err(refused("load the maps of the XDP program"))?;
        xdp(&mut ebpf)?
            .load()
            .map_err(refused("load the XDP program"))?;
        let mut header: Array<MapData, Header> = typed(&mut ebpf, "HEADER")?;
        header
            .set(0, Header::CURRENT, 0)
            .map_err(refused("write the header of the pins"))?;
        let words = match ebpf.take_map("SA_WORDS") {
            Some(Map::Array(words)) => words,
            _ => return Err(missing("SA_WORDS")),
        };
        let mut program = Self {
            folder,
            settings: typed(&mut ebpf, "SETTINGS")?,
            inbound: typed(&mut ebpf, "INBOUND")?,
            tunnels: typed(&mut ebpf, "TUNNELS")?,
            addresses: typed(&mut ebpf, "ADDRESSES")?,
            links: typed(&mut ebpf, "LINKS")?,
            vlans: typed(&mut ebpf, "VLANS")?,
            sockets: typed(&mut ebpf, "SOCKETS")?,
            counters: typed(&mut ebpf, "COUNTERS")?,
            ike_peers: typed(&mut ebpf, "IKE_PEERS")?,
            ike_spis: typed(&mut ebpf, "IKE_SPIS")?,
            words,
            regions: BTreeMap::new(),
            ebpf,
        };
        program.forget()?;
        Ok(program)
    }

    fn forget(&mut self) -> Result<(), ProgramError> {
        let step = refused("empty a map");
        clear(&mut self.inbound).map_err(&step)?;
        clear(&mut self.tunnels).map_err(&step)?;
        clear(&mut self.addresses).map_err(&step)?;
        clear(&mut self.links).map_err(&step)?;
        clear(&mut self.vlans).map_err(&step)
    }

    /// The array of SA words, to be mapped.
    ///
    /// # Errors
    ///
    /// No file descriptor is left.
    pub fn words(&self) -> io::Result<OwnedFd> {
        self.words.fd().as_fd().try_clone_to_owned()
    }

    /// Puts the program on an interface, where it passes everything until [`Program::activate`].
    ///
    /// # Errors
    ///
    /// Why the interface has no fast path.
    pub fn attach(&mut self, ifindex: u32) -> Result<AttachMode, OffloadReason> {
        if let Some(mode) = self.take_over(ifindex) {
            return Ok(mode);
        }
        for mode in AttachMode::ALL {
            match self.attach_as(ifindex, mode) {
                Ok(()) => return Ok(mode),
                Err(Refusal::Foreign) => return Err(OffloadReason::ForeignXdpProgram),
                Err(Refusal::Mode(reason)) => {
                    tracing::debug!(ifindex, mode = mode.name(), %reason, "XDP was refused");
                }
            }
        }
        Err(OffloadReason::NoXdp)
    }

    /// Puts this program in the place of the one that an earlier process left on the interface, without a gap.
    fn take_over(&mut self, ifindex: u32) -> Option<AttachMode> {
        for mode in AttachMode::ALL {
            let pin = self.pin(ifindex, mode);
            if !pin.exists() {
                continue;
            }
            let updated = PinnedLink::from_pin(&pin)
                .ok()
                .and_then(|link| XdpLink::try_from(FdLink::from(link)).ok())
                .and_then(|link| xdp(&mut self.ebpf).ok()?.attach_to_link(link).ok());
            if updated.is_some() {
                return Some(mode);
            }
            // The interface it was on is gone, and the index went to another.
            if let Err(error) = fs::remove_file(&pin) {
                tracing::warn!(%error, pin = %pin.display(), "a stale pin stays");
            }
        }
        None
    }

    fn attach_as(&mut self, ifindex: u32, mode: AttachMode) -> Result<(), Refusal> {
        let flags = match mode {
            AttachMode::Native => XdpMode::Driver,
            AttachMode::Generic => XdpMode::Skb,
        };
        let pin = self.pin(ifindex, mode);
        let program = xdp(&mut self.ebpf).map_err(|error| Refusal::Mode(error.to_string()))?;
        let link = program
            .attach_to_if_index(ifindex, flags)
            .and_then(|id| program.take_link(id))
            .map_err(Refusal::from)?;
        let link = FdLink::try_from(link).map_err(|error| Refusal::Mode(error.to_string()))?;
        link.pin(pin)
            .map(|_link| ())
            .map_err(|error| Refusal::Mode(error.to_string()))
    }

    /// Takes the program off an interface.
    pub fn detach(&mut self, ifindex: u32) {
        self.deactivate(ifindex);
        self.regions.remove(&ifindex);
        for mode in AttachMode::ALL {
            // There is no pin of the other mode.
            let _ = fs::remove_file(self.pin(ifindex, mode));
        }
    }

    /// Interfaces that carry the program, those of an earlier process included.
    pub fn attached(&self) -> Vec<u32> {
        let entries = fs::read_dir(self.folder.join("links"))
            .into_iter()
            .flatten();
        entries
            .filter_map(|entry| {
                let name = entry.ok()?.file_name();
                name.to_str()?.split_once('-')?.0.parse().ok()
            })
            .collect()
    }

    /// Enters the socket of a queue. `queues` is the number of queues that its interface has.
    ///
    /// # Errors
    ///
    /// The kernel refused, or there are more queues than the map has room for.
    pub fn enter_socket(
        &mut self,
        at: QueueId,
        queues: u32,
        socket: impl AsRawFd,
    ) -> io::Result<()> {
        let (base, _) = reserve(&mut self.regions, at.ifindex, queues)
            .filter(|(_, reserved)| at.queue < *reserved)
            .ok_or(io::ErrorKind::StorageFull)?;
        self.sockets
            .set(base + at.queue, socket, 0)
            .map_err(io::Error::other)
    }

    /// Lets the program redirect what arrives on an interface, all of whose sockets are entered.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub fn activate(&mut self, ifindex: u32, mac: [u8; 6]) -> Result<(), ProgramError> {
        let (sockets_base, queues) = self.regions.get(&ifindex).copied().unwrap_or_default();
        let entry = LinkEntry {
            sockets_base,
            queues,
            mac,
            padding: 0,
        };
        self.links
            .insert(ifindex, entry, 0)
            .map_err(refused("enter an interface"))
    }

    /// Makes the program pass everything on an interface, so that the slow path does its work.
    pub fn deactivate(&mut self, ifindex: u32) {
        // It was not active.
        let _ = self.links.remove(&ifindex);
    }

    /// Sets ports and limits.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub fn set_settings(&mut self, settings: Settings) -> Result<(), ProgramError> {
        self.settings
            .set(0, settings, 0)
            .map_err(refused("write the settings"))
    }

    /// Notes that IKE from this address may be a peer's.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub fn know_peer(&mut self, peer: IpAddr) -> Result<(), ProgramError> {
        self.ike_peers
            .insert(mapped(peer), 1, 0)
            .map_err(refused("enter a peer"))
    }

    /// Notes an SPI of ours of an IKE SA.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub fn know_ike(&mut self, spi: IkeSpi) -> Result<(), ProgramError> {
        self.ike_spis
            .insert(spi, 1, 0)
            .map_err(refused("enter an IKE SA"))
    }

    /// Enters or changes an inbound SA.
    ///
    /// # Errors
    ///
    /// The kernel refused, or the map is full.
    pub fn set_inbound(
        &mut self,
        spi: Spi,
        destination: IpAddr,
        slot: u32,
        offloaded: bool,
    ) -> Result<(), ProgramError> {
        let entry = InboundEntry {
            slot,
            offloaded: u32::from(offloaded),
        };
        self.inbound
            .insert(InboundKey::new(spi, destination), entry, 0)
            .map_err(refused("enter an SA"))
    }

    /// Removes an inbound SA, if it is there.
    pub fn remove_inbound(&mut self, spi: Spi, destination: IpAddr) {
        // It was not there.
        let _ = self.inbound.remove(&InboundKey::new(spi, destination));
    }

    /// Enters or changes a tunnel, known by its device.
    ///
    /// # Errors
    ///
    /// The kernel refused, or the map is full.
    pub fn set_tunnel(&mut self, ifindex: u32, entry: TunnelEntry) -> Result<(), ProgramError> {
        self.tunnels
            .insert(ifindex, entry, 0)
            .map_err(refused("enter a tunnel"))
    }

    /// Removes a tunnel, if it is there.
    pub fn remove_tunnel(&mut self, ifindex: u32) {
        // It was not there.
        let _ = self.tunnels.remove(&ifindex);
    }

    /// Makes these the addresses of this host; ESP to others is routed like anything else.
    ///
    /// # Errors
    ///
    /// The kernel refused, or the map is full.
    pub fn set_addresses(&mut self, addresses: &[IpAddr]) -> Result<(), ProgramError> {
        let wanted: Vec<_> = addresses
            .iter()
            .map(|address| (mapped(*address), 1))
            .collect();
        replace(&mut self.addresses, &wanted).map_err(refused("enter our addresses"))
    }

    /// Makes these the VLAN devices over interfaces that carry the program.
    ///
    /// # Errors
    ///
    /// The kernel refused, or the map is full.
    pub fn set_vlans(&mut self, vlans: &[(VlanKey, u32)]) -> Result<(), ProgramError> {
        replace(&mut self.vlans, vlans).map_err(refused("enter the VLANs"))
    }

    /// Packets that the program counted for this reason, over all CPUs.
    pub fn count(&self, reason: Reason) -> u64 {
        self.counters
            .get(&(reason as u32), 0)
            .map_or(0, |values| values.iter().sum())
    }

    fn pin(&self, ifindex: u32, mode: AttachMode) -> PathBuf {
        let name = format!("{ifindex}-{}", mode.name());
        self.folder.join("links").join(name)
    }
}

/// Takes the program off all interfaces and removes all pins of an instance.
///
/// # Errors
///
/// [`ProgramError`].
pub fn release(instance: &str) -> Result<(), ProgramError> {
    let folder = folder(instance)?;
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(refused("remove the pins")(error))
        }
        _ => Ok(()),
    }
}

enum Refusal {
    /// Another program is there.
    Foreign,
    /// Not in this mode.
    Mode(String),
}

impl From<AyaError> for Refusal {
    fn from(error: AyaError) -> Self {
        if let AyaError::SyscallError(call) = &error
            && let Some(libc::EBUSY | libc::EEXIST) = call.io_error.raw_os_error()
        {
            return Self::Foreign;
        }
        match refused("attach")(error) {
            ProgramError::Kernel { reason, .. } => Self::Mode(reason),
            other => Self::Mode(other.to_string()),
        }
    }
}

fn folder(instance: &str) -> Result<PathBuf, ProgramError> {
    // The BPF file system takes no dots.
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if instance.is_empty() || !instance.chars().all(is_name) {
        return Err(ProgramError::Instance(instance.to_owned()));
    }
    Ok(Path::new(PINS).join(instance))
}

/// Whether the maps pinned here have the layouts of this version; true also where there are none.
fn pins_are_current(folder: &Path) -> bool {
    let pin = folder.join("HEADER");
    if !pin.exists() {
        return true;
    }
    let header = MapData::from_pin(pin)
        .and_then(|data| Array::<_, Header>::try_from(Map::Array(data)))
        .and_then(|header| header.get(&0, 0));
    // All zero is what a process leaves that dies between making the maps and writing the header.
    header.is_ok_and(|header| header == Header::CURRENT)
}

/// Removes the maps' pins, but not those of attachments, which are brought over to a new program.
fn remove_files(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn xdp(ebpf: &mut Ebpf) -> Result<&mut Xdp, ProgramError> {
    ebpf.program_mut("gateway")
        .ok_or_else(|| missing("gateway"))?
        .try_into()
        .map_err(refused("find the XDP program"))
}

fn typed<M>(ebpf: &mut Ebpf, name: &'static str) -> Result<M, ProgramError>
where
    M: TryFrom<Map, Error = MapError>,
{
    let map = ebpf.take_map(name).ok_or_else(|| missing(name))?;
    M::try_from(map).map_err(refused("open a map"))
}

fn missing(name: &'static str) -> ProgramError {
    ProgramError::Kernel {
        step: name,
        reason: "not in the object".to_owned(),
    }
}

fn clear<K: Pod, V: Pod>(map: &mut HashMap<MapData, K, V>) -> Result<(), MapError> {
    let keys: Vec<_> = map.keys().collect::<Result<_, _>>()?;
    keys.iter().try_for_each(|key| map.remove(key))
}

fn replace<K: Pod + PartialEq, V: Pod>(
    map: &mut HashMap<MapData, K, V>,
    wanted: &[(K, V)],
) -> Result<(), MapError> {
    let keys: Vec<_> = map.keys().collect::<Result<_, _>>()?;
    for key in keys {
        if !wanted.iter().any(|(other, _)| *other == key) {
            map.remove(&key)?;
        }
    }
    wanted
        .iter()
        .try_for_each(|(key, value)| map.insert(key, value, 0))
}

/// Finds `queues` elements of the XSKMAP in a row for an interface, or those it has.
fn reserve(
    regions: &mut BTreeMap<u32, (u32, u32)>,
    ifindex: u32,
    queues: u32,
) -> Option<(u32, u32)> {
    if let Some(region) = regions.get(&ifindex)
        && region.1 >= queues
    {
        return Some(*region);
    }
    regions.remove(&ifindex);
    let mut taken: Vec<_> = regions.values().copied().collect();
    taken.sort_unstable();
    let mut base = 0_u32;
    for (start, length) in taken {
        if start.saturating_sub(base) >= queues {
            break;
        }
        base = start.saturating_add(length);
    }
    let fits = base.checked_add(queues)? <= SOCKET_SLOTS;
    fits.then(|| {
        regions.insert(ifindex, (base, queues));
        (base, queues)
    })
}

#[cfg(test)]
mod tests;
