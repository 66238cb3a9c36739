//! The CPU executor with rows of Q, O and LSE that are apart: the same bits as with contiguous ones, and nothing between them is
//! read or written.

use half::f16;
use pat_abi::generator::Tensor;
use pat_rs::plan::PlanMode;
use pat_rs::{KvStrides, RowStrides};
use pat_tests::{plan, random_case, run_tensors, softmax_scale};
use pat_workloads::Tensors;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Rows of `innermost` elements that are apart: heads within sequences or the reverse; and the elements they span.
fn strides(rng: &mut ChaCha8Rng, sequences: i64, heads: i64, innermost: i64, unit: i64) -> (RowStrides, usize) {
    let mut gap = || unit * rng.random_range(0..4);
    let inner = innermost + gap();
    let (outer_of, outer_gap) = (|count: i64| (count - 1).max(0) * inner + innermost, gap());
    let strides = if rng.random_bool(0.5) {
        RowStrides { sequence: outer_of(heads) + outer_gap, head: inner }
    } else {
        RowStrides { sequence: inner, head: outer_of(sequences) + outer_gap }
    };
    let last = (sequences - 1).max(0) * strides.sequence + (heads - 1) * strides.head;
    (strides, (last + innermost) as usize)
}

/// Element indices of the rows, in the order of contiguous ones.
fn places(strides: RowStrides, sequences: i64, heads: i64, innermost: i64) -> impl Iterator<Item = usize> {
    (0..sequences * heads).flat_map(move |row| {
        let begin = row / heads * strides.sequence + row % heads * strides.head;
        (begin..begin + innermost).map(|place| place as usize)
    })
}

#[test]
fn strided_rows_give_the_same_bits_and_gaps_keep_theirs() {
    const CANARY: f32 = 777.0;
    let mut rng = ChaCha8Rng::seed_from_u64(21);
    for index in 0..200 {
        let case = random_case(&mut rng, pat_rs::Dtype::F16);
        let tensors = Tensors::<f16>::draw(&case.batch, case.shape, case.layout, index).expect("a valid case");
        let scale = softmax_scale(case.shape);
        let mode =
            *[PlanMode::Auto, PlanMode::Flat, PlanMode::Packed, PlanMode::PerNode].choose(&mut rng).expect("one");
        let expected = run_tensors(&case, mode.into(), &tensors, scale).expect("a valid case");

        let (sequences, heads) = (case.batch.lengths.len() as i64, i64::from(case.shape.q_heads()));
        let head_dim = i64::from(case.shape.head_dim());
        let (q_strides, q_len) = strides(&mut rng, sequences, heads, head_dim, 8);
        let (out_strides, out_len) = strides(&mut rng, sequences, heads, head_dim, 8);
        let (lse_strides, lse_len) = strides(&mut rng, sequences, heads, 1, 1);
        let mut q = vec![f16::NAN; q_len];
        for (place, &value) in places(q_strides, sequences, heads, head_dim).zip(&tensors.q) {
            q[place] = value;
        }
        let mut host = tensors.host(scale).with_row_strides(q_strides, out_strides);
        (host.q, host.lse_strides) = (&q, lse_strides);
        let mut out = vec![f16::from_f32(CANARY); out_len + 5];
        let mut lse = vec![CANARY; lse_len + 5];
        let plan = plan(&case, mode.into()).expect("a plan");
        pat_rs::cpu::run(&plan, &host, &mut out, Some(&mut lse)).expect("a run");

        let what = || format!("{index}: {q_strides:?}, {out_strides:?}, {lse_strides:?}\n{case:?}");
        for (place, &value) in places(out_strides, sequences, heads, head_dim).zip(&expected.out) {
            assert_eq!(std::mem::replace(&mut out[place], f16::from_f32(CANARY)), value, "{}", what());
        }
        for (place, &value) in places(lse_strides, sequences, heads, 1).zip(&expected.lse) {
            assert_eq!(std::mem::replace(&mut lse[place], CANARY), value, "{}", what());
        }
        assert!(
            out.iter().all(|&value| value.to_f32() == CANARY) && lse.iter().all(|&value| value == CANARY),
            "{}",
            what()
        );
        // With the values in a pool of another layout than the keys'.
        let (pages, page_size, kv_heads) = (case.batch.num_pages, case.batch.page_size, case.shape.kv_heads());
        let apart = KvStrides::hnd(page_size, kv_heads, case.shape.head_dim() + 8);
        let mut values = vec![f16::NAN; pages as usize * apart.page as usize];
        for (page, token, head) in
            (0..pages).flat_map(|p| (0..page_size).flat_map(move |t| (0..kv_heads).map(move |h| (p, t, h))))
        {
            let begin = i64::from(page) * apart.page + i64::from(token) * apart.token + i64::from(head) * apart.head;
            let row = tensors.row(Tensor::V, page, token, head);
            values[begin as usize..][..row.len()].copy_from_slice(row);
        }
        let mut other = host.with_kv_strides(host.k_strides, apart);
        other.v = &values;
        let mut alone = vec![f16::from_f32(CANARY); out_len];
        pat_rs::cpu::run(&plan, &other, &mut alone, None).expect("a run");
        let outputs = places(out_strides, sequences, heads, head_dim).map(|place| alone[place]);
        assert!(outputs.eq(expected.out.iter().copied()), "values apart, {}", what());
        // Without LSE, the same output.
        let mut alone = vec![f16::from_f32(CANARY); out_len];
        pat_rs::cpu::run(&plan, &host, &mut alone, None).expect("a run");
        let outputs = places(out_strides, sequences, heads, head_dim).map(|place| alone[place]);
        assert!(outputs.eq(expected.out.iter().copied()), "{}", what());
    }
}
