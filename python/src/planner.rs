//! `Planner` and `PlanFuture`.

use crate::capacity::PyCapacity;
use crate::device::Device;
use crate::errors::{Integer, Result, argument, expect, invalid, type_name, wrong_type};
use crate::fork;
use crate::plan::{Origin, PyPlan};
use crate::profile::PyProfile;
use crate::resident::Pool;
use crate::scores::read_positive;
use crate::shape::PyShape;
use crate::tables::{Given, Integers, Queries, Tables};
use pat_rs::plan::{PageRuns, PlanCapacity, PlanChange, PlanMode};
use pat_rs::{Plan, PlanOptions, Planner, Problem, Reach, TileVariant};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Makes plans for one shape on one device: once per decode step, for all layers. It keeps its scratch memory, so that a step
/// of a batch that does not grow allocates little.
///
/// Args:
///     shape: the model's attention.
///     device: where plans will run: ``"cuda:0"``, ``"cpu"``, a torch.device. A :class:`DeviceProfile` plans for that device;
///         such plans run wherever the tensors are. By default the current CUDA device.
///     mode: ``"auto"`` takes what is predicted to be fastest; ``"flat"`` shares nothing; ``"packed"`` and ``"per-node"``
///         share as much as tiles hold; ``"fixed-chunk:TOKENS"`` cuts every TOKENS tokens and shares whole chunks alone, so
///         that the bits of a sequence's output do not depend on the rest of the batch.
///     capacity: bounds of the plans; needed for :class:`PlanBuffers`.
///     variants: names of the only tile variants to use; by default the best of those that the device runs.
///     softcap: the cap of the runs' scores, if they have one: not every kernel can cap. Runs without a cap may use the plans,
///         too.
///     window: tokens that each sequence sees, the last ones, under a sliding window. Pages in front of it are neither planned
///         nor read; their entries in the block tables must still be page ids.
///     chunk: instead of a window, the tokens of a chunk: each sequence sees those since the last multiple of it (Llama 4).
///     query_tree: whether batches may come with query trees (``parents=`` of :meth:`plan`).
///     page_runs: whether pages of one token, at least half of which lie in runs of consecutive ids, are planned as pages of 16
///         tokens where running the plan is predicted to take no longer. It changes nothing for other page sizes, under a capacity,
///         and with fixed chunks, windows, chunks or query trees.
///
/// Raises:
///     ValueError: a mode or variant that is not known, or not possible on the device.
///     CudaUnavailable: the device is not there.
#[pyclass(frozen, module = "prefix_attn", name = "Planner")]
pub(crate) struct PyPlanner {
    pub(crate) shape: PyShape,
    device: Option<Device>,
    capacity: Option<PlanCapacity>,
    origin: Arc<Origin>,
    planner: Arc<Mutex<PagedPlanner>>,
    pool: Arc<Pool>,
}

#[pymethods]
impl PyPlanner {
    #[new]
    #[pyo3(signature = (shape: "AttentionShape", device: "DeviceProfile | torch.device | str | None" = None, *, mode: "str" = "auto", capacity: "Capacity | None" = None, variants: "list[str] | None" = None, softcap: "float | None" = None, window: "SupportsIndex | None" = None, chunk: "SupportsIndex | None" = None, query_tree: "bool" = false, page_runs: "bool" = false))]
    #[expect(clippy::too_many_arguments, reason = "the Python signature")]
    fn new(
        py: Python<'_>,
        shape: &Bound<'_, PyAny>,
        device: Option<&Bound<'_, PyAny>>,
        #[pyo3(from_py_with = argument::mode)] mode: &str,
        capacity: Option<&Bound<'_, PyAny>>,
        variants: Option<&Bound<'_, PyAny>>,
        softcap: Option<&Bound<'_, PyAny>>,
        window: Option<Integer>,
        chunk: Option<Integer>,
        #[pyo3(from_py_with = argument::query_tree)] query_tree: bool,
        #[pyo3(from_py_with = argument::page_runs)] page_runs: bool,
    ) -> Result<Self> {
        let shape = *expect::<PyShape>("shape", shape)?.get();
        let capacity = capacity.map(|capacity| expect::<PyCapacity>("capacity", capacity)).transpose()?;
        let reach = read_reach(window, chunk)?;
        let soft_cap = read_positive("softcap", softcap)?;
        let (device, profile) = match device.map(|device| (device, device.cast::<PyProfile>())) {
            Some((_, Ok(profile))) => (None, profile.get().inner.clone()),
            given => {
                let device = Device::parse_or_current(py, given.map(|(device, _)| device))?;
                (Some(device), PyProfile::of(device)?.inner)
            }
        };
        let variants = variants.map(read_variants).transpose()?;
        let runs = if page_runs { PageRuns::WhereFree } else { PageRuns::Never };
        let options = PlanOptions::from(parse_mode(mode)?).with_runs(runs);
        let options = variants.into_iter().fold(options, PlanOptions::with_variants);
        let capacity = capacity.map(|capacity| capacity.get().inner);
        let origin = Origin { shape: shape.inner, soft_cap, reach, query_tree, profile, options, capacity };
        let origin = Arc::new(origin);
        let planner = Arc::new(Mutex::new(PagedPlanner::new(origin.clone())?));
        Ok(Self { shape, device, capacity, origin, planner, pool: Arc::default() })
    }

    /// Plans a batch. The interpreter is free for other threads meanwhile.
    ///
    /// Args:
    ///     block_tables: the page ids of each sequence, in order: a list of lists; a 2-D int32 CPU tensor or array
    ///         ``[rows, columns]``, where anything may stand behind the pages that a length needs; or a tuple
    ///         ``(indptr, ids)`` of 1-D int32 arrays. Data on a CUDA device is refused: a copy would have to wait for it.
    ///     lengths: tokens of each sequence, the one being decoded included: a list or a 1-D int32 CPU tensor. Rows of
    ///         length 0 are allowed; their output is 0 and their LSE -inf.
    ///     page_size: tokens per page.
    ///     num_pages: pages of the K and V caches.
    ///     query_tokens: query tokens of each sequence, its last tokens, each of which sees the tokens up to itself: one number
    ///         for all or one per sequence, as lengths are given; by default 1. A query token is a row of the plan and of q,
    ///         out and lse: those of the first sequence come first.
    ///     parents: instead of query_tokens, the query tokens of each sequence as a tree, for speculative trees: for each of its
    ///         last tokens the index of its parent among them, or None (or -1) where it comes right behind the tokens in front
    ///         of them. One list for all sequences, or a list of one list per sequence. A list may also be a 1-D CPU tensor or
    ///         array of int32 or int64; a 2-D one holds one tree per row. A query token sees the tokens in front of the query
    ///         tokens, its ancestors and itself; parents come before their children.
    ///     table_rows: the row of block_tables that each sequence has, where they are a 2-D tensor or array of more requests
    ///         than are in the batch, or of others in between: a list or a 1-D int32 CPU tensor, one per length. By default
    ///         sequence i has row i.
    ///
    /// Raises:
    ///     TypeError: an argument is of another type (integers of another width included).
    ///     ValueError: an argument has a value that is not accepted: the message names it, with its index.
    #[pyo3(signature = (block_tables, lengths, page_size, num_pages, *, query_tokens = None, parents = None, table_rows = None) -> "Plan")]
    #[expect(clippy::too_many_arguments, reason = "the Python signature")]
    fn plan(
        &self,
        py: Python<'_>,
        block_tables: &Bound<'_, PyAny>,
        lengths: &Bound<'_, PyAny>,
        page_size: Integer,
        num_pages: Integer,
        query_tokens: Option<&Bound<'_, PyAny>>,
        parents: Option<&Bound<'_, PyAny>>,
        table_rows: Option<&Bound<'_, PyAny>>,
    ) -> Result<PyPlan> {
        let (page_size, num_pages) = read_pages(page_size, num_pages)?;
        let given = Given { block_tables, table_rows, lengths, queries: self.queries(query_tokens, parents) };
        let tables = Tables::read(Tables::default(), given, page_size, num_pages)?;
        let plan = py.detach(|| {
            let _no_fork = fork::hold_off();
            tables.with_batch(|batch| self.lock().for_pages(page_size)?.plan(batch))
        })?;
        Ok(self.made(plan, tables))
    }

    /// Makes ``plan``, the plan that this planner made last, the plan of the next decode step, in place: with many sequences much
    /// faster than planning from scratch, and predicted to be about as fast on the device. With fixed chunks the two are equal.
    ///
    /// Args:
    ///     plan: a plan of this planner. An older one than the last is planned from scratch.
    ///     block_tables, lengths: as in :meth:`plan`, for pages of the plan's size and a pool of its number of pages.
    ///     changed_rows: the rows whose table entries *that were in use before* may differ: a list or 1-D int32 tensor. A
    ///         row that only grew is not among them. ``None``: all entries are compared, as with query_tokens.
    ///     query_tokens, parents, table_rows: as in :meth:`plan`. A planner with a window, chunks or query trees plans from
    ///         scratch.
    ///
    /// Returns:
    ///     ``"nothing"``, ``"lengths"``, ``"pages"`` or ``"forest"``: how much has changed.
    ///
    /// Raises:
    ///     TypeError, ValueError: as :meth:`plan`; the plan is as before.
    #[pyo3(signature = (plan: "Plan", block_tables, lengths, changed_rows = None, *, query_tokens = None, parents = None, table_rows = None) -> "str")]
    #[expect(clippy::too_many_arguments, reason = "the Python signature")]
    fn advance(
        &self,
        py: Python<'_>,
        plan: &Bound<'_, PyAny>,
        block_tables: &Bound<'_, PyAny>,
        lengths: &Bound<'_, PyAny>,
        changed_rows: Option<&Bound<'_, PyAny>>,
        query_tokens: Option<&Bound<'_, PyAny>>,
        parents: Option<&Bound<'_, PyAny>>,
        table_rows: Option<&Bound<'_, PyAny>>,
    ) -> Result<&'static str> {
        let plan = expect::<PyPlan>("plan", plan)?.get();
        if plan.origin.shape != self.shape.inner {
            let got = format!("one for {}", PyShape { inner: plan.origin.shape }.__repr__());
            return Err(invalid("plan", got, format!("one for {}", self.shape.__repr__())));
        }
        let (page_size, num_pages) = plan.pages();
        if plan.origin.problem(page_size) != self.problem(page_size) {
            return Err(invalid(
                "plan",
                "one for another window, chunk, soft cap or query tree",
                "a plan of this planner's problem",
            ));
        }
        let given = Given { block_tables, table_rows, lengths, queries: self.queries(query_tokens, parents) };
        // The memory of the tables before the last ones: no step of a batch that does not grow asks the system for some.
        let spare = std::mem::take(&mut plan.lock().spare);
        let tables = Tables::read(spare, given, page_size, num_pages)?;
        // They name sequences; the rows of the batch are query tokens.
        let changed_rows = changed_rows
            .map(|rows| read_rows(rows, tables.sequences()))
            .transpose()?
            .filter(|_| !tables.has_query_tokens());
        // What another thread plans for long is not waited for with the interpreter.
        let free = if tables.are_few() { self.planner.try_lock().ok() } else { None };
        let advance = |mut planner: MutexGuard<'_, PagedPlanner>| -> pat_rs::Result<PlanChange> {
            let mut state = plan.lock();
            let planner = planner.for_pages(page_size)?;
            let change = tables.with_batch(|batch| planner.advance(batch, changed_rows.as_deref(), &mut state.plan))?;
            state.spare = std::mem::replace(&mut state.tables, tables);
            Ok(change)
        };
        let change = if let Some(planner) = free {
            // Nor does another thread fork while this one has the interpreter.
            advance(planner)
        } else {
            py.detach(|| {
                let _no_fork = fork::hold_off();
                advance(self.lock())
            })
        }?;
        Ok(match change {
            PlanChange::Nothing => "nothing",
            PlanChange::Lengths => "lengths",
            PlanChange::Pages => "pages",
            PlanChange::Forest => "forest",
        })
    }

    /// As :meth:`plan`, on a thread of its own. The arguments are read before this returns, and may be changed then. A fork of
    /// the process (``os.fork``, multiprocessing) waits for it: the child has the plan, too.
    ///
    /// Returns:
    ///     An object with ``done()`` and ``result()``; ``result()`` waits, and raises what planning raised.
    ///
    /// Raises:
    ///     TypeError, ValueError: an argument cannot be read.
    #[pyo3(signature = (block_tables, lengths, page_size, num_pages, *, query_tokens = None, parents = None, table_rows = None) -> "PlanFuture")]
    #[expect(clippy::too_many_arguments, reason = "the Python signature")]
    fn plan_async(
        &self,
        py: Python<'_>,
        block_tables: &Bound<'_, PyAny>,
        lengths: &Bound<'_, PyAny>,
        page_size: Integer,
        num_pages: Integer,
        query_tokens: Option<&Bound<'_, PyAny>>,
        parents: Option<&Bound<'_, PyAny>>,
        table_rows: Option<&Bound<'_, PyAny>>,
    ) -> Result<PyPlanFuture> {
        let (page_size, num_pages) = read_pages(page_size, num_pages)?;
        let given = Given { block_tables, table_rows, lengths, queries: self.queries(query_tokens, parents) };
        let tables = Tables::read(Tables::default(), given, page_size, num_pages)?;
        let (planner, made) = (self.planner.clone(), Arc::new(OnceLock::new()));
        let (of_future, running) = (made.clone(), fork::Background::begin(py));
        let work = move || {
            let plan = || {
                let plan = tables.with_batch(|batch| lock(&planner).for_pages(page_size)?.plan(batch))?;
                Ok((plan, tables))
            };
            // A panic is the future's, too, whose result would wait for ever; the planner outlives it (see `lock`).
            let made = catch_unwind(AssertUnwindSafe(plan)).ok();
            let _ = of_future.set(Mutex::new(made));
            drop(running);
        };
        // Nobody joins it: in a forked child there would be no such thread.
        std::thread::Builder::new()
            .name("prefix-attn-plan".into())
            .spawn(work)
            .map_err(|error| PyRuntimeError::new_err(format!("no thread to plan on: {error}")))?;
        let (device, origin, pool) = (self.device, self.origin.clone(), self.pool.clone());
        Ok(PyPlanFuture { made, planned: OnceLock::new(), device, origin, pool })
    }

    /// The shape that is planned for.
    #[getter]
    fn shape(&self) -> PyShape {
        self.shape
    }

    /// Where its plans run: ``"cpu"``, ``"cuda:N"``, or None where it was made from a profile.
    #[getter]
    fn device(&self) -> Option<String> {
        self.device.map(|device| device.to_string())
    }

    /// The profile that plans are made for.
    #[getter]
    fn profile(&self) -> PyProfile {
        PyProfile { inner: self.origin.profile.clone() }
    }

    /// The bounds of its plans, or None.
    #[getter]
    fn capacity(&self) -> Option<PyCapacity> {
        self.capacity.map(|inner| PyCapacity { inner })
    }

    fn __repr__(&self) -> String {
        let device = self.device().unwrap_or_else(|| self.origin.profile.name.clone());
        format!("Planner({}, device=\"{device}\")", self.shape.__repr__())
    }
}

impl PyPlanner {
    fn queries<'a, 'py>(
        &self,
        tokens: Option<&'a Bound<'py, PyAny>>,
        parents: Option<&'a Bound<'py, PyAny>>,
    ) -> Queries<'a, 'py> {
        Queries { tokens, parents, may_be_trees: self.origin.query_tree }
    }

    fn lock(&self) -> MutexGuard<'_, PagedPlanner> {
        lock(&self.planner)
    }

    fn made(&self, plan: Plan, tables: Tables) -> PyPlan {
        PyPlan::new(plan, tables, self.device, self.origin.clone(), self.pool.clone())
    }

    pub(crate) fn fixed_capacity(&self) -> Result<PlanCapacity> {
        self.capacity.ok_or_else(|| invalid("planner", "one without capacity", "a Planner with capacity=Capacity(...)"))
    }

    pub(crate) fn fixed_device(&self) -> Result<Device> {
        let expected = "a Planner for a device (\"cuda:0\" or \"cpu\")";
        self.device.ok_or_else(|| invalid("planner", "one that was made from a profile", expected))
    }

    /// What its plans are made for.
    pub(crate) fn problem(&self, page_size: u32) -> Problem {
        self.origin.problem(page_size)
    }

    /// The tile variants that its plans may use.
    pub(crate) fn tile_variants(&self, page_size: u32) -> Result<Vec<TileVariant>> {
        Ok(self.lock().for_pages(page_size)?.tile_variants())
    }
}

/// The planner; after a panic elsewhere it is what it was before that plan, which it then makes from scratch.
fn lock(planner: &Mutex<PagedPlanner>) -> MutexGuard<'_, PagedPlanner> {
    planner.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A planner of whatever page size: batches name theirs.
struct PagedPlanner {
    origin: Arc<Origin>,
    /// For the page size of the last batch.
    planner: Option<Planner>,
}

impl PagedPlanner {
    /// Page size that every variant can read: what is refused with it is refused with every other one, but for chunks that are
    /// no whole number of its pages.
    const ANY_PAGE_SIZE: u32 = 32;

    fn new(origin: Arc<Origin>) -> Result<Self> {
        let reach = if matches!(origin.reach, Reach::Chunk(1..)) { Reach::Full } else { origin.reach };
        let options = origin.options.clone().with_mode(PlanMode::Auto);
        let any_mode = Origin { options, reach, ..(*origin).clone() };
        any_mode.planner(Self::ANY_PAGE_SIZE)?;
        Ok(Self { origin, planner: None })
    }

    fn for_pages(&mut self, page_size: u32) -> pat_rs::Result<&mut Planner> {
        let planner = match self.planner.take().filter(|planner| planner.problem().page_size() == page_size) {
            Some(planner) => planner,
            None => self.origin.planner(page_size)?,
        };
        Ok(self.planner.insert(planner))
    }
}

/// A page size and a number of pages.
pub(crate) fn read_pages(page_size: Integer, num_pages: Integer) -> Result<(u32, u32)> {
    Ok((page_size.count("page_size", 1)?, num_pages.count("num_pages", 0)?))
}

/// The reach that one of `window` and `chunk` gives.
pub(crate) fn read_reach(window: Option<Integer>, chunk: Option<Integer>) -> Result<Reach> {
    let tokens = |name, tokens: Option<Integer>| tokens.map(|tokens| tokens.count(name, 1)).transpose();
    match (tokens("window", window)?, tokens("chunk", chunk)?) {
        (None, None) => Ok(Reach::Full),
        (Some(tokens), None) => Ok(Reach::Window(tokens)),
        (None, Some(tokens)) => Ok(Reach::Chunk(tokens)),
        (Some(window), Some(chunk)) => {
            let expected = format!("None beside window = {window}: a layer has one of them");
            Err(invalid("chunk", chunk, expected))
        }
    }
}

fn parse_mode(text: &str) -> Result<PlanMode> {
    let expected = "auto, flat, per-node, packed, or fixed-chunk:TOKENS with one token or more";
    Ok(match text {
        "auto" => PlanMode::Auto,
        "flat" => PlanMode::Flat,
        "per-node" => PlanMode::PerNode,
        "packed" => PlanMode::Packed,
        _ => match text.strip_prefix("fixed-chunk:").map(str::parse) {
            // What is no whole number of pages is refused with the batch, whose page size counts.
            Some(Ok(tokens @ 1..)) => PlanMode::FixedChunk { tokens },
            _ => return Err(invalid("mode", format!("{text:?}"), expected)),
        },
    })
}

fn read_variants(names: &Bound<'_, PyAny>) -> Result<Vec<TileVariant>> {
    let expected = "a list of names";
    if !names.is_instance_of::<PyList>() && !names.is_instance_of::<PyTuple>() {
        return Err(wrong_type("variants", type_name(names), expected));
    }
    names
        .try_iter()?
        .map(|name| {
            let name = name?;
            let text: String = name
                .extract()
                .map_err(|_| wrong_type("variants", format!("a list with {}", type_name(&name)), expected))?;
            parse_variant(&text)
        })
        .collect()
}

fn parse_variant(name: &str) -> Result<TileVariant> {
    TileVariant::ALL.into_iter().find(|variant| variant.name() == name).ok_or_else(|| {
        let names: Vec<_> = TileVariant::ALL.iter().map(|variant| variant.name()).collect();
        invalid("variants", format!("{name:?}"), format!("one of {}", names.join(", ")))
    })
}

fn read_rows(rows: &Bound<'_, PyAny>, sequences: usize) -> Result<Vec<u32>> {
    let rows = Integers::of("changed_rows", rows, "None, or a list of integers or a 1-D int32 tensor or array")?;
    if rows.count() > sequences {
        return Err(invalid(
            "changed_rows",
            format!("{} rows", rows.count()),
            format!("at most all {sequences}, each once"),
        ));
    }
    rows.read(0..rows.count())?
        .into_iter()
        .enumerate()
        .map(|(i, row)| {
            u32::try_from(row).ok().filter(|row| (*row as usize) < sequences).ok_or_else(|| {
                invalid(format!("changed_rows[{i}]"), row, format!("a row of the batch, 0 to below {sequences}"))
            })
        })
        .collect()
}

/// A plan in the making (:meth:`Planner.plan_async`).
#[pyclass(frozen, module = "prefix_attn", name = "PlanFuture")]
pub(crate) struct PyPlanFuture {
    /// What the planning thread made, until the first :meth:`result` takes it.
    made: Arc<OnceLock<Made>>,
    /// Not pyo3's cell, which lets go of the interpreter while it is written: a child forked then would wait for ever.
    planned: OnceLock<Option<pat_rs::Result<Py<PyPlan>>>>,
    device: Option<Device>,
    origin: Arc<Origin>,
    pool: Arc<Pool>,
}

/// None after a panic.
type Made = Mutex<Option<pat_rs::Result<(Plan, Tables)>>>;

#[pymethods]
impl PyPlanFuture {
    /// Whether :meth:`result` would not wait.
    fn done(&self) -> bool {
        self.made.get().is_some()
    }

    /// The plan; waits for it, and lets other threads of the program run meanwhile.
    ///
    /// Raises:
    ///     ValueError: what :meth:`Planner.plan` raises.
    #[pyo3(signature = () -> "Plan")]
    fn result(&self, py: Python<'_>) -> Result<Py<PyPlan>> {
        let made = py.detach(|| self.made.wait());
        let planned = self.planned.get_or_init(|| {
            let planned = made.lock().unwrap_or_else(PoisonError::into_inner).take()?;
            let hold = |(plan, tables)| {
                Py::new(py, PyPlan::new(plan, tables, self.device, self.origin.clone(), self.pool.clone())).ok()
            };
            planned.map(hold).transpose()
        });
        match planned {
            Some(Ok(plan)) => Ok(plan.clone_ref(py)),
            Some(Err(error)) => Err(error.into()),
            None => Err(PyRuntimeError::new_err("the planning thread ended without a plan").into()),
        }
    }
}
