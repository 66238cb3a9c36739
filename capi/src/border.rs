//! What C calls, and the only file of the crate with `unsafe`.
//!
//! Each function reads its arguments in one `unsafe` block, which refuses what can be told from the outside (NULL, addresses that
//! are not aligned, sizes that no memory has), and goes on with references and slices. What cannot be told is C's to keep: the
//! rules at the head of `pat.h`, to which the SAFETY comments refer by number.
#![allow(unsafe_code, reason = "foreign pointers enter here")]

use crate::device::{PatBuffers, PatRun};
use crate::host::{self, HostSlices};
use crate::planning::{Form, PatPlan, PatPlanner, Tables};
use crate::status::{PatStatus, guard, last_error, null};
use crate::types::{
    PatCsrTables, PatKvStrides, PatLayout, PatPaddedTables, PatPlanChange, PatPlanSummary, PatPlannerOptions, PatPool,
    PatProblem, PatTensors,
};
use half::{bf16, f16};
use pat_rs::cpu::{E4m3, E5m2};
use pat_rs::cuda::{CudaDevice, DeviceKvScale, DeviceSpan, RunArgs, Stream};
use pat_rs::{DeviceProfile, Dtype, Element, Error, KvElement, KvScale, Plan, Problem, Result};
use std::ffi::{CStr, c_char, c_void};
use std::mem::MaybeUninit;
use std::slice;

/// The version of this header. A program compares it with `pat_abi_version`, once, before it calls anything else.
pub const PAT_ABI_VERSION: u32 = 2;

/// `PAT_ABI_VERSION` of the library that is there: structs and functions are those of a header with the same number.
#[unsafe(no_mangle)]
pub extern "C" fn pat_abi_version() -> u32 {
    PAT_ABI_VERSION
}

/// The library's version, as "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn pat_version() -> *const c_char {
    const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => c"",
    };
    VERSION.as_ptr()
}

/// What the calling thread's last failed call said: the argument, what came and what is accepted. Never NULL; stays until the
/// thread's next failed call.
#[unsafe(no_mangle)]
pub extern "C" fn pat_last_error() -> *const c_char {
    last_error()
}

/// Whether some kernel can compute a problem, on a device of this compute capability (major * 10 + minor; 0: any) and with pools
/// of these strides (each may be NULL: contiguous ones). Asks no device. PAT_STATUS_UNSUPPORTED says no, `pat_last_error` why.
///
/// # Safety
/// The rules at the head of pat.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pat_supports(
    problem: *const PatProblem,
    compute_capability: u32,
    k_strides: *const PatKvStrides,
    v_strides: *const PatKvStrides,
) -> PatStatus {
    guard(|| {
        // SAFETY: rule 1.
        let (problem, k, v) = unsafe {
            (read("problem", problem)?, read_optional("k_strides", k_strides)?, read_optional("v_strides", v_strides)?)
        };
        let problem = problem.problem()?;
        let contiguous = PatTensors::contiguous(&problem, 0, 0, crate::types::PAT_LAYOUT_NHD)?;
        let k = k.unwrap_or(&contiguous.k.strides);
        let v = v.unwrap_or(&contiguous.v.strides);
        let capability = Some(compute_capability).filter(|capability| *capability != 0);
        Ok(pat_rs::supports(&problem, Some(((*k).into(), (*v).into())), capability)?)
    })
}

/// A planner for a device that is known by name ("h100-sxm", "h200", "a100-80", or the driver's name of it). Needs no GPU.
/// `options` may be NULL. Give it back with `pat_planner_free`.
///
/// # Safety
/// The rules at the head of pat.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pat_planner_for_profile(
    problem: *const PatProblem,
    profile: *const c_char,
    options: *const PatPlannerOptions,
    planner: *mut *mut PatPlanner,
) -> PatStatus {
    guard(|| {
        // SAFETY: rule 1.
        let (problem, profile, options, planner) = unsafe {
            (
                read("problem", problem)?,
                text("profile", profile)?,
                read_optional("options", options)?,
                slot("planner", planner)?,
            )
        };
        give(planner, new_planner(problem, DeviceProfile::by_name(profile)?, options)?);
        Ok(())
    })
}

/// A planner for CUDA device `ordinal` of this process. Otherwise as `pat_planner_for_profile`.
///
/// # Safety
/// The rules at the head of pat.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pat_planner_for_device(
    problem: *const PatProblem,
    ordinal: u32,
    options: *const PatPlannerOptions,
    planner: *mut *mut PatPlanner,
) -> PatStatus {
    guard(|| {
        // SAFETY: rule 1.
        let (problem, options, planner) =
            unsafe { (read("problem", problem)?, read_optional("options", options)?, slot("planner", planner)?) };
        give(planner, new_planner(problem, CudaDevice::new(ordinal as usize)?.profile()?, options)?);
        Ok(())
    })
}

fn new_planner(
    problem: &PatProblem,
    profile: DeviceProfile,
    options: Option<&PatPlannerOptions>,
) -> Result<PatPlanner> {
    PatPlanner::new(problem.problem()?, profile, options.unwrap_or(&PatPlannerOptions::default()))
}

/// Gives a planner back. NULL is allowed. Its plans and buffers stay what they are.
///
/// # Safety
/// The rules at the head of pat.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pat_planner_free(planner: *mut PatPlanner) {
    // SAFETY: rule 2.
    unsafe { free(planner) }
}

/// Plans a batch. Give the plan back with `pat_plan_free`.
///
/// # Safety
/// The rules at the head of pat.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pat_planner_plan_padded(
    planner: *mut PatPlanner,
    tables: *const PatPaddedTables,
    plan: *mut *mut PatPlan,
) -> PatStatus {
    // SAFETY: rule 1.
    guard(|| unsafe { plan_tables(planner, &padded(tables)?, plan) })
}

/// Plans a batch. Give the plan back with `pat_plan_free`.
///
/// # Safety
/// The rules at the head of pat.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pat_planner_plan_csr(
    planner: *mut PatPlanner,
    tables: *const PatCsrTables,
    plan: *mut *mut PatPlan,
) -> PatStatus {
    // SAFETY: rule 1.
    guard(|| unsafe { plan_tables(planner, &csr(tables)?, plan) })
}

/// # Safety
/// Rule 1.
unsafe fn plan_tables(planner: *const PatPlanner, tables: &Tables<'_>, plan: *mut *mut PatPlan) -> Result<()> {
    // SAFETY: the caller's contract.
    let (planner, plan) = unsafe { (read("planner", planner)?, slot("plan", plan)?) };
    give(plan, planner.plan(tables)?);
    Ok(())
}

/// Makes `plan` the plan of the next decode step, predicted to be about as fast as planning the batch from scratch; with fixed
/// chunks the two are equal. With many sequences it takes little time where `plan` is the one that the planner made last.
/// `changed_rows` names the rows whose table entries *that were in use before* may differ (a row that only grew is not among
/// them); NULL: all entries are compared, as with `query_tokens`.
/// `change` may be NULL. Where the call fails, the plan is as before.
///
/// # Safety
/// The rules at the head of pat.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pat_planner_advance_padded(
    planner: *mut PatPlanner,
    plan: *mut PatPlan,
    tables: *const PatPaddedTables,
    changed_rows: *const u32,
    changed_row_count: usize,
    change: *mut PatPlanChange,
) -> PatStatus {
    // SAFETY: rule 1.
    guard(|| unsafe { advance(planner, plan, &padded(tables)?, (changed_rows, changed_row_count), change) })
}

/// As `pat_planner_advance_padded`.
///
/// # Safety
/// The rules at the head of pat.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pat_planner_advance_csr(
    planner: *mut PatPlanner,
    plan: *mut PatPlan,
    tables: *const PatCsrTables,
    changed_rows: *const u32,
    changed_row_count: usize,
    change: *mut PatPlanChange,
) -> PatStatus {
    // SAFETY: rule 1.
    guard(|| unsafe { advance(planner, plan, &csr(tables)?, (changed_rows, changed_row_count), change) })
}

/// # Safety
/// Rule 1.
unsafe fn advance(
    planner: *const PatPlanner,
    plan: *const PatPlan,
    tables: &Tables<'_>,
    (changed_rows, changed_row_count): (*const u32, usize),
    change: *mut PatPlanChange,
) -> Result<()> {
    // SAFETY: the caller's contract.
    let (planner, plan, changed_rows, change) = unsafe {
        (
            read("planner", planner)?,
            read("plan", plan)?,
            elements_optional("changed_rows", changed_rows, changed_row_count)?,
            slot_optional("change", change)?,
        )
    };
    let changed = planner.advance(plan, tables, changed_rows)?;
    if let Some(change) = change {
        change.write(changed.into());
    }
    Ok(())
}

/// Writes what the plan is, in numbers.
///
/// # Safety
/// The rules at the head of pat.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pat_plan_summary(plan: *const PatPlan, summary: *mut PatPlanSummary) -> PatStatus {
    guard(|| {
        // SAFETY: rule 1.
        let (plan, summary) = unsafe { (read("plan", plan)?, slot("summary", summary)?) };
        summary.write(plan.summary());
        Ok(())
    })
}

/// Executes the plan on tensors in host memory, on all cores: the same work items and merge as on a device. `problem` may name
/// another `softmax_scale` than the plan's; NULL: the plan's. Where the call fails, nothing is written.
///
/// # Safety
/// The rules at the head of pat.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pat_plan_run_host(
    plan: *const PatPlan,
    problem: *const PatProblem,
    tensors: *const PatTensors,
) -> PatStatus {
    guard(|| {
        // SAFETY: rule 1.
        let (plan, problem, tensors) =
            unsafe { (read("plan", plan)?, read_optional("problem", problem)?, read("tensors", tensors)?) };
        let (plan, problem) = (plan.read(), problem.map(PatProblem::problem).transpose()?);
        let problem = host::check(&plan, problem, tensors)?;
        // SAFETY: rules 1 and 3; `host::check` has shown that outputs overlap nothing.
        unsafe {
            match (problem.shape().dtype(), problem.shape().kv_dtype()) {
                (Dtype::F16, Dtype::E4m3) => run_host::<f16, E4m3>(&plan, problem, tensors),
                (Dtype::F16, Dtype::E5m2) => run_host::<f16, E5m2>(&plan, problem, tensors),
                (Dtype::F16, _) => run_host::<f16, f16>(&plan, problem, tensors),
                (Dtype::Bf16, Dtype::E4m3) => run_host::<bf16, E4m3>(&plan, problem, tensors),
                (Dtype::Bf16, Dtype::E5m2) => run_host::<bf16, E5m2>(&plan, problem, tensors),
                (Dtype::Bf16, _) => run_host::<bf16, bf16>(&plan, problem, tensors),
                (other, _) => Err(Error::invalid("problem.dtype", other.name(), "f16 or bf16")),
            }
        }
    })
}

/// Gives a plan back. NULL is allowed. What was uploaded of it stays.
///
/// # Safety
/// The rules at the head of pat.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pat_plan_free(plan: *mut PatPlan) {
    // SAFETY: rule 2.
    unsafe { free(plan) }
}

/// Writes the sizes and strides of contiguous tensors of a problem: Q, O and LSE of `rows` rows, K and V of `num_pages` pages.
/// All addresses become NULL: set them then, that of LSE where it is wanted.
///
/// # Safety
/// The rules at the head of pat.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pat_tensors_contiguous(
    problem: *const PatProblem,
    num_pages: u32,
    rows: u32,
    layout: PatLayout,
    tensors: *mut PatTensors,
) -> PatStatus {
    guard(|| {
        // SAFETY: rule 1.
        let (problem, tensors) = unsafe { (read("problem", problem)?, slot("tensors", tensors)?) };
        tensors.write(PatTensors::contiguous(&problem.problem()?, num_pages, rows, layout)?);
        Ok(())
    })
}

/// Allocates, on CUDA device `ordinal`, memory for the plans of a planner whose options have `max_rows` and `max_pages`, and for
/// their partial results, and compiles the kernels that they may use. Runs that may overlap need buffers each. Give it back with
/// `pat_buffers_free`.
///
/// # Safety
/// The rules at the head of pat.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pat_buffers_new(
    planner: *const PatPlanner,
    ordinal: u32,
    buffers: *mut *mut PatBuffers,
) -> PatStatus {
    guard(|| {
        // SAFETY: rule 1.
        let (planner, buffers) = unsafe { (read("planner", planner)?, slot("buffers", buffers)?) };
        give(buffers, PatBuffers::new(planner, ordinal)?);
        Ok(())
    })
}

/// Makes `plan` the one that later launches use: one asynchronous copy on `stream` (a `CUstream`; NULL: the default stream).
/// Once per decode step. Where a plan does not fit, the former one stays. Between the replays of a graph that holds runs, upload
/// on the stream that the graph is launched on.
///
/// # Safety
/// The rules at the head of pat.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pat_buffers_upload(
    buffers: *mut PatBuffers,
    plan: *const PatPlan,
    stream: *mut c_void,
) -> PatStatus {
    guard(|| {
        // SAFETY: rules 1 and 4.
        let (buffers, plan, stream) = unsafe {
            let buffers = read("buffers", buffers)?;
            (buffers, read("plan", plan)?, raw_stream(buffers.device(), stream)?)
        };
        buffers.upload(plan, &stream)
    })
}

/// Gives buffers back. NULL is allowed. Runs that were bound to them keep the memory.
///
/// # Safety
/// The rules at the head of pat.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pat_buffers_free(buffers: *mut PatBuffers) {
    // SAFETY: rule 2.
    unsafe { free(buffers) }
}

/// Checks a layer's tensors in device memory, once, for every plan that is uploaded into the buffers. `problem` may name another
/// `softmax_scale` than the planner's; NULL: the planner's. Give the run back with `pat_run_free`.
///
/// # Safety
/// The rules at the head of pat.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pat_run_bind(
    buffers: *const PatBuffers,
    problem: *const PatProblem,
    tensors: *const PatTensors,
    run: *mut *mut PatRun,
) -> PatStatus {
    guard(|| {
        // SAFETY: rule 1.
        let (buffers, problem, tensors, run) = unsafe {
            (
                read("buffers", buffers)?,
                read_optional("problem", problem)?,
                read("tensors", tensors)?,
                slot("run", run)?,
            )
        };
        let problem = problem.map(PatProblem::problem).transpose()?.unwrap_or_else(|| buffers.problem());
        // SAFETY: rule 3.
        let args = unsafe { device_args(problem, tensors)? };
        give(run, buffers.bind(&args)?);
        Ok(())
    })
}

/// Enqueues the run with the plan that was uploaded last on `stream`. Allocates nothing and waits for nothing. A stream that is
/// captured takes it: the graph then keeps the buffers' memory, and its replays use the plan that is there by then.
///
/// # Safety
/// The rules at the head of pat.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pat_run_launch(run: *const PatRun, stream: *mut c_void) -> PatStatus {
    guard(|| {
        // SAFETY: rules 1 and 4.
        let (run, stream) = unsafe {
            let run = read("run", run)?;
            (run, raw_stream(run.device(), stream)?)
        };
        run.launch(&stream)
    })
}

/// As `pat_run_launch`, with Q and O at other addresses, of the sizes and strides that the run was bound with.
///
/// # Safety
/// The rules at the head of pat.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pat_run_launch_at(
    run: *const PatRun,
    q: *const c_void,
    out: *mut c_void,
    stream: *mut c_void,
) -> PatStatus {
    guard(|| {
        // SAFETY: rules 1 and 4.
        let (run, stream) = unsafe {
            let run = read("run", run)?;
            (run, raw_stream(run.device(), stream)?)
        };
        let (q, out) = (q.expose_provenance() as u64, out.expose_provenance() as u64);
        run.launch_with(|bound, uploaded| {
            // SAFETY: rule 3.
            unsafe { bound.run_with(uploaded, q, out, &stream) }
        })
    })
}

/// Gives a run back. NULL is allowed. What it has enqueued goes on.
///
/// # Safety
/// The rules at the head of pat.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pat_run_free(run: *mut PatRun) {
    // SAFETY: rule 2.
    unsafe { free(run) }
}

/// A pointer that can be followed.
fn check_address<T>(argument: &str, pointer: *const T) -> Result<()> {
    if pointer.is_null() {
        return Err(null(argument, "an address"));
    }
    if !pointer.is_aligned() {
        let expected = format!("a multiple of {} bytes", align_of::<T>());
        return Err(Error::invalid(argument, format!("address {:#x}", pointer.addr()), expected));
    }
    Ok(())
}

/// What a pointer points to.
///
/// # Safety
/// Rule 1, for as long as `'a`: the call.
unsafe fn read<'a, T>(argument: &str, pointer: *const T) -> Result<&'a T> {
    check_address(argument, pointer)?;
    // SAFETY: not NULL and aligned (checked above); the rest is the caller's contract.
    Ok(unsafe { &*pointer })
}

/// # Safety
/// As [`read`].
unsafe fn read_optional<'a, T>(argument: &str, pointer: *const T) -> Result<Option<&'a T>> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's contract.
    unsafe { read(argument, pointer) }.map(Some)
}

/// Where a result goes.
///
/// # Safety
/// As [`read`], of memory that may be written and need not be initialised.
unsafe fn slot<'a, T>(argument: &str, pointer: *mut T) -> Result<&'a mut MaybeUninit<T>> {
    check_address(argument, pointer)?;
    // SAFETY: not NULL and aligned (checked above); the rest is the caller's contract.
    Ok(unsafe { &mut *pointer.cast::<MaybeUninit<T>>() })
}

/// # Safety
/// As [`slot`].
unsafe fn slot_optional<'a, T>(argument: &str, pointer: *mut T) -> Result<Option<&'a mut MaybeUninit<T>>> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's contract.
    unsafe { slot(argument, pointer) }.map(Some)
}

/// Hands an object over to C.
fn give<T>(slot: &mut MaybeUninit<*mut T>, object: T) {
    slot.write(Box::into_raw(Box::new(object)));
}

/// Takes an object back from C.
///
/// # Safety
/// Rule 2: the pointer is NULL, or [`give`] gave it and nobody uses it any more.
unsafe fn free<T>(object: *mut T) {
    if object.is_null() {
        return;
    }
    // What the drop of an object says of a panic goes to the last error, as elsewhere.
    let _ = guard(|| {
        // SAFETY: the caller's contract.
        drop(unsafe { Box::from_raw(object) });
        Ok(())
    });
}

/// Whether `count` elements of `T` can be memory at `pointer`.
fn check_elements<T>(argument: &str, pointer: *const T, count: usize) -> Result<()> {
    check_address(argument, pointer)?;
    let bytes = count.checked_mul(size_of::<T>()).filter(|&bytes| isize::try_from(bytes).is_ok());
    if bytes.and_then(|bytes| pointer.addr().checked_add(bytes)).is_none() {
        return Err(Error::invalid(argument, format!("{count} elements"), "a number that memory can hold"));
    }
    Ok(())
}

/// `count` elements. NULL may be the address of none.
///
/// # Safety
/// Rule 1: so many elements may be read, and nobody writes them during the call.
unsafe fn elements<'a, T>(argument: &str, pointer: *const T, count: usize) -> Result<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    check_elements(argument, pointer, count)?;
    // SAFETY: not NULL, aligned, and no more than memory holds (checked above); the rest is the caller's contract.
    Ok(unsafe { slice::from_raw_parts(pointer, count) })
}

/// # Safety
/// As [`elements`].
unsafe fn elements_optional<'a, T>(argument: &str, pointer: *const T, count: usize) -> Result<Option<&'a [T]>> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's contract.
    unsafe { elements(argument, pointer, count) }.map(Some)
}

/// # Safety
/// As [`elements`], of memory that nobody else uses during the call.
unsafe fn elements_mut<'a, T>(argument: &str, pointer: *mut T, count: usize) -> Result<&'a mut [T]> {
    if count == 0 {
        return Ok(&mut []);
    }
    check_elements(argument, pointer, count)?;
    // SAFETY: as in `elements`.
    Ok(unsafe { slice::from_raw_parts_mut(pointer, count) })
}

/// # Safety
/// As [`read`], of a string that ends with 0.
unsafe fn text<'a>(argument: &str, pointer: *const c_char) -> Result<&'a str> {
    check_address(argument, pointer)?;
    // SAFETY: not NULL (checked above); the rest is the caller's contract.
    let text = unsafe { CStr::from_ptr(pointer) };
    text.to_str().map_err(|_| Error::invalid(argument, text.to_string_lossy(), "UTF-8"))
}

/// # Safety
/// As [`read`], of the struct and of what it points to.
unsafe fn padded<'a>(tables: *const PatPaddedTables) -> Result<Tables<'a>> {
    // SAFETY: the caller's contract.
    unsafe {
        let tables = read("tables", tables)?;
        let sequences = tables.sequence_count;
        Ok(Tables {
            form: Form::Padded {
                page_ids: elements("tables.page_ids", tables.page_ids, tables.page_id_count)?,
                row_stride: tables.row_stride,
                lengths: elements("tables.lengths", tables.lengths, sequences)?,
            },
            query_tokens: elements_optional("tables.query_tokens", tables.query_tokens, sequences)?,
            num_pages: tables.num_pages,
        })
    }
}

/// # Safety
/// As [`read`], of the struct and of what it points to.
unsafe fn csr<'a>(tables: *const PatCsrTables) -> Result<Tables<'a>> {
    // SAFETY: the caller's contract.
    unsafe {
        let tables = read("tables", tables)?;
        let sequences = tables.sequence_count;
        Ok(Tables {
            form: Form::Csr {
                indptr: elements("tables.indptr", tables.indptr, sequences.saturating_add(1))?,
                page_ids: elements("tables.page_ids", tables.page_ids, tables.page_id_count)?,
                last_page_len: elements("tables.last_page_len", tables.last_page_len, sequences)?,
            },
            query_tokens: elements_optional("tables.query_tokens", tables.query_tokens, sequences)?,
            num_pages: tables.num_pages,
        })
    }
}

/// # Safety
/// As [`host_slices`].
unsafe fn run_host<T: Element, C: KvElement>(plan: &Plan, problem: Problem, tensors: &PatTensors) -> Result<()> {
    // SAFETY: the caller's contract.
    let slices = unsafe { host_slices::<T, C>(tensors, problem.shape().kv_heads())? };
    host::run(plan, problem, tensors, slices)
}

/// The tensors' memory as slices; an element that is not there as a whole is not in them.
///
/// # Safety
/// Rules 1 and 3, and outputs overlap nothing (`host::check`).
unsafe fn host_slices<'a, T: Element, C: KvElement>(
    tensors: &PatTensors,
    kv_heads: u32,
) -> Result<HostSlices<'a, T, C>> {
    fn count<T>(bytes: u64) -> usize {
        usize::try_from(bytes / size_of::<T>() as u64).unwrap_or(usize::MAX)
    }
    let PatTensors { q, k, v, out, lse, .. } = tensors;
    // SAFETY: the caller's contract.
    unsafe {
        Ok(HostSlices {
            q: elements("tensors.q", q.data.cast::<T>(), count::<T>(q.bytes))?,
            k: elements("tensors.k", k.data.cast::<C>(), count::<C>(k.bytes))?,
            v: elements("tensors.v", v.data.cast::<C>(), count::<C>(v.bytes))?,
            k_scale: host_scale("tensors.k", k, kv_heads)?,
            v_scale: host_scale("tensors.v", v, kv_heads)?,
            out: elements_mut("tensors.out", out.data.cast::<T>(), count::<T>(out.bytes))?,
            lse: if lse.data.is_null() {
                None
            } else {
                Some(elements_mut("tensors.lse", lse.data.cast::<f32>(), count::<f32>(lse.bytes))?)
            },
        })
    }
}

/// # Safety
/// Rules 1 and 3.
unsafe fn host_scale<'a>(argument: &str, pool: &PatPool, kv_heads: u32) -> Result<KvScale<'a>> {
    if let Some(scale) = scale_of_all(argument, pool)? {
        return Ok(KvScale::Tensor(scale));
    }
    // SAFETY: the caller's contract.
    let factors = unsafe { elements(&format!("{argument}.head_scales"), pool.head_scales, kv_heads as usize)? };
    Ok(KvScale::Heads(factors))
}

/// The factor of all elements, where the heads have none of their own.
fn scale_of_all(argument: &str, pool: &PatPool) -> Result<Option<f32>> {
    match (pool.head_scales.is_null(), pool.scale) {
        (true, 0.0) => Ok(Some(1.0)),
        (true, scale) => Ok(Some(scale)),
        (false, 0.0) => Ok(None),
        (false, scale) => Err(Error::invalid(format!("{argument}.scale"), scale, "0 beside head_scales")),
    }
}

/// # Safety
/// Rule 3, of device memory.
unsafe fn device_args(problem: Problem, tensors: &PatTensors) -> Result<RunArgs> {
    let span = |argument: &str, data: *const c_void, bytes: u64| {
        if data.is_null() {
            return Err(null(argument, "an address"));
        }
        // SAFETY: the caller's contract.
        Ok(unsafe { DeviceSpan::from_raw(data.expose_provenance() as u64, bytes) })
    };
    let PatTensors { rows, num_pages, q, k, v, out, lse } = *tensors;
    let spans = (
        span("tensors.q", q.data, q.bytes)?,
        span("tensors.k", k.data, k.bytes)?,
        span("tensors.v", v.data, v.bytes)?,
        span("tensors.out", out.data, out.bytes)?,
    );
    let scale = |argument: &str, pool: PatPool| -> Result<DeviceKvScale> {
        Ok(match scale_of_all(argument, &pool)? {
            Some(scale) => DeviceKvScale::Tensor(scale),
            None => {
                let bytes = u64::from(problem.shape().kv_heads()) * 4;
                DeviceKvScale::Heads(span(&format!("{argument}.head_scales"), pool.head_scales.cast(), bytes)?)
            }
        })
    };
    let args = RunArgs::new(problem, num_pages, rows, spans)
        .with_kv_scales(scale("tensors.k", k)?, scale("tensors.v", v)?)
        .with_kv_strides(k.strides.into(), v.strides.into())
        .with_row_strides(q.strides.into(), out.strides.into());
    if lse.data.is_null() {
        return Ok(args);
    }
    Ok(args.with_lse(span("tensors.lse", lse.data, lse.bytes)?, lse.strides.into()))
}

/// # Safety
/// Rule 4.
unsafe fn raw_stream(device: &CudaDevice, stream: *mut c_void) -> Result<Stream> {
    // SAFETY: the caller's contract.
    unsafe { device.stream_from_raw(stream.expose_provenance() as u64) }
}
