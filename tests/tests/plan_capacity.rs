//! Plans within a fixed capacity, for buffers and graphs that are made once.

use pat_rs::cuda::LaunchGeometry;
use pat_rs::plan::{PlanCapacity, PlanMode};
use pat_rs::{AttentionShape, DeviceProfile, Dtype, PlanOptions, Planner, Problem, TileVariant};
use pat_tests::invariants::{check, random_forest};
use pat_workloads::OwnedBatch;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn shape() -> AttentionShape {
    AttentionShape::new(16, 2, 128, Dtype::F16).expect("a valid shape")
}

fn planner(batch: &OwnedBatch, mode: PlanMode) -> Planner {
    Planner::new(batch.problem(shape()), DeviceProfile::h200(), mode.into()).expect("a planner")
}

fn pages(batch: &OwnedBatch) -> u32 {
    batch.lengths.iter().map(|length| length.div_ceil(batch.page_size)).sum()
}

#[test]
fn plans_stay_within_the_capacity() {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    for _ in 0..500 {
        let batch = random_forest(&mut rng);
        let sequences = batch.lengths.len() as u32;
        let capacity = PlanCapacity {
            max_sequences: sequences + rng.random_range(0..2),
            max_pages: pages(&batch) + rng.random_range(0..2),
            max_items: sequences + rng.random_range(1..40),
            max_slots: rng.random_range(0..80),
        };
        for mode in [PlanMode::Auto, PlanMode::Flat, PlanMode::Packed] {
            let mut planner = planner(&batch, mode).with_capacity(capacity).expect("a valid capacity");
            let rows = batch.rows();
            let plan = planner.plan(&batch.view(&rows).expect("a valid batch")).expect("an uncut plan at least");
            check(&plan, &batch, shape());
            let variants = planner.tile_variants();
            let (bounds, needed) = (LaunchGeometry::for_capacity(&capacity, &variants), LaunchGeometry::of(&plan));
            assert_eq!(bounds.union(needed), bounds, "{capacity:?}");
            assert!(plan.bytes().len() <= capacity.plan_bytes(), "{} bytes, {capacity:?}", plan.bytes().len());
            assert!(plan.partial_bytes() <= capacity.partial_bytes(shape()));
        }
    }
}

/// Of batches that get no wide tiles without one (`plan_quality.rs` has those that do).
#[test]
fn a_capacity_that_is_large_enough_changes_nothing() {
    let mut rng = ChaCha8Rng::seed_from_u64(12);
    for _ in 0..100 {
        let batch = random_forest(&mut rng);
        let capacity = PlanCapacity::for_batches(64, 64 * 64, &DeviceProfile::h200());
        let rows = batch.rows();
        let view = batch.view(&rows).expect("a valid batch");
        let bounded = planner(&batch, PlanMode::Auto).with_capacity(capacity).expect("a valid capacity").plan(&view);
        assert_eq!(bounded.expect("a plan"), planner(&batch, PlanMode::Auto).plan(&view).expect("a plan"));
    }
}

#[test]
fn what_exceeds_the_capacity_is_refused() {
    let batch = OwnedBatch {
        page_size: 16,
        num_pages: 100,
        lengths: vec![160, 160, 0],
        block_tables: vec![(0..10).collect(), (10..20).collect(), vec![]],
    };
    let fits = PlanCapacity { max_sequences: 3, max_pages: 20, max_items: 3, max_slots: 0 };
    let rows = batch.rows();
    let view = batch.view(&rows).expect("a valid batch");
    let refusal = |mode, capacity: PlanCapacity| {
        let planner = planner(&batch, mode).with_capacity(capacity);
        planner.and_then(|mut planner| planner.plan(&view)).expect_err("refused").to_string()
    };
    let mut planner = planner(&batch, PlanMode::Auto).with_capacity(fits).expect("a valid capacity");
    let mut plan = planner.plan(&view).expect("a plan that fits");
    assert_eq!(plan.header().slot_count, 0);
    let before = plan.clone();
    for (capacity, parts) in [
        (
            PlanCapacity { max_sequences: 2, ..fits },
            ["lengths: got those of 3 rows, expected", "at most capacity.max_sequences = 2"],
        ),
        (
            PlanCapacity { max_pages: 19, ..fits },
            ["lengths: got those of 20 pages, expected", "at most capacity.max_pages = 19"],
        ),
        (PlanCapacity { max_items: 2, ..fits }, ["capacity.max_items: got 2", "at least max_sequences = 3"]),
    ] {
        let message = refusal(PlanMode::Auto, capacity);
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
    // A fixed chunk leaves no choice.
    let message = refusal(PlanMode::FixedChunk { tokens: 80 }, fits);
    assert!(message.starts_with("capacity.max_items: got 3, expected at least 4 for this batch"), "{message}");
    let message = refusal(PlanMode::FixedChunk { tokens: 80 }, PlanCapacity { max_items: 9, ..fits });
    assert!(message.starts_with("capacity.max_slots: got 0, expected at least 4 for this batch"), "{message}");

    // A step that no longer fits leaves the plan as it was, and the next one that fits is planned.
    let more = OwnedBatch {
        lengths: vec![176, 160, 0],
        block_tables: vec![(0..11).collect(), (11..21).collect(), vec![]],
        ..batch.clone()
    };
    let more_rows = more.rows();
    planner.advance(&more.view(&more_rows).expect("valid"), None, &mut plan).expect_err("21 pages");
    assert_eq!(plan, before);
    planner.advance(&view, None, &mut plan).expect("a plan that fits");
    assert_eq!(plan, before);
}

#[test]
fn capacities_of_any_size_are_numbers() {
    let mut profile = DeviceProfile::h200();
    profile.sm_count = u32::MAX;
    let capacity = PlanCapacity::for_batches(u32::MAX, u32::MAX, &profile);
    assert_eq!((capacity.max_items, capacity.max_slots), (u32::MAX, u32::MAX));
    assert!(capacity.plan_bytes() > 1 << 36 && capacity.partial_bytes(shape()) > 1 << 40);
}

#[test]
fn groups_that_no_tile_holds_take_the_widest() {
    let wide = AttentionShape::new(129, 1, 128, Dtype::F16).expect("a valid shape");
    let planner = |shape| Planner::new(Problem::new(shape, 16), DeviceProfile::h200(), PlanOptions::default());
    assert_eq!(planner(wide).expect("a planner").tile_variants(), [TileVariant::Wgmma128]);
    let options = PlanOptions::default().with_variants([TileVariant::Mma64]);
    let message =
        Planner::new(Problem::new(wide, 16), DeviceProfile::h200(), options).expect_err("refused").to_string();
    assert_eq!(
        message,
        "variants: got mma64, expected some of mma128, wgmma128 (mma64: q_heads / kv_heads: got 129, expected 1 to 64)"
    );
    // More than the usual tile of the wgmma kernels has rows for: the wide one holds them.
    let falcon = AttentionShape::new(71, 1, 64, Dtype::F16).expect("a valid shape");
    assert_eq!(planner(falcon).expect("a planner").tile_variants(), [TileVariant::Wgmma128]);
}
