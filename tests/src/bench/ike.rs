//! IKE set-ups: what answering one takes a processor, and how much memory an IKE SA keeps, beside strongSwan.
//!
//! One initiator of ours asks two responders in turn: charon, and an IKE endpoint of ours in a process of its own. The
//! IKE SAs have no children (RFC 6023): neither side installs anything in a data plane. A responder has one processor,
//! the initiator the other.

use std::{
    io::{BufRead, BufReader},
    net::IpAddr,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use nix::unistd::{SysconfVar, sysconf};

use super::{
    Effort,
    cores::{CpuClock, LOAD, WORK, stay_on},
    ike_end::IkeEnd,
    peer::{bed, pinned},
    report::{IkeLine, Memory},
    slice::Slice,
};
use crate::{
    netns::Netns,
    strongswan::{Connection, StrongSwan},
    topology::{Family, Side},
};

/// Suites, and how many set-ups there are to one with the first.
const SUITES: [(&str, usize); 2] = [
    ("aes256gcm16-prfsha384-x25519", 1),
    ("aes256-sha512-ecp521", 10),
];
/// Set-ups under way at a time.
const AT_ONCE: usize = 8;
/// Longest that one more may take to come up.
const PATIENCE: Duration = Duration::from_secs(10);
/// The argument with which the benchmark's program is the responder.
pub const ANSWER: &str = "--answer";

/// Measures the set-ups of each suite, and the memory of the IKE SAs of the first.
///
/// # Errors
///
/// One does not come up.
pub(super) fn measure(effort: &Effort) -> anyhow::Result<(Vec<IkeLine>, Memory)> {
    let mut lines = Vec::new();
    let mut memory = None;
    for (suite, fewer) in SUITES {
        let topologies = [bed()?, bed()?];
        let (asker, answerer) = (Side::A.outside(Family::V4), Side::B.outside(Family::V4));
        let open = |netns: &Netns| netns.run(|| IkeEnd::open(asker));
        let ours = Answerer::start(&topologies[0].gateway_b, answerer, suite)?;
        let swan = charon(&topologies[1].gateway_b, suite)?;
        let mut ends = [
            End::new(
                open(&topologies[0].gateway_a)?,
                ours.process()?,
                suite,
                answerer,
            )?,
            End::new(
                open(&topologies[1].gateway_a)?,
                swan.pid()?.as_raw(),
                suite,
                answerer,
            )?,
        ];
        stay_on(LOAD)?;
        let each = (effort.set_ups / effort.rounds / fewer).max(1);
        let mut rounds = Vec::new();
        for round in 0..=effort.rounds {
            let mut pair = [Slice::default(); 2];
            for (end, slice) in ends.iter_mut().zip(&mut pair) {
                *slice = end.come_up(each).context(suite)?;
            }
            // The first round warms up, and is what memory is measured against.
            if round == 0 {
                ends.iter_mut().try_for_each(End::remember)?;
            } else {
                rounds.push((pair[0], pair[1]));
            }
        }
        if memory.is_none() {
            memory = Some(Memory {
                sas: ends[0].asker.up,
                ours: ends[0].bytes_each()?,
                theirs: ends[1].bytes_each()?,
            });
        }
        lines.push(IkeLine { suite, rounds });
    }
    Ok((lines, memory.context("no suite")?))
}

/// Answers for ever, as a process of its own: prints a line when it can be asked.
///
/// # Errors
///
/// The address or suite is none.
#[expect(clippy::print_stdout, reason = "its parent waits for it")]
pub fn answer(address: &str, suite: &str) -> anyhow::Result<()> {
    let mut end = IkeEnd::open(address.parse()?)?;
    end.answer(suite)?;
    println!("ready");
    loop {
        end.turn()?;
    }
}

/// A responder of ours; ends when dropped.
struct Answerer(Child);

impl Answerer {
    fn start(netns: &Netns, address: IpAddr, suite: &str) -> anyhow::Result<Self> {
        let program = std::env::current_exe()?;
        let mut command = netns.command(&program.to_string_lossy())?;
        command
            .args([ANSWER, &address.to_string(), suite])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut child = Self(pinned(WORK, || Ok(command.spawn()?))?);
        let output = child.0.stdout.take().context("its output")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        anyhow::ensure!(line.trim() == "ready", "a responder of ours did not start");
        Ok(child)
    }

    fn process(&self) -> anyhow::Result<i32> {
        Ok(i32::try_from(self.0.id())?)
    }
}

impl Drop for Answerer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn charon(netns: &Netns, suite: &str) -> anyhow::Result<StrongSwan> {
    let mut connection = Connection::between_sites(Side::B, suite, "aes256gcm16");
    connection.remote = None;
    connection.local_id = "hub.example".to_owned();
    connection.remote_id = "%any".to_owned();
    connection.lines = [
        "encap = no",
        "unique = never",
        "childless = allow",
        "rekey_time = 0",
    ]
    .map(str::to_owned)
    .to_vec();
    pinned(WORK, || {
        let swan = StrongSwan::start_silent(netns)?;
        swan.load(&connection)?;
        Ok(swan)
    })
}

/// An initiator of ours and the responder that it asks.
struct End {
    asker: IkeEnd,
    responder: i32,
    suite: &'static str,
    remote: IpAddr,
    asked: u32,
    /// Memory of the responder with so many IKE SAs.
    before: (u64, usize),
}

impl End {
    fn new(
        asker: IkeEnd,
        responder: i32,
        suite: &'static str,
        remote: IpAddr,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            asker,
            responder,
            suite,
            remote,
            asked: 0,
            before: (0, 0),
        })
    }

    /// Has so many more come up.
    fn come_up(&mut self, more: usize) -> anyhow::Result<Slice> {
        let clock = CpuClock::of_process(self.responder);
        let (wall, cpu) = (Instant::now(), clock.now()?);
        let goal = self.asker.up + more;
        let mut progress = (self.asker.up, wall);
        while self.asker.up < goal {
            let under_way = self.asked as usize - self.asker.up;
            if under_way < AT_ONCE && (self.asked as usize) < goal {
                self.asker.ask(self.asked, self.suite, self.remote)?;
                self.asked += 1;
            } else {
                self.asker.turn()?;
            }
            if self.asker.up > progress.0 {
                progress = (self.asker.up, Instant::now());
            } else if progress.1.elapsed() > PATIENCE {
                bail!(
                    "{} of {goal} came up; {}",
                    self.asker.up,
                    self.asker
                        .failure
                        .as_deref()
                        .unwrap_or("the rest is silence")
                );
            }
        }
        Ok(Slice {
            packets: more as u64,
            wall: wall.elapsed(),
            cpu: clock.now()? - cpu,
        })
    }

    fn remember(&mut self) -> anyhow::Result<()> {
        self.before = (resident(self.responder)?, self.asker.up);
        Ok(())
    }

    /// Bytes by which the responder has grown for each IKE SA since [`Self::remember`].
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    fn bytes_each(&self) -> anyhow::Result<f64> {
        let grown = resident(self.responder)?.saturating_sub(self.before.0);
        Ok(grown as f64 / (self.asker.up - self.before.1).max(1) as f64)
    }
}

/// Bytes of memory that a process has.
fn resident(process: i32) -> anyhow::Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{process}/statm"))?;
    let pages: u64 = text.split_whitespace().nth(1).context("statm")?.parse()?;
    let page = sysconf(SysconfVar::PAGE_SIZE)?.unwrap_or(4096);
    Ok(pages * u64::try_from(page)?)
}
