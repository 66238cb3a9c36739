//! Checks of a run's arguments, the same for both executors: before anything is launched or written.

use crate::eligibility::{STRIDE_BYTES_END, accepted_strides, is_stride};
use crate::problem::Planned;
use crate::{AttentionShape, Dtype, Error, KvStrides, Problem, Result, RowStrides, supports};
use pat_abi::{Switches, TileVariant};

/// Bytes of an element of LSE.
pub(crate) const LSE_BYTES: u32 = 4;

/// The tensors of a run: how many elements there are, and their strides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RunTensors {
    pub(crate) problem: Problem,
    /// Pages in the pools.
    pub(crate) num_pages: u32,
    /// Rows of Q, O and LSE.
    pub(crate) rows: u32,
    pub(crate) q: (u64, RowStrides),
    pub(crate) k: (u64, KvStrides),
    pub(crate) v: (u64, KvStrides),
    pub(crate) out: (u64, RowStrides),
    pub(crate) lse: Option<(u64, RowStrides)>,
}

/// Elements, from the first on, that the run may access of each tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Accessed {
    pub(crate) q: u64,
    pub(crate) k: u64,
    pub(crate) v: u64,
    pub(crate) out: u64,
    pub(crate) lse: u64,
}

impl RunTensors {
    /// Checks everything but where the tensors lie.
    ///
    /// # Errors
    /// The plan was made for another problem, no kernel can compute the problem with such pools, a tensor is too small for
    /// its strides, a stride is not accepted, or rows of an output overlap.
    pub(crate) fn check(&self, plan: Planned) -> Result<Accessed> {
        let Self { problem, num_pages, rows, q, k, v, out, lse } = *self;
        let shape = problem.shape();
        plan.check_is(&problem.planned(), "the run")?;
        supports(&problem, Some((k.1, v.1)), None)?;
        let row_dims =
            |strides: RowStrides| [("sequence", rows, strides.sequence), ("head", shape.q_heads(), strides.head)];
        let pool_dims = |strides: KvStrides| {
            let KvStrides { page, token, head } = strides;
            [("page", num_pages, page), ("token", problem.page_size(), token), ("head", shape.kv_heads(), head)]
        };
        let [q_dims, out_dims, k_dims, v_dims] =
            [&row_dims(q.1)[..], &row_dims(out.1), &pool_dims(k.1), &pool_dims(v.1)];
        let (head_dim, v_head_dim) = (shape.head_dim(), shape.v_head_dim());
        let mut accessed = Accessed {
            q: check_tensor("q", q.0, q_dims, head_dim, shape.dtype())?,
            k: check_tensor("k", k.0, k_dims, head_dim, shape.kv_dtype())?,
            v: check_tensor("v", v.0, v_dims, v_head_dim, shape.kv_dtype())?,
            out: check_tensor("out", out.0, out_dims, v_head_dim, shape.out_dtype())?,
            lse: 0,
        };
        check_apart("out", out_dims, v_head_dim)?;
        if let Some((elements, strides)) = lse {
            let dims = row_dims(strides);
            accessed.lse = check_lse("lse", elements, &dims)?;
            check_apart("lse", &dims, 1)?;
        }
        Ok(accessed)
    }
}

/// # Errors
/// The plan's value and the call's differ.
pub(crate) fn same<T: PartialEq + std::fmt::Debug>(what: &str, plan: T, call: T) -> Result<()> {
    if plan == call {
        return Ok(());
    }
    Err(Error::PlanMismatch { what: what.into(), plan: format!("{plan:?}"), call: format!("{call:?}") })
}

/// # Errors
/// The variant, whose items a plan has, has no kernels with these features: the plan was made for a problem without them.
pub(crate) fn check_features(variant: TileVariant, switches: Switches, shape: AttentionShape) -> Result<()> {
    if variant.serves(switches, shape.kv_dtype(), shape.head_dim()) {
        return Ok(());
    }
    Err(Error::PlanMismatch {
        what: "the features of the kernels".into(),
        plan: format!("items of {}, which has no kernels with them", variant.name()),
        call: switches.names().collect::<Vec<_>>().join(" and "),
    })
}

/// A dimension: name, count, stride in elements.
pub(crate) type Dimension = (&'static str, u32, i64);

/// Whether the kernels can follow a tensor's strides and its elements hold what they span; how many that is. `innermost` is
/// the length of the contiguous dimension.
pub(crate) fn check_tensor(
    tensor: &str,
    elements: u64,
    dimensions: &[Dimension],
    innermost: u32,
    dtype: Dtype,
) -> Result<u64> {
    check_strides(tensor, dimensions, dtype.bytes())?;
    check_extent(tensor, elements, dimensions, innermost)
}

/// Likewise of log-sum-exps, whose strides are any.
pub(crate) fn check_lse(tensor: &str, elements: u64, dimensions: &[Dimension]) -> Result<u64> {
    let end = STRIDE_BYTES_END / i64::from(LSE_BYTES);
    if let Some((dimension, _, stride)) = dimensions.iter().find(|(_, _, stride)| !(0..end).contains(stride)) {
        let (got, expected) = (format!("{stride} elements"), format!("0 or more, below 2^{}", end.ilog2()));
        return Err(Error::invalid(format!("{tensor}_strides.{dimension}"), got, expected));
    }
    check_extent(tensor, elements, dimensions, 1)
}

fn check_strides(tensor: &str, dimensions: &[Dimension], element_bytes: u32) -> Result<()> {
    match dimensions.iter().find(|(_, _, stride)| !is_stride(*stride, element_bytes)) {
        None => Ok(()),
        Some((name, _, stride)) => {
            let got = format!("{stride} elements");
            Err(Error::invalid(format!("{tensor}_strides.{name}"), got, accepted_strides(element_bytes)))
        }
    }
}

/// Whether `elements` elements hold every (index, ..., `0..innermost`); how many it takes. Strides have been checked.
fn check_extent(tensor: &str, elements: u64, dimensions: &[Dimension], innermost: u32) -> Result<u64> {
    if dimensions.iter().any(|&(_, count, _)| count == 0) {
        return Ok(0);
    }
    // Of at most three dimensions of 2^32 - 1 strides below 2^39.
    let last: i128 = dimensions.iter().map(|&(_, count, stride)| i128::from(count - 1) * i128::from(stride)).sum();
    let needed = last + i128::from(innermost);
    match u64::try_from(needed) {
        Ok(needed) if needed <= elements => Ok(needed),
        _ => {
            let expected = format!("at least {needed} for its strides {dimensions:?} (dimension, count, stride)");
            Err(Error::invalid(tensor, format!("{elements} elements"), expected))
        }
    }
}

/// Whether no two rows of an output share an element: each dimension steps over all of the one within it.
pub(crate) fn check_apart(tensor: &str, dimensions: &[Dimension], innermost: u32) -> Result<()> {
    if dimensions.iter().any(|&(_, count, _)| count == 0) {
        return Ok(());
    }
    let steps = || dimensions.iter().enumerate().filter(|(_, (_, count, _))| *count > 1);
    for (index, (name, _, stride)) in steps() {
        // Of equal strides either is within the other.
        let inner = steps().filter(|&(other, (_, _, of_other))| (*of_other, other) < (*stride, index));
        let reach = |(_, &(_, count, stride)): (usize, &Dimension)| i128::from(count - 1) * i128::from(stride);
        let within = i128::from(innermost) + inner.map(reach).sum::<i128>();
        if i128::from(*stride) < within {
            let expected = format!("at least {within}, so that no two rows overlap");
            return Err(Error::invalid(format!("{tensor}_strides.{name}"), format!("{stride} elements"), expected));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AttentionShape;

    fn good() -> RunTensors {
        let problem = Problem::new(AttentionShape::new(4, 2, 64, Dtype::F16).unwrap(), 16);
        let (rows, pool) = (RowStrides::contiguous(4, 64), KvStrides::nhd(16, 2, 64));
        RunTensors {
            problem,
            num_pages: 3,
            rows: 5,
            q: (5 * 256, rows),
            k: (3 * 2048, pool),
            v: (3 * 2048, pool),
            out: (5 * 256, rows),
            lse: Some((20, RowStrides::lse(4))),
        }
    }

    fn refusal(tensors: RunTensors) -> String {
        tensors.check(good().problem.planned()).unwrap_err().to_string()
    }

    #[test]
    fn features_that_the_plans_kernels_have_not_are_refused() {
        let shape = good().problem.shape();
        let eight_bit = shape.with_kv_dtype(Dtype::E4m3);
        let capped = Switches { soft_cap: true, window: false };
        let error = check_features(TileVariant::Wgmma128, capped, shape).unwrap_err().to_string();
        assert!(error.contains("wgmma128") && error.contains("soft_cap"), "{error}");
        check_features(TileVariant::Wgmma64, capped, shape).unwrap();
        let windowed = Switches { soft_cap: false, window: true };
        let error = check_features(TileVariant::Wgmma64, windowed, eight_bit).unwrap_err().to_string();
        assert!(error.contains("wgmma64") && error.contains("part of their pages"), "{error}");
        check_features(TileVariant::Wgmma64, windowed, shape).unwrap();
        check_features(TileVariant::Mma64, windowed, eight_bit).unwrap();
    }

    #[test]
    fn what_is_accessed_is_what_sizes_and_strides_span() {
        let accessed = Accessed { q: 1280, k: 6144, v: 6144, out: 1280, lse: 20 };
        assert_eq!(good().check(good().problem.planned()).unwrap(), accessed);
        let apart = RunTensors {
            q: (4 * 512 + 3 * 64 + 64, RowStrides { sequence: 512, head: 64 }),
            // Heads outermost.
            out: (3 * 1000 + 4 * 72 + 64, RowStrides { sequence: 72, head: 1000 }),
            lse: Some((20, RowStrides { sequence: 1, head: 5 })),
            ..good()
        };
        let accessed = Accessed { q: 2304, out: 3352, ..accessed };
        assert_eq!(apart.check(good().problem.planned()).unwrap(), accessed);
        let empty = RunTensors { rows: 0, q: (0, good().q.1), out: (0, good().out.1), lse: None, ..good() };
        let accessed = empty.check(good().problem.planned()).unwrap();
        assert_eq!((accessed.q, accessed.out, accessed.lse), (0, 0, 0));
    }

    #[test]
    fn every_tensor_must_hold_what_its_strides_span() {
        let shorten = |(elements, strides): (u64, RowStrides)| (elements - 1, strides);
        let cases = [
            ("q: got 1279 elements, expected at least 1280", RunTensors { q: shorten(good().q), ..good() }),
            ("out: got 1279 elements, expected at least 1280", RunTensors { out: shorten(good().out), ..good() }),
            ("lse: got 19 elements, expected at least 20", RunTensors { lse: good().lse.map(shorten), ..good() }),
            ("k: got 6143 elements", RunTensors { k: (6143, good().k.1), ..good() }),
            ("v: got 6143 elements", RunTensors { v: (6143, good().v.1), ..good() }),
            ("k: got 6144 elements, expected at least 8192", RunTensors { num_pages: 4, ..good() }),
            ("q: got 1280 elements, expected at least 1536", RunTensors { rows: 6, ..good() }),
        ];
        for (expected, tensors) in cases {
            let message = refusal(tensors);
            assert!(message.starts_with(expected), "{expected}: {message}");
        }
    }

    #[test]
    fn strides_and_overlapping_outputs_are_refused() {
        let rows = |sequence, head| (u64::MAX, RowStrides { sequence, head });
        let pool = |page, token, head| (u64::MAX, KvStrides { page, token, head });
        let cases = [
            ("q_strides.sequence: got -256 elements", RunTensors { q: rows(-256, 64), ..good() }),
            ("q_strides.head: got 65 elements", RunTensors { q: rows(256, 65), ..good() }),
            ("out_strides.head: got 4 elements", RunTensors { out: rows(256, 4), ..good() }),
            ("k_strides.page: got 549755813888 elements", RunTensors { k: pool(1 << 39, 128, 64), ..good() }),
            ("v_strides.token: got 1 elements", RunTensors { v: pool(2048, 1, 64), ..good() }),
            ("lse_strides.head: got -1 elements, expected 0 or more", RunTensors { lse: Some(rows(4, -1)), ..good() }),
            ("lse_strides.sequence: got 9223372036854775807", RunTensors { lse: Some(rows(i64::MAX, 1)), ..good() }),
            (
                "lse_strides.head: got 274877906944 elements, expected 0 or more, below 2^38",
                RunTensors { lse: Some(rows(1, 1 << 38)), ..good() },
            ),
            ("out_strides.sequence: got 0 elements, expected at least 64", RunTensors { out: rows(0, 64), ..good() }),
            ("out_strides.head: got 56 elements, expected at least 64", RunTensors { out: rows(256, 56), ..good() }),
            (
                "out_strides.sequence: got 248 elements, expected at least 256",
                RunTensors { out: rows(248, 64), ..good() },
            ),
            (
                "lse_strides.sequence: got 3 elements, expected at least 4",
                RunTensors { lse: Some(rows(3, 1)), ..good() },
            ),
        ];
        for (expected, tensors) in cases {
            let message = refusal(tensors);
            assert!(message.starts_with(expected), "{expected}: {message}");
        }
        // All rows of Q may be one, and one row of an output needs no stride.
        RunTensors { q: rows(0, 0), ..good() }.check(good().problem.planned()).unwrap();
        RunTensors { rows: 1, out: rows(0, 64), ..good() }.check(good().problem.planned()).unwrap();
        RunTensors { lse: Some(rows(1, (1 << 38) - 1)), ..good() }.check(good().problem.planned()).unwrap();
    }

    #[test]
    fn another_problem_than_the_plans_is_refused() {
        let problem = good().problem;
        let with = |problem| refusal(RunTensors { problem, ..good() });
        let other = AttentionShape::new(8, 2, 64, Dtype::F16).unwrap();
        assert!(with(Problem::new(other, 16)).starts_with("plan does not fit the shape of the run"));
        assert!(
            with(Problem::new(problem.shape(), 32))
                .starts_with("plan does not fit the page_size of the run: the plan has 16")
        );
        assert!(with(problem.with_window(9)).starts_with("plan does not fit the visibility of the run"));
        assert!(with(problem.with_soft_cap(-9.0)).starts_with("soft_cap: got -9"));
        assert!(with(problem.with_scale(0.0)).starts_with("softmax_scale: got 0"));
        RunTensors { problem: problem.with_scale(0.5), ..good() }.check(problem.planned()).unwrap();
    }
}
