//! What the kernel's IPsec can do, found out by asking for it.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::atomic::{AtomicU32, Ordering},
};

use zeroize::Zeroizing;

use super::algorithms::{algorithms, key_lengths};
use crate::{
    esp::{EspKeys, EspSuite},
    net::xfrm::{Limits, Mode, Replay, State, Xfrm},
};

/// Whether the kernel has ESP with a suite: a state with it is added and removed again. It lets nothing through, for
/// its addresses are of no network (RFC 5737), and no policy knows it.
///
/// # Errors
///
/// The kernel's own words.
pub fn esp(xfrm: &Xfrm, suite: EspSuite) -> Result<(), String> {
    /// Probes of this process so far.
    static PROBES: AtomicU32 = AtomicU32::new(0);
    const TEST_NET: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 0));
    let (cipher, integrity) = key_lengths(suite);
    let keys = EspKeys {
        cipher: Zeroizing::new(vec![1; cipher]),
        integrity: Zeroizing::new(vec![1; integrity]),
    };
    let state = State {
        source: TEST_NET,
        destination: TEST_NET,
        // Two probes at once must not meet, of one process or of two.
        spi: 0x8000_0000
            | (std::process::id() << 8 & 0x7fff_ff00)
            | (PROBES.fetch_add(1, Ordering::Relaxed) & 0xff),
        mode: Mode::Tunnel,
        reqid: 0,
        if_id: 0,
        algorithms: algorithms(suite, &keys).ok_or("the keys do not fit the algorithms")?,
        replay: Replay::default(),
        encap: None,
        output_mark: None,
        limits: Limits::NONE,
        copy_dscp: true,
        clear_df: false,
        card: None,
    };
    match xfrm.add_state(&state) {
        Ok(()) => xfrm
            .remove_state(&state.id())
            .map_err(|error| error.to_string()),
        Err(error) => Err(error.reason),
    }
}
