//! What calls would launch, where there is no device: kernels as they would be compiled, grids and parameters. For tests that
//! run the PTX elsewhere.

use super::args::RunArgs;
use super::engine::{forward_kernel, merge_kernel};
use super::plan_buffers::{BindingTerms, PlanTerms};
use super::row_ops::{CheckedAppend, CheckedMergeStates, row_kernel};
use super::tensor_map::TensorMapSpec;
use super::{AppendArgs, DeviceSpan, DeviceState, LaunchGeometry, Workspace, driver, ptx};
use crate::{Dtype, Plan, Result};
use bytemuck::{NoUninit, bytes_of};
use pat_abi::{Arch, Family, KernelSpec, Switches, TileVariant};

/// A launch that a device would have been given.
#[derive(Clone, Debug)]
pub struct LaunchRecord {
    /// The kernel: its threads and its shared memory.
    pub kernel: &'static KernelSpec,
    /// The features that are compiled in.
    pub switches: Switches,
    /// The module that the driver would compile, with this one kernel.
    pub ptx: String,
    /// CTAs.
    pub ctas: u32,
    /// Bytes of the first parameter.
    pub params: Vec<u8>,
    /// The parameters behind it.
    pub tensor_maps: Vec<TensorMapRecord>,
}

/// A tensor map, before the driver encodes it: 128-byte swizzle, zeros out of range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMapRecord {
    /// Address of the first element.
    pub address: u64,
    /// Bytes of an element.
    pub element_bytes: u32,
    /// Elements, innermost dimension first.
    pub dims: [u64; 4],
    /// Strides of the dimensions 1 to 3.
    pub strides_bytes: [u64; 3],
    /// Elements of a box, innermost dimension first.
    pub box_dims: [u32; 4],
}

impl From<TensorMapSpec> for TensorMapRecord {
    fn from(spec: TensorMapSpec) -> Self {
        let TensorMapSpec { address, dtype, dims, strides_bytes, box_dims } = spec;
        Self { address, element_bytes: dtype.bytes(), dims, strides_bytes, box_dims }
    }
}

/// A span for arguments of this module's functions. Engines refuse it: it is on no device.
pub fn span(address: u64, bytes: u64) -> DeviceSpan {
    DeviceSpan::of_nothing(address, bytes)
}

/// The module that the driver of a Hopper device would compile for a kernel.
///
/// # Errors
/// The committed PTX lacks it.
pub fn module(kernel: &KernelSpec, switches: Switches) -> Result<String> {
    module_of(kernel, kernel.newest_file(90).unwrap_or(kernel.arch), switches)
}

/// The module of a kernel in one of the files that hold it ([`KernelSpec::is_in`]).
///
/// # Errors
/// The committed PTX lacks it.
pub fn module_of(kernel: &KernelSpec, file: Arch, switches: Switches) -> Result<String> {
    ptx::cut(ptx::text(file), kernel.entry, switches)
}

/// The launches of a run of `plan`, which lies at `plan_address`, on a device with `sm_count` multiprocessors: forward kernels in
/// order of tile variants, each once for every part of a group, those in runs of pages behind the others, then the merge,
/// where there is something to merge.
///
/// # Errors
/// As [`CudaEngine::bind`](super::CudaEngine::bind).
pub fn run(
    plan: &Plan,
    plan_address: u64,
    args: &RunArgs,
    workspace: &Workspace,
    sm_count: u32,
) -> Result<Vec<LaunchRecord>> {
    let terms = PlanTerms { planned: plan.problem().planned(), num_pages: plan.num_pages() };
    let bound = BindingTerms { terms, limits: LaunchGeometry::of(plan), generation: Some(plan.generation()) };
    let run = args.prepare(&bound, plan_address, workspace)?;
    let switches = args.problem.switches();
    let mut records = Vec::new();
    let launches = run.forward.iter().flat_map(|launches| TileVariant::ALL.map(|variant| (launches, variant)));
    for (launches, variant) in launches {
        let ctas = launches.grids[variant.index()];
        if ctas > 0 {
            let kernel = forward_kernel(variant, run.shape, switches)?;
            for params in launches.of_variant(variant) {
                let mut record = if kernel.kv_dtype.bytes() == 1 {
                    LaunchRecord::new(kernel, switches, (ctas, sm_count), &params)?
                } else {
                    LaunchRecord::new(kernel, switches, (ctas, sm_count), &params.forward)?
                };
                record.ctas = record.ctas.max(ctas.min(launches.ctas[variant.index()]));
                if kernel.tensor_maps > 0 {
                    record.tensor_maps.extend(args.tensor_maps()?.map(TensorMapRecord::from));
                }
                records.push(record);
            }
        }
    }
    if run.merge_rows > 0 {
        let kernel = merge_kernel(run.shape, |variant| run.launches(variant))?;
        records.push(LaunchRecord::new(kernel, Switches::OFF, (run.merge_rows as u32, sm_count), &run.merge)?);
    }
    Ok(records)
}

/// The launch of [`CudaEngine::append_kv`](super::CudaEngine::append_kv).
///
/// # Errors
/// An argument is refused.
pub fn append_kv(args: &AppendArgs) -> Result<LaunchRecord> {
    let CheckedAppend { kernel, params, ctas } = CheckedAppend::new(args)?;
    if kernel.kv_dtype.bytes() == 1 {
        LaunchRecord::new(kernel, Switches::OFF, (ctas, 1), &params)
    } else {
        LaunchRecord::new(kernel, Switches::OFF, (ctas, 1), &params.append)
    }
}

/// The launch of [`CudaEngine::merge_states`](super::CudaEngine::merge_states).
///
/// # Errors
/// An argument is refused.
pub fn merge_states(
    extent: (u32, u32, u32),
    dtype: Dtype,
    [a, b]: [&DeviceState; 2],
    merged: &DeviceState,
) -> Result<LaunchRecord> {
    let CheckedMergeStates(params, ctas) = CheckedMergeStates::new(extent, [a, b, merged])?;
    LaunchRecord::new(row_kernel(Family::MergeStates, dtype)?, Switches::OFF, (ctas, 1), &params)
}

impl LaunchRecord {
    /// `ctas` of a device with so many multiprocessors: persistent kernels have no more than fit.
    fn new(
        kernel: &'static KernelSpec,
        switches: Switches,
        (ctas, sm_count): (u32, u32),
        params: &impl NoUninit,
    ) -> Result<Self> {
        Ok(Self {
            kernel,
            switches,
            ptx: module(kernel, switches)?,
            ctas: ctas.min(driver::max_grid(kernel, sm_count)),
            params: bytes_of(params).to_vec(),
            tensor_maps: Vec::new(),
        })
    }
}
