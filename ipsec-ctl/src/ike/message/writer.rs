//! Writes messages: numbers in network order, and lengths that are filled in when what they count is complete.
//!
//! A length or count that outgrows its field is remembered and refused at the end, so that no `emit` has to fail
//! half-way, and nothing is ever sent with a wrong length.

use thiserror::Error;

/// What was to be sent has no wire form, mostly because it doesn't fit into a length field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{0} has no wire form")]
pub struct EmitError(pub &'static str);

/// Collects the bytes of a message.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
    too_long: Option<EmitError>,
}

impl Writer {
    /// Starts empty.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends, with all bytes or with the first thing that was too long.
    pub fn finish(self) -> Result<Vec<u8>, EmitError> {
        self.too_long.map_or(Ok(self.bytes), Err)
    }

    /// Appends one byte.
    pub fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    /// Appends a 16-bit number.
    pub fn u16(&mut self, value: u16) {
        self.bytes.extend(value.to_be_bytes());
    }

    /// Appends a 32-bit number.
    pub fn u32(&mut self, value: u32) {
        self.bytes.extend(value.to_be_bytes());
    }

    /// Appends a 64-bit number.
    pub fn u64(&mut self, value: u64) {
        self.bytes.extend(value.to_be_bytes());
    }

    /// Appends bytes as they are.
    pub fn bytes(&mut self, value: &[u8]) {
        self.bytes.extend(value);
    }

    /// Appends a count or length of one byte.
    pub fn count_u8(&mut self, count: usize, field: &'static str) {
        let value = u8::try_from(count).unwrap_or_else(|_| self.refuse(field));
        self.u8(value);
    }

    /// Appends a count or length of two bytes.
    pub fn count_u16(&mut self, count: usize, field: &'static str) {
        let value = u16::try_from(count).unwrap_or_else(|_| self.refuse(field));
        self.u16(value);
    }

    /// Appends what `body` writes, preceded by its length: two bytes, which count `before` bytes in front of them,
    /// themselves and the body.
    pub fn with_length(
        &mut self,
        before: usize,
        field: &'static str,
        body: impl FnOnce(&mut Self),
    ) {
        let start = self.bytes.len();
        self.u16(0);
        body(self);
        let length =
            u16::try_from(before + self.bytes.len() - start).unwrap_or_else(|_| self.refuse(field));
        if let Some(slot) = self.bytes.get_mut(start..start + 2) {
            slot.copy_from_slice(&length.to_be_bytes());
        }
    }

    /// Remembers that `field` cannot be written, and stands in for its value.
    pub fn refuse<T: Default>(&mut self, field: &'static str) -> T {
        self.too_long.get_or_insert(EmitError(field));
        T::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_counts_what_stands_before_it_and_the_body() {
        let mut w = Writer::new();
        w.bytes(&[9, 9]);
        w.with_length(2, "thing", |w| w.bytes(&[1, 2, 3]));
        assert_eq!(w.finish().unwrap(), [9, 9, 0, 7, 1, 2, 3]);
    }

    #[test]
    fn a_body_beyond_its_length_field_is_refused() {
        let mut w = Writer::new();
        w.with_length(0, "thing", |w| w.bytes(&[0; 0x1_0000]));
        assert_eq!(w.finish(), Err(EmitError("thing")));
    }

    #[test]
    fn a_count_beyond_its_field_is_refused() {
        let mut w = Writer::new();
        w.count_u8(256, "things");
        assert_eq!(w.finish(), Err(EmitError("things")));
    }
}
