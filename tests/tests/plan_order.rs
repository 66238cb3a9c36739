//! In which order a plan's items are launched, and their streams are walked: no result depends on it, speed does.

use pat_abi::TileVariant;
use pat_rs::plan::{PlanCapacity, PlanMode};
use pat_rs::{AttentionShape, DeviceProfile, Dtype, Planner};
use pat_tests::invariants::{modes, random_forest};
use pat_workloads::{OwnedBatch, TreeSpec};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

fn planner(batch: &OwnedBatch, mode: PlanMode) -> Planner {
    let shape = AttentionShape::new(32, 8, 128, Dtype::F16).expect("a valid shape");
    Planner::new(batch.problem(shape), DeviceProfile::h200(), mode.into()).expect("a planner")
}

fn tree(spec: &str) -> OwnedBatch {
    spec.parse::<TreeSpec>().expect("a tree").batch(32, Some(1)).expect("a batch")
}

#[test]
fn the_longest_items_are_launched_first() {
    let mut rng = ChaCha8Rng::seed_from_u64(41);
    for _ in 0..200 {
        let batch = random_forest(&mut rng);
        for mode in modes(batch.page_size) {
            let plan = planner(&batch, mode).plan(&batch.view(&batch.rows()).expect("valid")).expect("a plan");
            for variant in TileVariant::ALL {
                let pages = plan.variant_items(variant).iter().map(|item| item.token_count.div_ceil(batch.page_size));
                assert!(pages.is_sorted_by(|a, b| a >= b), "{mode:?}\n{batch:?}");
            }
        }
    }
}

#[test]
fn the_same_chunks_of_several_tiles_are_launched_together() {
    // 64 rows of 4 query heads in tiles of 16 sequences, a prefix that is cut.
    let batch = tree("1,64_16384,32");
    let plan = planner(&batch, PlanMode::Packed).plan(&batch.view(&batch.rows()).expect("valid")).expect("a plan");
    let longest = plan.items()[0].token_count;
    let first_pages: Vec<u32> = plan
        .items()
        .iter()
        // Of the prefix alone.
        .take_while(|item| item.token_count == longest && plan.masks(item).is_empty())
        .map(|item| plan.pages()[item.page_begin as usize])
        .collect();
    assert!(first_pages.len() >= 8, "{first_pages:?}");
    for of_chunk in first_pages.chunks_exact(4) {
        assert!(of_chunk.iter().all(|page| *page == of_chunk[0]), "{first_pages:?}");
    }
}

#[test]
fn every_other_tile_begins_with_its_leaves() {
    let batch = tree("1,64_64,32");
    // Without slots no stream is cut.
    let capacity = PlanCapacity { max_sequences: 64, max_pages: 64 * 3, max_items: 64, max_slots: 0 };
    let mut planner = planner(&batch, PlanMode::Packed).with_capacity(capacity).expect("a capacity");
    let plan = planner.plan(&batch.view(&batch.rows()).expect("valid")).expect("a plan");
    let shared_first: Vec<bool> = plan.items().iter().map(|item| plan.masks(item)[0].is_for_all_rows()).collect();
    assert_eq!(shared_first, [true, false, true, false]);
}
