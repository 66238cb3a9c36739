//! Bad input at library level: an error that names the argument, the value and what is accepted; nothing is written.

use half::{bf16, f16};
use pat_rs::{AttentionShape, DecodeBatch, DeviceProfile, Dtype, HostTensors, PlanOptions, Planner, Problem};
use pat_workloads::{OwnedBatch, PoolLayout, Tensors};

fn assert_names<V>(result: pat_rs::Result<V>, parts: &[&str]) {
    let message = result.err().expect("bad input is refused").to_string();
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

#[test]
fn shapes() {
    assert_names(AttentionShape::new(0, 8, 128, Dtype::F16), &["q_heads", "got 0"]);
    assert_names(AttentionShape::new(8, 0, 128, Dtype::F16), &["kv_heads", "got 0"]);
    assert_names(AttentionShape::new(30, 8, 128, Dtype::F16), &["q_heads", "got 30", "multiple of kv_heads (8)"]);
    assert_names(AttentionShape::new(32, 8, 0, Dtype::F16), &["head_dim", "got 0", "1 to 65535"]);
    let odd = Problem::new(AttentionShape::new(32, 8, 80, Dtype::F16).expect("a shape"), 16);
    let planner = Planner::new(odd, DeviceProfile::h200(), PlanOptions::default());
    assert_names(planner, &["head_dim", "got 80", "64 or 96 or 128 or 192 or 256 or 512"]);
}

#[test]
fn batches() {
    let batch = |tables: &[&[u32]], lengths: &[u32], page_size| {
        DecodeBatch::from_block_tables(tables, lengths, page_size, 4).map(|_| ())
    };
    assert_names(batch(&[&[0, 4]], &[17], 16), &["block_tables[0][1]", "got 4", "num_pages = 4"]);
    assert_names(batch(&[&[0]], &[17], 16), &["block_tables[0]", "at least 2", "lengths[0] = 17"]);
    assert_names(batch(&[&[0]], &[1, 1], 16), &["block_tables", "got 1 tables"]);
    assert_names(batch(&[&[0]], &[1], 0), &["page_size", "got 0"]);
    assert_names(DecodeBatch::from_padded(&[-1], 1, &[1], 16, 4), &["block_tables[0][0]", "got -1"]);
    // As the caller has them: negative where the type is signed, large where it is not.
    assert_names(DecodeBatch::from_padded(&[u32::MAX - 1], 1, &[1], 16, 4), &["block_tables[0][0]", "got 4294967294"]);
    let one: [&[u32]; 2] = [&[0], &[3_000_000_000]];
    assert_names(DecodeBatch::from_block_tables(&one, &[1, 1], 16, 4), &["block_tables[1][0]", "got 3000000000"]);
    assert_names(DecodeBatch::from_block_tables(&one, &[1, -7], 16, 4), &["lengths[1]", "got -7", "0 to 2147483647"]);
    assert_names(DecodeBatch::from_padded(&[0, 0], 1, &[-1, 1], 16, 4), &["lengths[0]", "got -1"]);
    assert_names(DecodeBatch::from_padded(&[0], 1, &[1u32 << 31], 16, 4), &["lengths[0]", "got 2147483648"]);
    assert_names(DecodeBatch::from_csr(&[0, -2], &[0], &[1], 16, 4), &["indptr[1]", "got -2"]);
    assert_names(DecodeBatch::from_csr(&[0, 1], &[-5], &[1], 16, 4), &["block_tables[0][0]", "got -5"]);
    assert_names(DecodeBatch::from_csr(&[0, 1], &[0], &[-3], 16, 4), &["last_page_len[0]", "got -3"]);
    assert_names(DecodeBatch::from_csr(&[0, 1], &[0], &[17], 16, 4), &["last_page_len[0]", "got 17", "page_size = 16"]);
}

#[test]
fn executor_arguments() {
    let shape = AttentionShape::new(4, 2, 64, Dtype::F16).expect("valid");
    let batch = OwnedBatch { page_size: 16, num_pages: 2, lengths: vec![17], block_tables: vec![vec![0, 1]] };
    let rows = batch.rows();
    let plan = Planner::new(batch.problem(shape), DeviceProfile::h200(), PlanOptions::default())
        .and_then(|mut planner| planner.plan(&batch.view(&rows)?))
        .expect("a plan");
    let drawn = Tensors::<f16>::draw(&batch, shape, PoolLayout::Nhd, 1).expect("valid");
    let good = drawn.host(0.125);
    let refuse = |tensors: HostTensors<'_, f16>, out_len: usize, lse_len: usize, parts: &[&str]| {
        let mut out = vec![f16::from_f32(7.0); out_len];
        let mut lse = vec![7.0; lse_len];
        assert_names(pat_rs::cpu::run(&plan, &tensors, &mut out, Some(&mut lse)), parts);
        assert!(out.iter().all(|value| value.to_f32() == 7.0) && lse.iter().all(|&value| value == 7.0));
    };
    refuse(good, 255, 4, &["out", "got 255 elements", "at least 256"]);
    refuse(good, 256, 3, &["lse", "got 3 elements", "at least 4"]);
    let with = |change: &dyn Fn(&mut HostTensors<'_, f16>)| {
        let mut tensors = good;
        change(&mut tensors);
        tensors
    };
    refuse(with(&|t| t.q = &t.q[1..]), 256, 4, &["q", "got 255 elements"]);
    refuse(with(&|t| t.k = &t.k[..100]), 256, 4, &["k", "got 100 elements"]);
    refuse(with(&|t| t.v = &t.v[..100]), 256, 4, &["v", "got 100 elements"]);
    refuse(with(&|t| t.problem = t.problem.with_scale(f32::NAN)), 256, 4, &["softmax_scale", "NaN"]);
    refuse(with(&|t| t.k_strides.token = -1), 256, 4, &["k_strides.token", "got -1"]);
    refuse(with(&|t| t.out_strides.head = 0), 256, 4, &["out_strides.head", "got 0", "no two rows overlap"]);
    // A plan for 4/2 heads of 64 elements does not run on 8/1 x 128 tensors, nor on pages of 32 tokens.
    let other = AttentionShape::new(8, 1, 128, Dtype::F16).expect("valid");
    refuse(with(&|t| t.problem = Problem::new(other, 16)), 256, 4, &["plan does not fit the shape of the run"]);
    refuse(with(&|t| t.problem = Problem::new(shape, 32)), 256, 4, &["plan does not fit the page_size of the run"]);

    let other = Tensors::<bf16>::draw(&batch, shape, PoolLayout::Nhd, 1).expect("valid");
    let mut out = vec![bf16::from_f32(7.0); 256];
    assert_names(pat_rs::cpu::run(&plan, &other.host(0.125), &mut out, None), &["element type", "F16", "Bf16"]);
}
