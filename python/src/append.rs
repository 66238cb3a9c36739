//! `append_kv`.

use crate::apart::{check_distinct_elements, check_elements_apart};
use crate::device::{self, Device};
use crate::errors::{Integer, Result, argument, invalid, wrong_type};
use crate::foreign;
use crate::operands::{KvLayout, Scale, Span, check_strides};
use crate::scores::Scores;
use crate::shape::parse_stored;
use crate::tensor::{Element, Tensor};
use crate::torch;
use pat_rs::cpu::{CacheLayout, E4m3, E5m2};
use pat_rs::cuda::AppendArgs;
use pat_rs::{Dtype, KvStrides, RowStrides};
use pyo3::prelude::*;

/// Writes new rows of K and V into their slots of a paged cache, in place.
///
/// Into an 8-bit cache, elements are divided by their factor (in float32) and rounded to nearest even. What is too large,
/// infinities among it, becomes the largest finite element, NaN the code 0x7f: what vLLM's ``reshape_and_cache_flash`` writes.
/// So a factor of 1, the default, keeps elements up to 448 of float8_e4m3fn and 57344 of float8_e5m2; larger ones ask for a
/// factor.
/// On CUDA it enqueues one launch on torch's current stream.
///
/// Args:
///     k_new, v_new: ``[rows, kv_heads, head_dim]``, float16 or bfloat16. V may have another head dim than K; each is a multiple
///         of 8.
///     k_cache, v_cache: as in :func:`run`, of the same type, or of 8 bits. They may share storage, but no element.
///     slots: int64 ``[rows]`` beside the tensors: ``page * page_size + token in the page``. Rows with a negative slot are
///         not written. A slot beyond the cache is refused on the CPU; on CUDA, where the host cannot look at it, the row is
///         not written. No two rows have the same slot.
///     kv_dtype: type of the caches, which uint8 tensors do not say: "float8_e4m3fn" or "float8_e5m2", or torch's.
///     k_scale, v_scale: factors of an 8-bit cache's elements as in :func:`run`, 1 by default.
///     kv_layout: order of the dimensions of the caches, "NHD" or "HND".
///     stream: handle of a CUDA stream, instead of torch's current one.
///
/// Raises:
///     TypeError: another element type, or no tensor.
///     ValueError: a shape, stride, device or address that is not accepted; the message names the argument, and nothing has
///         been written.
///     CudaError: the driver refuses the launch.
#[pyfunction]
#[pyo3(signature = (k_new: "torch.Tensor", v_new: "torch.Tensor", k_cache: "torch.Tensor", v_cache: "torch.Tensor", slots: "torch.Tensor", *, kv_dtype: "torch.dtype | str | None" = None, k_scale: "float | torch.Tensor | None" = None, v_scale: "float | torch.Tensor | None" = None, kv_layout: "str" = "NHD", stream: "SupportsIndex | None" = None))]
#[expect(clippy::too_many_arguments, reason = "the Python signature")]
pub(crate) fn append_kv<'py>(
    py: Python<'py>,
    k_new: &Bound<'py, PyAny>,
    v_new: &Bound<'py, PyAny>,
    k_cache: &Bound<'py, PyAny>,
    v_cache: &Bound<'py, PyAny>,
    slots: &Bound<'py, PyAny>,
    kv_dtype: Option<&Bound<'py, PyAny>>,
    k_scale: Option<&Bound<'py, PyAny>>,
    v_scale: Option<&Bound<'py, PyAny>>,
    #[pyo3(from_py_with = argument::kv_layout)] kv_layout: &str,
    stream: Option<Integer>,
) -> Result<()> {
    let layout = KvLayout::parse(kv_layout)?;
    let stream = stream.map(|stream| stream.unsigned("stream")).transpose()?;
    let kv_dtype = kv_dtype.map(|dtype| parse_stored("kv_dtype", dtype)).transpose()?;
    let (scores, [k_of_heads, v_of_heads]) = Scores::read(None, None)?.with_kv_scales(k_scale, v_scale)?;
    let mut k_new = Tensor::read("k_new", k_new, stream)?;
    let handle = torch::stream_of(py, k_new.device, stream)?;
    let read = |name, object| Tensor::read(name, object, Some(handle.raw()));
    let [mut v_new, mut k_cache, mut v_cache, mut slots] =
        [read("v_new", v_new)?, read("k_cache", k_cache)?, read("v_cache", v_cache)?, read("slots", slots)?];
    let mut of_heads = [
        k_of_heads.map(|scale| read("k_scale", scale)).transpose()?,
        v_of_heads.map(|scale| read("v_scale", scale)).transpose()?,
    ];
    let all = [&mut k_new, &mut v_new, &mut k_cache, &mut v_cache, &mut slots];
    Tensor::settle(all.into_iter().chain(of_heads.iter_mut().flatten()))?;
    let heads = u32::try_from(k_new.sizes[1]).unwrap_or(0);
    let [k_of_heads, v_of_heads] = of_heads;
    let scale = |of_all, of_heads: Option<Tensor<'py>>| -> Result<_> {
        Ok((Scale::new(of_all, of_heads.as_ref(), (k_new.device, "as k_new"), heads)?, of_heads))
    };
    let scales = [scale(scores.k_scale, k_of_heads)?, scale(scores.v_scale, v_of_heads)?];
    let tensors = Append { scales, v_new, k_cache, v_cache, slots, k_new };
    let args = tensors.check(kv_dtype, layout)?;
    match tensors.k_new.device {
        Device::Cpu => match (args.dtype, args.kv_dtype) {
            (Dtype::F16, Dtype::E4m3) => foreign::append_host_rounded::<half::f16, E4m3>(&tensors, &args),
            (Dtype::F16, Dtype::E5m2) => foreign::append_host_rounded::<half::f16, E5m2>(&tensors, &args),
            (Dtype::F16, _) => foreign::append_host::<half::f16>(&tensors, &args),
            (_, Dtype::E4m3) => foreign::append_host_rounded::<half::bf16, E4m3>(&tensors, &args),
            (_, Dtype::E5m2) => foreign::append_host_rounded::<half::bf16, E5m2>(&tensors, &args),
            _ => foreign::append_host::<half::bf16>(&tensors, &args),
        },
        Device::Cuda(ordinal) => {
            let engine = device::engine(ordinal)?;
            Ok(engine.append_kv(&args, &foreign::stream(engine.device(), handle)?)?)
        }
    }
}

/// The tensors of a call.
pub(crate) struct Append<'py> {
    pub(crate) k_new: Tensor<'py>,
    pub(crate) v_new: Tensor<'py>,
    pub(crate) k_cache: Tensor<'py>,
    pub(crate) v_cache: Tensor<'py>,
    pub(crate) slots: Tensor<'py>,
    /// Factors of K and V; where heads have their own, the tensor of these.
    pub(crate) scales: [(Scale, Option<Tensor<'py>>); 2],
}

impl Append<'_> {
    /// Checks everything but the slots' values.
    fn check(&self, kv_dtype: Option<Dtype>, layout: KvLayout) -> Result<AppendArgs> {
        let Self { k_new, v_new, k_cache, v_cache, slots, scales } = self;
        let dtype = match k_new.element {
            Element::F16 => Dtype::F16,
            Element::Bf16 => Dtype::Bf16,
            _ => return Err(wrong_type("k_new", format!("a tensor of {}", k_new.element), "float16 or bfloat16")),
        };
        v_new.expect_element(&k_new.element)?;
        let kv_dtype = match (kv_dtype, &k_cache.element) {
            (Some(named), _) => named,
            (None, Element::E4m3) => Dtype::E4m3,
            (None, Element::E5m2) => Dtype::E5m2,
            (None, Element::U8) => {
                return Err(wrong_type("k_cache", "a tensor of uint8", "another type, or kv_dtype beside it"));
            }
            (None, _) => dtype,
        };
        if kv_dtype.bytes() == 2 && kv_dtype != dtype {
            let expected = format!("{}, as of k_new, or a type of 8 bits", k_new.element);
            return Err(invalid("kv_dtype", Element::from(kv_dtype), expected));
        }
        for cache in [k_cache, v_cache] {
            cache.expect_stored(&Element::from(kv_dtype))?;
        }
        for ((scale, _), name) in scales.iter().zip(["k_scale", "v_scale"]) {
            let got = match scale {
                Scale::Tensor(scale) if *scale == 1.0 || kv_dtype.bytes() == 1 => continue,
                Scale::Heads(_) if kv_dtype.bytes() == 1 => continue,
                Scale::Tensor(scale) => scale.to_string(),
                Scale::Heads(_) => "factors of heads".into(),
            };
            return Err(invalid(name, got, "1 where the caches do not have 8 bits"));
        }
        slots.expect_element(&Element::I64)?;
        for tensor in [v_new, k_cache, v_cache, slots] {
            tensor.expect_device(k_new.device, "as k_new")?;
        }
        let (k_layout, v_layout) = (cache_layout(k_cache, layout)?, cache_layout(v_cache, layout)?);
        let CacheLayout { num_pages, page_size, kv_heads: heads, .. } = k_layout;
        if [v_layout.num_pages, v_layout.page_size, v_layout.kv_heads] != [num_pages, page_size, heads] {
            let expected = format!("that of k_cache, {}, but for the last dimension", k_cache.shape());
            return Err(invalid("v_cache", format!("shape {}", v_cache.shape()), expected));
        }
        let factors = scales.iter().zip(["k_scale", "v_scale"]);
        let factors: Vec<_> = factors.filter_map(|((scale, _), name)| scale.span().map(|span| (name, span))).collect();
        check_distinct_elements(k_cache)?;
        check_distinct_elements(v_cache)?;
        check_elements_apart(v_cache, k_cache)?;
        for cache in [k_cache, v_cache] {
            cache.expect_writable()?;
            let cached = Span::of(cache)?;
            if let Some((name, _)) = factors.iter().find(|(_, span)| span.overlaps(cached)) {
                return Err(invalid(*name, format!("memory of {}", cache.name), "memory of its own"));
            }
            for read in [k_new, v_new, slots] {
                if Span::of(read)?.overlaps(cached) {
                    return Err(invalid(read.name, format!("memory of {}", cache.name), "memory of its own"));
                }
            }
        }
        if slots.rank != 1 {
            return Err(invalid("slots", format!("shape {}", slots.shape()), "one dimension"));
        }
        let rows = slots.sizes[0];
        if rows > 1 && slots.strides[0] != 1 {
            return Err(invalid("slots", format!("stride {}", slots.strides[0]), "a contiguous tensor"));
        }
        for (tensor, dim) in [(k_new, k_layout.head_dim), (v_new, v_layout.head_dim)] {
            if tensor.rank != 3 || tensor.sizes[1..3] != [i64::from(heads), i64::from(dim)] {
                let expected = format!("[rows, {heads}, {dim}]");
                return Err(invalid(tensor.name, format!("shape {}", tensor.shape()), expected));
            }
            check_strides(tensor, true)?;
        }
        if v_new.sizes[0] != k_new.sizes[0] {
            let expected = format!("as many rows as k_new ({})", k_new.sizes[0]);
            return Err(invalid("v_new", format!("{} rows", v_new.sizes[0]), expected));
        }
        if rows != k_new.sizes[0] {
            return Err(invalid("slots", format!("{rows} slots"), format!("one per row ({})", k_new.sizes[0])));
        }
        let row_strides = |tensor: &Tensor<'_>| RowStrides { sequence: tensor.strides[0], head: tensor.strides[1] };
        Ok(AppendArgs {
            dtype,
            kv_dtype,
            k_scale: scales[0].0.of_device(),
            v_scale: scales[1].0.of_device(),
            rows: u32::try_from(rows).map_err(|_| invalid("slots", rows, "fewer than 2^32"))?,
            k_new: foreign::device_span(Span::of(k_new)?),
            k_new_strides: row_strides(k_new),
            v_new: foreign::device_span(Span::of(v_new)?),
            v_new_strides: row_strides(v_new),
            k_cache: foreign::device_span(Span::of(k_cache)?),
            k_layout,
            v_cache: foreign::device_span(Span::of(v_cache)?),
            v_layout,
            slots: foreign::device_span(Span::of(slots)?),
        })
    }
}

/// Extent and strides of a cache.
fn cache_layout(cache: &Tensor<'_>, layout: KvLayout) -> Result<CacheLayout> {
    if cache.rank != 4 {
        return Err(invalid(cache.name, format!("shape {}", cache.shape()), "four dimensions"));
    }
    check_strides(cache, true)?;
    let size = |dim: usize| {
        u32::try_from(cache.sizes[dim])
            .map_err(|_| invalid(cache.name, format!("shape {}", cache.shape()), "sizes below 2^32"))
    };
    let [page, second, third, _] = cache.strides;
    let (token_dim, head_dim) = match layout {
        KvLayout::Nhd => (1, 2),
        KvLayout::Hnd => (2, 1),
    };
    let strides = match layout {
        KvLayout::Nhd => KvStrides { page, token: second, head: third },
        KvLayout::Hnd => KvStrides { page, token: third, head: second },
    };
    let layout = CacheLayout {
        num_pages: size(0)?,
        page_size: size(token_dim)?,
        kv_heads: size(head_dim)?,
        head_dim: size(3)?,
        strides,
    };
    if layout.page_size == 0 || layout.kv_heads == 0 || layout.head_dim == 0 {
        return Err(invalid(cache.name, format!("shape {}", cache.shape()), "no dimension of 0"));
    }
    // Strides do not say: of a slice they are those of the whole.
    if !layout.head_dim.is_multiple_of(8) {
        return Err(invalid(
            cache.name,
            format!("shape {}", cache.shape()),
            "a last dimension that is a multiple of 8",
        ));
    }
    Ok(layout)
}
