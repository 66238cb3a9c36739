//! Plans of PAT's 80 configurations beside those of its scheduler and beside no sharing (docs/planner-quality.md).

use pat_rs::plan::{PlanMode, PlanSummary};
use pat_rs::{AttentionShape, DeviceProfile, Dtype, PlanOptions, Planner};
use pat_tests::pat_schedule::{BLOCK_TOKENS, PatSchedule};
use pat_workloads::{FIGURE_10_HEADS, FIGURE_10_TREES, OwnedBatch, RaggedGroups, TreeSpec};

fn summary(batch: &OwnedBatch, shape: AttentionShape, profile: &str, mode: PlanMode) -> PlanSummary {
    let rows = batch.rows();
    let profile = DeviceProfile::by_name(profile).expect("a known device");
    let mut planner = Planner::new(shape, profile, PlanOptions { mode, variants: None }).expect("a planner");
    planner.plan(&batch.view(&rows).expect("a valid batch")).expect("a plan").summary()
}

#[test]
fn the_widest_tiles_read_about_what_pat_reads_and_the_plan_is_no_slower() {
    for tree in FIGURE_10_TREES {
        let spec: TreeSpec = tree.parse().expect("a tree");
        let batch = spec.batch(BLOCK_TOKENS, Some(1)).expect("a batch");
        for (q_heads, kv_heads) in FIGURE_10_HEADS {
            let shape = AttentionShape::new(q_heads, kv_heads, 128, Dtype::F16).expect("a valid shape");
            let pat = PatSchedule::new(&spec, q_heads, kv_heads);
            let (auto, flat, packed) = (
                summary(&batch, shape, "h200", PlanMode::Auto),
                summary(&batch, shape, "h200", PlanMode::Flat),
                summary(&batch, shape, "h200", PlanMode::Packed),
            );
            let case = format!("{tree} with {q_heads}/{kv_heads} heads");
            let packed_tokens = packed.planned_kv_bytes / shape.kv_bytes_per_token();
            // Both have tiles of 64 rows, but PAT packs each node by itself, at the price of a partial per level: where a
            // node has fewer rows than a tile, tiles that follow whole paths read the levels above it more often.
            assert!(packed_tokens <= pat.kv_tokens() * 5 / 4, "{case}: {packed_tokens}, PAT {}", pat.kv_tokens());
            assert!(auto.predicted_us <= packed.predicted_us.min(flat.predicted_us), "{case}");
        }
    }
}

#[test]
fn sharing_is_never_predicted_to_cost_on_any_device() {
    for profile in DeviceProfile::known_names() {
        for (sequences, groups, shared_pages, private_pages) in
            [(32, 16, 2, 300), (64, 8, 40, 100), (128, 120, 5, 200), (256, 4, 1, 3), (256, 256, 10, 64)]
        {
            let spec = RaggedGroups { sequences, groups, shared_pages, private_pages, page_size: 16, seed: 3 };
            for (q_heads, kv_heads) in FIGURE_10_HEADS {
                let shape = AttentionShape::new(q_heads, kv_heads, 128, Dtype::F16).expect("a valid shape");
                let of = |mode| summary(&spec.batch(), shape, profile, mode).predicted_us;
                let (auto_us, flat_us) = (of(PlanMode::Auto), of(PlanMode::Flat));
                assert!(auto_us <= flat_us, "{profile}, {spec:?}: {auto_us} us, flat {flat_us} us");
            }
        }
    }
}
