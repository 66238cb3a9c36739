//! Which kernels can compute a problem: the one validator that [`supports`], the planner, both executors and the tool ask.
//!
//! It says what *can* run; which of the kernels that can is best is the planner's choice.

use crate::features::Demand;
pub use crate::features::Part;
use crate::{KvStrides, Problem};
use pat_abi::{Arch, DeviceLimits, Family, KERNELS, KernelSpec, TileVariant};
use std::fmt;

/// What the kernels' 128-bit loads, cp.async and TMA need of addresses and of strides in bytes.
pub(crate) const VECTOR_BYTES: u32 = 16;
/// Strides of pools and rows are shorter: what a tensor map can express.
pub(crate) const STRIDE_BYTES_END: i64 = 1 << 40;

/// Why a problem cannot be computed: what of it, and what would be accepted.
///
/// Fix: change what the message names, or use another attention for this model; `supports` tells it before anything is
/// allocated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{part}: got {got}, expected {accepted}")]
#[non_exhaustive]
pub struct Reason {
    /// What stands in the way.
    pub part: Part,
    /// Its value.
    pub got: String,
    /// What the kernels that come closest accept.
    pub accepted: String,
}

/// What is asked of a kernel.
#[derive(Clone, Copy, Debug)]
struct Asked<'a> {
    problem: &'a Problem,
    kv_strides: Option<(KvStrides, KvStrides)>,
    compute_capability: Option<u32>,
}

/// Whether some kernel can compute `problem`: with K and V in pools of these strides, where they are given, and on a device
/// of this compute capability (major * 10 + minor), or else on one that suits. Asks no device, so that an adapter can decide
/// anywhere. What it accepts, [`crate::Planner::new`] and the executors accept; what it refuses, they refuse.
///
/// # Errors
/// What stands in the way of the kernels that come closest.
pub fn supports(
    problem: &Problem,
    kv_strides: Option<(KvStrides, KvStrides)>,
    compute_capability: Option<u32>,
) -> Result<(), Reason> {
    Asked { problem, kv_strides, compute_capability }.one_of(forward_kernels())
}

/// Whether the kernels of one variant can compute `problem` on a device of this compute capability.
///
/// # Errors
/// What stands in their way.
pub(crate) fn variant_supports(variant: TileVariant, problem: &Problem, compute_capability: u32) -> Result<(), Reason> {
    let asked = Asked { problem, kv_strides: None, compute_capability: Some(compute_capability) };
    asked.one_of(forward_kernels().filter(|(_, other)| *other == variant))
}

fn forward_kernels() -> impl Iterator<Item = (&'static KernelSpec, TileVariant)> + Clone {
    KERNELS.iter().filter_map(|kernel| match kernel.family {
        Family::Forward(variant) => Some((kernel, variant)),
        _ => None,
    })
}

impl Asked<'_> {
    /// # Errors
    /// None of `kernels` can; the reason is that of those that come closest.
    fn one_of<'k>(self, kernels: impl Iterator<Item = (&'k KernelSpec, TileVariant)> + Clone) -> Result<(), Reason> {
        // Where all is well, and on the way of every run it is, nothing is allocated.
        let mut closest = Part::ComputeCapability;
        for (kernel, variant) in kernels.clone() {
            match self.obstacle(kernel, variant) {
                None => return Ok(()),
                Some(part) => closest = closest.max(part),
            }
        }
        let mut accepted = Accepted::Listed(Vec::new());
        for (kernel, variant) in kernels.filter(|(kernel, variant)| self.obstacle(kernel, *variant) == Some(closest)) {
            accepted = accepted.or(accepted_by(self.problem, kernel, variant, closest));
        }
        let shape = self.problem.shape();
        let mut accepted = accepted.to_string();
        if matches!(closest, Part::HeadDim | Part::VHeadDim) && shape.kv_dtype() != shape.dtype() {
            // There are others for K and V of Q's type.
            accepted = format!("{accepted} with K and V of {}", shape.kv_dtype().name());
        }
        Err(Reason { part: closest, got: self.value(closest), accepted })
    }

    /// The first thing that stands in the way of a kernel.
    fn obstacle(self, kernel: &KernelSpec, variant: TileVariant) -> Option<Part> {
        let Self { problem, kv_strides, compute_capability } = self;
        let shape = problem.shape();
        let device_and_shape = [
            (Part::ComputeCapability, compute_capability.is_some_and(|capability| !kernel.arch.runs_on(capability))),
            (Part::SharedMemory, self.smem_per_cta_bytes().is_some_and(|bytes| kernel.smem_bytes > bytes)),
            (Part::QDtype, shape.dtype() != kernel.dtype),
            (Part::KvDtype, shape.kv_dtype() != kernel.kv_dtype),
            (Part::OutDtype, shape.out_dtype() != kernel.dtype),
            (Part::HeadDim, shape.head_dim() != kernel.head_dim),
            (Part::VHeadDim, shape.v_head_dim() != kernel.v_head_dim),
        ];
        let is_refused = |demand: Demand| (demand.part, !demand.is_valid || !kernel.serves(demand.switches));
        let tiles = [
            (Part::Group, shape.group() > variant.rows() && !self.divides_groups(kernel, variant)),
            (
                Part::PageSize,
                problem.page_size() > Problem::MAX_PAGE_SIZE || !variant.supports_page_size(problem.page_size()),
            ),
        ];
        let obstacles = device_and_shape.into_iter().chain(problem.demands().map(is_refused)).chain(tiles);
        let first = obstacles.into_iter().find(|(_, is_there)| *is_there).map(|(part, _)| part);
        first.or_else(|| kv_strides.and_then(|(k, v)| kv_stride_obstacle(problem, k, v)).map(|(part, _)| part))
    }

    /// Whether the variant's tiles take groups of more query heads than they have rows, in parts: those do whose rows are the
    /// most that there are on the device for such problems. With other variants wider tiles are better.
    fn divides_groups(self, kernel: &KernelSpec, variant: TileVariant) -> bool {
        let of = |kernel: &KernelSpec| (kernel.dtype, kernel.kv_dtype, kernel.head_dim, kernel.v_head_dim);
        let serves = |other: &KernelSpec, wider: TileVariant| {
            self.compute_capability.is_none_or(|capability| other.arch.runs_on(capability))
                && self.smem_per_cta_bytes().is_none_or(|bytes| other.smem_bytes <= bytes)
                && other.serves(self.problem.switches())
                && wider.supports_page_size(self.problem.page_size())
        };
        forward_kernels()
            .all(|(other, wider)| wider.rows() <= variant.rows() || of(other) != of(kernel) || !serves(other, wider))
    }

    /// What a CTA may have on devices of this kind.
    fn smem_per_cta_bytes(self) -> Option<u32> {
        self.compute_capability.map(|capability| DeviceLimits::of(capability).smem_per_cta_bytes)
    }

    /// The value of a part, for messages.
    fn value(self, part: Part) -> String {
        let shape = self.problem.shape();
        match part {
            Part::ComputeCapability => self.compute_capability.unwrap_or_default().to_string(),
            Part::SharedMemory => format!("{} bytes", self.smem_per_cta_bytes().unwrap_or_default()),
            Part::QDtype => shape.dtype().name().into(),
            Part::KvDtype => shape.kv_dtype().name().into(),
            Part::OutDtype => shape.out_dtype().name().into(),
            Part::HeadDim => shape.head_dim().to_string(),
            Part::VHeadDim => shape.v_head_dim().to_string(),
            Part::Group => shape.group().to_string(),
            Part::PageSize => self.problem.page_size().to_string(),
            Part::Stride { .. } => {
                let obstacle = self.kv_strides.and_then(|(k, v)| kv_stride_obstacle(self.problem, k, v));
                obstacle.map_or(String::new(), |(_, stride)| format!("{stride} elements"))
            }
            feature => self.problem.feature_value(feature),
        }
    }
}

/// What a kernel accepts of one part.
fn accepted_by(problem: &Problem, kernel: &KernelSpec, variant: TileVariant, part: Part) -> Accepted {
    let one = |value: String| Accepted::Listed(vec![value]);
    match part {
        Part::ComputeCapability => match kernel.arch {
            Arch::Sm80 => Accepted::Range(80, None),
            Arch::Sm90a => one("90".into()),
        },
        Part::SharedMemory => one(format!("{} bytes or more", kernel.smem_bytes)),
        Part::QDtype | Part::OutDtype => one(kernel.dtype.name().into()),
        Part::KvDtype => one(kernel.kv_dtype.name().into()),
        Part::HeadDim => one(kernel.head_dim.to_string()),
        Part::VHeadDim => one(kernel.v_head_dim.to_string()),
        Part::Group => Accepted::Range(1, Some(variant.rows())),
        Part::PageSize if variant.supports_page_size(1) => Accepted::Range(1, Some(Problem::MAX_PAGE_SIZE)),
        Part::PageSize => one(format!("a multiple of 8 to {}", Problem::MAX_PAGE_SIZE)),
        Part::Stride { .. } => one(accepted_strides(kernel.kv_dtype.bytes())),
        feature => {
            let demands = problem.demands().into_iter().filter(|demand| demand.part == feature);
            problem.accepted_feature(feature, demands.into_iter().all(|demand| kernel.serves(demand.switches)))
        }
    }
}

/// The strides [`is_stride`] accepts, in words.
pub(crate) fn accepted_strides(element_bytes: u32) -> String {
    let least = VECTOR_BYTES / element_bytes;
    format!(
        "0 or a positive multiple of {least} elements below 2^{}",
        (STRIDE_BYTES_END / i64::from(element_bytes)).ilog2()
    )
}

/// Whether the kernels can follow a stride of so many elements.
pub(crate) fn is_stride(elements: i64, element_bytes: u32) -> bool {
    elements
        .checked_mul(i64::from(element_bytes))
        .is_some_and(|bytes| (0..STRIDE_BYTES_END).contains(&bytes) && bytes % i64::from(VECTOR_BYTES) == 0)
}

/// The first stride of the pools that the kernels cannot follow.
fn kv_stride_obstacle(problem: &Problem, k: KvStrides, v: KvStrides) -> Option<(Part, i64)> {
    let element_bytes = problem.shape().kv_dtype().bytes();
    let of = |tensor, strides: KvStrides| {
        [("page", strides.page), ("token", strides.token), ("head", strides.head)]
            .map(|(dimension, stride)| (Part::Stride { tensor, dimension }, stride))
    };
    of("k", k).into_iter().chain(of("v", v)).find(|(_, stride)| !is_stride(*stride, element_bytes))
}

/// What several kernels accept.
#[derive(Clone, Debug)]
pub(crate) enum Accepted {
    /// From the first number to the second, where there is one.
    Range(u32, Option<u32>),
    /// One of these.
    Listed(Vec<String>),
}

impl Accepted {
    /// What either accepts: the wider range, or both lists.
    fn or(self, other: Self) -> Self {
        match (self, other) {
            (Self::Range(a, a_end), Self::Range(b, b_end)) => {
                Self::Range(a.min(b), a_end.zip(b_end).map(|(a_end, b_end)| a_end.max(b_end)))
            }
            (range @ Self::Range(..), _) | (_, range @ Self::Range(..)) => range,
            (Self::Listed(mut all), Self::Listed(more)) => {
                all.extend(more);
                // Numbers by size.
                all.sort_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
                all.dedup();
                Self::Listed(all)
            }
        }
    }
}

impl fmt::Display for Accepted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Range(least, Some(most)) => write!(f, "{least} to {most}"),
            Self::Range(least, None) => write!(f, "{least} or more"),
            Self::Listed(values) => f.write_str(&values.join(" or ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AttentionShape, Dtype};

    fn problem(q_heads: u32, kv_heads: u32, head_dim: u32, dtype: Dtype, page_size: u32) -> Problem {
        Problem::new(AttentionShape::new(q_heads, kv_heads, head_dim, dtype).unwrap(), page_size)
    }

    fn usual() -> Problem {
        problem(32, 8, 128, Dtype::F16, 16)
    }

    fn refusal(problem: Problem, compute_capability: Option<u32>) -> String {
        supports(&problem, None, compute_capability).unwrap_err().to_string()
    }

    #[test]
    fn every_head_dim_and_plain_layout_is_supported() {
        for dtype in [Dtype::F16, Dtype::Bf16] {
            for head_dim in [64, 96, 128, 256, 512] {
                for page_size in [1, 7, 16, 32, Problem::MAX_PAGE_SIZE] {
                    let problem = problem(12, 4, head_dim, dtype, page_size);
                    let strides = (KvStrides::nhd(page_size, 4, head_dim), KvStrides::hnd(page_size, 4, head_dim));
                    for compute_capability in [None, Some(80), Some(89), Some(90), Some(120)] {
                        assert_eq!(supports(&problem, Some(strides), compute_capability), Ok(()));
                    }
                }
            }
        }
        for (group, head_dim) in [(128, 64), (129, 128), (256, 256), (65_535, 64)] {
            assert_eq!(supports(&problem(group, 1, head_dim, Dtype::F16, 1), None, Some(80)), Ok(()));
        }
    }

    #[test]
    fn refusals_say_which_part_and_what_would_be_accepted() {
        let usual = usual();
        let shape = usual.shape();
        let of = |shape| refusal(Problem::new(shape, 16), None);
        assert_eq!(of(shape.with_kv_dtype(Dtype::Bf16)), "kv_dtype: got bf16, expected f16 or e4m3 or e5m2");
        let eight_bit = |shape: AttentionShape| Problem::new(shape.with_kv_dtype(Dtype::E4m3), 16);
        assert_eq!(supports(&eight_bit(shape), None, None), Ok(()));
        let wide = problem(32, 8, 256, Dtype::F16, 16).shape();
        assert_eq!(refusal(eight_bit(wide), None), "head_dim: got 256, expected 64 or 128 with K and V of e4m3");
        let grouped = problem(65, 1, 128, Dtype::F16, 16).shape();
        assert_eq!(supports(&eight_bit(grouped), None, None), Ok(()));
        assert_eq!(of(shape.with_out_dtype(Dtype::Bf16)), "out_dtype: got bf16, expected f16");
        assert_eq!(of(shape.with_v_head_dim(64).unwrap()), "v_head_dim: got 64, expected 128");
        let long_keys = problem(32, 8, 192, Dtype::Bf16, 16).shape();
        assert_eq!(of(long_keys), "v_head_dim: got 192, expected 128");
        let served = Problem::new(long_keys.with_v_head_dim(128).unwrap(), 16);
        assert_eq!(supports(&served, None, None), Ok(()));
        assert_eq!(
            refusal(Problem::new(served.shape().with_kv_dtype(Dtype::E5m2), 16), None),
            "head_dim: got 192, expected 64 or 128 with K and V of e5m2"
        );
        let cases = [
            (problem(8, 8, 80, Dtype::Bf16, 16), "head_dim: got 80, expected 64 or 96 or 128 or 192 or 256 or 512"),
            (problem(8, 8, 128, Dtype::E5m2, 16), "dtype: got e5m2, expected f16 or bf16"),
            (problem(32, 8, 128, Dtype::F16, 0), "page_size: got 0, expected 1 to 65536"),
            (problem(32, 8, 128, Dtype::F16, 65_537), "page_size: got 65537, expected 1 to 65536"),
            (
                usual.with_soft_cap(0.0),
                "soft_cap: got 0, expected none or a positive number, finite also beside the scale",
            ),
            (
                usual.with_soft_cap(f32::INFINITY),
                "soft_cap: got inf, expected none or a positive number, finite also beside the scale",
            ),
            // Scores that are divided by it are 0.
            (
                usual.with_scale(1e-10).with_soft_cap(1e38),
                "soft_cap: got 100000000000000000000000000000000000000, expected none or a positive number, finite also \
                 beside the scale",
            ),
            (usual.with_window(0), "window: got 0, expected 1 or more"),
            (usual.with_chunk(0), "chunk: got 0, expected 1 or more"),
            (usual.with_query_tokens(0), "query_tokens: got 0, expected 1 or more"),
            (usual.with_alibi(), "alibi: got yes, expected none"),
        ];
        for (problem, message) in cases {
            assert_eq!(refusal(problem, None), message);
        }
        assert_eq!(supports(&usual.with_soft_cap(30.0), None, None), Ok(()));
        for scale in [0.0, -1.0, f32::NAN, f32::INFINITY, f32::MAX] {
            let message = refusal(usual.with_scale(scale), None);
            assert!(message.starts_with(&format!("softmax_scale: got {scale}, expected a positive")), "{message}");
        }
        assert_eq!(refusal(usual, Some(75)), "compute_capability: got 75, expected 80 or more");
    }

    #[test]
    fn strides_that_kernels_cannot_follow_are_refused_everywhere() {
        let good = KvStrides::nhd(16, 8, 128);
        let reason = |k, v| supports(&usual(), Some((k, v)), None).unwrap_err();
        for stride in [-8, 1, 1025, 1 << 39, 1 << 40, i64::MAX, i64::MIN] {
            let bad = KvStrides { token: stride, ..good };
            assert_eq!(reason(good, bad).part, Part::Stride { tensor: "v", dimension: "token" });
            let message = reason(KvStrides { page: stride, ..good }, bad).to_string();
            let expected = "expected 0 or a positive multiple of 8 elements below 2^39";
            assert_eq!(message, format!("k_strides.page: got {stride} elements, {expected}"));
        }
        let longest = KvStrides { page: (1 << 39) - 8, ..good };
        assert_eq!(supports(&usual(), Some((longest, longest)), None), Ok(()));
    }

    #[test]
    fn variants_differ_in_what_they_accept() {
        let of = |variant, problem, compute_capability| variant_supports(variant, &problem, compute_capability);
        let [odd, wide] = [problem(8, 8, 128, Dtype::F16, 48), problem(71, 1, 64, Dtype::F16, 16)];
        assert_eq!(of(TileVariant::Mma16, odd, 90), Ok(()));
        for page_size in [8, 24, 48, 784, 1056, 65_536] {
            assert_eq!(of(TileVariant::Wgmma64, odd.with_page_size(page_size), 90), Ok(()), "{page_size}");
        }
        let reason = of(TileVariant::Wgmma64, odd.with_page_size(20), 90).unwrap_err().to_string();
        assert_eq!(reason, "page_size: got 20, expected a multiple of 8 to 65536");
        assert_eq!(of(TileVariant::Wgmma64, wide, 90).unwrap_err().part, Part::Group);
        assert_eq!(of(TileVariant::Wgmma128, wide, 90), Ok(()));
        for variant in TileVariant::ALL {
            // A group that fills a tile.
            assert_eq!(of(variant, problem(variant.rows(), 1, 128, Dtype::F16, 16), 90), Ok(()), "{variant:?}");
        }
        let wider = problem(256, 1, 128, Dtype::F16, 16);
        let reason = of(TileVariant::Mma64, wider, 90).unwrap_err().to_string();
        assert_eq!(reason, "q_heads / kv_heads: got 256, expected 1 to 64");
        assert_eq!(
            [TileVariant::Mma128, TileVariant::Wgmma128].map(|variant| of(variant, wider, 90)),
            [Ok(()), Ok(())]
        );
        let widest = problem(256, 1, 256, Dtype::F16, 16);
        assert_eq!(of(TileVariant::Mma64, widest, 80), Ok(()));
        // Where the only wider tiles have no windows, or cannot read the pages.
        assert_eq!(of(TileVariant::Mma64, widest, 90).unwrap_err().part, Part::Group);
        assert_eq!(of(TileVariant::Wgmma128, widest, 90), Ok(()));
        for served in [widest.with_window(40), widest.with_query_tree(4), widest.with_page_size(20)] {
            assert_eq!(of(TileVariant::Mma64, served, 90), Ok(()));
        }
        // At head dim 512 the 32 rows of `mma32` take more shared memory than some devices have.
        for capability in [80, 86, 89, 90, 120] {
            assert_eq!(supports(&problem(71, 1, 512, Dtype::F16, 16), None, Some(capability)), Ok(()), "{capability}");
        }
        let eight_bit = Problem::new(usual().shape().with_kv_dtype(Dtype::E4m3), 16);
        // A kernel that is not compiled for windows would not see where they begin.
        let of_256 = problem(8, 2, 256, Dtype::Bf16, 16);
        for (variant, problem) in [(TileVariant::Wgmma64, of_256), (TileVariant::Wgmma128, usual())] {
            let parts = [problem.with_window(40), problem.with_chunk(40), problem.with_query_tree(4)]
                .map(|problem| of(variant, problem, 90).unwrap_err().part);
            assert_eq!(parts, [Part::Window, Part::Chunk, Part::QueryTree], "{variant:?}");
        }
        let tree = |problem: Problem| problem.with_query_tree(4);
        for problem in [tree(usual()), usual().with_window(40), usual().with_chunk(40)] {
            assert_eq!(of(TileVariant::Mma16, problem, 90), Ok(()));
            assert_eq!(of(TileVariant::Wgmma64, problem, 90), Ok(()));
        }
        assert_eq!(of(TileVariant::Mma16, tree(eight_bit), 90), Ok(()));
        let reason = of(TileVariant::Wgmma64, tree(eight_bit), 90).unwrap_err().to_string();
        assert_eq!(reason, "query tree: got yes, expected none");
        let reason = of(TileVariant::Wgmma64, eight_bit.with_window(40), 90).unwrap_err().to_string();
        assert_eq!(reason, "window: got 40, expected none");
        let reason = of(TileVariant::Wgmma64, eight_bit.with_chunk(40), 90).unwrap_err().to_string();
        assert_eq!(reason, "chunk: got 40, expected none or a multiple of page_size = 16");
        let reason = supports(&usual().with_query_tree(257), None, None).unwrap_err().to_string();
        assert_eq!(reason, "query_tokens: got 257, expected 1 to 256");
        let reason = of(TileVariant::Wgmma64, usual(), 80).unwrap_err().to_string();
        assert_eq!(reason, "compute_capability: got 80, expected 90");
    }

    #[test]
    fn a_kernel_that_no_multiprocessor_holds_is_refused() {
        let (kernel, variant) = forward_kernels().find(|(_, variant)| *variant == TileVariant::Mma64).unwrap();
        let large = KernelSpec { smem_bytes: 120_000, ..*kernel };
        let asked = |capability| {
            Asked { problem: &usual(), kv_strides: None, compute_capability: Some(capability) }
                .one_of([(&large, variant)].into_iter())
        };
        let reason = asked(89).unwrap_err().to_string();
        assert_eq!(reason, "shared memory of a CTA: got 101376 bytes, expected 120000 bytes or more");
        assert_eq!((asked(80), asked(90)), (Ok(()), Ok(())));
    }

    #[test]
    fn a_problem_is_supported_where_one_variant_is() {
        for problem in
            [usual(), usual().with_alibi(), problem(8, 8, 80, Dtype::F16, 16), problem(71, 1, 64, Dtype::F16, 3)]
        {
            for capability in [75, 80, 90, 120] {
                let one = TileVariant::ALL.into_iter().any(|v| variant_supports(v, &problem, capability).is_ok());
                assert_eq!(one, supports(&problem, None, Some(capability)).is_ok(), "{problem:?} {capability}");
            }
        }
    }

    #[test]
    fn every_forward_kernel_has_a_merge() {
        for (kernel, _) in forward_kernels() {
            let merge = pat_abi::manifest::find(Family::Merge, kernel.dtype, kernel.v_head_dim);
            assert!(merge.is_some(), "{}", kernel.entry);
        }
    }
}
