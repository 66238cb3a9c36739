//! Binding and launching a plan.

use super::CudaDevice;
use super::args::{PreparedRun, RunArgs};
use super::bound_run::{BoundRun, RunKernels};
use super::device::{KernelQuery, KernelRole};
use super::driver::{self, Stream};
use super::plan_buffers::{PlanBuffers, Workspace};
use crate::arguments::check_features;
use crate::{AttentionShape, Error, Plan, Problem, Result};
use pat_abi::{Arch, Family, KernelSpec, Switches, TileVariant, manifest};

/// Runs plans on a device. `Send` and `Sync`; one serves all layers, streams and threads.
#[derive(Clone, Debug)]
pub struct CudaEngine {
    device: CudaDevice,
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
        Self { device }
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
        let mut buffers = PlanBuffers::with_capacity(&self.device, plan.bytes().len())?;
        buffers.upload(plan, stream)?;
        Ok(buffers)
    }

    /// Loads the kernels of all plans in these tile variants: the driver compiles them at their first use, which takes up to
    /// a second. At the start, with the variants that a planner may use ([`crate::Planner::tile_variants`]), it spares the
    /// first batch the wait.
    ///
    /// # Errors
    /// There is no kernel for the shape and a variant on this device, or the driver rejects the PTX (with its log).
    pub fn prepare_variants(&self, problem: &Problem, variants: &[TileVariant]) -> Result<()> {
        let (shape, switches) = (problem.shape(), problem.switches());
        for &variant in variants {
            self.device.kernel(forward_kernel(variant, shape, switches)?, switches)?;
        }
        self.device.kernel(merge_kernel(shape, |variant| variants.contains(&variant))?, Switches::OFF).map(drop)
    }

    /// Checks the arguments of a run, once, and compiles its kernels if this is their first use. The result owns what it uses.
    /// Buffers of fixed geometry may still be empty.
    ///
    /// # Errors
    /// An argument is refused or of another device, nothing was uploaded into buffers of exact geometry, there is no kernel
    /// for the plan's shape and variants on this device, or the driver rejects the PTX (with its log).
    pub fn bind(&self, plan: &PlanBuffers, args: &RunArgs, workspace: &Workspace) -> Result<BoundRun> {
        driver::drop_released();
        self.check_devices(plan, args, workspace)?;
        let terms = plan.binding_terms(args.terms())?;
        let run = args.prepare(&terms, plan.memory().address(), workspace)?;
        let kernels = self.kernels(&run, args)?;
        if plan.has_fixed_geometry() {
            plan.settle_terms(args.terms())?;
        }
        Ok(BoundRun::new(plan, terms.generation, args, workspace, run, kernels))
    }

    /// Binds and runs: for a single call. What is run more than once, as the layers of a model are at each step, is bound once.
    ///
    /// # Errors
    /// As [`Self::bind`] and [`BoundRun::run`]; nothing has been launched where an argument is refused.
    pub fn run(&self, plan: &PlanBuffers, args: &RunArgs, workspace: &Workspace, stream: &Stream) -> Result<()> {
        self.bind(plan, args, workspace)?.run(plan.uploaded()?, stream)
    }

    fn check_devices(&self, plan: &PlanBuffers, args: &RunArgs, workspace: &Workspace) -> Result<()> {
        let of_plan = plan.device();
        if of_plan != self.device {
            return Err(Error::invalid(
                "plan",
                format!("buffers of device {}", of_plan.ordinal()),
                format!("buffers of device {}", self.device.ordinal()),
            ));
        }
        let workspace = [("workspace", workspace.span())];
        args.spans().chain(workspace).try_for_each(|(name, span)| span.check_device(name, self.device))
    }

    fn kernels(&self, run: &PreparedRun, args: &RunArgs) -> Result<RunKernels> {
        let switches = args.problem.switches();
        let mut kernels = RunKernels { maps: None, forward: [[None; TileVariant::ALL.len()]; 2], merge: None };
        for (launches, kernels_of) in run.forward.iter().zip(&mut kernels.forward) {
            for variant in TileVariant::ALL.into_iter().filter(|variant| launches.grids[variant.index()] > 0) {
                let query = KernelQuery { shape: run.shape, role: KernelRole::Forward(variant, switches) };
                let find = || Ok((forward_kernel(variant, run.shape, switches)?, switches));
                let kernel = self.device.kernel_for(query, find)?;
                if kernel.takes_tensor_maps() && kernels.maps.is_none() {
                    kernels.maps = Some(driver::encode_tensor_maps(self.device, &args.tensor_maps()?)?);
                }
                kernels_of[variant.index()] = Some(kernel);
            }
        }
        if run.merge_rows > 0 {
            let launched = TileVariant::ALL.into_iter().filter(|variant| run.launches(*variant));
            let behind = launched.map(|variant| 1 << variant.index()).sum();
            let query = KernelQuery { shape: run.shape, role: KernelRole::Merge(behind) };
            let find = || Ok((merge_kernel(run.shape, |variant| run.launches(variant))?, Switches::OFF));
            kernels.merge = Some(self.device.kernel_for(query, find)?);
        }
        Ok(kernels)
    }
}

/// Behind a forward kernel of sm_90a the merge that starts while that drains; else the one that every device has, so that plans
/// of sm_80 tiles run the same kernels everywhere. `is_launched` says whether a tile variant is launched.
pub(super) fn merge_kernel(
    shape: AttentionShape,
    is_launched: impl Fn(TileVariant) -> bool,
) -> Result<&'static KernelSpec> {
    let overlapping = TileVariant::ALL
        .into_iter()
        .any(|variant| variant.arch() == Arch::Sm90a && is_launched(variant))
        .then(|| manifest::find_for(Arch::Sm90a, Family::Merge, shape.dtype(), shape.v_head_dim()))
        .flatten();
    overlapping
        .or_else(|| manifest::find(Family::Merge, shape.dtype(), shape.v_head_dim()))
        .ok_or_else(|| missing(Family::Merge, shape))
}

/// # Errors
/// The variant has no kernel for the shape, or none with these features: a plan made for a problem without them may use it.
pub(super) fn forward_kernel(
    variant: TileVariant,
    shape: AttentionShape,
    switches: Switches,
) -> Result<&'static KernelSpec> {
    check_features(variant, switches, shape)?;
    let (dtypes, head_dims) = ((shape.dtype(), shape.kv_dtype()), (shape.head_dim(), shape.v_head_dim()));
    manifest::find_forward(variant, dtypes, head_dims).ok_or_else(|| missing(Family::Forward(variant), shape))
}

fn missing(family: Family, shape: AttentionShape) -> Error {
    Error::PlanMismatch {
        what: "the kernels there are".into(),
        plan: format!(
            "{family:?} for {:?}, K and V {:?}, head_dim {}, v_head_dim {}",
            shape.dtype(),
            shape.kv_dtype(),
            shape.head_dim(),
            shape.v_head_dim()
        ),
        call: "no such entry in the manifest".into(),
    }
}
