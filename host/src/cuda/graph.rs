//! Graphs of bound runs.

use super::bound_run::BoundRun;
use super::driver::{GraphExec, Stream};
use super::plan_buffers::Uploaded;
use crate::{Error, Result};

/// Bound runs as one CUDA graph, replayed with whatever plan is in their buffers. It owns the runs, and with them all they use.
/// `Send`: capture at the start, replay in a worker.
///
/// Engines that capture whole models capture with their own means, and call [`BoundRun::run`] meanwhile.
#[derive(Debug)]
pub struct Graph {
    exec: GraphExec,
    /// At least one.
    runs: Vec<BoundRun>,
}

impl Graph {
    /// Captures the launches of `runs`, one after the other, on a stream of its own.
    ///
    /// # Errors
    /// There is no run, they are not all bound to the same buffers, or these have no fixed geometry; the driver refuses the
    /// capture (as it does where another thread waits for the whole device meanwhile).
    pub fn capture(runs: Vec<BoundRun>) -> Result<Self> {
        let Some(first) = runs.first() else {
            return Err(Error::invalid("runs", "none", "at least one"));
        };
        for (index, run) in runs.iter().enumerate() {
            let name = format!("runs[{index}]");
            if !run.has_fixed_geometry() {
                let accepted =
                    "buffers of a fixed geometry (`PlanBuffers::for_capacity`), which serve later plans, too";
                return Err(Error::invalid(name, "bound to buffers of an exact geometry", accepted));
            }
            if !run.shares_plan_with(first) {
                return Err(Error::invalid(name, "bound to other plan buffers", "the buffers of runs[0]"));
            }
        }
        let exec =
            GraphExec::capture(first.device(), |stream| runs.iter().try_for_each(|run| run.launch_bound(stream)))?;
        Ok(Self { exec, runs })
    }

    /// Enqueues the runs, on any stream of the device: in order with uploads, as [`BoundRun::run`].
    ///
    /// # Errors
    /// `uploaded` is of other buffers; the stream is another device's or is captured; the driver refuses the launch.
    pub fn replay(&mut self, uploaded: Uploaded<'_>, stream: &Stream) -> Result<()> {
        let Self { exec, runs } = self;
        runs.iter().try_for_each(|run| run.check_plan(uploaded))?;
        uploaded.check_not_captured(stream)?;
        uploaded.enqueue_on(stream, || exec.launch(stream))
    }
}
