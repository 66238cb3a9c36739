//! Launching a plan.

use super::CudaDevice;
use super::args::{PreparedRun, RunArgs};
use super::driver::{self, Stream, TensorMap};
use super::plan_buffers::{PlanBuffers, Workspace};
use super::tensor_map::TensorMapSpec;
use crate::{AttentionShape, Error, Plan, Result};
use pat_abi::{Arch, Family, KernelSpec, TileVariant, manifest};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Pools whose maps are kept: two per layer of any model; a caller whose pools keep moving does not grow the cache.
const MAX_CACHED_TENSOR_MAPS: usize = 4096;

/// Runs plans on a device. `Send` and `Sync`; one serves all layers, streams and threads.
#[derive(Debug)]
pub struct CudaEngine {
    device: CudaDevice,
    tensor_maps: Mutex<HashMap<TensorMapSpec, TensorMap>>,
}

impl CudaEngine {
    /// An engine on device `ordinal`.
    ///
    /// # Errors
    /// As [`CudaDevice::new`].
    pub fn new(ordinal: usize) -> Result<Self> {
        CudaDevice::new(ordinal).map(Self::on)
    }

    /// An engine on an open device.
    pub fn on(device: CudaDevice) -> Self {
        Self { device, tensor_maps: Mutex::default() }
    }

    /// The device.
    pub fn device(&self) -> &CudaDevice {
        &self.device
    }

    /// Allocates buffers of the plan's size and enqueues the copy.
    ///
    /// # Errors
    /// The driver cannot allocate or copy.
    pub fn upload(&self, plan: &Plan, stream: &Stream) -> Result<PlanBuffers> {
        let buffers = PlanBuffers::with_capacity(&self.device, plan.bytes().len())?;
        buffers.upload(plan, stream)?;
        Ok(buffers)
    }

    /// Loads the kernels that [`Self::run`] would launch for these buffers: the driver compiles them at their first
    /// use, which takes up to a second and cannot happen while a stream is captured.
    ///
    /// # Errors
    /// Nothing was uploaded, there is no kernel for the plan's shape and variants on this device, or the driver rejects
    /// the PTX (with its log).
    pub fn prepare(&self, plan: &PlanBuffers) -> Result<()> {
        let uploaded = plan.uploaded()?;
        self.load(uploaded.planned.shape, &uploaded.limits.max_items, uploaded.limits.max_merge_rows > 0)
    }

    /// As [`Self::prepare`], for all plans in these tile variants: at the start, with those that a planner may use
    /// ([`crate::Planner::tile_variants`]), it spares the first batch that needs another one the wait.
    ///
    /// # Errors
    /// There is no kernel for the shape and a variant on this device, or the driver rejects the PTX (with its log).
    pub fn prepare_variants(&self, shape: AttentionShape, variants: &[TileVariant]) -> Result<()> {
        let mut launched = [0; TileVariant::ALL.len()];
        variants.iter().for_each(|variant| launched[variant.index()] = 1);
        self.load(shape, &launched, true)
    }

    /// Loads the forward kernels of which `launched` says that something is launched, and the merge behind them.
    fn load(&self, shape: AttentionShape, launched: &[u32], has_merge: bool) -> Result<()> {
        for variant in TileVariant::ALL.into_iter().filter(|variant| launched[variant.index()] > 0) {
            self.device.kernel(find(Family::Forward(variant), shape)?)?;
        }
        if has_merge {
            self.device.kernel(merge_kernel(shape, launched)?)?;
        }
        Ok(())
    }

    /// Enqueues the forward launches of the plan's tile variants and the merge. Allocates nothing on the device, waits
    /// for nothing; outputs are there when the stream has passed.
    ///
    /// # Errors
    /// An argument is refused (nothing has been launched), a kernel cannot be loaded (likewise), or the driver refuses
    /// a launch.
    pub fn run(
        &self,
        plan: &PlanBuffers,
        args: &RunArgs<'_>,
        workspace: &Workspace<'_>,
        stream: &Stream,
    ) -> Result<()> {
        let run = args.prepare(plan, workspace)?;
        // Everything that can fail comes before the first launch.
        self.prepare(plan)?;
        let maps = self.tensor_maps(&run, args)?;
        for variant in TileVariant::ALL {
            if run.forward_grids[variant.index()] > 0 {
                let spec = find(Family::Forward(variant), run.shape)?;
                let maps = if spec.tensor_maps > 0 { maps.as_slice() } else { &[] };
                driver::launch_forward(&*self.device.kernel(spec)?, &run, maps, stream)?;
            }
        }
        if run.merge_rows > 0 {
            let kernel = self.device.kernel(merge_kernel(run.shape, &run.forward_grids)?)?;
            driver::launch_merge(&kernel, &run, stream)?;
        }
        Ok(())
    }

    /// The maps of K and V if a kernel of the run takes them; encoded once per pool.
    fn tensor_maps(&self, run: &PreparedRun, args: &RunArgs<'_>) -> Result<Vec<TensorMap>> {
        let wanted = |variant: TileVariant| {
            run.forward_grids[variant.index()] > 0
                && manifest::find(Family::Forward(variant), run.shape.dtype(), run.shape.head_dim())
                    .is_some_and(|spec| spec.tensor_maps > 0)
        };
        if !TileVariant::ALL.into_iter().any(wanted) {
            return Ok(Vec::new());
        }
        // A panic elsewhere leaves the cache as it was before or after an insertion: both are fine.
        let mut cache = self.tensor_maps.lock().unwrap_or_else(PoisonError::into_inner);
        if cache.len() >= MAX_CACHED_TENSOR_MAPS {
            cache.clear();
        }
        let mut maps = Vec::with_capacity(2);
        for spec in args.tensor_maps()? {
            let map = match cache.get(&spec) {
                Some(map) => *map,
                None => {
                    let map = driver::encode_tensor_map(&spec)?;
                    cache.insert(spec, map);
                    map
                }
            };
            maps.push(map);
        }
        Ok(maps)
    }
}

/// Behind a forward kernel of sm_90a the merge that starts while that drains; else the one that every device has, so that plans
/// of sm_80 tiles run the same kernels everywhere. `launched` says how much of each tile variant is launched.
fn merge_kernel(shape: AttentionShape, launched: &[u32]) -> Result<&'static KernelSpec> {
    let overlapping = TileVariant::ALL
        .into_iter()
        .any(|variant| variant.arch() == Arch::Sm90a && launched[variant.index()] > 0)
        .then(|| manifest::find_for(Arch::Sm90a, Family::Merge, shape.dtype(), shape.head_dim()))
        .flatten();
    overlapping.map_or_else(|| find(Family::Merge, shape), Ok)
}

fn find(family: Family, shape: AttentionShape) -> Result<&'static KernelSpec> {
    manifest::find(family, shape.dtype(), shape.head_dim()).ok_or_else(|| Error::PlanMismatch {
        what: "the kernels there are".into(),
        plan: format!("{family:?} for {:?}, head_dim {}", shape.dtype(), shape.head_dim()),
        call: "no such entry in the manifest".into(),
    })
}
