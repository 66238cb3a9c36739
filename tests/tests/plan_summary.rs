//! What a plan says of itself: predictions by variant, balance, and why shared nodes are read as often as they are.

use pat_rs::plan::{PlanMode, PlanSummary, ReadReason, SharedNodes};
use pat_rs::{AttentionShape, DeviceProfile, Dtype, PlanOptions, Planner, Problem, TileVariant};
use pat_tests::invariants::{modes, random_forest};
use pat_workloads::{OwnedBatch, RaggedGroups, TreeSpec};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

fn shape(q_heads: u32, kv_heads: u32) -> AttentionShape {
    AttentionShape::new(q_heads, kv_heads, 128, Dtype::F16).expect("a valid shape")
}

fn planner(problem: Problem, profile: &str, mode: PlanMode, variants: Option<&[TileVariant]>) -> Planner {
    let profile = DeviceProfile::by_name(profile).expect("a known device");
    let options = variants.into_iter().fold(PlanOptions::from(mode), PlanOptions::with_variants);
    Planner::new(problem, profile, options).expect("a planner")
}

/// The summary of a batch's plan and all kinds of shared nodes.
fn explain(planner: &mut Planner, batch: &OwnedBatch) -> (PlanSummary, Vec<SharedNodes>) {
    let plan = plan_of(planner, batch);
    let nodes = planner.shared_nodes(&plan, usize::MAX).expect("its last plan");
    (plan.summary(), nodes)
}

fn plan_of(planner: &mut Planner, batch: &OwnedBatch) -> pat_rs::Plan {
    let rows = batch.rows();
    planner.plan(&batch.view(&rows).expect("a valid batch")).expect("a plan")
}

fn tree(spec: &str) -> OwnedBatch {
    spec.parse::<TreeSpec>().expect("a tree").batch(32, Some(1)).expect("a batch")
}

#[test]
fn figures_add_up_on_random_forests() {
    let mut rng = ChaCha8Rng::seed_from_u64(31);
    for _ in 0..200 {
        let batch = random_forest(&mut rng);
        for mode in modes(batch.page_size) {
            for (profile, variants) in [("h200", None), ("a100-80", None), ("h200", Some(&TileVariant::ALL[..3]))] {
                let shape = shape(16, 4);
                let (summary, nodes) = explain(&mut planner(batch.problem(shape), profile, mode, variants), &batch);
                // What is not read is what sharing saves.
                let saved: u64 = nodes.iter().map(|node| u64::from(node.nodes) * node.saved_kv_bytes).sum();
                assert_eq!(summary.flat_kv_bytes - summary.planned_kv_bytes, saved, "{mode:?}: {nodes:?}");
                let (us, share) = summary
                    .variants
                    .iter()
                    .fold((0.0, 0.0), |(us, share), v| (us + v.predicted_us, share + v.predicted_share));
                let forward_us = summary.prediction.busy_us;
                if summary.variants.is_empty() {
                    assert!(batch.lengths.iter().all(|&length| length == 0));
                    assert_eq!(summary.imbalance, 1.0);
                } else {
                    assert!((share - 1.0).abs() < 1e-9 && (us - forward_us).abs() < 1e-9 * forward_us, "{summary:?}");
                }
                let of_variants = summary.variants.iter().map(|variant| variant.imbalance);
                let (least, most) = of_variants.fold((f64::MAX, 1.0f64), |(a, b), x| (a.min(x), b.max(x)));
                assert!(least >= 1.0 && summary.imbalance >= 1.0 && summary.imbalance <= most, "{summary:?}");
            }
        }
    }
}

#[test]
fn balance_is_that_of_the_places_for_ctas() {
    // 132 multiprocessors with two CTAs each: 33 sequences x 8 heads fill them once.
    let imbalance = |batch: &str| {
        let batch = tree(batch);
        let variants = Some(&[TileVariant::Wgmma64][..]);
        explain(&mut planner(batch.problem(shape(32, 8)), "h200", PlanMode::Flat, variants), &batch).0.imbalance
    };
    // Uncut: a chunk is at least 128 tokens long.
    assert_eq!(imbalance("33_128"), 1.0);
    assert_eq!(imbalance("11_128"), 3.0);
    assert_eq!(imbalance("66_128"), 1.0);
}

#[test]
fn places_are_those_that_the_device_has_shared_memory_for() {
    // Equal items of 65,792 bytes at head dimension 64: two per multiprocessor of an A100, one where there are 100 KiB.
    let shape = AttentionShape::new(16, 4, 64, Dtype::F16).expect("a valid shape");
    let imbalance = |profile: DeviceProfile, sequences: u32| {
        let batch = tree(&format!("{sequences}_128"));
        let options = PlanOptions::from(PlanMode::Flat).with_variants([TileVariant::Mma16]);
        let mut planner = Planner::new(batch.problem(shape), profile, options).expect("a planner");
        planner.plan(&batch.view(&batch.rows()).expect("a valid batch")).expect("a plan").summary().imbalance
    };
    let a100 = || DeviceProfile::by_name("a100-80").expect("a known device");
    assert_eq!(imbalance(a100(), 54), 1.0);
    assert_eq!(imbalance(a100(), 81), 2.0 / 1.5);
    let mut l40s = a100();
    (l40s.compute_capability, l40s.sm_count) = (89, 142);
    assert_eq!(imbalance(l40s.clone(), 71), 1.0);
    assert_eq!(imbalance(l40s.clone(), 36), 2.0 / (144.0 / 142.0));
    // What the profile says counts, whatever the compute capability.
    l40s.smem_per_sm_bytes = Some(164 << 10);
    assert_eq!(imbalance(l40s, 36), 1.0 / (144.0 / 284.0));
}

#[test]
fn reasons() {
    let kind = |mode, heads: (u32, u32), batch: &OwnedBatch| {
        let (_, nodes) = explain(&mut planner(batch.problem(shape(heads.0, heads.1)), "h200", mode, None), batch);
        nodes[0]
    };
    let five = tree("1,4,256_32,256,32");
    let node = kind(PlanMode::Auto, (16, 8), &five);
    assert_eq!((node.nodes, node.sequences, node.tokens, node.fewest_reads), (4, 64, 256, 2));
    assert!(node.reads > 2 && node.reason == ReadReason::NarrowTiles, "{node:?}");
    let packed = kind(PlanMode::Packed, (32, 8), &five);
    assert_eq!((packed.reads, packed.reason), (4, ReadReason::TileRows));
    // 60 of 64 reads of 256 tokens, 4,096 bytes each.
    assert_eq!(packed.saved_kv_bytes, 60 * 256 * 4096);
    assert_eq!(kind(PlanMode::Packed, (32, 8), &tree("1,8_256,32")).reason, ReadReason::OneTile);
    let flat = kind(PlanMode::Flat, (32, 8), &five);
    assert_eq!((flat.reads, flat.saved_kv_bytes, flat.reason), (64, 0, ReadReason::Mode));
    // Of each node the first 224 tokens are in chunks of 64 that are shared whole, the last 32 are not.
    let fixed = kind(PlanMode::FixedChunk { tokens: 64 }, (32, 8), &five);
    assert_eq!((fixed.reads, fixed.saved_kv_bytes), ((224u32 * 4 + 32 * 64).div_ceil(256), 60 * 224 * 4096));
    assert_eq!(fixed.reason, ReadReason::PartsOfChunks);
    let whole = kind(PlanMode::FixedChunk { tokens: 32 }, (32, 8), &five);
    assert_eq!((whole.reads, whole.saved_kv_bytes, whole.reason), (4, 60 * 256 * 4096, ReadReason::TileRows));
    // A short common prefix, and then far more of one's own than a chunk holds.
    let long = RaggedGroups { sequences: 8, groups: 1, shared_pages: 8, private_pages: 4000, page_size: 16, seed: 1 };
    let packed = kind(PlanMode::Packed, (32, 8), &long.batch());
    assert!(packed.reads > 1 && packed.reason == ReadReason::LongPrivateRuns, "{packed:?}");
    let auto = kind(PlanMode::Auto, (32, 8), &long.batch());
    assert!(matches!(auto.reason, ReadReason::SharingCosts | ReadReason::LongPrivateRuns), "{auto:?}");
}

#[test]
fn sharing_that_costs_more_than_it_saves() {
    // Three sequences that share one page: one CTA per KV head would walk all three tails, one after the other.
    let batch = tree("1,3_32,512");
    let (summary, nodes) = explain(&mut planner(batch.problem(shape(32, 8)), "h200", PlanMode::Auto, None), &batch);
    assert_eq!((nodes[0].reads, nodes[0].fewest_reads, nodes[0].reason), (3, 1, ReadReason::SharingCosts));
    assert_eq!(summary.planned_kv_bytes, summary.flat_kv_bytes);
}

#[test]
fn only_the_last_plan_is_explained() {
    let batch = tree("1,8_256,32");
    let rows = batch.rows();
    let view = batch.view(&rows).expect("a valid batch");
    let mut planner = planner(batch.problem(shape(32, 8)), "h200", PlanMode::Auto, None);
    let former = planner.plan(&view).expect("a plan");
    let last = planner.plan(&view).expect("a plan");
    assert_eq!(planner.shared_nodes(&last, 1).expect("the last plan").len(), 1);
    assert_eq!(planner.shared_nodes(&last, 0).expect("the last plan"), []);
    let message = planner.shared_nodes(&former, 1).expect_err("refused").to_string();
    assert!(message.contains("the planner's last plan"), "{message}");
}

#[test]
fn plans_are_equal_where_all_is_that_runs_and_figures_depend_on() {
    let batch = tree("1,4_64,32");
    let of = |problem: Problem, profile: &str, batch: &OwnedBatch| {
        let mode = PlanMode::FixedChunk { tokens: 32 };
        let mut planner = planner(problem, profile, mode, Some(&[TileVariant::Mma64]));
        plan_of(&mut planner, batch)
    };
    let problem = batch.problem(shape(16, 4));
    let plan = of(problem, "h200", &batch);
    assert_eq!(plan, of(problem, "h200", &batch));
    assert!(plan.generation() < of(problem, "h200", &batch).generation());
    assert_eq!(plan.generation().to_string(), plan.generation().number().to_string());
    assert_ne!(plan, of(problem.with_scale(2.0), "h200", &batch));
    assert_ne!(plan, of(problem, "h100-sxm", &batch));
    assert_ne!(plan, of(problem, "h200", &OwnedBatch { num_pages: batch.num_pages + 1, ..batch.clone() }));
    let slots = u64::from(plan.header().slot_count);
    assert_eq!(plan.partial_bytes(), slots * 16 * (128 + 1) * 4);
    assert!(slots > 0);
}
