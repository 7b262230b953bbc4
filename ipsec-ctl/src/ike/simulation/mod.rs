//! Two endpoints on a network that loses, repeats, reorders and delays, in virtual time, from one seed.
//!
//! `IPSEC_XDP_SEED=N` runs one seed alone; a failure prints the seed that it needs. `IPSEC_XDP_SEEDS=N` sets how many
//! are run. `IPSEC_XDP_TRACE=1` prints what the endpoints tell their data planes.

mod exchanges;
mod extensions;
mod hostile;
mod lossy;
mod many;
mod mobike;
mod network;
mod node;
mod pair;
mod peers;
mod refusals;
mod rekey;
mod restarts;
mod routability;
mod search;
mod transport;
mod uncallable;
mod upkeep;
