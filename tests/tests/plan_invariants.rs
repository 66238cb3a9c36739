//! The planner's invariants over random ragged forests: 2,000, or 20,000 with `PAT_LONG` set.

use pat_abi::TileVariant;
use pat_rs::plan::PlanMode;
use pat_rs::{AttentionShape, DeviceProfile, Dtype, Plan, PlanOptions, Planner};
use pat_tests::invariants::{check, modes, random_forest};
use pat_workloads::OwnedBatch;
use rand::SeedableRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;

fn plan(batch: &OwnedBatch, shape: AttentionShape, options: &PlanOptions) -> Plan {
    let rows = batch.rows();
    let view = batch.view(&rows).unwrap();
    Planner::new(shape, DeviceProfile::h200(), options.clone()).unwrap().plan(&view).unwrap()
}

#[test]
fn invariants_hold_on_random_forests() {
    let cases = if std::env::var_os("PAT_LONG").is_some() { 20_000 } else { 2_000 };
    let mut rng = ChaCha8Rng::seed_from_u64(20_261_123);
    for case in 0..cases {
        let batch = random_forest(&mut rng);
        let group = *[1u32, 2, 3, 4, 5, 7, 8, 16].choose(&mut rng).unwrap();
        let kv_heads = *[1u32, 2, 8].choose(&mut rng).unwrap();
        let shape = AttentionShape::new(group * kv_heads, kv_heads, 128, Dtype::F16).unwrap();
        let variants = match case % 3 {
            0 => None,
            1 => Some(vec![TileVariant::Mma16, TileVariant::Mma64]),
            _ => Some(vec![*[TileVariant::Mma16, TileVariant::Mma32, TileVariant::Mma128].choose(&mut rng).unwrap()]),
        };
        let mut predicted = Vec::new();
        for mode in modes(batch.page_size) {
            let options = PlanOptions { mode, variants: variants.clone() };
            let plan = plan(&batch, shape, &options);
            check(&plan, &batch, shape);
            predicted.push(plan.prediction().total_us());
            assert_eq!(plan, self::plan(&batch, shape, &options), "planning is deterministic");
        }
        // Invariant 6.
        assert!(predicted[0] <= predicted[1], "auto {} us, flat {} us", predicted[0], predicted[1]);
    }
}

/// Invariant 5: the order of the sequences does not matter, up to their permutation.
#[test]
fn a_permuted_batch_gives_the_same_work() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let shape = AttentionShape::new(32, 8, 128, Dtype::F16).unwrap();
    for _ in 0..200 {
        let batch = random_forest(&mut rng);
        let mut permutation: Vec<usize> = (0..batch.lengths.len()).collect();
        permutation.shuffle(&mut rng);
        let permuted = OwnedBatch {
            lengths: permutation.iter().map(|&i| batch.lengths[i]).collect(),
            block_tables: permutation.iter().map(|&i| batch.block_tables[i].clone()).collect(),
            ..batch.clone()
        };
        let (a, b) = (plan(&batch, shape, &PlanOptions::default()), plan(&permuted, shape, &PlanOptions::default()));
        let work = |plan: &Plan| {
            let mut items: Vec<_> =
                plan.items().iter().map(|i| (i.token_count, i.row_count, plan.stream_tokens(i))).collect();
            items.sort_unstable();
            items
        };
        assert_eq!(work(&a), work(&b));
        assert_eq!(a.summary(), b.summary());
    }
}

#[test]
fn options_that_cannot_be_are_refused() {
    let shape = AttentionShape::new(32, 8, 128, Dtype::F16).unwrap();
    let new = |mode, variants| Planner::new(shape, DeviceProfile::h200(), PlanOptions { mode, variants });
    assert!(new(PlanMode::Auto, Some(vec![])).is_err());
    assert!(new(PlanMode::FixedChunk { tokens: 0 }, None).is_err());
    let a100 = DeviceProfile { compute_capability: 80, ..DeviceProfile::h200() };
    let wgmma = PlanOptions { mode: PlanMode::Auto, variants: Some(vec![TileVariant::Wgmma64]) };
    let error = Planner::new(shape, a100, wgmma.clone()).unwrap_err().to_string();
    assert!(error.contains("wgmma64") && error.contains("mma16"), "{error}");
    let batch = |page_size, tokens| OwnedBatch {
        page_size,
        num_pages: 2,
        lengths: vec![tokens],
        block_tables: vec![vec![0, 1]],
    };
    let odd = batch(1, 2);
    let rows = odd.rows();
    let mut planner = Planner::new(shape, DeviceProfile::h200(), wgmma).unwrap();
    assert!(planner.plan(&odd.view(&rows).unwrap()).is_err());
    let mut planner = new(PlanMode::FixedChunk { tokens: 24 }, None).unwrap();
    let paged = batch(16, 20);
    let rows = paged.rows();
    let error = planner.plan(&paged.view(&rows).unwrap()).unwrap_err().to_string();
    assert!(error.contains("multiple of page_size"), "{error}");
}
