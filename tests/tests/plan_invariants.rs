//! The planner's invariants over random ragged forests: 2,000, or 20,000 with `PAT_LONG` set. Invariant 4 is held by executing
//! plans (`cpu_forests.rs`).

use pat_abi::TileVariant;
use pat_rs::plan::PlanMode;
use pat_rs::{AttentionShape, DeviceProfile, Dtype, Plan, PlanOptions, Planner, Problem};
use pat_tests::invariants::{check, modes};
use pat_workloads::OwnedBatch;
use proptest::prelude::*;
use proptest::sample::{Index, select};

fn plan(batch: &OwnedBatch, shape: AttentionShape, options: &PlanOptions) -> Plan {
    let rows = batch.rows();
    let view = batch.view(&rows).unwrap();
    Planner::new(batch.problem(shape), DeviceProfile::h200(), options.clone()).unwrap().plan(&view).unwrap()
}

/// How a sequence comes about: it continues the first pages of an earlier one, or of none.
#[derive(Clone, Debug)]
struct Sequence {
    parent: Option<Index>,
    kept_pages: Index,
    own_pages: usize,
    /// Tokens that the last page lacks, where it has more.
    missing_tokens: u32,
}

fn sequence(page_size: u32) -> impl Strategy<Value = Sequence> {
    let parent = prop_oneof![1 => Just(None), 4 => any::<Index>().prop_map(Some)];
    let own_pages = prop_oneof![1 => Just(0), 4 => 0..=64usize];
    let missing_tokens = select(vec![0, 1, page_size / 2, page_size - 1]);
    (parent, any::<Index>(), own_pages, missing_tokens).prop_map(|(parent, kept_pages, own_pages, missing_tokens)| {
        Sequence { parent, kept_pages, own_pages, missing_tokens }
    })
}

/// Up to 64 sequences of up to 64 pages: continuations, copies and cuts of earlier ones, of uneven depth; lengths around
/// page borders, and 0. Behind the last needed entry stands garbage. As `pat_tests::invariants::random_forest`, but failures
/// shrink.
fn forests() -> impl Strategy<Value = OwnedBatch> {
    let of_page_size = |page_size| {
        let sequences = prop::collection::vec(sequence(page_size), 1..=64);
        let ids = any::<u32>();
        (Just(page_size), sequences, ids)
    };
    select(vec![1u32, 16, 32, 64]).prop_flat_map(of_page_size).prop_map(|(page_size, sequences, ids)| {
        let (mut next_page, mut tables, mut lengths) = (0u32, Vec::<Vec<u32>>::new(), Vec::new());
        for sequence in sequences {
            let parent = sequence.parent.filter(|_| !tables.is_empty()).map(|parent| parent.get(&tables).clone());
            let mut table = parent.unwrap_or_default();
            table.truncate(sequence.kept_pages.index(table.len() + 1));
            let own = sequence.own_pages.min(64 - table.len()) as u32;
            table.extend(next_page..next_page + own);
            next_page += own;
            lengths.push((table.len() as u32 * page_size).saturating_sub(sequence.missing_tokens));
            tables.push(table);
        }
        // Ids in another order: times an odd number below a power of two is a permutation.
        let num_pages = (next_page + 2).next_power_of_two();
        for table in &mut tables {
            table.iter_mut().for_each(|page| *page = page.wrapping_mul(ids | 1) & (num_pages - 1));
            table.push(u32::MAX);
        }
        OwnedBatch { page_size, num_pages, lengths, block_tables: tables }
    })
}

/// Query heads, KV heads, and the variants to plan with.
fn shapes() -> impl Strategy<Value = (AttentionShape, Option<Vec<TileVariant>>)> {
    let variants = prop_oneof![
        Just(None),
        Just(Some(vec![TileVariant::Mma16, TileVariant::Mma64])),
        select(vec![TileVariant::Mma16, TileVariant::Mma32, TileVariant::Mma128]).prop_map(|one| Some(vec![one])),
    ];
    (select(vec![1u32, 2, 3, 4, 5, 7, 8, 16]), select(vec![1u32, 2, 8]), variants).prop_map(
        |(group, kv_heads, variants)| {
            (AttentionShape::new(group * kv_heads, kv_heads, 128, Dtype::F16).unwrap(), variants)
        },
    )
}

/// What items there are, whatever their order.
fn work(plan: &Plan) -> Vec<(u32, u32, u64)> {
    let mut items: Vec<_> = plan.items().iter().map(|i| (i.token_count, i.row_count, plan.stream_tokens(i))).collect();
    items.sort_unstable();
    items
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if std::env::var_os("PAT_LONG").is_some() { 20_000 } else { 2_000 },
        ..ProptestConfig::default()
    })]

    #[test]
    fn invariants_hold_on_random_forests(batch in forests(), (shape, variants) in shapes()) {
        let mut predicted = Vec::new();
        for mode in modes(batch.page_size) {
            let options = variants.clone().into_iter().fold(PlanOptions::from(mode), PlanOptions::with_variants);
            let plan = plan(&batch, shape, &options);
            check(&plan, &batch, shape);
            predicted.push(plan.prediction().total_us());
            prop_assert_eq!(plan, self::plan(&batch, shape, &options), "planning is deterministic");
        }
        // Invariant 6.
        prop_assert!(predicted[0] <= predicted[1], "auto {} us, flat {} us", predicted[0], predicted[1]);
    }

    /// Invariant 5.
    #[test]
    fn a_permuted_batch_gives_the_same_work(
        (batch, permutation) in forests().prop_flat_map(|batch| {
            let rows: Vec<usize> = (0..batch.lengths.len()).collect();
            (Just(batch), Just(rows).prop_shuffle())
        }),
    ) {
        let shape = AttentionShape::new(32, 8, 128, Dtype::F16).unwrap();
        let permuted = OwnedBatch {
            lengths: permutation.iter().map(|&row| batch.lengths[row]).collect(),
            block_tables: permutation.iter().map(|&row| batch.block_tables[row].clone()).collect(),
            ..batch.clone()
        };
        let (a, b) = (plan(&batch, shape, &PlanOptions::default()), plan(&permuted, shape, &PlanOptions::default()));
        prop_assert_eq!(work(&a), work(&b));
        prop_assert_eq!(a.summary(), b.summary());
    }
}

#[test]
fn options_that_cannot_be_are_refused() {
    let shape = AttentionShape::new(32, 8, 128, Dtype::F16).unwrap();
    let (problem, h200) = (Problem::new(shape, 16), DeviceProfile::h200);
    let refusal = |problem, profile, options| Planner::new(problem, profile, options).unwrap_err().to_string();
    let none = refusal(problem, h200(), PlanOptions::default().with_variants([]));
    assert_eq!(none, "variants: got none, expected at least one tile variant");
    for tokens in [0, 24] {
        let error = refusal(problem, h200(), PlanMode::FixedChunk { tokens }.into());
        assert_eq!(error, format!("fixed chunk: got {tokens}, expected a positive multiple of page_size = 16"));
    }
    let mut a100 = h200();
    a100.compute_capability = 80;
    let wgmma = PlanOptions::default().with_variants([TileVariant::Wgmma64]);
    let error = refusal(problem, a100, wgmma.clone());
    assert!(error.starts_with("variants: got wgmma64, expected some of mma16, mma32"), "{error}");
    assert!(error.ends_with("(wgmma64: compute_capability: got 80, expected 90)"), "{error}");
    let error = refusal(Problem::new(shape, 1), h200(), wgmma.clone());
    assert!(error.contains("(wgmma64: page_size: got 1, expected a multiple of 8 to"), "{error}");

    let paged = OwnedBatch { page_size: 32, num_pages: 2, lengths: vec![20], block_tables: vec![vec![0]] };
    let rows = paged.rows();
    let mut planner = Planner::new(problem, h200(), wgmma).unwrap();
    let error = planner.plan(&paged.view(&rows).unwrap()).unwrap_err().to_string();
    assert_eq!(error, "page_size of the batch: got 32, expected the planner's page_size = 16");
}
