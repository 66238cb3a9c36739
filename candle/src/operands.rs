//! What the tensors of a call must be, checked before anything is allocated or launched.

use candle_core::{DType, DeviceLocation, Layout, Tensor};
use pat_rs::{Dtype, Error, KvStrides, Plan, Result, RowStrides};

/// The order of the dimensions of K and V caches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheLayout {
    /// `[pages, page_size, kv_heads, head_dim]`.
    #[default]
    Nhd,
    /// `[pages, kv_heads, page_size, head_dim]`, as mistral.rs has them for FlashInfer.
    Hnd,
}

/// Strides of a call's tensors.
pub(crate) struct Strides {
    pub(crate) q: RowStrides,
    pub(crate) k: KvStrides,
    pub(crate) v: KvStrides,
}

/// Refuses tensors on another device than the plan, of other types than the plan's, and those that are differentiated.
pub(crate) fn check_tensors(plan: &Plan, device: DeviceLocation, tensors: [(&str, &Tensor); 3]) -> Result<()> {
    let shape = plan.shape();
    let dtypes = [shape.dtype(), shape.kv_dtype(), shape.kv_dtype()];
    for ((name, tensor), dtype) in tensors.into_iter().zip(dtypes) {
        let location = tensor.device().location();
        if location != device {
            let got = format!("a tensor on {location:?}");
            return Err(Error::invalid(name, got, format!("one on {device:?}, where the plan is")));
        }
        if tensor.dtype() != candle_dtype(dtype)? {
            let got = format!("a tensor of {}", tensor.dtype().as_str());
            return Err(Error::invalid(name, got, format!("{}, as the plan", dtype.name())));
        }
        if tensor.track_op() {
            let expected = "a tensor without gradient (`Tensor::detach`): there is no backward pass";
            return Err(Error::invalid(name, "a variable, or what was computed from one", expected));
        }
    }
    Ok(())
}

fn candle_dtype(dtype: Dtype) -> Result<DType> {
    match dtype {
        Dtype::F16 => Ok(DType::F16),
        Dtype::Bf16 => Ok(DType::BF16),
        other => Err(Error::invalid("plan", format!("one for {}", other.name()), "one for f16 or bf16")),
    }
}

impl Strides {
    /// Checks sizes and strides; those that no kernel follows are left to `pat-rs`.
    pub(crate) fn of(plan: &Plan, cache: CacheLayout, q: &Layout, k: &Layout, v: &Layout) -> Result<Self> {
        let shape = plan.shape();
        Ok(Self {
            q: row_strides(plan, q)?,
            k: kv_strides("k_cache", plan, cache, shape.head_dim(), k)?,
            v: kv_strides("v_cache", plan, cache, shape.v_head_dim(), v)?,
        })
    }
}

fn row_strides(plan: &Plan, q: &Layout) -> Result<RowStrides> {
    let (rows, shape) = (plan.sequence_count(), plan.shape());
    check_dims("q", q, [rows, shape.q_heads(), shape.head_dim()], "[rows of the plan, q_heads, head_dim]")?;
    let [row, head] = outer_strides("q", q)?;
    Ok(RowStrides { sequence: row, head })
}

fn kv_strides(name: &str, plan: &Plan, cache: CacheLayout, head_dim: u32, layout: &Layout) -> Result<KvStrides> {
    let (pages, page_size, kv_heads) = (plan.num_pages(), plan.page_size(), plan.shape().kv_heads());
    match cache {
        CacheLayout::Nhd => {
            check_dims(name, layout, [pages, page_size, kv_heads, head_dim], "[pages, page_size, kv_heads, head_dim]")?;
            let [page, token, head] = outer_strides(name, layout)?;
            Ok(KvStrides { page, token, head })
        }
        CacheLayout::Hnd => {
            check_dims(name, layout, [pages, kv_heads, page_size, head_dim], "[pages, kv_heads, page_size, head_dim]")?;
            let [page, head, token] = outer_strides(name, layout)?;
            Ok(KvStrides { page, token, head })
        }
    }
}

fn check_dims<const N: usize>(name: &str, layout: &Layout, expected: [u32; N], meaning: &str) -> Result<()> {
    if layout.dims().iter().copied().eq(expected.map(|size| size as usize)) {
        return Ok(());
    }
    Err(Error::invalid(name, format!("{:?}", layout.dims()), format!("{expected:?}, {meaning}")))
}

/// Strides of all dimensions but the last, which is contiguous. The number of dimensions has been checked.
fn outer_strides<const N: usize>(name: &str, layout: &Layout) -> Result<[i64; N]> {
    let (outer, innermost) = layout.stride().split_at(N);
    if innermost != [1] {
        let got = format!("strides {:?}", layout.stride());
        return Err(Error::invalid(name, got, "a contiguous last dimension (stride 1)"));
    }
    let mut strides = [0; N];
    for (stride, &elements) in strides.iter_mut().zip(outer) {
        *stride = i64::try_from(elements).unwrap_or(i64::MAX);
    }
    Ok(strides)
}
