//! Q, O and LSE with gaps between rows and heads, on any executor.

use crate::executor::Executor;
use crate::{Case, softmax_scale};
use pat_rs::{Element, HostTensors, PlanOptions, Planner, RowStrides};
use pat_workloads::Tensors;

/// Elements of a matrix `[rows, heads, dim]` spread over memory by `strides`, `gap` between them.
fn spread<T: Copy>(values: &[T], heads: usize, dim: usize, strides: RowStrides, gap: T) -> Vec<T> {
    let rows = values.len() / (heads * dim);
    let mut memory = vec![gap; extent(rows, heads, dim, strides)];
    for (index, row) in values.chunks_exact(dim).enumerate() {
        let begin = index / heads * strides.sequence as usize + index % heads * strides.head as usize;
        memory[begin..begin + dim].copy_from_slice(row);
    }
    memory
}

fn extent(rows: usize, heads: usize, dim: usize, strides: RowStrides) -> usize {
    match rows {
        0 => 0,
        rows => (rows - 1) * strides.sequence as usize + (heads - 1) * strides.head as usize + dim,
    }
}

/// Runs a case with contiguous rows, then with the strides of Q, O and LSE each of another kind: the same bits, and nothing
/// written between them.
///
/// # Panics
/// Where they differ, or the case is not valid.
pub fn check<T: Element>(engine: &impl Executor, case: &Case, options: PlanOptions, seed: u32) {
    let shape = case.shape;
    let heads = shape.q_heads() as usize;
    let (dim, out_dim) = (shape.head_dim() as usize, shape.v_head_dim() as usize);
    let tensors = Tensors::<T>::draw(&case.batch, shape, case.layout, seed).expect("a valid case");
    let rows = case.batch.rows();
    let profile = engine.profile().expect("a profile");
    let mut planner = Planner::new(case.batch.problem(shape), profile, options).expect("valid options");
    let plan = planner.plan(&case.batch.view(&rows).expect("a valid batch")).expect("a plan");
    let (count, scale) = (case.batch.lengths.len(), softmax_scale(shape));
    let run = |tensors: &HostTensors<'_, T>, out: &mut [T], lse: &mut [f32]| {
        engine.run_host(&plan, tensors, out, Some(lse)).expect("a valid run");
    };
    let gap = T::from_f32(7.0);
    let (mut out, mut lse) = (vec![gap; count * heads * out_dim], vec![7.0f32; count * heads]);
    run(&tensors.host(scale), &mut out, &mut lse);

    let (heads_i, dim_i, out_dim_i) = (heads as i64, dim as i64, out_dim as i64);
    // Rows longer than their heads; heads apart; heads outside, rows inside.
    let q_strides = RowStrides { sequence: heads_i * dim_i + 24, head: dim_i };
    let out_strides = RowStrides { sequence: heads_i * (out_dim_i + 8) + 16, head: out_dim_i + 8 };
    let lse_strides = RowStrides { sequence: 1, head: count as i64 + 3 };
    let q = spread(&tensors.q, heads, dim, q_strides, T::from_f32(f32::NAN));
    let (expected_out, expected_lse) =
        (spread(&out, heads, out_dim, out_strides, gap), spread(&lse, heads, 1, lse_strides, 7.0));
    let (mut out, mut lse) = (vec![gap; expected_out.len()], vec![7.0f32; expected_lse.len()]);
    let mut strided = tensors.host(scale).with_row_strides(q_strides, out_strides);
    (strided.q, strided.lse_strides) = (&q, lse_strides);
    run(&strided, &mut out, &mut lse);
    assert!(
        bytemuck::cast_slice::<T, u16>(&out) == bytemuck::cast_slice::<T, u16>(&expected_out),
        "O with strides: {case:?}"
    );
    assert!(
        bytemuck::cast_slice::<f32, u32>(&lse) == bytemuck::cast_slice::<f32, u32>(&expected_lse),
        "LSE with strides: {case:?}"
    );
}
