//! Files that a user hands in.

use super::read_file;
use crate::invariants::{self, modes};
use pat_bench::{compare, result, suites};
use pat_rs::{AttentionShape, DeviceProfile, Dtype, Planner, Problem};
use pat_workloads::requests;
use pat_workloads::requests::BlockTrace;
use pat_workloads::requests::Lengths;
use pat_workloads::{
    ElementParts, MOONCAKE_BLOCK_TOKENS, OwnedBatch, RaggedGroups, TraceCut, batch_text, count_requests, read_batch,
};

/// Shape of plans whose batch says nothing about it.
fn shape() -> AttentionShape {
    AttentionShape::new(8, 2, 64, Dtype::F16).expect("a valid shape")
}

/// A batch that a reader gave can be planned; the plan is that of the batch.
fn assert_planned(batch: &OwnedBatch, shape: AttentionShape) {
    let rows = batch.rows();
    let view = batch.view(&rows).expect("readers give valid batches");
    let Ok(mut planner) = Planner::new(batch.problem(shape), DeviceProfile::h200(), Default::default()) else { return };
    let plan = planner.plan(&view).expect("a valid batch has a plan");
    invariants::check(&plan, batch, shape);
}

/// What is read is valid, can be planned, and is read again from what is written of it.
pub(super) fn batch_file(bytes: &[u8]) {
    match read_file(bytes, read_batch) {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok((batch, model)) => {
            let (q_heads, kv_heads) = model.heads.unwrap_or((8, 2));
            if let Ok(shape) = AttentionShape::new(q_heads, kv_heads, model.elements.head_dim.unwrap_or(64), Dtype::F16)
            {
                assert_planned(&batch, shape);
            }
            let text = batch_text(&batch, model);
            assert_eq!(read_file(text.as_bytes(), read_batch).expect("what was written"), (batch, model));
        }
    }
}

/// Cuts of traces are valid batches with a row for each request.
pub(super) fn trace(bytes: &[u8]) {
    let requests = count_requests(bytes);
    for (page_size, block_tokens, batch_size, step) in
        [(16, MOONCAKE_BLOCK_TOKENS, 1, 0), (16, 16, 2, 100), (48, 32, 3, 7), (1, 1, 1, 1)]
    {
        let cut = TraceCut { first_request: batch_size - 1, batch_size, step, page_size, block_tokens };
        match cut.batch(bytes) {
            Err(error) => assert!(!error.to_string().is_empty()),
            Ok(batch) => {
                assert_eq!(batch.lengths.len(), batch_size);
                // Behind the cut there may be anything.
                assert!(
                    requests.as_ref().is_err() || requests.as_ref().is_ok_and(|n| *n >= cut.first_request + batch_size)
                );
                assert_planned(&batch, shape());
            }
        }
    }
}

/// Request workloads: ours, block-hash traces, tables of lengths.
pub(super) fn requests(bytes: &[u8]) {
    let write = |workload: &_| {
        let mut text = Vec::new();
        requests::write(workload, &mut text).expect("memory");
        text
    };
    if let Ok(workload) = requests::read(bytes) {
        assert_eq!(requests::read(write(&workload).as_slice()).expect("what was written"), workload);
    }
    for (block_tokens, pat_filter) in [(MOONCAKE_BLOCK_TOKENS, false), (16, true)] {
        let trace = BlockTrace { name: "trace".into(), block_tokens, pat_filter, requests: 100 };
        if let Ok(workload) = trace.workload(bytes, 1) {
            assert!((1..=100).contains(&workload.requests.len()));
            assert_eq!(requests::read(write(&workload).as_slice()).expect("what was written"), workload);
        }
    }
    if let Err(error) = Lengths::read_burstgpt(bytes, 8192) {
        assert!(!error.to_string().is_empty());
    }
}

/// What is read is read again from what is written of it, and is no regression on itself.
pub(super) fn result_file(bytes: &[u8]) {
    match read_file(bytes, result::read) {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(file) => {
            let again = read_file(b"", |path| {
                result::write(path, &file).expect("a writable file");
                result::read(path).expect("what was written")
            });
            let keys = |file: &result::ResultFile| file.records.iter().map(result::Record::key).collect::<Vec<_>>();
            assert_eq!(keys(&again), keys(&file));
            let files = [file];
            let comparison = compare::compare(&files, &files);
            assert!(comparison.geometric_mean().is_nan() || (comparison.geometric_mean() - 1.0).abs() < 1e-6);
        }
    }
}

/// Specifications give valid batches.
pub(super) fn spec_file(bytes: &[u8]) {
    match read_file(bytes, suites::spec_file) {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(configurations) => {
            for configuration in configurations {
                let batch = configuration.batch().expect("the reader has made it once");
                let rows = batch.rows();
                batch.view(&rows).expect("a valid batch");
                configuration.shape(ElementParts::default()).expect("the reader has checked it");
            }
        }
    }
}

/// With a profile that is taken for plausible every batch has a plan with a predicted time.
pub(super) fn profile(bytes: &[u8]) {
    let Ok(profile) = serde_json::from_slice::<DeviceProfile>(bytes) else { return };
    if let Err(error) = profile.validate() {
        assert!(!error.to_string().is_empty());
        return;
    }
    let spec = RaggedGroups { sequences: 24, groups: 3, shared_pages: 12, private_pages: 5, page_size: 16, seed: 1 };
    let batch = spec.batch();
    let rows = batch.rows();
    let view = batch.view(&rows).expect("a valid batch");
    let shape = AttentionShape::new(32, 8, 128, Dtype::F16).expect("a valid shape");
    for mode in modes(batch.page_size) {
        let mut planner = Planner::new(Problem::new(shape, batch.page_size), profile.clone(), mode.into())
            .expect("the kernels can compute it on every device");
        let plan = planner.plan(&view).expect("a plan");
        invariants::check(&plan, &batch, shape);
        let predicted = plan.prediction().total_us();
        assert!(predicted.is_finite() && predicted > 0.0, "{predicted} us");
    }
}
