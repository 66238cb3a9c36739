//! Planning a batch that does not grow allocates nothing. A test of its own: the counting allocator is the program's.

use pat_rs::plan::{PlanChange, PlanMode};
use pat_rs::{AttentionShape, DeviceProfile, Dtype, PlanOptions, Planner, Problem};
use pat_workloads::{OwnedBatch, RaggedGroups, TreeSpec};

fn batch(private_pages: u32, seed: u64) -> OwnedBatch {
    RaggedGroups { sequences: 256, groups: 8, shared_pages: 16, private_pages, page_size: 16, seed }.batch()
}

#[test]
fn steps_allocate_nothing() {
    let shape = AttentionShape::new(32, 8, 128, Dtype::F16).expect("a valid shape");
    for mode in [PlanMode::Auto, PlanMode::Flat, PlanMode::PerNode, PlanMode::FixedChunk { tokens: 64 }] {
        let problem = Problem::new(shape, 16);
        let mut planner = Planner::new(problem, DeviceProfile::h200(), mode.into()).expect("a planner");
        // The larger batch first, and all steps once before they are counted: the memory is there then.
        let (large, small) = (batch(40, 1), batch(24, 2));
        let (large_rows, small_rows) = (large.rows(), small.rows());
        let large_view = large.view(&large_rows).expect("valid");
        let small_view = small.view(&small_rows).expect("valid");
        let mut plan = planner.plan(&large_view).expect("a plan");
        let mut seen = Vec::new();
        for counted in [false, true] {
            let scratch = allocation_counter::measure(|| planner.plan_into(&small_view, &mut plan).expect("a plan"));
            assert!(!counted || scratch.count_total == 0, "{mode:?} from scratch: {scratch:?}");
            let mut stepping = small.clone();
            for step in 0..40 {
                for (table, length) in stepping.block_tables.iter_mut().zip(&mut stepping.lengths) {
                    *length += 1;
                    if *length > table.len() as u32 * 16 {
                        table.push(step);
                    }
                }
                let rows = stepping.rows();
                let view = stepping.view(&rows).expect("valid");
                let hint = (step % 2 == 0).then_some(&[][..]);
                let mut change = None;
                let advancing = allocation_counter::measure(|| {
                    change = Some(planner.advance(&view, hint, &mut plan).expect("a plan"));
                });
                assert!(!counted || advancing.count_total == 0, "{mode:?} step {step}, {change:?}: {advancing:?}");
                seen.extend(change);
            }
        }
        assert!(seen.contains(&PlanChange::Pages) || seen.contains(&PlanChange::Forest), "{seen:?}");
    }
}

#[test]
fn batches_that_alternate_between_tile_variants_allocate_nothing() {
    let shape = AttentionShape::new(32, 8, 128, Dtype::F16).expect("a valid shape");
    let tree = |spec: &str| spec.parse::<TreeSpec>().expect("a tree").batch(32, Some(1)).expect("a batch");
    let batches = [tree("1,64_65536,256"), tree("256_1024")];
    let problem = Problem::new(shape, 32);
    let mut planner = Planner::new(problem, DeviceProfile::h200(), PlanOptions::default()).expect("a planner");
    let mut plan = planner.plan(&batches[0].view(&batches[0].rows()).expect("valid")).expect("a plan");
    let mut variants = Vec::new();
    for counted in [false, false, true, true] {
        for batch in &batches {
            let rows = batch.rows();
            let view = batch.view(&rows).expect("valid");
            let planning = allocation_counter::measure(|| planner.plan_into(&view, &mut plan).expect("a plan"));
            assert!(!counted || planning.count_total == 0, "{planning:?}");
            variants.push(plan.summary().variants[0].variant);
        }
    }
    assert_eq!(variants[..2], ["wgmma128", "wgmma64"]);
}
