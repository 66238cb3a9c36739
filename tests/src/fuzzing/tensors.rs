//! Tensors of any sizes and strides: refused, or the same bits as contiguous ones and nothing else written.

use super::batches;
use arbitrary::{Result, Unstructured};
use half::f16;
use pat_rs::{AttentionShape, DeviceProfile, Dtype, HostTensors, KvStrides, Planner, RowStrides};

const DIM: usize = 64;
/// Most elements of a tensor.
const MOST: usize = 1 << 14;
/// What no output is.
const GAP: f16 = f16::from_bits(0x7e01);
const LSE_GAP: f32 = f32::NAN;

/// Any sizes and strides.
pub(super) fn tensors(bytes: &[u8]) {
    // Out of bytes: the case ends.
    let _ = case(&mut Unstructured::new(bytes));
}

fn stride(u: &mut Unstructured<'_>) -> Result<i64> {
    Ok(match u.int_in_range(0..=7u8)? {
        0 => u.arbitrary()?,
        1 => i64::from(u.arbitrary::<i16>()?),
        _ => 8 * u.int_in_range(0..=64)?,
    })
}

fn row_strides(u: &mut Unstructured<'_>, contiguous: RowStrides) -> Result<RowStrides> {
    if u.ratio(1, 2)? {
        return Ok(contiguous);
    }
    Ok(RowStrides { sequence: stride(u)?, head: stride(u)? })
}

fn kv_strides(u: &mut Unstructured<'_>, contiguous: KvStrides) -> Result<KvStrides> {
    if u.ratio(1, 2)? {
        return Ok(contiguous);
    }
    Ok(KvStrides { page: stride(u)?, token: stride(u)?, head: stride(u)? })
}

/// Values from -2 to 2, other ones for other seeds.
fn values(u: &mut Unstructured<'_>, seed: u32) -> Result<Vec<f16>> {
    let count = if u.ratio(3, 4)? { MOST } else { u.int_in_range(0..=MOST)? };
    let value = |index: u32| {
        let hash = (index ^ seed).wrapping_mul(0x9e37_79b9);
        f16::from_f32((hash >> 20) as f32 / 1024.0 - 2.0)
    };
    Ok((0..count as u32).map(value).collect())
}

fn case(u: &mut Unstructured<'_>) -> Result<()> {
    let batch = batches::batch(u)?;
    let (kv_heads, group) = (u.int_in_range(1..=2)?, u.int_in_range(1..=4)?);
    let shape = AttentionShape::new(group * kv_heads, kv_heads, DIM as u32, Dtype::F16).expect("a valid shape");
    let pool_elements = batch.num_pages * batch.page_size * kv_heads * DIM as u32;
    if pool_elements as usize > MOST || batch.lengths.len() * shape.q_heads() as usize * DIM > MOST {
        return Ok(());
    }
    let rows = batch.rows();
    let problem = batch.problem(shape);
    let mut planner = Planner::new(problem, DeviceProfile::h200(), Default::default()).expect("a planner");
    let plan = planner.plan(&batch.view(&rows).expect("a valid batch")).expect("a plan");
    let (q, k, v) = (values(u, 1)?, values(u, 2)?, values(u, 3)?);
    let mut tensors = HostTensors::new(problem, &q, &k, &v);
    tensors.q_strides = row_strides(u, tensors.q_strides)?;
    tensors.k_strides = kv_strides(u, tensors.k_strides)?;
    tensors.v_strides = kv_strides(u, tensors.v_strides)?;
    tensors.out_strides = row_strides(u, tensors.out_strides)?;
    if u.ratio(1, 2)? {
        tensors.lse_strides = RowStrides { sequence: stride(u)?, head: i64::from(u.arbitrary::<i8>()?) };
    }
    let mut out = vec![GAP; values(u, 4)?.len()];
    let mut lse = vec![LSE_GAP; u.int_in_range(0..=1024)?];
    match pat_rs::cpu::run(&plan, &tensors, &mut out, Some(&mut lse)) {
        Err(error) => {
            assert!(!error.to_string().is_empty());
            assert!(out.iter().all(|x| x.to_bits() == GAP.to_bits()) && lse.iter().all(|x| x.is_nan()), "{error}");
        }
        Ok(()) => assert_rows(&plan, &tensors, batch.num_pages, batch.lengths.len(), &out, &lse),
    }
    Ok(())
}

/// The rows of `values` one after the other.
fn gather(values: &[f16], places: impl Iterator<Item = i64>) -> Vec<f16> {
    places.flat_map(|place| values[place as usize..][..DIM].to_vec()).collect()
}

fn assert_rows(
    plan: &pat_rs::Plan,
    tensors: &HostTensors<'_, f16>,
    num_pages: u32,
    rows: usize,
    out: &[f16],
    lse: &[f32],
) {
    let (problem, shape) = (tensors.problem, tensors.problem.shape());
    let heads = i64::from(shape.q_heads());
    let row_places = |strides: RowStrides| {
        (0..rows as i64).flat_map(move |row| (0..heads).map(move |head| row * strides.sequence + head * strides.head))
    };
    let kv_places = |strides: KvStrides| {
        let (pages, tokens) = (i64::from(num_pages), i64::from(problem.page_size()));
        (0..pages).flat_map(move |page| {
            (0..tokens).flat_map(move |token| {
                (0..i64::from(shape.kv_heads()))
                    .map(move |head| page * strides.page + token * strides.token + head * strides.head)
            })
        })
    };
    let q = gather(tensors.q, row_places(tensors.q_strides));
    let (k, v) = (gather(tensors.k, kv_places(tensors.k_strides)), gather(tensors.v, kv_places(tensors.v_strides)));
    let (mut plain_out, mut plain_lse) = (vec![GAP; q.len()], vec![LSE_GAP; q.len() / DIM]);
    let contiguous = HostTensors::new(problem, &q, &k, &v);
    pat_rs::cpu::run(plan, &contiguous, &mut plain_out, Some(&mut plain_lse)).expect("contiguous tensors");
    let (mut expected_out, mut expected_lse) = (vec![GAP; out.len()], vec![LSE_GAP; lse.len()]);
    for (place, row) in row_places(tensors.out_strides).zip(plain_out.chunks_exact(DIM)) {
        expected_out[place as usize..][..DIM].copy_from_slice(row);
    }
    for (place, value) in row_places(tensors.lse_strides).zip(plain_lse) {
        expected_lse[place as usize] = value;
    }
    assert!(bytemuck::cast_slice::<_, u16>(out) == bytemuck::cast_slice::<_, u16>(&expected_out), "O");
    assert!(bytemuck::cast_slice::<_, u32>(lse) == bytemuck::cast_slice::<_, u32>(&expected_lse), "LSE");
}
