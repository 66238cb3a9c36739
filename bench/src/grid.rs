//! Measuring one configuration into a record.

use crate::device::{DeviceCase, Repeats, SEED, median, sample, softmax_scale};
use crate::result::{Correctness, Record};
use half::{bf16, f16};
use pat_rs::cuda::CudaEngine;
use pat_rs::cuda::bench_support::L2Flush;
use pat_rs::{AttentionShape, DeviceProfile, Dtype, PlanOptions, Planner, Result};
use pat_workloads::{Oracle, OwnedBatch};
use std::collections::BTreeMap;
use std::time::Instant;

/// Name of a type in records.
pub fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F16 => "f16",
        Dtype::Bf16 => "bf16",
    }
}

/// Plans, verifies and times a batch; `(profile, options)` say how it is planned.
///
/// # Errors
/// The planner's, the engine's, or the driver's.
pub fn measure(
    engine: &CudaEngine,
    flush: &L2Flush,
    name: &str,
    batch: &OwnedBatch,
    shape: AttentionShape,
    (profile, options): (&DeviceProfile, &PlanOptions),
    repeats: Repeats,
) -> Result<Record> {
    let rows = batch.rows();
    let view = batch.view(&rows)?;
    let mut planner = Planner::new(shape, profile.clone(), options.clone())?;
    let plan = planner.plan(&view)?;
    let mut plan_times = Vec::new();
    for _ in 0..9 {
        let begin = Instant::now();
        planner.plan(&view)?;
        plan_times.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    let summary = plan.summary();
    let mut case = DeviceCase::new(engine, batch, shape)?;
    let (scale, sample) = (softmax_scale(shape), sample(batch, shape));
    let report = match shape.dtype() {
        Dtype::F16 => case.verify::<f16>(&plan, &Oracle::compute::<f16>(batch, shape, SEED, scale, sample)?)?,
        Dtype::Bf16 => case.verify::<bf16>(&plan, &Oracle::compute::<bf16>(batch, shape, SEED, scale, sample)?)?,
    };
    let times = case.time(&plan, flush, repeats)?;
    let rows_bytes = 2 * 2 * batch.lengths.len() as u64 * u64::from(shape.q_heads()) * u64::from(shape.head_dim());
    let bytes = summary.unique_kv_bytes + rows_bytes;
    let tokens: f64 = batch.lengths.iter().map(|&length| f64::from(length)).sum();
    let flop = 4.0 * tokens * f64::from(shape.q_heads()) * f64::from(shape.head_dim());
    let correctness = Correctness {
        status: if report.passed { "PASSED" } else { "FAILED" }.into(),
        max_diff: report.max_abs_error,
        relative_l2: report.relative_l2_error,
    };
    Ok(Record {
        tree: name.into(),
        nheads_q: shape.q_heads(),
        nheads_kv: shape.kv_heads(),
        head_dim: shape.head_dim(),
        block_size: batch.page_size,
        dtype: dtype_name(shape.dtype()).into(),
        latencies: BTreeMap::from([("pat-rs".into(), times.cold_us / 1e3)]),
        correctness: BTreeMap::from([("pat-rs".into(), correctness)]),
        cold_us: times.cold_us,
        warm_us: times.warm_us,
        graph_us: times.graph_us,
        plan_us: median(&mut plan_times),
        upload_us: times.upload_us,
        predicted_us: summary.predicted_us,
        bytes,
        flop,
        floor_us: (bytes as f64 / 4.8e6).max(flop / 989e6),
        ceiling_us: (bytes as f64 / 4.6e6).max(flop / 650e6),
        sharing_factor: summary.sharing_factor,
        planned_kv_bytes: summary.planned_kv_bytes,
        partial_bytes: summary.partial_bytes,
        items: Record::items_of(&summary),
    })
}
