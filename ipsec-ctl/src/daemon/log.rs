//! The log: one readable line for each event, on standard error.
//!
//! A thread of its own writes it. If whoever reads it stops reading, lines are lost and counted; nothing waits for them.

use std::time::Duration;

use tracing::warn;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, util::SubscriberInitExt};

/// Lines that wait to be written; more are lost.
const LINES: usize = 4096;
/// How often losses are told.
const PERIOD: Duration = Duration::from_secs(1);

/// The log of this process. Dropping it writes what still waits, if that can be done within a second.
#[derive(Debug)]
pub(super) struct Log {
    lost: ErrorCounter,
    _writer: WorkerGuard,
}

/// Starts logging. `filter` is in the syntax of `RUST_LOG`, for instance `info` or `ipsec_ctl::ike=debug`.
///
/// # Errors
///
/// The filter's own words, if it cannot be parsed.
pub(super) fn start(filter: &str) -> Result<Log, String> {
    // Its warnings are about messages that nobody asked for, each shown whole. Who names it in the filter has them.
    let filter = format!("netlink_proto=error,{filter}");
    let filter = EnvFilter::try_new(filter).map_err(|error| error.to_string())?;
    let (writer, log) = writing_to(std::io::stderr());
    // Under systemd the journal has the time already, and a file wants no colours.
    let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::registry()
        .with(filter)
        .with(
            fmt::layer()
                .with_writer(writer)
                .with_ansi(terminal)
                .with_target(false),
        )
        .try_init()
        .map_err(|error| error.to_string())?;
    Ok(log)
}

fn writing_to(output: impl std::io::Write + Send + 'static) -> (NonBlocking, Log) {
    let (writer, guard) = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(LINES)
        .thread_name("log")
        .finish(output);
    let lost = writer.error_counter();
    let log = Log {
        lost,
        _writer: guard,
    };
    (writer, log)
}

impl Log {
    /// Tells how many lines were lost, for ever.
    pub(super) fn tell_losses(&self) -> impl Future<Output = ()> + Send + use<> {
        let lost = self.lost.clone();
        async move {
            let mut told = 0;
            loop {
                tokio::time::sleep(PERIOD).await;
                let now = lost.dropped_lines();
                if now > told {
                    // If this line is lost, too, the number grows, and the next turn tells it again.
                    warn!("{now} lines of the log were lost so far: whoever reads it is too slow");
                    told = now;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::mpsc;

    use super::*;

    /// An output that takes nothing until the other end of its channel goes.
    struct Stuck(mpsc::Receiver<()>);

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_log_that_nobody_reads_stops_nobody_and_counts_what_it_loses() {
        let (released, stuck) = mpsc::channel();
        let (mut writer, log) = writing_to(Stuck(stuck));
        let lines = 2 * LINES;
        for _ in 0..lines {
            writer.write_all(b"a line\n").unwrap();
        }
        // One may be on its way to the output already.
        let lost = log.lost.dropped_lines();
        assert!([lines - LINES, lines - LINES - 1].contains(&lost), "{lost}");
        drop(released);
    }
}
