//! `PlanBuffers` and `BoundRun`: fixed memory that plans are uploaded into, and runs whose arguments were checked once.

use crate::device::{self, Device};
use crate::errors::{Integer, Result, argument, expect, invalid};
use crate::foreign;
use crate::operands::{Facts, KvLayout, Operands, Tensors};
use crate::plan::PyPlan;
use crate::planner::{PyPlanner, read_pages};
use crate::scores::Scores;
use crate::shape::PyShape;
use crate::tensor::Tensor;
use crate::torch::{self, Handle};
use crate::workspace::PyWorkspace;
use pat_rs::cuda::{BoundRun, CudaEngine, PlanBuffers, Stream, Uploaded};
use pat_rs::{Plan, Visibility};
use pyo3::intern;
use pyo3::prelude::*;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// Memory for a plan at an address that never changes, sized by the planner's capacity, with launches that do not depend on
/// the plan: runs that a CUDA graph has captured serve every plan that is uploaded later.
///
/// Args:
///     planner: with ``capacity=`` and for a device. On the CPU the buffers hold a copy, so that programs run alike.
///     page_size: tokens per page.
///     num_pages: pages of the K and V caches.
///
/// Raises:
///     ValueError: the planner has no capacity or no device.
///     CudaError: the driver cannot allocate.
#[pyclass(frozen, module = "prefix_attn", name = "PlanBuffers")]
pub(crate) struct PyPlanBuffers {
    memory: Arc<Memory>,
    facts: Facts,
}

enum Memory {
    Cpu(Mutex<Option<Plan>>),
    /// Uploads lock it for writing, runs for reading: they do not wait for each other.
    Cuda {
        ordinal: usize,
        engine: Arc<CudaEngine>,
        buffers: Box<RwLock<PlanBuffers>>,
    },
}

#[pymethods]
impl PyPlanBuffers {
    #[new]
    #[pyo3(signature = (planner: "Planner", page_size, num_pages))]
    fn new(planner: &Bound<'_, PyAny>, page_size: Integer, num_pages: Integer) -> Result<Self> {
        let (page_size, num_pages) = read_pages(page_size, num_pages)?;
        let planner = expect::<PyPlanner>("planner", planner)?.get();
        let (capacity, device) = (planner.fixed_capacity()?, planner.fixed_device()?);
        let variants = planner.tile_variants(page_size)?;
        let shape = planner.shape.inner;
        let memory = match device {
            Device::Cpu => Memory::Cpu(Mutex::new(None)),
            Device::Cuda(ordinal) => {
                let engine = device::engine(ordinal)?;
                let buffers = PlanBuffers::for_capacity(engine.device(), &capacity, &variants)?;
                // The driver compiles them now, not while a stream is captured.
                engine.prepare_variants(&planner.problem(page_size), &variants)?;
                Memory::Cuda { ordinal, engine, buffers: Box::new(RwLock::new(buffers)) }
            }
        };
        let Visibility { reach, is_tree: query_tree, .. } = planner.problem(page_size).visibility();
        let rows = capacity.max_sequences;
        let facts = Facts { shape, page_size, reach, query_tree, num_pages, rows, device: Some(device) };
        Ok(Self { memory: Arc::new(memory), facts })
    }

    /// Makes ``plan`` the one that later runs use: enqueues one copy. Between the replays of a graph it goes to the stream
    /// that the graph is replayed on.
    ///
    /// Args:
    ///     plan: of the planner that the buffers were made for, of the same page size and pool.
    ///     stream: handle of the CUDA stream, instead of torch's current one.
    ///
    /// Raises:
    ///     ValueError: the plan is of another shape, page size or pool, or exceeds the capacity: the former plan stays.
    ///     CudaError: the copy cannot be enqueued.
    #[pyo3(signature = (plan: "Plan", stream = None))]
    fn upload(&self, py: Python<'_>, plan: &Bound<'_, PyAny>, stream: Option<Integer>) -> Result<()> {
        let stream = stream.map(|stream| stream.unsigned("stream")).transpose()?;
        let plan = expect::<PyPlan>("plan", plan)?.get();
        let handle = torch::stream_of(py, self.device(), stream)?;
        let state = plan.lock();
        self.check(&state.plan)?;
        match &*self.memory {
            Memory::Cpu(held) => {
                held.lock().unwrap_or_else(PoisonError::into_inner).replace(state.plan.clone());
            }
            Memory::Cuda { engine, buffers, .. } => {
                let stream = foreign::stream(engine.device(), handle)?;
                buffers.write().unwrap_or_else(PoisonError::into_inner).upload(&state.plan, &stream)?;
            }
        }
        Ok(())
    }

    /// A run of one layer whose arguments are checked here, once, and whose tensors are kept alive.
    ///
    /// Args:
    ///     k_cache, v_cache, q, out, lse, scale, softcap, sinks, k_scale, v_scale, kv_layout: as in :func:`run`; q, out and lse
    ///         have at least the capacity's ``max_sequences`` rows.
    ///     workspace: memory for partial results, at least that of :meth:`Workspace.for_planner`; layers that run in the
    ///         order of a stream share one.
    ///
    /// Raises:
    ///     TypeError, ValueError: as :func:`run`.
    #[pyo3(signature = (k_cache: "torch.Tensor", v_cache: "torch.Tensor", q: "torch.Tensor", out: "torch.Tensor", lse: "torch.Tensor | None" = None, *, scale: "float | None" = None, softcap: "float | None" = None, sinks: "torch.Tensor | None" = None, k_scale: "float | torch.Tensor | None" = None, v_scale: "float | torch.Tensor | None" = None, kv_layout: "str" = "NHD", workspace: "Workspace | None" = None) -> "BoundRun")]
    #[expect(clippy::too_many_arguments, reason = "the Python signature")]
    fn bind(
        &self,
        k_cache: &Bound<'_, PyAny>,
        v_cache: &Bound<'_, PyAny>,
        q: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
        lse: Option<&Bound<'_, PyAny>>,
        scale: Option<&Bound<'_, PyAny>>,
        softcap: Option<&Bound<'_, PyAny>>,
        sinks: Option<&Bound<'_, PyAny>>,
        k_scale: Option<&Bound<'_, PyAny>>,
        v_scale: Option<&Bound<'_, PyAny>>,
        #[pyo3(from_py_with = argument::kv_layout)] kv_layout: &str,
        workspace: Option<&Bound<'_, PyAny>>,
    ) -> Result<PyBoundRun> {
        let layout = KvLayout::parse(kv_layout)?;
        let workspace = workspace.map(|workspace| expect::<PyWorkspace>("workspace", workspace)).transpose()?;
        let (scores, [k_scale, v_scale]) = Scores::read(scale, softcap)?.with_kv_scales(k_scale, v_scale)?;
        let objects = [
            ("q", Some(q)),
            ("k_cache", Some(k_cache)),
            ("v_cache", Some(v_cache)),
            ("out", Some(out)),
            ("lse", lse),
            ("sinks", sinks),
            ("k_scale", k_scale),
            ("v_scale", v_scale),
        ];
        let held: Vec<_> = objects
            .into_iter()
            .filter_map(|(name, object)| object.map(|object| (name, object.clone().unbind())))
            .collect();
        let mut tensors = Tensors {
            q: Tensor::read("q", q, None)?,
            k: Tensor::read("k_cache", k_cache, None)?,
            v: Tensor::read("v_cache", v_cache, None)?,
            out: Tensor::read("out", out, None)?,
            lse: lse.map(|lse| Tensor::read("lse", lse, None)).transpose()?,
            sinks: sinks.map(|sinks| Tensor::read("sinks", sinks, None)).transpose()?,
            k_scale: k_scale.map(|scale| Tensor::read("k_scale", scale, None)).transpose()?,
            v_scale: v_scale.map(|scale| Tensor::read("v_scale", scale, None)).transpose()?,
        };
        tensors.settle()?;
        let operands = Operands::new(&self.facts, &tensors, layout, scores)?;
        operands.check_outputs_are_apart()?;
        let on_device = match (&*self.memory, workspace) {
            (Memory::Cpu(_), _) => {
                operands.check_host(&tensors)?;
                None
            }
            (Memory::Cuda { .. }, None) => {
                return Err(invalid("workspace", "None", "a Workspace (Workspace.for_planner(planner))"));
            }
            (Memory::Cuda { ordinal, engine, buffers }, Some(workspace)) => {
                let workspace = workspace.get().on_cuda(*ordinal)?;
                let buffers = buffers.read().unwrap_or_else(PoisonError::into_inner);
                Some(engine.bind(&buffers, &operands.args(), workspace)?)
            }
        };
        let addresses = tensors.all().iter().map(|tensor| tensor.address).collect();
        Ok(PyBoundRun {
            memory: self.memory.clone(),
            on_device,
            device: operands.device,
            layout,
            scores,
            held,
            addresses,
            facts: self.facts,
        })
    }

    fn __repr__(&self) -> String {
        let Facts { page_size, num_pages, rows, .. } = self.facts;
        format!(
            "PlanBuffers(device=\"{}\", page_size={page_size}, num_pages={num_pages}, max_sequences={rows})",
            self.device()
        )
    }
}

impl PyPlanBuffers {
    fn device(&self) -> Device {
        match *self.memory {
            Memory::Cpu(_) => Device::Cpu,
            Memory::Cuda { ordinal, .. } => Device::Cuda(ordinal),
        }
    }

    /// Refuses a plan that the bound runs were not checked for.
    fn check(&self, plan: &Plan) -> Result<()> {
        let given = Facts::of(plan, self.facts.device);
        if given.rows > self.facts.rows {
            let expected = format!("at most the capacity's {}", self.facts.rows);
            return Err(invalid("plan", format!("one of {} sequences", given.rows), expected));
        }
        if (Facts { rows: self.facts.rows, ..given }) != self.facts {
            let describe = |facts: &Facts| {
                let Facts { shape, page_size, reach, query_tree, num_pages, .. } = facts;
                let reach = reach.tokens().map_or(String::new(), |tokens| format!(", {} {tokens}", reach.name()));
                format!(
                    "{}, page_size {page_size}, num_pages {num_pages}{reach}{}",
                    PyShape { inner: *shape }.__repr__(),
                    if *query_tree { ", query trees" } else { "" }
                )
            };
            return Err(invalid("plan", format!("one for {}", describe(&given)), describe(&self.facts)));
        }
        Ok(())
    }
}

/// One layer's run, checked once (:meth:`PlanBuffers.bind`). It keeps its tensors, its workspace and the plan's memory.
#[pyclass(frozen, module = "prefix_attn", name = "BoundRun")]
pub(crate) struct PyBoundRun {
    memory: Arc<Memory>,
    /// On CUDA: the same run, with its launches.
    on_device: Option<BoundRun>,
    device: Device,
    layout: KvLayout,
    scores: Scores,
    facts: Facts,
    /// The tensors, by name: q, k_cache, v_cache, out and perhaps lse, sinks and factors.
    held: Vec<(&'static str, Py<PyAny>)>,
    /// Where they were when they were checked.
    addresses: Vec<u64>,
}

#[pymethods]
impl PyBoundRun {
    /// Runs the plan that was uploaded last, on torch's current stream. A CUDA graph can capture it.
    ///
    /// Raises:
    ///     ValueError: nothing was uploaded; or a tensor has been resized since it was bound.
    ///     CudaError: the driver refuses a launch.
    fn run(&self, py: Python<'_>) -> Result<()> {
        match &*self.memory {
            Memory::Cpu(plan) => {
                let tensors = self.read_again(py)?;
                let operands = Operands::new(&self.facts, &tensors, self.layout, self.scores)?;
                let plan = plan.lock().unwrap_or_else(PoisonError::into_inner);
                operands.run_host(plan.as_ref().ok_or_else(nothing_uploaded)?, &tensors)
            }
            Memory::Cuda { .. } => {
                self.check_addresses(py)?;
                self.launch(py, |run, uploaded, stream| Ok(run.run(uploaded, stream)?))
            }
        }
    }

    /// As :meth:`run`, with other memory for q and out: the fastest form.
    ///
    /// Nothing is checked: the caller vouches that both addresses are those of memory on the run's device with the strides,
    /// the type and at least the rows of the bound q and out, aligned to 16 bytes, that out shares no memory with an input,
    /// and that both live until the stream has passed. Anything else is undefined behaviour.
    ///
    /// Args:
    ///     q_ptr: address of q, as ``q.data_ptr()`` gives it.
    ///     out_ptr: address of out.
    ///
    /// Raises:
    ///     ValueError: nothing was uploaded, an address is not aligned, or the run is one on the CPU.
    ///     CudaError: the driver refuses a launch.
    fn run_ptr(&self, py: Python<'_>, q_ptr: Integer, out_ptr: Integer) -> Result<()> {
        let (q_ptr, out_ptr) = (q_ptr.unsigned("q_ptr")?, out_ptr.unsigned("out_ptr")?);
        if matches!(*self.memory, Memory::Cpu(_)) {
            return Err(invalid("run_ptr", "a run on the CPU", "one on a CUDA device: use run()"));
        }
        self.launch(py, |run, uploaded, stream| foreign::run_with(run, uploaded, (q_ptr, out_ptr), stream))
    }

    fn __repr__(&self) -> String {
        format!("BoundRun(device=\"{}\")", self.device)
    }
}

impl PyBoundRun {
    fn launch(
        &self,
        py: Python<'_>,
        launch: impl FnOnce(&BoundRun, Uploaded<'_>, &Stream) -> Result<()>,
    ) -> Result<()> {
        let (Memory::Cuda { ordinal, engine, buffers }, Some(run)) = (&*self.memory, &self.on_device) else {
            return Err(nothing_uploaded());
        };
        let stream = foreign::stream(engine.device(), Handle::Current(torch::current_stream(py, *ordinal)?))?;
        let buffers = buffers.read().unwrap_or_else(PoisonError::into_inner);
        launch(run, buffers.uploaded().map_err(|_| nothing_uploaded())?, &stream)
    }

    /// Refuses tensors that have been given other memory.
    fn check_addresses(&self, py: Python<'_>) -> Result<()> {
        for ((name, tensor), &bound) in self.held.iter().zip(&self.addresses) {
            let address: u64 = match tensor.bind(py).call_method0(intern!(py, "data_ptr")) {
                Ok(address) => address.extract()?,
                // No torch tensor: DLPack memory is never resized.
                Err(_) => continue,
            };
            if address != bound {
                let got = format!("a tensor at {address:#x}, which has been resized since it was bound at {bound:#x}");
                return Err(invalid(*name, got, "the memory that was bound: bind again"));
            }
        }
        Ok(())
    }

    fn read_again<'py>(&self, py: Python<'py>) -> Result<Tensors<'py>> {
        self.check_addresses(py)?;
        let read = |index: usize| {
            let (name, object) = &self.held[index];
            Tensor::read(name, object.bind(py), None)
        };
        let optional = |name| self.held.iter().position(|held| held.0 == name).map(read).transpose();
        let (lse, sinks, k_scale, v_scale) =
            (optional("lse")?, optional("sinks")?, optional("k_scale")?, optional("v_scale")?);
        let mut tensors =
            Tensors { q: read(0)?, k: read(1)?, v: read(2)?, out: read(3)?, lse, sinks, k_scale, v_scale };
        tensors.settle()?;
        Ok(tensors)
    }
}

fn nothing_uploaded() -> crate::errors::Failure {
    invalid("buffers", "nothing uploaded", "a plan (PlanBuffers.upload)")
}
