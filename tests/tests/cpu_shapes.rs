//! Shapes that random forests do not have: every size of a GQA group, page sizes that are no powers of two, pools of more than
//! 2^31 elements. On the CPU executor, against the f64 oracle.

use half::{bf16, f16};
use pat_abi::GroupParts;
use pat_rs::{
    AttentionShape, DeviceProfile, Dtype, Element, HostTensors, KvStrides, PlanOptions, Planner, Problem, supports,
};
use pat_tests::forests::far_apart;
use pat_tests::invariants::{self, modes};
use pat_tests::{Case, Output, judge, run_tensors, softmax_scale};
use pat_workloads::{Oracle, PoolLayout, RowSample, Tensors, check};
use rayon::prelude::*;

const SEED: u32 = 23;

/// At head dimension 192 with 128 elements per value, else with as many as per key.
fn verify<T: Element>(q_heads: u32, kv_heads: u32, head_dim: u32, page_size: u32) {
    let v_head_dim = if head_dim == 192 { 128 } else { head_dim };
    let shape = AttentionShape::new(q_heads, kv_heads, head_dim, T::DTYPE).expect("a valid shape");
    let shape = shape.with_v_head_dim(v_head_dim).expect("a valid shape");
    let case = Case { batch: far_apart(page_size, 40), shape, layout: PoolLayout::Nhd };
    let sample = RowSample::for_batch(&case.batch, shape);
    let oracle = Oracle::compute::<T>(&case.batch, shape, SEED, softmax_scale(shape), sample).expect("a valid case");
    let tensors = Tensors::<T>::draw(&case.batch, shape, case.layout, SEED).expect("a valid case");
    for mode in modes(page_size) {
        let output = run_tensors(&case, mode.into(), &tensors, softmax_scale(shape)).expect("a valid case");
        let report = check(&oracle, q_heads, &output.out, Some(&output.lse));
        assert!(report.passed, "{q_heads}/{kv_heads} x {head_dim}, pages of {page_size}, {mode:?}: {report:?}");
    }
}

#[test]
fn every_group_that_a_tile_holds_agrees_with_the_oracle() {
    (1..=128u32).into_par_iter().for_each(|group| {
        // The widest tile of head dims beyond 128 has 64 rows.
        let head_dims: &[u32] = if group > 64 { &[64, 96, 128] } else { &[64, 96, 128, 192, 256] };
        let (kv_heads, head_dim) = (1 + group % 2, head_dims[group as usize % head_dims.len()]);
        let page_size = [16, 1, 8, 24][group as usize / 3 % 4];
        match group % 4 {
            0 => verify::<bf16>(group * kv_heads, kv_heads, head_dim, page_size),
            _ => verify::<f16>(group * kv_heads, kv_heads, head_dim, page_size),
        }
    });
}

/// In parts of equally many rows, the last of which may begin within the one before it.
#[test]
fn groups_that_no_tile_holds_agree_with_the_oracle() {
    // At head dim 256, from two parts on to four.
    [65, 66, 97, 127, 128, 129, 191, 193, 255, 256].into_par_iter().for_each(|group| {
        let (kv_heads, page_size) = (1 + group % 2, [16, 1, 24][group as usize % 3]);
        verify::<f16>(group * kv_heads, kv_heads, 256, page_size);
    });
    (129..=256u32).into_par_iter().for_each(|group| {
        let (kv_heads, head_dim) = (1 + group % 2, [64, 128][group as usize / 2 % 2]);
        let page_size = [16, 1, 8, 24][group as usize / 3 % 4];
        match group % 4 {
            0 => verify::<bf16>(group * kv_heads, kv_heads, head_dim, page_size),
            _ => verify::<f16>(group * kv_heads, kv_heads, head_dim, page_size),
        }
    });
    verify::<f16>(1000, 1, 64, 16);
}

#[test]
fn plans_of_groups_that_no_tile_holds_keep_their_invariants() {
    for (group, kv_heads, head_dim) in [(65, 2, 256), (129, 1, 128), (131, 3, 64), (256, 1, 128), (65_535, 1, 128)] {
        let shape = AttentionShape::new(group * kv_heads, kv_heads, head_dim, Dtype::F16).expect("a valid shape");
        let batch = far_apart(16, 40);
        let rows = batch.rows();
        assert_eq!(supports(&batch.problem(shape), None, None), Ok(()));
        for mode in modes(16) {
            for profile in [DeviceProfile::h200(), DeviceProfile::by_name("a100-80").expect("a known device")] {
                let mut planner = Planner::new(batch.problem(shape), profile, mode.into()).expect("supported");
                let plan = planner.plan(&batch.view(&rows).expect("valid")).expect("a plan");
                invariants::check(&plan, &batch, shape);
                // Every part reads the whole context, as it would without sharing.
                let summary = plan.summary();
                let variant = planner.tile_variants()[0];
                let parts = u64::from(GroupParts::new(group, variant).count);
                assert_eq!(summary.planned_kv_bytes, summary.flat_kv_bytes, "{group} {mode:?}");
                let logical_kv_bytes = summary.flat_kv_bytes as f64 / parts as f64;
                assert_eq!(summary.sharing_factor, logical_kv_bytes / summary.unique_kv_bytes as f64);
                assert!(summary.predicted_us.is_finite() && summary.prediction.launch_us > 2.0 * parts as f64);
            }
        }
    }
}

/// A caller may also pass the group as KV heads that lie at the same place: one launch, and the second part finds in L2 what
/// the first has read.
#[test]
fn kv_heads_at_the_same_place_make_a_group_of_256() {
    let shape = AttentionShape::new(256, 1, 128, Dtype::F16).expect("a valid shape");
    let case = Case { batch: far_apart(16, 40), shape, layout: PoolLayout::Nhd };
    let tensors = Tensors::<f16>::draw(&case.batch, shape, case.layout, SEED).expect("a valid case");
    let twice = AttentionShape::new(256, 2, 128, Dtype::F16).expect("a valid shape");
    let problem = Problem::new(twice, 16);
    let strides = KvStrides { head: 0, ..tensors.k_strides };
    assert_eq!(supports(&problem, Some((strides, strides)), None), Ok(()));
    let rows = case.batch.rows();
    let mut planner = Planner::new(problem, DeviceProfile::h200(), PlanOptions::default()).expect("supported");
    let plan = planner.plan(&case.batch.view(&rows).expect("valid")).expect("a plan");
    let host = HostTensors::new(problem, &tensors.q, &tensors.kv, &tensors.kv[tensors.v_begin..])
        .with_kv_strides(strides, strides);
    let mut output =
        Output { out: vec![f16::NAN; tensors.q.len()], lse: vec![f32::NAN; 256 * case.batch.lengths.len()] };
    pat_rs::cpu::run(&plan, &host, &mut output.out, Some(&mut output.lse)).expect("a run");
    let report = judge(&case, &output, SEED).expect("a valid case");
    assert!(report.passed, "{report:?}");
}

#[test]
fn page_sizes_of_engines_agree_with_the_oracle() {
    // 784 and 1056: hybrid models, whose attention pages are as large as their linear layers' states.
    [1, 2, 8, 24, 48, 784, 1056].into_par_iter().for_each(|page_size| {
        verify::<bf16>(8, 2, 128, page_size);
        verify::<f16>(6, 1, 256, page_size);
    });
}

#[test]
fn pools_of_more_than_2_to_the_31_elements_agree_with_the_oracle() {
    for (page_size, layout) in [(16, PoolLayout::Nhd), (1, PoolLayout::Hnd), (784, PoolLayout::Nhd)] {
        let shape = AttentionShape::new(8, 2, 128, Dtype::F16).expect("a valid shape");
        let page_elements = page_size as usize * 2 * 128;
        let num_pages = (1usize << 31).div_ceil(page_elements) as u32 + 100;
        let sparse = far_apart(page_size, num_pages);
        let compact = Case { batch: sparse.compacted(), shape, layout };
        let drawn = Tensors::<f16>::draw(&compact.batch, shape, layout, SEED).expect("a valid case");
        // Zeroed memory: the system backs only what is touched.
        let [mut keys, mut values] = [(); 2].map(|()| vec![0u16; num_pages as usize * page_elements]);
        let (keys, values) =
            (bytemuck::cast_slice_mut::<_, f16>(&mut keys), bytemuck::cast_slice_mut::<_, f16>(&mut values));
        let mut furthest = 0;
        for (table, compact) in sparse.block_tables.iter().zip(&compact.batch.block_tables) {
            for (&page, &small) in table.iter().zip(compact) {
                let (begin, small) = (page as usize * page_elements, small as usize * page_elements);
                furthest = furthest.max(begin);
                keys[begin..][..page_elements].copy_from_slice(&drawn.kv[small..][..page_elements]);
                let small = drawn.v_begin + small;
                values[begin..][..page_elements].copy_from_slice(&drawn.kv[small..][..page_elements]);
            }
        }
        assert!(furthest > 1 << 30 && keys.len() > 1 << 31);

        let problem = sparse.problem(shape);
        let rows = sparse.rows();
        for mode in modes(page_size) {
            let mut planner = Planner::new(problem, DeviceProfile::h200(), mode.into()).expect("supported");
            let plan = planner.plan(&sparse.view(&rows).expect("valid")).expect("a plan");
            invariants::check(&plan, &sparse, shape);
            let [k_strides, v_strides] = layout.strides(shape, page_size);
            let host = HostTensors::new(problem.with_scale(softmax_scale(shape)), &drawn.q, keys, values)
                .with_kv_strides(k_strides, v_strides);
            let mut output =
                Output { out: vec![f16::NAN; drawn.q.len()], lse: vec![f32::NAN; 8 * sparse.lengths.len()] };
            pat_rs::cpu::run(&plan, &host, &mut output.out, Some(&mut output.lse)).expect("a run");
            let report = judge(&compact, &output, SEED).expect("a valid case");
            assert!(report.passed, "pages of {page_size}, {mode:?}: {report:?}");
            // One element too few, of more than 2^31.
            let mut short = host;
            short.k = &keys[1..];
            let message = pat_rs::cpu::run(&plan, &short, &mut output.out, None).unwrap_err().to_string();
            let (got, needed) = (keys.len() - 1, keys.len());
            assert!(message.starts_with(&format!("k: got {got} elements, expected at least {needed}")), "{message}");
        }
    }
}

/// As many pages as there may be, and pages as large: what the planner counts in.
#[test]
fn plans_of_the_largest_pools_keep_their_invariants() {
    let most = pat_rs::DecodeBatch::MAX_TOKENS;
    for (page_size, num_pages) in [(1, most), (8, most), (784, most), (1056, most), (Problem::MAX_PAGE_SIZE, most)] {
        let shape = AttentionShape::new(64, 8, 128, Dtype::Bf16).expect("a valid shape");
        let batch = far_apart(page_size, num_pages);
        let rows = batch.rows();
        assert!(rows.iter().flat_map(|row| row.iter()).any(|&page| page > most - 8));
        for mode in modes(page_size) {
            let mut planner =
                Planner::new(batch.problem(shape), DeviceProfile::h200(), mode.into()).expect("supported");
            let plan = planner.plan(&batch.view(&rows).expect("valid")).expect("a plan");
            invariants::check(&plan, &batch, shape);
        }
    }
}
