//! A case in device memory.

use crate::{Case, Output};
use pat_abi::generator::Tensor;
use pat_rs::cuda::bench_support::{FillSpec, fill};
use pat_rs::cuda::{CudaEngine, DeviceBuffer, RunArgs, Stream};
use pat_rs::{Dtype, Element, KvStrides, Plan, PlanOptions, Planner, RowStrides};
use pat_workloads::Tensors;

/// A case with its tensors in device memory, outputs contiguous.
#[derive(Debug)]
pub struct OnDevice<T> {
    /// What is computed.
    pub case: Case,
    /// Q.
    pub q: DeviceBuffer,
    /// Both pools.
    pub kv: DeviceBuffer,
    /// O.
    pub out: DeviceBuffer,
    /// Log-sum-exps.
    pub lse: DeviceBuffer,
    tensors: Tensors<T>,
}

impl<T: Element> OnDevice<T> {
    /// Draws the tensors and copies them.
    ///
    /// # Errors
    /// The case is not valid, or the device's.
    pub fn new(case: Case, engine: &CudaEngine, seed: u32) -> pat_rs::Result<Self> {
        let tensors = Tensors::<T>::draw(&case.batch, case.shape, case.layout, seed)?;
        let device = engine.device();
        Ok(Self {
            q: DeviceBuffer::from_slice(device, &tensors.q)?,
            kv: DeviceBuffer::from_slice(device, &tensors.kv)?,
            out: DeviceBuffer::zeroed(device, tensors.nan_out().len() * 2)?,
            lse: DeviceBuffer::zeroed(device, tensors.q.len() / case.shape.head_dim() as usize * 4)?,
            case,
            tensors,
        })
    }

    /// The arguments of a run over all of it.
    ///
    /// # Panics
    /// Never: V begins inside the pool.
    pub fn args(&self) -> RunArgs {
        let v = self.kv.span().skip(2 * self.tensors.v_begin as u64).expect("inside the pool");
        let (batch, shape) = (&self.case.batch, self.case.shape);
        let tensors = (self.q.span(), self.kv.span(), v, self.out.span());
        RunArgs::new(batch.problem(shape), batch.num_pages, batch.lengths.len() as u32, tensors)
            .with_kv_strides(self.tensors.k_strides, self.tensors.v_strides)
            .with_lse(self.lse.span(), RowStrides::lse(shape.q_heads()))
    }

    /// Plans the case for a device.
    ///
    /// # Errors
    /// The planner's.
    pub fn plan(&self, engine: &CudaEngine, options: PlanOptions) -> pat_rs::Result<Plan> {
        plan(&self.case, engine, options)
    }

    /// Makes the outputs NaN.
    ///
    /// # Errors
    /// The driver's.
    pub fn poison(&mut self) -> pat_rs::Result<()> {
        self.out.fill(0xff)?;
        self.lse.fill(0xff)
    }

    /// The outputs, when the device has finished.
    ///
    /// # Errors
    /// The driver's.
    pub fn output(&self) -> pat_rs::Result<Output<T>> {
        read_output(&self.out, &self.lse)
    }
}

/// Outputs of these buffers.
///
/// # Errors
/// The driver's.
pub fn read_output<T: Element>(out: &DeviceBuffer, lse: &DeviceBuffer) -> pat_rs::Result<Output<T>> {
    let mut output =
        Output { out: vec![T::zeroed(); out.bytes() as usize / 2], lse: vec![0.0; lse.bytes() as usize / 4] };
    out.read(0, &mut output.out)?;
    lse.read(0, &mut output.lse)?;
    Ok(output)
}

/// Puts something into a buffer that no plan computes: by a kernel, since a captured graph goes on borrowing what it writes.
/// Buffers have a multiple of 128 bytes; what is behind that stays.
///
/// # Errors
/// The driver's.
pub fn poison(engine: &CudaEngine, buffer: &DeviceBuffer, seed: u32, stream: &Stream) -> pat_rs::Result<()> {
    let head_dim = 64;
    let pages = buffer.bytes() as u32 / 2 / head_dim;
    let strides = KvStrides::nhd(1, 1, head_dim);
    let spec = FillSpec { tensor: Tensor::Q, seed, dtype: Dtype::F16, pages, tokens: 1, heads: 1, head_dim, strides };
    fill(engine.device(), buffer.span(), spec, stream)
}

/// Plans a case for a device.
///
/// # Errors
/// The planner's.
pub fn plan(case: &Case, engine: &CudaEngine, options: PlanOptions) -> pat_rs::Result<Plan> {
    let rows = case.batch.rows();
    Planner::new(case.batch.problem(case.shape), engine.device().profile()?, options)?.plan(&case.batch.view(&rows)?)
}
