//! The cryptography by itself: ring on one buffer, on the processor of the worker.

use std::time::{Duration, Instant};

use ipsec_ctl::{dataplane::seam::Direction, esp::EspSuite};
use ring::aead::{
    AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey,
};

use super::{
    cores::{CpuClock, WORK, stay_on},
    packets::Size,
    slice::Slice,
};

/// Bytes of an ICV.
const TAG: usize = 16;

fn algorithm(suite: EspSuite) -> anyhow::Result<&'static Algorithm> {
    match suite {
        EspSuite::Aes128Gcm16 => Ok(&AES_128_GCM),
        EspSuite::Aes256Gcm16 => Ok(&AES_256_GCM),
        EspSuite::ChaCha20Poly1305 => Ok(&CHACHA20_POLY1305),
        EspSuite::AesCbc { .. } => anyhow::bail!("not a suite of ring's"),
    }
}

/// Payload, padding and trailer of ESP around an inner packet.
fn text_bytes(inner: usize) -> usize {
    (inner + 2).next_multiple_of(4)
}

/// Seals or opens packets of these sizes for a while.
///
/// # Errors
///
/// The cipher refuses, or there is no such processor.
pub(super) fn ring_alone(
    suite: EspSuite,
    direction: Direction,
    size: Size,
    time: Duration,
) -> anyhow::Result<Slice> {
    let algorithm = algorithm(suite)?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            stay_on(WORK)?;
            let key = vec![7; algorithm.key_len()];
            let refused = |_| anyhow::anyhow!("the cipher refused");
            let key = LessSafeKey::new(UnboundKey::new(algorithm, &key).map_err(refused)?);
            match direction {
                Direction::Outbound => seal(&key, size, time),
                Direction::Inbound => open(&key, size, time),
            }
            .map_err(refused)
        });
        thread
            .join()
            .map_err(|_| anyhow::anyhow!("a thread panicked"))?
    })
}

fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([9; 12])
}

fn associated() -> Aad<[u8; 12]> {
    Aad::from([3; 12])
}

fn seal(key: &LessSafeKey, size: Size, time: Duration) -> Result<Slice, ring::error::Unspecified> {
    let mut buffer = vec![0; 2048];
    repeat(size, time, |bytes| {
        let text = &mut buffer[..text_bytes(bytes)];
        key.seal_in_place_separate_tag(nonce(), associated(), text)
            .map(drop)
    })
}

/// Opening destroys the ciphertext, so every packet is copied from a sealed one first: what a copy takes is measured
/// too, and taken off.
fn open(key: &LessSafeKey, size: Size, time: Duration) -> Result<Slice, ring::error::Unspecified> {
    let sealed = |bytes: &usize| {
        let mut packet = vec![5; text_bytes(*bytes)];
        key.seal_in_place_append_tag(nonce(), associated(), &mut packet)
            .map(|()| packet)
    };
    let packets: Vec<_> = size
        .pattern()
        .iter()
        .map(sealed)
        .collect::<Result<_, _>>()?;
    let mut buffer = vec![0; 2048];
    let mut turn = packets.iter().cycle();
    let mut next = |buffer: &mut Vec<u8>, bytes: usize| {
        let length = text_bytes(bytes) + TAG;
        if let Some(packet) = turn.next() {
            buffer[..length].copy_from_slice(packet);
        }
        length
    };
    let copying = repeat(size, time / 4, |bytes| {
        next(&mut buffer, bytes);
        std::hint::black_box(&mut buffer);
        Ok(())
    })?;
    let both = repeat(size, time, |bytes| {
        let length = next(&mut buffer, bytes);
        key.open_in_place(nonce(), associated(), &mut buffer[..length])
            .map(drop)
    })?;
    Ok(both.without(&copying))
}

/// Calls `work` with each size in turn, whole patterns only, until the time is over.
fn repeat(
    size: Size,
    time: Duration,
    mut work: impl FnMut(usize) -> Result<(), ring::error::Unspecified>,
) -> Result<Slice, ring::error::Unspecified> {
    const AT_ONCE: usize = 20;
    let clock = CpuClock::of_thread(nix::unistd::gettid().as_raw());
    let now = || clock.now().map_err(|_| ring::error::Unspecified);
    let (start, cpu) = (Instant::now(), now()?);
    let mut packets = 0;
    while start.elapsed() < time {
        for _ in 0..AT_ONCE {
            for bytes in size.pattern() {
                work(*bytes)?;
            }
        }
        packets += (AT_ONCE * size.pattern().len()) as u64;
    }
    Ok(Slice {
        packets,
        wall: start.elapsed(),
        cpu: now()? - cpu,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_suite_seals_and_opens_by_itself() {
        for suite in [
            EspSuite::Aes128Gcm16,
            EspSuite::Aes256Gcm16,
            EspSuite::ChaCha20Poly1305,
        ] {
            for direction in [Direction::Outbound, Direction::Inbound] {
                let slice =
                    ring_alone(suite, direction, Size::Mixed, Duration::from_millis(5)).unwrap();
                assert!(slice.packets > 0);
            }
        }
    }
}
