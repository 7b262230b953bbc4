//! The daemon's log: one readable line for each event, on standard error.

use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, util::SubscriberInitExt};

/// Starts logging. `filter` is in the syntax of `RUST_LOG`, for instance `info` or `ipsec_ctl::ike=debug`.
///
/// # Errors
///
/// The filter's own words, if it cannot be parsed.
pub(super) fn start(filter: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|error| error.to_string())?;
    // Under systemd the journal has the time already, and a file wants no colours.
    let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::registry()
        .with(filter)
        .with(
            fmt::layer()
                .with_writer(std::io::stderr)
                .with_ansi(terminal)
                .with_target(false),
        )
        .try_init()
        .map_err(|error| error.to_string())
}
