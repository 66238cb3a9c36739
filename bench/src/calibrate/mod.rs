//! Measures the terms of a [`DeviceProfile`] on a device: [`probes`] are batches whose time one term decides, [`fit()`] solves the
//! cost model for the terms.
//!
//! Every probe is planned in mode `fixed-chunk`, with its tile variant forced: the plan does not depend on the terms that are
//! sought. All times are those with a cold L2, as the cost model predicts them.

pub mod fit;
pub mod probe;

use crate::device::{DeviceCase, Repeats};
use crate::statistics::median;
pub use fit::fit;
use pat_rs::cuda::CudaEngine;
use pat_rs::cuda::bench_support::L2Flush;
use pat_rs::{DeviceProfile, Plan, Planner, Result};
pub use probe::{Probe, Quantity, probes};

/// A probe's time.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The probe's name.
    pub name: String,
    /// What its time says.
    pub quantity: Quantity,
    /// Median with a cold L2.
    pub measured_us: f64,
}

/// Calls per probe: single times of short steps scatter by a microsecond, their median must not.
const REPEATS: Repeats = Repeats { warm_ups: 5, timed: 41 };

/// Measures probes on the device; `next` is told of each before it runs.
///
/// # Errors
/// The driver's, or the device is too small.
pub fn measure(engine: &CudaEngine, probes: &[Probe], mut next: impl FnMut(&Probe)) -> Result<Vec<Sample>> {
    let flush = L2Flush::new(engine.device())?;
    let measured = probes.iter().map(|probe| {
        next(probe);
        probe.measure(engine, &flush, REPEATS)
    });
    measured.collect()
}

impl Probe {
    /// The probe's plan, which is the same for every profile of the device's kind.
    ///
    /// # Errors
    /// The device does not run the probe's variant.
    pub fn plan(&self, profile: &DeviceProfile) -> Result<Plan> {
        let rows = self.batch.rows();
        Planner::new(self.batch.problem(self.shape), profile.clone(), self.options.clone())?
            .plan(&self.batch.view(&rows)?)
    }

    /// Runs it on the device.
    ///
    /// # Errors
    /// The driver's, or the device is too small.
    fn measure(&self, engine: &CudaEngine, flush: &L2Flush, repeats: Repeats) -> Result<Sample> {
        let plan = self.plan(&engine.device().profile()?)?;
        let case = DeviceCase::new(engine, &self.batch, self.batch.problem(self.shape))?;
        let mut times = case.prepare(&plan)?.times_us(Some(flush), repeats)?;
        Ok(Sample { name: self.name.clone(), quantity: self.quantity, measured_us: median(&mut times) })
    }
}
