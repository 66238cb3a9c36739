//! `supports`, the planner and the executor agree on every problem: what one accepts, all accept, and they refuse with the same
//! words.

use half::{bf16, f16};
use pat_rs::cpu::{E4m3, E5m2};
use pat_rs::{
    AttentionShape, DecodeBatch, DeviceProfile, Dtype, Element, Error, HostTensors, KvElement, KvStrides, PlanOptions,
    Planner, Problem, supports,
};
use proptest::prelude::*;
use proptest::sample::select;

fn dtypes() -> impl Strategy<Value = Dtype> {
    prop_oneof![8 => select(vec![Dtype::F16, Dtype::Bf16]), 1 => select(vec![Dtype::E4m3, Dtype::E5m2])]
}

/// Mostly one of the usual values.
fn mostly<T: Clone + std::fmt::Debug + 'static>(usual: Vec<T>, odd: Vec<T>) -> impl Strategy<Value = T> {
    prop_oneof![8 => select(usual), 1 => select(odd)]
}

fn shapes() -> impl Strategy<Value = AttentionShape> {
    let head_dims = || mostly(vec![64u32, 128, 256], vec![1, 96, 192, 512]);
    let others = (prop::option::weighted(0.1, head_dims()), prop::option::weighted(0.1, dtypes()));
    let groups = mostly(vec![1u32, 3, 8, 16, 64, 128], vec![129, 192, 500]);
    (groups, 1..5u32, head_dims(), dtypes(), others, prop::option::weighted(0.1, dtypes())).prop_map(
        |(group, kv_heads, head_dim, dtype, (v_head_dim, kv_dtype), out_dtype)| {
            let shape = AttentionShape::new(group * kv_heads, kv_heads, head_dim, dtype).expect("a shape");
            let shape = shape.with_v_head_dim(v_head_dim.unwrap_or(head_dim)).expect("a head dim");
            shape.with_kv_dtype(kv_dtype.unwrap_or(dtype)).with_out_dtype(out_dtype.unwrap_or(dtype))
        },
    )
}

fn problems() -> impl Strategy<Value = Problem> {
    let page_sizes = mostly(vec![1u32, 7, 16, 48, 64, 256], vec![0, 65_536, 65_537, 100_000, u32::MAX]);
    let scales = mostly(vec![None, Some(0.2f32)], [0.0, -1.0, f32::NAN, f32::INFINITY, f32::MAX].map(Some).to_vec());
    let features = mostly(vec![0u32], (1..8).collect());
    (shapes(), page_sizes, scales, features).prop_map(|(shape, page_size, scale, feature)| {
        let problem = Problem::new(shape, page_size);
        let problem = scale.map_or(problem, |scale| problem.with_scale(scale));
        match feature {
            1 => problem.with_soft_cap(30.0),
            2 => problem.with_window(9),
            6 => problem.with_chunk(24),
            7 => problem.with_query_tree(3),
            3 => problem.with_query_tokens(3),
            4 => problem.with_sinks(),
            5 => problem.with_alibi(),
            _ => problem,
        }
    })
}

/// One page is all there is: its stride is never used, but must be one that kernels can follow.
fn page_strides() -> impl Strategy<Value = Option<i64>> {
    mostly(vec![None, Some(0), Some(8), Some((1 << 39) - 8)], [-8, 3, 1 << 39, 1 << 40, i64::MAX].map(Some).to_vec())
}

fn profile(compute_capability: u32) -> DeviceProfile {
    let mut profile = DeviceProfile::h200();
    profile.compute_capability = compute_capability;
    profile
}

/// Executes one sequence of one token under a plan for `planned`.
fn execute<T: Element, C: KvElement>(
    planned: Problem,
    called: Problem,
    page_stride: Option<i64>,
    one_of_cache: C,
) -> pat_rs::Result<()> {
    let tables: [&[u32]; 1] = [&[0]];
    let batch = DecodeBatch::from_block_tables(&tables, &[1], planned.page_size(), 1)?;
    let plan = Planner::new(planned, DeviceProfile::h200(), PlanOptions::default())?.plan(&batch)?;
    let shape = called.shape();
    let one = T::from_f32(1.0);
    let (q, elements) = (vec![one; 500 * 5 * 256], (called.page_size() * shape.kv_heads() * 256) as usize);
    // Sinks that take no weight.
    let sinks = vec![f32::NEG_INFINITY; shape.q_heads() as usize];
    let pool = vec![one_of_cache; elements];
    let mut tensors = HostTensors::new(called, &q, &pool, &pool);
    if called.has_sinks() {
        tensors = tensors.with_sinks(&sinks);
    }
    tensors.k_strides.page = page_stride.unwrap_or(tensors.k_strides.page);
    let mut out = vec![T::from_f32(0.0); q.len()];
    pat_rs::cpu::run(&plan, &tensors, &mut out, None)?;
    let head_dim = shape.v_head_dim() as usize;
    assert!(out[..shape.q_heads() as usize * head_dim].iter().all(|&x| x.to_f32() == 1.0), "{called:?}");
    Ok(())
}

/// What is compared of a result.
fn text<V, E: std::fmt::Display>(result: Result<V, E>) -> Result<(), String> {
    result.map(drop).map_err(|error| error.to_string())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3_000, ..ProptestConfig::default() })]

    #[test]
    fn supports_planner_and_executor_agree(
        problem in problems(),
        compute_capability in mostly(vec![80u32, 86, 89, 90, 100, 120], vec![81, 999]),
        page_stride in page_strides(),
    ) {
        let supported = supports(&problem, None, Some(compute_capability));
        let planner = Planner::new(problem, profile(compute_capability), PlanOptions::default());
        prop_assert_eq!(text(planner.as_ref().map(drop)), text(supported.clone()));
        if let Err(error) = &planner {
            prop_assert!(matches!(error, Error::Unsupported(_)), "{error:?}");
        }
        let variants = profile(compute_capability).variants(&problem);
        prop_assert_eq!(!variants.is_empty(), supported.is_ok());
        for variant in &variants {
            let options = PlanOptions::default().with_variants([*variant]);
            prop_assert_eq!(text(Planner::new(problem, profile(compute_capability), options)), Ok(()));
        }
        let tables: [&[u32]; 0] = [];
        let batch = DecodeBatch::from_block_tables::<u32>(&tables, &[], problem.page_size(), 1);
        prop_assert_eq!(batch.is_ok(), (1..=Problem::MAX_PAGE_SIZE).contains(&problem.page_size()));

        // The executor, where the pool is small: under a plan for the problem, or for what is closest to it.
        let shape = problem.shape();
        if problem.page_size() > 256 || !(1..=256).contains(&shape.head_dim()) {
            return Ok(());
        }
        let (k, v) = (KvStrides::nhd(problem.page_size(), shape.kv_heads(), shape.head_dim()), shape.v_head_dim());
        let v = KvStrides::nhd(problem.page_size(), shape.kv_heads(), v);
        let k = KvStrides { page: page_stride.unwrap_or(k.page), ..k };
        let supported = text(supports(&problem, Some((k, v)), None));
        // A planner that is not told of a cap may take kernels that have none, whose plans are then refused.
        let uncapped = Problem::new(shape, problem.page_size());
        let planned = problem.score().soft_cap.map(|cap| uncapped.with_soft_cap(cap));
        let planned = planned.filter(|capped| supports(capped, None, None).is_ok()).unwrap_or(uncapped);
        if text(supports(&planned, None, None)).is_err() || planned.visibility() != problem.visibility() {
            return Ok(());
        }
        let executed = match (shape.dtype(), shape.kv_dtype()) {
            (Dtype::Bf16, Dtype::E4m3) => execute::<bf16, _>(planned, problem, page_stride, E4m3::from_f32(1.0)),
            (Dtype::Bf16, Dtype::E5m2) => execute::<bf16, _>(planned, problem, page_stride, E5m2::from_f32(1.0)),
            (Dtype::Bf16, _) => execute::<bf16, _>(planned, problem, page_stride, bf16::ONE),
            (_, Dtype::E4m3) => execute::<f16, _>(planned, problem, page_stride, E4m3::from_f32(1.0)),
            (_, Dtype::E5m2) => execute::<f16, _>(planned, problem, page_stride, E5m2::from_f32(1.0)),
            _ => execute::<f16, _>(planned, problem, page_stride, f16::ONE),
        };
        prop_assert_eq!(text(executed), supported, "{:?}", problem);
    }
}
