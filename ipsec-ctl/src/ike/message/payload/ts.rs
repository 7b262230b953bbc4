//! The Traffic Selector payloads (RFC 7296 section 3.13).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipsec_common::TrafficSelector;

use crate::ike::message::reader::{ParseError, Reader};
use crate::ike::message::writer::Writer;

/// The payload: what one side sends from, or receives for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrafficSelectors<'a> {
    /// The selectors in order of preference; never more than 255.
    pub selectors: Vec<WireSelector<'a>>,
}

/// One selector as it stands on the wire.
///
/// ```text
/// +---------------+---------------+-------------------------------+
/// |    TS type    |  IP protocol  |        selector length        |
/// +---------------+---------------+-------------------------------+
/// |          start port           |           end port            |
/// +-------------------------------+-------------------------------+
/// ~                   starting and ending address                 ~
/// +---------------------------------------------------------------+
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireSelector<'a> {
    /// A range of IPv4 or IPv6 addresses.
    Addresses(TrafficSelector),
    /// A type that we do not know.
    Other {
        /// Its number.
        kind: u8,
        /// Its second byte, which in the known types is the protocol.
        second: u8,
        /// What follows the length.
        body: &'a [u8],
    },
}

const IPV4: u8 = 7;
const IPV6: u8 = 8;

impl<'a> TrafficSelectors<'a> {
    /// Makes the payload of selectors.
    pub fn new(selectors: &[TrafficSelector]) -> Self {
        Self {
            selectors: selectors
                .iter()
                .copied()
                .map(WireSelector::Addresses)
                .collect(),
        }
    }

    /// The selectors of types that we know.
    // RFC 7296 section 2.9: selectors of unknown types are left out when narrowing.
    pub fn known(&self) -> impl Iterator<Item = TrafficSelector> {
        self.selectors.iter().filter_map(|selector| match selector {
            WireSelector::Addresses(selector) => Some(*selector),
            WireSelector::Other { .. } => None,
        })
    }

    /// Reads the body.
    pub fn parse(mut r: Reader<'a>) -> Result<Self, ParseError> {
        let count = r.u8("number of selectors")?;
        r.array::<3>("selectors reserved")?;
        let selectors = (0..count)
            .map(|_| WireSelector::parse(&mut r))
            .collect::<Result<_, _>>()?;
        r.finish("last selector")?;
        Ok(Self { selectors })
    }

    /// Writes the body.
    pub fn emit(&self, w: &mut Writer) {
        w.count_u8(self.selectors.len(), "number of selectors");
        w.bytes(&[0; 3]);
        self.selectors.iter().for_each(|selector| selector.emit(w));
    }
}

impl<'a> WireSelector<'a> {
    fn parse(r: &mut Reader<'a>) -> Result<Self, ParseError> {
        let kind = r.u8("selector type")?;
        let protocol = r.u8("selector protocol")?;
        let length = r.u16("selector length")?;
        let mut body = r.body(length, 4, "selector")?;
        if kind != IPV4 && kind != IPV6 {
            return Ok(Self::Other {
                kind,
                second: protocol,
                body: body.rest(),
            });
        }
        let ports = (body.u16("start port")?, body.u16("end port")?);
        let mut address = |field| match kind {
            IPV4 => body
                .array(field)
                .map(|octets| IpAddr::V4(Ipv4Addr::from_octets(octets))),
            _ => body
                .array(field)
                .map(|octets| IpAddr::V6(Ipv6Addr::from_octets(octets))),
        };
        let addresses = (address("starting address")?, address("ending address")?);
        body.finish("ending address")?;
        // RFC 7296 section 3.13.1: a range runs upwards; the one exception is OPAQUE, from 65535 down to 0.
        if addresses.0 > addresses.1 || (ports.0 > ports.1 && ports != (u16::MAX, 0)) {
            return Err(ParseError::Invalid("selector range"));
        }
        Ok(Self::Addresses(TrafficSelector {
            protocol,
            ports,
            addresses,
        }))
    }

    fn emit(&self, w: &mut Writer) {
        match *self {
            Self::Addresses(TrafficSelector {
                protocol,
                ports,
                addresses,
            }) => match addresses {
                (IpAddr::V4(start), IpAddr::V4(end)) => {
                    range(w, IPV4, protocol, ports, &start.octets(), &end.octets())
                }
                (IpAddr::V6(start), IpAddr::V6(end)) => {
                    range(w, IPV6, protocol, ports, &start.octets(), &end.octets())
                }
                (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {
                    w.refuse("selector of two address families")
                }
            },
            Self::Other { kind, second, body } => {
                w.u8(kind);
                w.u8(second);
                w.with_length(2, "selector", |w| w.bytes(body));
            }
        }
    }
}

fn range(w: &mut Writer, kind: u8, protocol: u8, ports: (u16, u16), start: &[u8], end: &[u8]) {
    w.u8(kind);
    w.u8(protocol);
    w.with_length(2, "selector", |w| {
        w.u16(ports.0);
        w.u16(ports.1);
        w.bytes(start);
        w.bytes(end);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(start: u16, end: u16) -> Result<TrafficSelectors<'static>, ParseError> {
        let addresses = (
            IpAddr::V4(Ipv4Addr::new(10, 0, 0, 0)),
            IpAddr::V4(Ipv4Addr::new(10, 0, 0, 255)),
        );
        let mut w = Writer::new();
        TrafficSelectors::new(&[TrafficSelector {
            protocol: 6,
            ports: (start, end),
            addresses,
        }])
        .emit(&mut w);
        let bytes = w.finish().unwrap().leak();
        TrafficSelectors::parse(Reader::new(bytes))
    }

    // RFC 7296 section 3.13.1: a range runs upwards; the one exception is OPAQUE, from 65535 down to 0.
    #[test]
    fn a_range_runs_upwards_unless_it_is_opaque() {
        assert!(ports(80, 80).is_ok());
        assert!(ports(65535, 0).is_ok());
        assert_eq!(ports(81, 80), Err(ParseError::Invalid("selector range")));
    }

    // RFC 7296 section 2.9: selectors of unknown types are left out when narrowing.
    #[test]
    fn an_unknown_type_is_kept_but_left_out_of_the_known_selectors() {
        let bytes = [1, 0, 0, 0, 9, 17, 0, 6, 0xaa, 0xbb];
        let parsed = TrafficSelectors::parse(Reader::new(&bytes)).unwrap();
        assert_eq!(
            parsed.selectors,
            [WireSelector::Other {
                kind: 9,
                second: 17,
                body: &[0xaa, 0xbb]
            }]
        );
        assert_eq!(parsed.known().count(), 0);
    }

    #[test]
    fn a_selector_of_two_address_families_has_no_wire_form() {
        let addresses = (
            IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        );
        let mut w = Writer::new();
        TrafficSelectors::new(&[TrafficSelector {
            protocol: 0,
            ports: (0, 0),
            addresses,
        }])
        .emit(&mut w);
        assert!(w.finish().is_err());
    }
}
