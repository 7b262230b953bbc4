//! Load at millions of packets a second from one processor: live frames of BPF_PROG_TEST_RUN, each one another frame of
//! a list, sent out of an interface into its peer.

use std::path::Path;

use anyhow::{Context, ensure};
use aya::{
    Ebpf, EbpfLoader, TestRun, TestRunAttrs, TestRunOptions,
    maps::{Array, MapData},
    programs::{Xdp, XdpMode, xdp::XdpLinkId},
};
use ipsec_common::generator::{BLANK_BYTES, Course, Frame, LONGEST_FRAME};

/// What the program is called in its object.
const PROGRAM: &str = "generate";
/// Index of the loopback interface in every namespace.
const LOOPBACK: u32 = 1;

/// A list of frames and the program that sends them.
pub(crate) struct Generator {
    ebpf: Ebpf,
    course: Array<MapData, Course>,
    frames: u32,
    egress: u32,
    parked: Option<XdpLinkId>,
}

impl Generator {
    /// Frames to be sent in turn out of the interface of that index, in the namespace of the thread that sends.
    ///
    /// # Errors
    ///
    /// The program was not built, or the kernel refuses it.
    pub(crate) fn new(egress: u32, frames: &[Vec<u8>]) -> anyhow::Result<Self> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bpf/ipsec-generator.o");
        let object = std::fs::read(&path)
            .with_context(|| format!("{}: run `cargo xtask build --debug`", path.display()))?;
        let count = u32::try_from(frames.len())?;
        let mut ebpf = EbpfLoader::new()
            .map_max_entries("FRAMES", count)
            .load(&object)?;
        program(&mut ebpf)?.load()?;
        let mut list: Array<MapData, Frame> =
            ebpf.take_map("FRAMES").context("FRAMES")?.try_into()?;
        for (index, frame) in (0..).zip(frames) {
            ensure!(
                (1..=BLANK_BYTES).contains(&frame.len()),
                "a frame of {} bytes",
                frame.len()
            );
            let mut bytes = [0; LONGEST_FRAME];
            bytes[..frame.len()].copy_from_slice(frame);
            let last = u32::try_from(frame.len() - 1)?;
            list.set(index, Frame { last, bytes }, 0)?;
        }
        let course = ebpf.take_map("COURSE").context("COURSE")?.try_into()?;
        Ok(Self {
            ebpf,
            course,
            frames: count,
            egress,
            parked: None,
        })
    }

    /// Begins with the first frame again. Only one generator of a namespace can be started.
    ///
    /// The program sits on the idle loopback meanwhile: the kernel waits for all processors before and after each test
    /// run of a program that is nowhere.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub(crate) fn start(&mut self) -> anyhow::Result<()> {
        if self.parked.is_none() {
            let program = program(&mut self.ebpf)?;
            self.parked = Some(program.attach_to_if_index(LOOPBACK, XdpMode::Skb)?);
        }
        let course = Course {
            sent: 0,
            frames: self.frames,
            egress: self.egress,
        };
        self.course.set(0, course, 0)?;
        Ok(())
    }

    /// Ends what [`Self::start`] began.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub(crate) fn stop(&mut self) -> anyhow::Result<()> {
        if let Some(link) = self.parked.take() {
            program(&mut self.ebpf)?.detach(link)?;
        }
        Ok(())
    }

    /// Sends the next frames of the list.
    ///
    /// # Errors
    ///
    /// The kernel has no live frames (before Linux 5.18), or is out of memory.
    pub(crate) fn send(&mut self, count: u32) -> anyhow::Result<()> {
        let blank = [0; BLANK_BYTES];
        let options = TestRunOptions {
            data_in: Some(&blank),
            repeat: count,
            attrs: TestRunAttrs::new().xdp_live_frames(64),
            ..TestRunOptions::default()
        };
        program(&mut self.ebpf)?.test_run(options)?;
        Ok(())
    }
}

fn program(ebpf: &mut Ebpf) -> anyhow::Result<&mut Xdp> {
    let program = ebpf.program_mut(PROGRAM).context(PROGRAM)?;
    Ok(program.try_into()?)
}
