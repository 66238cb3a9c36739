//! One front for both executors, and what the kernels support.

use crate::cuda::{CudaEngine, DeviceBuffer, RunArgs, Workspace};
use crate::{AttentionShape, DeviceProfile, Element, Error, HostTensors, KvStrides, Plan, Result, cpu};
use pat_abi::{Arch, KERNELS, TileVariant};

/// Executes plans, on the CPU or on a CUDA device.
#[derive(Debug)]
pub struct Engine {
    backend: Backend,
    reason: String,
}

#[derive(Debug)]
enum Backend {
    Cpu,
    Cuda(Box<CudaEngine>),
}

impl Engine {
    /// The CPU executor (all threads of rayon's pool).
    pub fn cpu() -> Self {
        Self { backend: Backend::Cpu, reason: "asked for".into() }
    }

    /// CUDA device `ordinal`.
    ///
    /// # Errors
    /// As [`crate::cuda::CudaDevice::new`].
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Ok(Self { backend: Backend::Cuda(Box::new(CudaEngine::new(ordinal)?)), reason: "asked for".into() })
    }

    /// CUDA device 0 where it can be used, else the CPU; [`Self::reason`] says why.
    pub fn auto() -> Self {
        match Self::cuda(0) {
            Ok(engine) => Self { reason: "a usable CUDA device is there".into(), ..engine },
            Err(error) => Self { backend: Backend::Cpu, reason: error.to_string() },
        }
    }

    /// What it runs on: `CPU`, or the device's name.
    pub fn name(&self) -> &str {
        self.as_cuda().map_or("CPU", |engine| engine.device().name())
    }

    /// Why this backend was chosen.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// The CUDA engine, for runs on device memory.
    pub fn as_cuda(&self) -> Option<&CudaEngine> {
        match &self.backend {
            Backend::Cpu => None,
            Backend::Cuda(engine) => Some(engine),
        }
    }

    /// The profile to plan with. On the CPU it is the H200's: the plan that is executed there is the one a GPU would get.
    ///
    /// # Errors
    /// The driver cannot be asked.
    pub fn profile(&self) -> Result<DeviceProfile> {
        self.as_cuda().map_or_else(|| Ok(DeviceProfile::h200()), |engine| engine.device().profile())
    }

    /// Executes a plan on host memory: as [`cpu::run`], on either backend. On CUDA it uploads everything, waits, and
    /// downloads the results: for tests and tools; engines call [`CudaEngine::bind`].
    ///
    /// # Errors
    /// As [`cpu::run`]; on CUDA also those of [`CudaEngine::run`].
    pub fn run_host<T: Element>(
        &self,
        plan: &Plan,
        tensors: &HostTensors<'_, T>,
        out: &mut [T],
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        match &self.backend {
            Backend::Cpu => cpu::run(plan, tensors, out, lse),
            Backend::Cuda(engine) => run_host_on(engine, plan, tensors, out, lse),
        }
    }
}

fn run_host_on<T: Element>(
    engine: &CudaEngine,
    plan: &Plan,
    tensors: &HostTensors<'_, T>,
    out: &mut [T],
    lse: Option<&mut [f32]>,
) -> Result<()> {
    if T::DTYPE != plan.shape().dtype() {
        return Err(Error::PlanMismatch {
            what: "the element type".into(),
            plan: format!("{:?}", plan.shape().dtype()),
            call: format!("{:?}", T::DTYPE),
        });
    }
    let device = engine.device();
    let stream = device.new_stream()?;
    let q = DeviceBuffer::from_slice(device, tensors.q)?;
    let k = DeviceBuffer::from_slice(device, tensors.k)?;
    let v = DeviceBuffer::from_slice(device, tensors.v)?;
    // Elements between strided rows keep their values, so the outputs travel both ways.
    let device_out = DeviceBuffer::from_slice(device, out)?;
    let device_lse = lse.as_deref().map(|values| DeviceBuffer::from_slice(device, values)).transpose()?;
    let workspace = Workspace::with_capacity(device, Workspace::bytes_for(plan))?;
    let buffers = engine.upload(plan, &stream)?;
    let args = RunArgs {
        shape: plan.shape(),
        page_size: plan.page_size(),
        num_pages: plan.num_pages(),
        rows: plan.sequence_count(),
        q: q.span(),
        q_strides: tensors.q_strides,
        k: k.span(),
        k_strides: tensors.k_strides,
        v: v.span(),
        v_strides: tensors.v_strides,
        out: device_out.span(),
        out_strides: tensors.out_strides,
        lse: device_lse.as_ref().map(|buffer| (buffer.span(), tensors.lse_strides)),
        softmax_scale: tensors.softmax_scale,
    };
    engine.run(&buffers, &args, &workspace, &stream)?;
    stream.synchronize()?;
    device_out.read(0, out)?;
    if let (Some(buffer), Some(values)) = (&device_lse, lse) {
        buffer.read(0, values)?;
    }
    Ok(())
}

/// What a model may ask of decode attention beyond the definition in the crate's documentation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// Scores capped by `cap * tanh(score / cap)`.
    pub softcap: bool,
    /// Only the last so many tokens are attended to.
    pub sliding_window: bool,
    /// Attention sinks (an additional term in the softmax's denominator).
    pub sinks: bool,
    /// Linear position biases.
    pub alibi: bool,
    /// KV stored in 8 bits.
    pub fp8_kv: bool,
    /// Elements per head of V and O, if they differ from those of Q and K.
    pub value_head_dim: Option<u32>,
    /// Query tokens per sequence, if more than one with a causal mask between them.
    pub query_tokens: Option<u32>,
}

/// Why something is not supported.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// A feature there is no kernel for.
    #[error("{0} is not supported")]
    Feature(&'static str),
    /// A shape there is no kernel for.
    #[error("no kernel for {dtype:?} with head_dim {head_dim}")]
    Shape {
        /// Element type asked for.
        dtype: pat_abi::Dtype,
        /// Elements per head asked for.
        head_dim: u32,
    },
    /// Page size 0.
    #[error("page_size is {0}, at least 1 is needed")]
    PageSize(u32),
    /// A stride the kernels' 16-byte accesses cannot follow.
    #[error("{tensor}_strides.{dim} is {stride} elements, a multiple of 8 from 0 up is needed")]
    Stride {
        /// `k` or `v`.
        tensor: &'static str,
        /// `page`, `token` or `head`.
        dim: &'static str,
        /// Elements.
        stride: i64,
    },
}

/// Whether the CUDA kernels can run a model's attention: asks no device, so that an adapter can decide anywhere.
///
/// # Errors
/// The first reason why not.
pub fn supports(
    shape: AttentionShape,
    page_size: u32,
    k_strides: KvStrides,
    v_strides: KvStrides,
    features: Features,
) -> std::result::Result<(), Reason> {
    let asked = [
        (features.softcap, "softcap"),
        (features.sliding_window, "a sliding window"),
        (features.sinks, "attention sinks"),
        (features.alibi, "alibi"),
        (features.fp8_kv, "8-bit KV"),
        (features.value_head_dim.is_some_and(|d| d != shape.head_dim()), "a head_dim of V other than that of K"),
        (features.query_tokens.is_some_and(|tokens| tokens != 1), "more than one query token per sequence"),
    ];
    if let Some((_, name)) = asked.into_iter().find(|(wanted, _)| *wanted) {
        return Err(Reason::Feature(name));
    }
    let portable = |variant: TileVariant| variant.arch() == Arch::Sm80 && variant.supports_page_size(page_size);
    let (dtype, head_dim) = (shape.dtype(), shape.head_dim());
    if page_size == 0 {
        return Err(Reason::PageSize(page_size));
    }
    let has_kernel = KERNELS.iter().any(|kernel| {
        matches!(kernel.family, pat_abi::Family::Forward(variant) if portable(variant))
            && kernel.dtype == dtype
            && kernel.head_dim == head_dim
    });
    if !has_kernel {
        return Err(Reason::Shape { dtype, head_dim });
    }
    for (tensor, strides) in [("k", k_strides), ("v", v_strides)] {
        for (dim, stride) in [("page", strides.page), ("token", strides.token), ("head", strides.head)] {
            if stride < 0 || stride % 8 != 0 {
                return Err(Reason::Stride { tensor, dim, stride });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    #[test]
    fn auto_names_its_choice_and_the_reason() {
        let engine = Engine::auto();
        assert!(!engine.reason().is_empty());
        match Engine::cuda(0) {
            Ok(_) => assert_ne!(engine.name(), "CPU"),
            Err(error) => assert_eq!((engine.name(), engine.reason()), ("CPU", error.to_string().as_str())),
        }
    }

    #[test]
    fn supports_every_shape_and_plain_layout() {
        for dtype in [Dtype::F16, Dtype::Bf16] {
            for head_dim in AttentionShape::HEAD_DIMS {
                let shape = AttentionShape::new(12, 4, head_dim, dtype).unwrap();
                for page_size in [1, 7, 16, 32] {
                    let (nhd, hnd) = (KvStrides::nhd(page_size, 4, head_dim), KvStrides::hnd(page_size, 4, head_dim));
                    assert_eq!(supports(shape, page_size, nhd, hnd, Features::default()), Ok(()));
                }
            }
        }
    }

    #[test]
    fn refusals_name_what_is_missing() {
        let shape = AttentionShape::new(32, 8, 128, Dtype::F16).unwrap();
        let nhd = KvStrides::nhd(16, 8, 128);
        let features = Features { softcap: true, ..Features::default() };
        assert_eq!(supports(shape, 16, nhd, nhd, features), Err(Reason::Feature("softcap")));
        let odd = KvStrides { token: 1025, ..nhd };
        let reason = supports(shape, 16, nhd, odd, Features::default()).unwrap_err();
        assert_eq!(reason, Reason::Stride { tensor: "v", dim: "token", stride: 1025 });
        assert_eq!(supports(shape, 0, nhd, nhd, Features::default()), Err(Reason::PageSize(0)));
    }
}
