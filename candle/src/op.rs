//! The operation, as candle calls it.

use crate::operands::{CacheLayout, Strides};
use crate::step::PlannedStep;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, Error, Layout, Result, Shape, WithDType};
use pat_rs::{Dtype, Element, HostTensors, Problem, RowStrides};

/// Decode attention of q over paged caches of K and V.
pub(crate) struct PagedDecode<'a> {
    pub(crate) step: &'a PlannedStep,
    pub(crate) cache: CacheLayout,
    pub(crate) problem: Problem,
}

impl PagedDecode<'_> {
    /// Of the output.
    pub(crate) fn out_shape(&self) -> Shape {
        let plan = self.step.plan();
        let (rows, shape) = (plan.sequence_count() as usize, plan.shape());
        (rows, shape.q_heads() as usize, shape.v_head_dim() as usize).into()
    }

    /// Of contiguous rows.
    pub(crate) fn out_strides(&self) -> RowStrides {
        let shape = self.problem.shape();
        RowStrides::contiguous(shape.q_heads(), shape.v_head_dim())
    }

    pub(crate) fn strides(&self, q: &Layout, k: &Layout, v: &Layout) -> Result<Strides> {
        Strides::of(self.step.plan(), self.cache, q, k, v).map_err(Error::wrap)
    }

    fn run_on_cpu<T: Element + WithDType>(&self, q: Operand<'_>, k: Operand<'_>, v: Operand<'_>) -> Result<CpuStorage> {
        let strides = self.strides(q.layout, k.layout, v.layout)?;
        let tensors = HostTensors::new(self.problem, q.elements::<T>()?, k.elements::<T>()?, v.elements::<T>()?)
            .with_kv_strides(strides.k, strides.v)
            .with_row_strides(strides.q, self.out_strides());
        let mut out = vec![T::from_f32(0.0); self.out_shape().elem_count()];
        pat_rs::cpu::run(self.step.plan(), &tensors, &mut out, None).map_err(Error::wrap)?;
        Ok(T::to_cpu_storage_owned(out))
    }
}

/// A tensor in host memory.
#[derive(Clone, Copy)]
struct Operand<'a> {
    storage: &'a CpuStorage,
    layout: &'a Layout,
}

impl<'a> Operand<'a> {
    /// Those from the first one on.
    fn elements<T: WithDType>(self) -> Result<&'a [T]> {
        let elements = self.storage.as_slice::<T>()?;
        Ok(elements.get(self.layout.start_offset()..).unwrap_or_default())
    }
}

impl CustomOp3 for PagedDecode<'_> {
    fn name(&self) -> &'static str {
        "pat-paged-decode"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let operand = |storage, layout| Operand { storage, layout };
        let (q, k, v) = (operand(q, q_layout), operand(k, k_layout), operand(v, v_layout));
        let out = match self.problem.shape().dtype() {
            Dtype::F16 => self.run_on_cpu::<half::f16>(q, k, v),
            Dtype::Bf16 => self.run_on_cpu::<half::bf16>(q, k, v),
            other => {
                Err(Error::wrap(pat_rs::Error::invalid("plan", format!("one for {}", other.name()), "f16 or bf16")))
            }
        }?;
        Ok((out, self.out_shape()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
        v: &CudaStorage,
        v_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let tensors = [(q, q_layout), (k, k_layout), (v, v_layout)];
        let out = match self.problem.shape().dtype() {
            Dtype::F16 => crate::border::run::<half::f16>(self, tensors),
            Dtype::Bf16 => crate::border::run::<half::bf16>(self, tensors),
            other => {
                Err(Error::wrap(pat_rs::Error::invalid("plan", format!("one for {}", other.name()), "f16 or bf16")))
            }
        }?;
        Ok((out, self.out_shape()))
    }
}
