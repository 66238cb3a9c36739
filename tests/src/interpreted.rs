//! The CUDA executor without a device: the launches of a run as the library makes them, their PTX interpreted on the CPU.

use crate::Output;
use bytemuck::Pod;
use pat_abi::Family;
use pat_ptx_interpreter::{Access, GlobalMemory, Kernel, Launch, Param, TensorMap, Unset};
use pat_rs::cuda::launch_records::{self, LaunchRecord, span};
use pat_rs::cuda::{DeviceKvScale, DeviceSpan, RunArgs, Workspace};
use pat_rs::{Element, HostTensors, KvElement, KvScale, Plan};

/// Multiprocessors of the device that the launches are for: few, so that persistent kernels take several items per CTA.
pub const SM_COUNT: u32 = 2;

/// Memory for launches, and reading it back.
#[derive(Clone, Debug, Default)]
pub struct DeviceMemory {
    memory: GlobalMemory,
}

impl DeviceMemory {
    /// Without buffers.
    pub fn new() -> Self {
        Self::default()
    }

    /// A buffer with these values.
    pub fn add<T: Pod>(&mut self, name: &str, values: &[T], access: Access) -> DeviceSpan {
        let bytes: Vec<u8> = bytemuck::cast_slice(values).to_vec();
        let length = bytes.len() as u64;
        span(self.memory.add(name, bytes, access), length)
    }

    /// What the buffer of a span holds.
    ///
    /// # Panics
    /// No buffer begins there.
    pub fn read<T: Pod>(&self, span: &DeviceSpan) -> Vec<T> {
        let bytes = self.memory.bytes(span.address()).expect("a buffer");
        bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
    }

    /// Executes a launch.
    ///
    /// # Errors
    /// The interpreter's.
    pub fn launch(&mut self, record: &LaunchRecord) -> pat_ptx_interpreter::Result<()> {
        let maps = record.tensor_maps.iter().map(|map| {
            Param::TensorMap(TensorMap {
                address: map.address,
                element_bytes: u64::from(map.element_bytes),
                dims: map.dims,
                strides_bytes: map.strides_bytes,
                box_dims: map.box_dims,
            })
        });
        let params: Vec<Param<'_>> = [Param::Bytes(&record.params)].into_iter().chain(maps).collect();
        // The wgmma kernels compute tile rows that the item does not have from whatever the queries before have left there:
        // rows do not mix, and theirs are not stored. NaN shows if they do.
        let unset_shared = match record.kernel.family {
            Family::Forward(variant) if variant.is_persistent() => Unset::Reads(0xff),
            _ => Unset::Fault,
        };
        let launch = Launch {
            ctas: record.ctas,
            threads: record.kernel.threads,
            shared_bytes: record.kernel.smem_bytes as usize,
            unset_shared,
            params: &params,
        };
        Kernel::parse(&record.ptx, record.kernel.entry)?.launch(&launch, &mut self.memory)
    }
}

/// A run of a plan, ready to be executed.
#[derive(Clone, Debug)]
pub struct InterpretedRun {
    /// The launches; a test may change their PTX.
    pub launches: Vec<LaunchRecord>,
    memory: DeviceMemory,
    out: DeviceSpan,
    lse: Option<DeviceSpan>,
}

impl InterpretedRun {
    /// Lays out the tensors, the outputs as they are, and a workspace of NaN in memory, and takes down the launches.
    ///
    /// # Errors
    /// An argument is refused.
    ///
    /// # Panics
    /// V begins inside K and ends behind it.
    pub fn new<T: Element, C: KvElement>(
        plan: &Plan,
        host: &HostTensors<'_, T, C>,
        out: &[T],
        lse: Option<&[f32]>,
    ) -> pat_rs::Result<Self> {
        let mut memory = DeviceMemory::new();
        let mut plan_bytes = plan.bytes().to_vec();
        // Kernels fetch as much before they know how long the plan is.
        plan_bytes.resize(plan_bytes.len().max(pat_abi::PlanHeader::LEAST_ALLOCATION_BYTES as usize), 0);
        let plan_span = memory.add("the plan", &plan_bytes, Access::Read);
        let q = memory.add("Q", host.q, Access::Read);
        let k = memory.add("K", host.k, Access::Read);
        let v = match inside(host.k, host.v) {
            Some(offset) => k.skip(offset).expect("inside K"),
            None => memory.add("V", host.v, Access::Read),
        };
        let out = memory.add("O", out, Access::ReadWrite);
        let lse = lse.map(|lse| memory.add("LSE", lse, Access::ReadWrite));
        let nan = vec![f32::NAN; (Workspace::bytes_for(plan) / 4) as usize];
        let workspace = Workspace::from_span(memory.add("the workspace", &nan, Access::ReadWrite));

        let header = plan.header();
        let mut args = RunArgs::new(host.problem, plan.num_pages(), header.sequence_count, (q, k, v, out.clone()))
            .with_kv_strides(host.k_strides, host.v_strides)
            .with_row_strides(host.q_strides, host.out_strides);
        if let Some(lse) = &lse {
            args = args.with_lse(lse.clone(), host.lse_strides);
        }
        if let Some(sinks) = host.sinks {
            args = args.with_sinks(memory.add("the sinks", sinks, Access::Read));
        }
        let mut scale = |name, scale: KvScale<'_>| match scale {
            KvScale::Tensor(scale) => DeviceKvScale::Tensor(scale),
            KvScale::Heads(scales) => DeviceKvScale::Heads(memory.add(name, scales, Access::Read)),
        };
        let (k_scale, v_scale) = (scale("K's factors", host.k_scale), scale("V's factors", host.v_scale));
        let args = args.with_kv_scales(k_scale, v_scale);
        let launches = launch_records::run(plan, plan_span.address(), &args, &workspace, SM_COUNT)?;
        Ok(Self { launches, memory, out, lse })
    }

    /// Executes the launches, one after the other.
    ///
    /// # Errors
    /// The interpreter's.
    pub fn run<T: Element>(&mut self) -> pat_ptx_interpreter::Result<Output<T>> {
        self.launches.iter().try_for_each(|record| self.memory.launch(record))?;
        let lse = self.lse.as_ref().map(|lse| self.memory.read(lse)).unwrap_or_default();
        Ok(Output { out: self.memory.read(&self.out), lse })
    }
}

/// Where `inner` begins in `outer`, in bytes, if it lies inside.
fn inside<T>(outer: &[T], inner: &[T]) -> Option<u64> {
    let (outer, inner) = (outer.as_ptr_range(), inner.as_ptr_range());
    let is_inside = outer.start <= inner.start && inner.end <= outer.end;
    is_inside.then(|| (inner.start.addr() - outer.start.addr()) as u64)
}
