//! One slow thing never delays another peer: a disk, clients, and whoever reads the log are stalled here, one after the other.
//!
//! Key exchanges and name servers that never end are stalled in the tests of the daemon's parts.

use std::{
    fs,
    io::{Read, Write, pipe},
    os::unix::{fs::OpenOptionsExt, net::UnixStream},
    process::ExitCode,
    thread,
};

use anyhow::{Context, anyhow, ensure};
use ipsec_ctl::api::{client::Client, model::Rekey};
use ipsec_tests::{
    cases,
    command::wait_for,
    gateway::{Gateway, PSK, Tunnel},
    pair::{self, PATIENCE, hosts_talk},
    suite,
    topology::{Family, Options, Side, Topology},
};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::stat::Mode,
    unistd::mkfifo,
};

fn main() -> ExitCode {
    suite::main(&cases![
        [] a_key_file_that_cannot_be_read_delays_no_tunnel,
        [] clients_that_are_stuck_delay_no_tunnel_and_no_other_client,
        [] a_log_that_nobody_reads_delays_no_tunnel,
    ])
}

fn tunnel(side: Side) -> Tunnel {
    let tunnel = Tunnel::between_sites(side, Family::V4);
    match side {
        Side::A => tunnel,
        Side::B => tunnel.respond(),
    }
}

/// The tunnel negotiates, and carries traffic.
fn is_alive(topology: &Topology, gateway: &Gateway<'_>) -> anyhow::Result<()> {
    let spi = || -> anyhow::Result<_> {
        let status = gateway.asked(async |client| client.status().await)?;
        let child = status
            .tunnels
            .first()
            .and_then(|tunnel| tunnel.children.first());
        child
            .and_then(|child| child.inbound)
            .map(|inbound| inbound.spi)
            .context("nothing is received")
    };
    let before = wait_for("an SA", PATIENCE, || spi().map(Some))?;
    gateway.asked(async |client| client.rekey("site", Rekey::Children).await)?;
    wait_for(
        "a new SA",
        PATIENCE,
        || Ok((spi()? != before).then_some(())),
    )?;
    hosts_talk(topology, Family::V4)
}

fn a_key_file_that_cannot_be_read_delays_no_tunnel() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (gateway, _other) = pair::start(&topology, tunnel(Side::A), tunnel(Side::B))?;
    let mut second = Tunnel::between_sites(Side::A, Family::V6);
    "second".clone_into(&mut second.name);
    gateway.configure("", &[tunnel(Side::A), second])?;
    // A FIFO blocks whoever reads it until somebody writes.
    let key = gateway.config().with_file_name("second.psk");
    fs::remove_file(&key)?;
    mkfifo(&key, Mode::S_IRUSR | Mode::S_IWUSR)?;
    let socket = gateway.socket();
    let reload = thread::spawn(move || -> anyhow::Result<_> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        Ok(runtime.block_on(async { Client::new(&socket).reload().await })?)
    });
    // It can be opened for writing once somebody reads it, who waits on until it is written to.
    let mut writer = wait_for("the reload to begin", PATIENCE, || {
        let flags = OFlag::O_NONBLOCK.bits();
        let opened = fs::File::options()
            .write(true)
            .custom_flags(flags)
            .open(&key);
        match opened {
            Err(error) if error.raw_os_error() == Some(Errno::ENXIO as i32) => Ok(None),
            opened => Ok(Some(opened?)),
        }
    })?;
    let refused = gateway.reload().err().map(|error| format!("{error:#}"));
    ensure!(
        refused
            .as_ref()
            .is_some_and(|why| why.contains("still being read")),
        "a second reload: {refused:?}"
    );
    is_alive(&topology, &gateway)?;
    ensure!(
        !reload.is_finished(),
        "the reload has a key that nobody wrote"
    );
    writer.write_all(PSK.as_bytes())?;
    drop(writer);
    let done = reload
        .join()
        .map_err(|_| anyhow!("the client panicked"))??;
    ensure!(done.lines == ["second added"], "{done:?}");
    Ok(())
}

fn clients_that_are_stuck_delay_no_tunnel_and_no_other_client() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (gateway, _other) = pair::start(&topology, tunnel(Side::A), tunnel(Side::B))?;
    let mut stuck = Vec::new();
    let mut stick = |count: usize, words: &[u8]| -> anyhow::Result<()> {
        for _ in 0..count {
            let mut stream = UnixStream::connect(gateway.socket())?;
            stream.write_all(words)?;
            stuck.push(stream);
        }
        Ok(())
    };
    // Some do not read what they asked for, some stop in the middle of a word, some say nothing.
    stick(40, b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n")?;
    stick(40, b"GET /sta")?;
    stick(40, b"")?;
    is_alive(&topology, &gateway)?;
    // More than are let in at the same time: they are cut off after some seconds, and the others have their turn.
    stick(100, b"")?;
    is_alive(&topology, &gateway)
}

fn a_log_that_nobody_reads_delays_no_tunnel() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let _other = Gateway::start(&topology.gateway_b, &[tunnel(Side::B)])?;
    let mut gateway = Gateway::prepare(&topology.gateway_a, "", &[tunnel(Side::A)])?;
    let (mut reader, writer) = pipe()?;
    let filled = fill(&writer)?;
    gateway.run_with_log(writer)?;
    gateway.wait_up("site", PATIENCE)?;
    is_alive(&topology, &gateway)?;
    ensure!(gateway.stop()?.success(), "it does not stop as it should");
    // Nothing came through the pipe that was full; what it holds is what the test wrote.
    let mut log = Vec::new();
    reader.read_to_end(&mut log)?;
    ensure!(log.len() >= filled && log[..filled].iter().all(|byte| *byte == b'.'));
    Ok(())
}

/// Fills a pipe until it takes no more; returns how much that was.
fn fill(pipe: &std::io::PipeWriter) -> anyhow::Result<usize> {
    let flags = OFlag::from_bits_truncate(fcntl(pipe, FcntlArg::F_GETFL)?);
    fcntl(pipe, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    let (mut pipe_end, mut filled) = (pipe.try_clone()?, 0);
    while let Ok(count) = pipe_end.write(&[b'.'; 1]) {
        filled += count;
    }
    fcntl(pipe, FcntlArg::F_SETFL(flags))?;
    Ok(filled)
}
