//! A plan on a candle device.

#[cfg(feature = "cuda")]
use crate::border::Resident;
use crate::op::PagedDecode;
use crate::operands::{CacheLayout, check_tensors};
use candle_core::{Device, DeviceLocation, Tensor};
use pat_rs::plan::PlanChange;
use pat_rs::{DecodeBatch, Error, Plan, Planner, Problem, Result};

/// One decode step's plan on a candle device, for all layers.
///
/// On CUDA, plans and runs go to the stream of the candle device. That of `Device::new_cuda` is the default stream of the calling
/// thread, another one in each thread: a step then stays on the thread that made it. `Device::new_cuda_with_stream` has no such
/// bound.
#[derive(Debug)]
pub struct PlannedStep {
    plan: Plan,
    device: DeviceLocation,
    /// The plan's copy on the device.
    #[cfg(feature = "cuda")]
    resident: Option<Resident>,
}

/// What is a layer's own.
#[derive(Clone, Copy, Debug, Default)]
pub struct Layer {
    /// Factor of the scores; by default the plan's.
    pub softmax_scale: Option<f32>,
    /// How the caches lie in memory.
    pub cache: CacheLayout,
}

impl PlannedStep {
    /// Takes a plan, and on CUDA uploads it.
    ///
    /// # Errors
    /// The device is of a kind that there are no kernels for; on CUDA also: it cannot be used, or has no memory left.
    pub fn new(plan: Plan, device: &Device) -> Result<Self> {
        let location = device.location();
        match device {
            Device::Cpu => Ok(Self {
                plan,
                device: location,
                #[cfg(feature = "cuda")]
                resident: None,
            }),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => {
                let resident = Some(Resident::new(&plan, device)?);
                Ok(Self { plan, device: location, resident })
            }
            _ => {
                let expected = "the CPU or, with the feature `cuda` of pat-candle, a CUDA device";
                Err(Error::invalid("device", format!("{location:?}"), expected))
            }
        }
    }

    /// Makes it the next decode step ([`Planner::advance`]), and on CUDA uploads the plan if it has changed.
    ///
    /// # Errors
    /// As [`Planner::advance`]: the step is as before. On CUDA also: the copy fails, or this is another thread than that of the
    /// stream; then the step serves no layer until it is advanced again.
    pub fn advance(
        &mut self,
        planner: &mut Planner,
        batch: &DecodeBatch<'_>,
        changed_rows: Option<&[u32]>,
    ) -> Result<PlanChange> {
        #[cfg(feature = "cuda")]
        if let Some(resident) = &self.resident {
            resident.check_thread()?;
        }
        let change = planner.advance(batch, changed_rows, &mut self.plan)?;
        #[cfg(feature = "cuda")]
        if let Some(resident) = &mut self.resident {
            resident.hold(&self.plan)?;
        }
        Ok(change)
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Attention of one layer: `q` is `[rows of the plan, q_heads, head_dim]`, the caches are `[pages, page_size, kv_heads,
    /// head_dim]` or as `layer` says, with any strides before the last dimension that the kernels follow. Returns `[rows of the
    /// plan, q_heads, v_head_dim]`. Nothing is copied, and nothing waits for the device.
    ///
    /// # Errors
    /// A tensor has another type, size or device than the plan asks for, its last dimension is not contiguous, or it is
    /// differentiated; the scale is not positive. On CUDA also: this is another thread than that of the stream, or the driver
    /// refuses a launch. What is wrapped is a [`pat_rs::Error`], which names the argument.
    pub fn attend(&self, q: &Tensor, k_cache: &Tensor, v_cache: &Tensor, layer: Layer) -> candle_core::Result<Tensor> {
        let tensors = [("q", q), ("k_cache", k_cache), ("v_cache", v_cache)];
        check_tensors(&self.plan, self.device, tensors).map_err(candle_core::Error::wrap)?;
        q.apply_op3_no_bwd(
            k_cache,
            v_cache,
            &PagedDecode { step: self, cache: layer.cache, problem: self.problem(layer) },
        )
    }

    fn problem(&self, layer: Layer) -> Problem {
        let problem = self.plan.problem();
        layer.softmax_scale.map_or(problem, |scale| problem.with_scale(scale))
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn resident(&self) -> Result<&Resident> {
        let expected = "one that was made for a CUDA device";
        self.resident.as_ref().ok_or_else(|| Error::invalid("step", "one on the CPU", expected))
    }
}
