//! One front for both executors.

use crate::cuda::{CudaEngine, DeviceBuffer, DeviceKvScale, RunArgs, Workspace};
use crate::{DeviceProfile, Element, HostTensors, KvElement, KvScale, Plan, Result, cpu};

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
    pub fn run_host<T: Element, C: KvElement>(
        &self,
        plan: &Plan,
        tensors: &HostTensors<'_, T, C>,
        out: &mut [T],
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        match &self.backend {
            Backend::Cpu => cpu::run(plan, tensors, out, lse),
            Backend::Cuda(engine) => run_host_on(engine, plan, tensors, out, lse),
        }
    }
}

fn run_host_on<T: Element, C: KvElement>(
    engine: &CudaEngine,
    plan: &Plan,
    tensors: &HostTensors<'_, T, C>,
    out: &mut [T],
    lse: Option<&mut [f32]>,
) -> Result<()> {
    crate::cpu::check(plan, tensors, out.len(), lse.as_deref().map(<[f32]>::len))?;
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
    let spans = (q.span(), k.span(), v.span(), device_out.span());
    let mut args = RunArgs::new(tensors.problem, plan.num_pages(), plan.sequence_count(), spans)
        .with_kv_strides(tensors.k_strides, tensors.v_strides)
        .with_row_strides(tensors.q_strides, tensors.out_strides);
    args.lse = device_lse.as_ref().map(|buffer| (buffer.span(), tensors.lse_strides));
    let sinks = tensors.sinks.map(|sinks| DeviceBuffer::from_slice(device, sinks)).transpose()?;
    args.sinks = sinks.as_ref().map(DeviceBuffer::span);
    let on_device = |scale: KvScale<'_>| match scale {
        KvScale::Tensor(scale) => Ok(DeviceKvScale::Tensor(scale)),
        KvScale::Heads(scales) => {
            DeviceBuffer::from_slice(device, scales).map(|scales| DeviceKvScale::Heads(scales.span()))
        }
    };
    args = args.with_kv_scales(on_device(tensors.k_scale)?, on_device(tensors.v_scale)?);
    engine.run(&buffers, &args, &workspace, &stream)?;
    stream.synchronize()?;
    device_out.read(0, out)?;
    if let (Some(buffer), Some(values)) = (&device_lse, lse) {
        buffer.read(0, values)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_names_its_choice_and_the_reason() {
        let engine = Engine::auto();
        assert!(!engine.reason().is_empty());
        match Engine::cuda(0) {
            Ok(_) => assert_ne!(engine.name(), "CPU"),
            Err(error) => assert_eq!((engine.name(), engine.reason()), ("CPU", error.to_string().as_str())),
        }
    }
}
