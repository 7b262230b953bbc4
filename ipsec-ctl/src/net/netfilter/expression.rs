//! What rules of nf_tables are made of: each looks at a packet, or does something to it (nft(8), "EXPRESSIONS").

use super::message::Attributes;

pub(super) const LIST_ELEMENT: u16 = 1;

pub(super) const META_IIFNAME: u32 = 6;
pub(super) const META_NFPROTO: u32 = 15;
pub(super) const META_L4PROTO: u32 = 16;
pub(super) const META_OIFNAME: u32 = 7;

pub(super) fn expression(name: &str, data: &Attributes) -> Attributes {
    Attributes::default().name(1, name).nested(2, data)
}

/// Loads something about the packet into register 1.
pub(super) fn meta(key: u32) -> Attributes {
    expression("meta", &Attributes::default().number(1, 1).number(2, key))
}

fn payload(base: u32, offset: u32, length: u32, register: u32) -> Attributes {
    let data = Attributes::default()
        .number(1, register)
        .number(2, base)
        .number(3, offset)
        .number(4, length);
    expression("payload", &data)
}

/// Loads bytes of the network header.
pub(super) fn network(offset: u32, length: u32, register: u32) -> Attributes {
    payload(1, offset, length, register)
}

/// Loads bytes of the transport header into register 1; fragments after the first do not get past it.
pub(super) fn transport(offset: u32, length: u32) -> Attributes {
    payload(2, offset, length, 1)
}

/// Keeps the masked bits of two bytes in register 1.
pub(super) fn mask(bits: [u8; 2]) -> Attributes {
    let masked = Attributes::default()
        .number(1, 1)
        .number(2, 1)
        .number(3, 2)
        .nested(4, &data(&bits))
        .nested(5, &data(&[0, 0]));
    expression("bitwise", &masked)
}

/// Goes on only if register 1 is, or is not, this.
pub(super) fn compare(equal: bool, value: &[u8]) -> Attributes {
    let data = Attributes::default()
        .number(1, 1)
        .number(2, u32::from(!equal))
        .nested(3, &data(value));
    expression("cmp", &data)
}

pub(super) fn data(value: &[u8]) -> Attributes {
    Attributes::default().bytes(1, value)
}

pub(super) fn list(elements: Vec<Attributes>) -> Attributes {
    elements
        .iter()
        .fold(Attributes::default(), |list, element| {
            list.nested(LIST_ELEMENT, element)
        })
}
