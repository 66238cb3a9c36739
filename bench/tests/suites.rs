//! The suites' batches: always the same, each with a name of its own, none too large for one GPU.

use fnv::FnvHasher;
use pat_bench::memory::pool_bytes;
use pat_bench::suites::{
    Configuration, bf16, figure10, realistic, sweeps, tensor_parallel, trace, trace_requests, unshared,
};
use pat_rs::{AttentionShape, Dtype};
use pat_workloads::{ElementParts, OwnedBatch};
use std::collections::BTreeSet;
use std::fmt::Write;
use std::hash::Hasher;

/// Every suite that needs no file.
fn committed() -> Vec<Configuration> {
    [figure10(), realistic(), unshared(), sweeps(), bf16(), tensor_parallel()].concat()
}

fn shape(configuration: &Configuration) -> AttentionShape {
    configuration.shape(ElementParts::default()).expect("a valid shape")
}

/// Of everything in the batch, the same on every machine.
fn hash(batch: &OwnedBatch) -> u64 {
    let mut hasher = FnvHasher::default();
    let values = [batch.page_size, batch.num_pages].into_iter().chain(batch.lengths.iter().copied());
    for value in values.chain(batch.block_tables.iter().flatten().copied()) {
        hasher.write(&value.to_le_bytes());
    }
    hasher.finish()
}

#[test]
fn batches_are_what_they_were() {
    let mut lines = String::new();
    let mut seen = BTreeSet::new();
    for configuration in committed() {
        let batch = configuration.batch().expect("a batch");
        batch.view(&batch.rows()).expect("a valid batch");
        if seen.insert((configuration.suite, configuration.name.clone())) {
            let Configuration { suite, name, .. } = &configuration;
            let (sequences, pages, page_size) = (batch.lengths.len(), batch.num_pages, batch.page_size);
            writeln!(
                lines,
                "{suite} {name}: {sequences} sequences, {pages} pages of {page_size}, {:016x}",
                hash(&batch)
            )
            .expect("writing to a string");
        }
    }
    insta::assert_snapshot!(lines);
}

#[test]
fn every_configuration_has_a_name_of_its_own() {
    let configurations = [committed(), trace("trace.jsonl".as_ref(), 512, 256)].concat();
    let names: BTreeSet<_> = configurations.iter().map(|c| (c.suite, c.label())).collect();
    assert_eq!(names.len(), configurations.len());
    assert_eq!(configurations.len(), 80 + 20 + 20 + 15 + 20 + 60 + 12);
}

#[test]
fn a_configuration_of_one_type_refuses_another() {
    let bf16 = &bf16()[0];
    let of = |head_dim, dtype| ElementParts { head_dim: Some(head_dim), dtype: Some(dtype), ..ElementParts::default() };
    assert_eq!(bf16.shape(ElementParts::default()).expect("its own").dtype(), Dtype::Bf16);
    assert_eq!(bf16.shape(of(64, Dtype::Bf16)).expect("the same").head_dim(), 64);
    let message = bf16.shape(of(128, Dtype::F16)).expect_err("another").to_string();
    assert!(message.contains("dtype: got f16, expected bf16 or nothing for bf16: "), "{message}");
    assert_eq!(figure10()[0].shape(ElementParts::default()).expect("the default").dtype(), Dtype::F16);
}

#[test]
fn a_short_trace_gives_the_batches_that_fit() {
    let names = |requests| {
        let of_trace = trace("trace.jsonl".as_ref(), 512, requests).into_iter().map(|c| c.name);
        of_trace.filter(|name| name.ends_with("_s0")).collect::<Vec<_>>()
    };
    assert_eq!(names(0), [""; 0]);
    assert_eq!(names(3), ["trace_b3_s0"]);
    assert_eq!(names(100), ["trace_b32_s0", "trace_b64_s0"]);
}

#[test]
fn pools_fit_one_gpu() {
    for configuration in committed() {
        let batch = configuration.batch().expect("a batch");
        let bytes = pool_bytes(&batch, shape(&configuration));
        let most = if configuration.suite == "unshared" { 24_000_000_000 } else { 40_000_000_000 };
        assert!(bytes <= most, "{}: {bytes}", configuration.label());
        assert_eq!(batch.unique_pages() as u32, batch.num_pages, "{}: every page is read", configuration.label());
    }
}

#[test]
fn realistic_batches_cover_heads_pages_and_sharing() {
    let realistic = realistic();
    for heads in [(32, 8), (64, 8), (32, 32), (16, 8)] {
        assert!(realistic.iter().any(|c| (c.q_heads, c.kv_heads) == heads), "{heads:?}");
    }
    let batches: Vec<_> = realistic.iter().map(|c| c.batch().expect("a batch")).collect();
    for page_size in [16, 32] {
        assert!(batches.iter().any(|batch| batch.page_size == page_size), "{page_size}");
    }
    let chain = &batches[realistic.iter().position(|c| c.name == "chain_64").expect("the chain")];
    let mut lengths = chain.lengths.clone();
    lengths.sort_unstable();
    lengths.dedup();
    assert_eq!(lengths.len(), 64, "each sequence has a depth of its own");
}

#[test]
fn trace_batches_are_the_same_every_time() {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    let mut text = String::new();
    for i in 0..256u32 {
        let (input, output) = (600 + 37 * i, 5 * i);
        let ids: Vec<u32> =
            (0..input.div_ceil(512)).map(|block| if block == 0 { 0 } else { 1000 * i + block }).collect();
        writeln!(
            text,
            r#"{{"timestamp": {i}, "input_length": {input}, "output_length": {output}, "hash_ids": {ids:?}}}"#
        )
        .expect("writing to a string");
    }
    std::fs::write(file.path(), text).expect("writable");
    let mut hashes = BTreeSet::new();
    assert_eq!(trace_requests(file.path()).expect("readable"), 256);
    for configuration in trace(file.path(), 512, 256) {
        let batch = configuration.batch().expect("a batch");
        assert_eq!(batch, configuration.batch().expect("a batch"));
        hashes.insert(hash(&batch));
    }
    assert_eq!(hashes.len(), 12, "no two cuts are alike");
}
