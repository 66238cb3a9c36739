//! Whether caches that are written have elements of their own: views into one storage may interleave, and must not overlap.

use crate::errors::{Result, invalid};
use crate::tensor::{MAX_RANK, Tensor};

/// Dimensions of a tensor in front of its rows.
const OUTER: usize = MAX_RANK - 1;

/// A tensor of four dimensions as rows of contiguous bytes.
#[derive(Clone, Copy, Debug)]
struct Rows {
    /// Sizes and strides in bytes, the largest stride first; 1 and 0 where there is but one entry.
    dims: [(i128, i128); OUTER],
    row_bytes: i128,
}

impl Rows {
    fn of(tensor: &Tensor<'_>) -> Self {
        let bytes = i128::from(tensor.element.bytes());
        let mut dims = [(1, 0); OUTER];
        for (dim, (&size, &stride)) in dims.iter_mut().zip(tensor.sizes.iter().zip(&tensor.strides)) {
            if size > 1 {
                *dim = (size.into(), i128::from(stride) * bytes);
            }
        }
        dims.sort_unstable_by_key(|&(size, stride)| std::cmp::Reverse((size > 1, stride)));
        Self { dims, row_bytes: i128::from(tensor.sizes[OUTER]) * bytes }
    }

    /// Bytes from the first to the last one of what lies below its first `outer` dimensions.
    fn extent(&self, outer: usize) -> i128 {
        self.dims[outer..].iter().map(|(size, stride)| (size - 1) * stride).sum::<i128>() + self.row_bytes
    }

    /// Whether each step of a dimension is beyond all that lies below it.
    fn are_nested(&self) -> bool {
        (0..OUTER).all(|dim| self.dims[dim].0 == 1 || self.dims[dim].1 >= self.extent(dim + 1))
    }

    /// Whether, below the first `outer` dimensions, a row of `other`, which lies `offset` bytes behind, meets one of these. Both
    /// are nested.
    fn meet(&self, other: &Self, offset: i128, outer: usize) -> bool {
        let reach = (self.extent(outer), other.extent(outer));
        if offset >= reach.0 || -offset >= reach.1 {
            return false;
        }
        let Some(&(size, stride)) = self.dims.get(outer) else { return true };
        if self.dims[outer] != other.dims[outer] {
            // Their strides differ from here on: taken for as dense as their extents.
            return true;
        }
        if size == 1 {
            return self.meet(other, offset, outer + 1);
        }
        // What lies below is shorter than a stride: only these two steps bring it near.
        let step = offset.div_euclid(stride);
        [step, step + 1]
            .into_iter()
            .any(|step| step.abs() < size && self.meet(other, offset - step * stride, outer + 1))
    }
}

/// Refuses a cache of which several elements are the same one, as those of an expanded tensor are.
pub(crate) fn check_distinct_elements(cache: &Tensor<'_>) -> Result<()> {
    if is_empty(cache) || Rows::of(cache).are_nested() {
        return Ok(());
    }
    // Rows that lie between each other's are apart as well in rare cases; nobody lays out caches so.
    let strides = &cache.strides[..cache.rank];
    let got = format!("shape {} with strides {strides:?}", cache.shape());
    Err(invalid(cache.name, got, "a cache whose elements do not overlap each other"))
}

/// Refuses caches that have an element in common. Each has distinct ones.
pub(crate) fn check_elements_apart(cache: &Tensor<'_>, other: &Tensor<'_>) -> Result<()> {
    let offset = i128::from(cache.address) - i128::from(other.address);
    if is_empty(cache) || is_empty(other) || !Rows::of(other).meet(&Rows::of(cache), offset, 0) {
        return Ok(());
    }
    let got = format!("memory that holds elements of {}", other.name);
    Err(invalid(cache.name, got, format!("elements of its own; those of {} may lie between them", other.name)))
}

fn is_empty(cache: &Tensor<'_>) -> bool {
    cache.sizes[..cache.rank].contains(&0)
}
