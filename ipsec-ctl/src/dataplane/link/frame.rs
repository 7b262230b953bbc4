//! Values as frames: a length, then MessagePack with the names of fields. Buffers are wiped, for frames carry keys.

use std::io;

use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use zeroize::Zeroizing;

use crate::wiped::Wiped;

/// The longest frame in bytes: counters of all SAs that there is room for fit well.
const LONGEST: usize = 64 << 20;

/// Writes a value.
///
/// # Errors
///
/// Those of the stream; `InvalidData` if the value is too long.
pub(super) async fn write<T: Serialize>(
    stream: &mut (impl AsyncWrite + Unpin),
    value: &T,
) -> io::Result<()> {
    let mut frame = Wiped::new();
    frame.extend(&[0; 4]);
    frame.append(value)?;
    let length = frame.bytes().len() - 4;
    let length = u32::try_from(length)
        .ok()
        .filter(|_| length <= LONGEST)
        .ok_or(io::ErrorKind::InvalidData)?;
    if let Some(head) = frame.bytes_mut().first_chunk_mut() {
        *head = length.to_be_bytes();
    }
    stream.write_all(frame.bytes()).await
}

/// Reads a value; none if the stream ends before it begins.
///
/// # Errors
///
/// Those of the stream; `InvalidData` if the frame is too long or no such value.
pub(super) async fn read<T: DeserializeOwned>(
    stream: &mut (impl AsyncRead + Unpin),
) -> io::Result<Option<T>> {
    let mut length = [0; 4];
    if let Err(error) = stream.read_exact(&mut length).await {
        return match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => Ok(None),
            _ => Err(error),
        };
    }
    let length = u32::from_be_bytes(length) as usize;
    if length > LONGEST {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = Zeroizing::new(vec![0; length]);
    stream.read_exact(&mut bytes).await?;
    rmp_serde::from_slice(&bytes)
        .map(Some)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn values_arrive_as_they_were_sent() {
        let (mut one, mut other) = tokio::io::duplex(1 << 16);
        let long = vec![7_u32; 10_000];
        write(&mut one, &long).await.unwrap();
        write(&mut one, &"short").await.unwrap();
        drop(one);
        assert_eq!(read::<Vec<u32>>(&mut other).await.unwrap(), Some(long));
        assert_eq!(
            read::<String>(&mut other).await.unwrap().as_deref(),
            Some("short")
        );
        assert_eq!(read::<String>(&mut other).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_frame_that_claims_too_much_is_refused_before_memory_is_taken_for_it() {
        let mut bytes: &[u8] = &u32::MAX.to_be_bytes();
        assert!(read::<String>(&mut bytes).await.is_err());
    }

    #[tokio::test]
    async fn a_frame_that_ends_early_is_an_error() {
        let mut bytes: &[u8] = &[0, 0, 0, 9, 1];
        assert!(read::<String>(&mut bytes).await.is_err());
    }
}
