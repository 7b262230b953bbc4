//! The Delete payload (RFC 7296 section 3.11).

use ipsec_common::Spi;

use super::Protocol;
use crate::ike::message::reader::{ParseError, Reader};
use crate::ike::message::writer::Writer;

/// Which SAs the sender has deleted: its inbound ones, for AH and ESP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delete<'a> {
    /// The IKE SA that carries this payload.
    IkeSa,
    /// ESP SAs by the SPIs that the sender receives them under.
    Esp(Vec<Spi>),
    /// SAs of a protocol that we do not do, whose SPIs are `spi_size` bytes long.
    Other {
        /// The protocol.
        protocol: Protocol,
        /// Length of one SPI.
        spi_size: u8,
        /// All SPIs, one behind the other.
        spis: &'a [u8],
    },
}

impl<'a> Delete<'a> {
    /// Reads the body.
    pub fn parse(mut r: Reader<'a>) -> Result<Self, ParseError> {
        let protocol = Protocol(r.u8("deleted protocol")?);
        let spi_size = r.u8("deleted SPI size")?;
        let count = r.u16("number of deleted SPIs")?;
        let delete = match (protocol, spi_size) {
            // RFC 7296 section 3.11: the deletion of the IKE SA names no SPI.
            (Protocol::IKE, 0) if count == 0 => Self::IkeSa,
            (Protocol::IKE, _) => return Err(ParseError::Invalid("deleted IKE SA")),
            (Protocol::ESP, 4) => {
                let spi = |_| r.array("deleted SPI").map(Spi::from_be_bytes);
                Self::Esp((0..count).map(spi).collect::<Result<_, _>>()?)
            }
            (Protocol::ESP, _) => return Err(ParseError::Invalid("deleted SPI size")),
            (protocol, spi_size) => {
                let spis = r.take(usize::from(spi_size) * usize::from(count), "deleted SPIs")?;
                Self::Other {
                    protocol,
                    spi_size,
                    spis,
                }
            }
        };
        r.finish("last deleted SPI")?;
        Ok(delete)
    }

    /// Writes the body.
    pub fn emit(&self, w: &mut Writer) {
        match self {
            Self::IkeSa => w.bytes(&[Protocol::IKE.0, 0, 0, 0]),
            Self::Esp(spis) => {
                w.bytes(&[Protocol::ESP.0, 4]);
                w.count_u16(spis.len(), "number of deleted SPIs");
                spis.iter().for_each(|spi| w.bytes(&spi.to_be_bytes()));
            }
            Self::Other {
                protocol,
                spi_size,
                spis,
            } => {
                w.bytes(&[protocol.0, *spi_size]);
                w.count_u16(
                    spis.len().checked_div((*spi_size).into()).unwrap_or(0),
                    "number of deleted SPIs",
                );
                w.bytes(spis);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // RFC 7296 section 3.11: the deletion of the IKE SA names no SPI.
    #[test]
    fn the_deletion_of_the_ike_sa_names_no_spi() {
        assert_eq!(Delete::parse(Reader::new(&[1, 0, 0, 0])), Ok(Delete::IkeSa));
        let with_spi = [1, 8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9];
        assert_eq!(
            Delete::parse(Reader::new(&with_spi)),
            Err(ParseError::Invalid("deleted IKE SA"))
        );
    }

    #[test]
    fn more_spis_announced_than_there_are_is_refused() {
        assert_eq!(
            Delete::parse(Reader::new(&[3, 4, 255, 255, 0, 0, 1, 0])),
            Err(ParseError::Truncated("deleted SPI"))
        );
    }
}
