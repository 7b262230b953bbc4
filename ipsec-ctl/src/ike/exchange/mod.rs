//! Messages sorted once: a struct for each exchange and direction, in which nothing that it needs is missing or doubled.

mod sorted;

pub use sorted::{
    AuthRequest, AuthResponse, ChildOffer, ChildRequest, ChildResponse, Informational, InitRequest,
    InitResponse, Notifies, SortError,
};
