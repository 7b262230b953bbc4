//! Layouts of the load generator for benchmarks: an XDP program that turns live frames of BPF_PROG_TEST_RUN into the
//! frames of a list, each in its turn, and sends them out of an interface.

/// Longest frame, with its Ethernet header.
pub const LONGEST_FRAME: usize = 1532;
/// Length of the frame that the test run is given: each one is cut from it.
pub const BLANK_BYTES: usize = 1514;

/// One frame of the list.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// Offset of its last byte, less than [`BLANK_BYTES`]: so no frame is empty, as the verifier wants to see.
    pub last: u32,
    /// From the Ethernet header on.
    pub bytes: [u8; LONGEST_FRAME],
}

/// Where the generator is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Course {
    /// Frames sent so far; the next one is this modulo `frames`.
    pub sent: u64,
    /// Length of the list.
    pub frames: u32,
    /// Index of the interface that they leave by.
    pub egress: u32,
}

/// Makes the layouts plain old data for aya's typed maps.
#[cfg(feature = "aya")]
mod pod {
    #![expect(
        unsafe_code,
        reason = "aya reads and writes map elements as bytes and wants to be told that it may"
    )]
    use super::{Course, Frame};

    // SAFETY: `repr(C)`, integers and an array of integers, no padding, any bytes valid.
    unsafe impl aya::Pod for Frame {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Course {}
}
