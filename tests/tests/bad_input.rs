//! Bad input at library level: an error that names the argument, the value and what is accepted; nothing is written.

use half::{bf16, f16};
use pat_rs::{AttentionShape, DecodeBatch, DeviceProfile, Dtype, HostTensors, PlanOptions, Planner};
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
    assert_names(AttentionShape::new(32, 8, 96, Dtype::F16), &["head_dim", "got 96", "64 or 128"]);
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
    assert_names(DecodeBatch::from_csr(&[0, 1], &[0], &[17], 16, 4), &["last_page_len[0]", "got 17", "page_size = 16"]);
}

#[test]
fn executor_arguments() {
    let shape = AttentionShape::new(4, 2, 64, Dtype::F16).expect("valid");
    let batch = OwnedBatch { page_size: 16, num_pages: 2, lengths: vec![17], block_tables: vec![vec![0, 1]] };
    let rows = batch.rows();
    let plan = Planner::new(shape, DeviceProfile::h200(), PlanOptions::default())
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
    refuse(HostTensors { q: &good.q[1..], ..good }, 256, 4, &["q", "got 255 elements"]);
    refuse(HostTensors { k: &good.k[..100], ..good }, 256, 4, &["k", "got 100 elements"]);
    refuse(HostTensors { v: &good.v[..100], ..good }, 256, 4, &["v", "got 100 elements"]);
    refuse(HostTensors { softmax_scale: f32::NAN, ..good }, 256, 4, &["softmax_scale", "NaN"]);
    let mut strides = good.k_strides;
    strides.token = -1;
    refuse(HostTensors { k_strides: strides, ..good }, 256, 4, &["k_strides.token", "got -1"]);

    let other = Tensors::<bf16>::draw(&batch, shape, PoolLayout::Nhd, 1).expect("valid");
    let mut out = vec![bf16::from_f32(7.0); 256];
    assert_names(pat_rs::cpu::run(&plan, &other.host(0.125), &mut out, None), &["element type", "F16", "Bf16"]);
}
