//! A CTA: its warps, what they share, and the order in which they run.
//!
//! A warp runs until it waits. What is asynchronous happens as late as it may: copies when they are waited for, those of TMA
//! when no warp can go on otherwise, matrix products when they are waited for. So a wait that is missing shows.

use crate::barrier::{CountingBarriers, NumberedBarriers};
use crate::error::{Error, Fault, Place, Result};
use crate::global::GlobalMemory;
use crate::kernel::Kernel;
use crate::launch::Launch;
use crate::order::{Accessor, Clock};
use crate::shared::Shared;
use crate::warp::{Wait, Warp};
use std::collections::VecDeque;

/// Most instructions of a CTA's warps.
pub(crate) const MAX_INSTRUCTIONS: u64 = 1 << 28;

/// A box that TMA is copying.
#[derive(Clone, Debug)]
pub(crate) struct TensorCopy {
    pub(crate) by: Accessor,
    /// When its warp asked for it, and what it knew then.
    pub(crate) when: u32,
    pub(crate) clock: Clock,
    pub(crate) to: u64,
    pub(crate) bytes: Vec<u8>,
    pub(crate) barrier: u64,
}

/// What the warps of a CTA share.
pub(crate) struct Common<'a> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) launch: &'a Launch<'a>,
    pub(crate) params: &'a [u8],
    pub(crate) global: &'a mut GlobalMemory,
    pub(crate) shared: Shared,
    pub(crate) numbered: NumberedBarriers,
    pub(crate) counting: CountingBarriers,
    pub(crate) tensor_copies: VecDeque<TensorCopy>,
    /// Warps that a numbered barrier has let go.
    pub(crate) released: Vec<usize>,
    /// How often a barrier in shared memory has turned.
    pub(crate) changes: u64,
    pub(crate) executed: u64,
}

/// Runs CTA `cta` of a launch to its end.
pub(crate) fn run(
    kernel: &Kernel,
    launch: &Launch<'_>,
    params: &[u8],
    cta: u32,
    global: &mut GlobalMemory,
) -> Result<()> {
    let warps_count = (launch.threads / 32) as usize;
    let mut warps: Vec<Warp> =
        (0..warps_count).map(|index| Warp::new(kernel, index, launch.threads, (cta, launch.ctas))).collect();
    let mut common = Common {
        kernel,
        launch,
        params,
        global,
        shared: Shared::new(launch.shared_bytes, launch.unset_shared, warps_count),
        numbered: NumberedBarriers::default(),
        counting: CountingBarriers::default(),
        tensor_copies: VecDeque::new(),
        released: Vec::new(),
        changes: 0,
        executed: 0,
    };
    loop {
        let mut has_run = false;
        for index in 0..warps.len() {
            while let Some(group) = warps[index].next_group(common.changes) {
                has_run = true;
                let run = warps[index].run_group(group, &mut common);
                run.map_err(|(pc, fault)| Error::Run { at: place(kernel, cta, index, pc), fault })?;
                for released in common.released.drain(..) {
                    warps[released].groups.iter_mut().filter(|group| matches!(group.wait, Wait::Barrier(_))).for_each(
                        |group| {
                            group.wait = Wait::None;
                            group.pc += 1;
                        },
                    );
                }
            }
        }
        if warps.iter().all(Warp::has_exited) {
            return Ok(());
        }
        if !has_run {
            let Some(copy) = common.tensor_copies.pop_front() else {
                return Err(Error::Deadlock { cta, waiting: waiting(&warps, &common) });
            };
            let warp = copy.by.warp;
            common.arrive(copy).map_err(|fault| {
                let text = "a tensor copy arrives".into();
                Error::Run { at: Place { cta, warp: warp as u32, line: 0, text }, fault }
            })?;
        }
    }
}

impl Common<'_> {
    /// A tensor copy is there.
    fn arrive(&mut self, copy: TensorCopy) -> std::result::Result<(), Fault> {
        self.shared.fill(copy.by, copy.when, copy.to, &copy.bytes)?;
        let is_complete = self.counting.receive(copy.barrier, copy.bytes.len(), &copy.clock)?;
        self.changes += u64::from(is_complete);
        Ok(())
    }
}

fn place(kernel: &Kernel, cta: u32, warp: usize, pc: usize) -> Place {
    let (line, text) = kernel
        .instructions
        .get(pc)
        .map_or((0, "the end of the kernel".into()), |instruction| (instruction.line, instruction.text.clone()));
    Place { cta, warp: warp as u32, line, text }
}

fn waiting(warps: &[Warp], common: &Common<'_>) -> Vec<String> {
    let groups = warps.iter().flat_map(|warp| warp.groups.iter().map(move |group| (warp, group)));
    groups
        .map(|(warp, group)| {
            let instruction = &common.kernel.instructions[group.pc.min(common.kernel.instructions.len() - 1)];
            let what = match group.wait {
                Wait::None => "can go on".into(),
                Wait::Lanes => "for the other lanes of the warp".into(),
                Wait::Barrier(id) => format!("for barrier {id}"),
                Wait::Change { barrier, .. } => format!("for {}", common.counting.describe(barrier)),
            };
            let (line, text) = (instruction.line, &instruction.text);
            format!("    warp {}, lanes {:#010x}, line {line} ({text}): {what}", warp.index, group.lanes)
        })
        .collect()
}
