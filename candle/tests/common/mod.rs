//! What both kinds of device must do.

use candle_core::{DType, Device, IndexOp, Tensor, Var, WithDType};
use half::{bf16, f16};
use pat_candle::{CacheLayout, Layer, PlannedStep};
use pat_rs::plan::PlanChange;
use pat_rs::{AttentionShape, DeviceProfile, Dtype, Element, KvElement, PlanOptions, Planner};
use pat_workloads::{Oracle, OwnedBatch, PoolLayout, RowSample, Tensors};

const SEED: u32 = 15;

/// Two levels of sharing, equal sequences, an empty one, and one that shares nothing; pages that nobody owns.
fn batch() -> OwnedBatch {
    OwnedBatch {
        page_size: 16,
        num_pages: 9,
        lengths: vec![60, 61, 33, 0, 60, 5],
        block_tables: vec![vec![7, 1, 2, 3], vec![7, 1, 2, 4], vec![7, 1, 5], vec![], vec![7, 1, 2, 3], vec![6]],
    }
}

fn shape(dtype: Dtype) -> AttentionShape {
    AttentionShape::new(8, 2, 64, dtype).unwrap()
}

fn planner(batch: &OwnedBatch, shape: AttentionShape) -> Planner {
    Planner::new(batch.problem(shape), DeviceProfile::h200(), PlanOptions::default()).unwrap()
}

fn step(batch: &OwnedBatch, shape: AttentionShape, device: &Device) -> PlannedStep {
    let plan = planner(batch, shape).plan(&batch.view(&batch.rows()).unwrap()).unwrap();
    PlannedStep::new(plan, device).unwrap()
}

/// q, and the caches with the layout's strides.
fn tensors<T: Element + WithDType>(
    batch: &OwnedBatch,
    shape: AttentionShape,
    layout: PoolLayout,
    device: &Device,
) -> (Tensor, Tensor, Tensor) {
    let drawn = Tensors::<T>::draw(batch, shape, layout, SEED).unwrap();
    let [rows, pages] = [batch.lengths.len(), batch.num_pages as usize];
    let [page_size, q_heads, kv_heads, head_dim] =
        [batch.page_size, shape.q_heads(), shape.kv_heads(), shape.head_dim()].map(|size| size as usize);
    // As a fused projection leaves it: q's heads are the first ones of a row.
    let q = Tensor::from_slice(&drawn.q, (rows, q_heads, head_dim), device).unwrap();
    let q = Tensor::cat(&[&q, &q], 1).unwrap().narrow(1, 0, q_heads).unwrap();
    let kv = |dims: [usize; 5]| Tensor::from_slice(&drawn.kv, dims.as_slice(), device).unwrap();
    let (k, v) = match layout {
        PoolLayout::Nhd | PoolLayout::Hnd => {
            let kv = match layout {
                PoolLayout::Nhd => kv([2, pages, page_size, kv_heads, head_dim]),
                _ => kv([2, pages, kv_heads, page_size, head_dim]),
            };
            (kv.i(0).unwrap(), kv.i(1).unwrap())
        }
        PoolLayout::Interleaved => {
            let kv = kv([pages, page_size, kv_heads, 2, head_dim]);
            let part = |index| kv.narrow(3, index, 1).unwrap().squeeze(3).unwrap();
            (part(0), part(1))
        }
    };
    (q, k, v)
}

fn layer(layout: PoolLayout) -> Layer {
    let cache = if layout == PoolLayout::Hnd { CacheLayout::Hnd } else { CacheLayout::Nhd };
    Layer { cache, ..Layer::default() }
}

/// Judges an output by the numerics rule.
fn judge<T: Element + WithDType>(batch: &OwnedBatch, shape: AttentionShape, scale: f32, out: &Tensor) {
    assert_eq!(out.dims(), [batch.lengths.len(), shape.q_heads() as usize, shape.v_head_dim() as usize]);
    let sample = RowSample::for_batch(batch, shape);
    let oracle = Oracle::compute::<T>(batch, shape, SEED, scale, sample).unwrap();
    let out = out.flatten_all().unwrap().to_vec1::<T>().unwrap();
    let report = pat_workloads::check(&oracle, shape.q_heads(), &out, None);
    assert!(report.passed && report.rows == out.len() / shape.v_head_dim() as usize, "{report:?}");
}

fn every_layout_of<T: Element + WithDType>(device: &Device) {
    let (batch, shape) = (batch(), shape(<T as KvElement>::DTYPE));
    let step = step(&batch, shape, device);
    for layout in PoolLayout::ALL {
        let (q, k, v) = tensors::<T>(&batch, shape, layout, device);
        let out = step.attend(&q, &k, &v, layer(layout)).unwrap();
        judge::<T>(&batch, shape, 0.125, &out);
        // Layers may have scales of their own.
        let scaled = Layer { softmax_scale: Some(0.3), ..layer(layout) };
        judge::<T>(&batch, shape, 0.3, &step.attend(&q, &k, &v, scaled).unwrap());
    }
}

/// Outputs of every cache layout and both types are right.
pub(crate) fn every_layout_is_right(device: &Device) {
    every_layout_of::<f16>(device);
    every_layout_of::<bf16>(device);
}

/// Steps of a batch that grows, loses a sequence, and gets another.
pub(crate) fn steps_follow_each_other(device: &Device) {
    let (mut batch, shape) = (batch(), shape(Dtype::F16));
    let mut planner = planner(&batch, shape);
    let plan = planner.plan(&batch.view(&batch.rows()).unwrap()).unwrap();
    let mut step = PlannedStep::new(plan, device).unwrap();
    let grow =
        |batch: &mut OwnedBatch| batch.lengths.iter_mut().filter(|length| **length > 0).for_each(|length| *length += 1);
    let mut changes = Vec::new();
    for _ in 0..3 {
        let rows = batch.rows();
        changes.push(step.advance(&mut planner, &batch.view(&rows).unwrap(), None).unwrap());
        let (q, k, v) = tensors::<f16>(&batch, shape, PoolLayout::Nhd, device);
        judge::<f16>(&batch, shape, 0.125, &step.attend(&q, &k, &v, Layer::default()).unwrap());
        grow(&mut batch);
        if changes.len() == 2 {
            // A longer batch than the first one: the copy on a device has to grow.
            for _ in 0..40 {
                batch.lengths.push(60);
                batch.block_tables.push(vec![7, 1, 2, 8]);
            }
        }
    }
    assert_eq!(changes, [PlanChange::Nothing, PlanChange::Lengths, PlanChange::Forest]);
}

/// The message of a refused call.
fn refusal(result: candle_core::Result<Tensor>) -> String {
    result.unwrap_err().to_string()
}

/// Bad tensors are refused by name.
pub(crate) fn bad_tensors_are_refused(device: &Device) {
    let (batch, shape) = (batch(), shape(Dtype::F16));
    let step = step(&batch, shape, device);
    let (q, k, v) = tensors::<f16>(&batch, shape, PoolLayout::Nhd, device);
    let attend = |q: &Tensor, k: &Tensor, v: &Tensor| refusal(step.attend(q, k, v, Layer::default()));
    let wide = |tensor: &Tensor| tensor.to_dtype(DType::F32).unwrap();
    let last_two_swapped =
        |tensor: &Tensor| tensor.transpose(2, 3).unwrap().contiguous().unwrap().transpose(2, 3).unwrap();
    let cases = [
        ("q: got a tensor of f32, expected f16", attend(&wide(&q), &k, &v)),
        ("k_cache: got a tensor of f32, expected f16", attend(&q, &wide(&k), &v)),
        ("v_cache: got a tensor of bf16", attend(&q, &k, &v.to_dtype(DType::BF16).unwrap())),
        ("q: got [5, 8, 64], expected [6, 8, 64]", attend(&q.narrow(0, 0, 5).unwrap(), &k, &v)),
        ("q: got [6, 512], expected", attend(&q.contiguous().unwrap().reshape((6, 512)).unwrap(), &k, &v)),
        ("k_cache: got [8, 16, 2, 64], expected [9, 16, 2, 64]", attend(&q, &k.narrow(0, 0, 8).unwrap(), &v)),
        ("v_cache: got [9, 2, 16, 64], expected [9, 16, 2, 64]", attend(&q, &k, &v.transpose(1, 2).unwrap())),
        ("k_cache: got strides [2048, 128, 1, 2], expected a contiguous last", attend(&q, &last_two_swapped(&k), &v)),
        (
            "q: got a variable, or what was computed from one",
            attend(&Var::from_tensor(&q.contiguous().unwrap()).unwrap(), &k, &v),
        ),
        (
            "softmax_scale: got -1",
            refusal(step.attend(&q, &k, &v, Layer { softmax_scale: Some(-1.0), ..Layer::default() })),
        ),
        (
            "k_cache: got [9, 16, 2, 64], expected [9, 2, 16, 64]",
            refusal(step.attend(&q, &k, &v, layer(PoolLayout::Hnd))),
        ),
        ("k_strides.token: got 129 elements", attend(&q, &odd_rows(&k), &v)),
    ];
    for (expected, message) in cases {
        assert!(message.contains(expected), "{expected}\n{message}");
    }
    // And what is good still is.
    judge::<f16>(&batch, shape, 0.125, &step.attend(&q, &k, &v, Layer::default()).unwrap());
}

/// The same elements in rows that are one element longer, which no kernel can follow.
fn odd_rows(cache: &Tensor) -> Tensor {
    let (pages, page_size, kv_heads, head_dim) = cache.dims4().unwrap();
    let rows = cache.contiguous().unwrap().reshape((pages, page_size, kv_heads * head_dim)).unwrap();
    let padded = rows.pad_with_zeros(2, 0, 1).unwrap();
    // Of [pages, page_size, 129], as [pages, page_size, 2, 64] with the strides of the former.
    let narrow = padded.narrow(2, 0, kv_heads * head_dim).unwrap();
    let halves: Vec<Tensor> = (0..kv_heads).map(|head| narrow.narrow(2, head * head_dim, head_dim).unwrap()).collect();
    assert_eq!(halves[0].stride(), [page_size * 129, 129, 1]);
    halves[0].unsqueeze(2).unwrap().broadcast_as((pages, page_size, kv_heads, head_dim)).unwrap()
}
