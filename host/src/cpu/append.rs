//! Writing new rows of K or V into a paged cache.

use super::{Element, KvElement};
use crate::arguments::check_tensor;
use crate::{Error, KvScale, KvStrides, Result, RowStrides};
use std::cell::Cell;

/// New rows of K or V, one per sequence, and where they go.
#[derive(Clone, Copy, Debug)]
pub struct NewRows<'a, T: Element> {
    /// `[rows, kv_heads, head_dim]` in the order that `strides` give.
    pub rows: &'a [Cell<T>],
    /// Layout of `rows`.
    pub strides: RowStrides,
    /// `page * page_size + token in the page` for each row; a negative one means that the row is not written.
    pub slots: &'a [i64],
}

impl<T: Element> NewRows<'_, T> {
    /// Refuses what [`append_rows`] refuses, and writes nothing: K and V are both checked before either is written.
    ///
    /// # Errors
    /// As [`append_rows`].
    pub fn check<C: KvElement>(&self, layout: &CacheLayout, cache: &[Cell<C>]) -> Result<()> {
        let CacheLayout { num_pages, page_size, kv_heads, head_dim, strides } = *layout;
        if page_size == 0 {
            return Err(Error::invalid("page_size", 0, "at least 1"));
        }
        let rows = u32::try_from(self.slots.len())
            .map_err(|_| Error::invalid("slots", self.slots.len(), "fewer than 2^32"))?;
        let of_rows = [("sequence", rows, self.strides.sequence), ("head", kv_heads, self.strides.head)];
        check_tensor("rows", self.rows.len() as u64, &of_rows, head_dim, T::DTYPE)?;
        let of_cache =
            [("page", num_pages, strides.page), ("token", page_size, strides.token), ("head", kv_heads, strides.head)];
        check_tensor("cache", cache.len() as u64, &of_cache, head_dim, C::DTYPE)?;
        if let Some((row, slot)) = self.slots.iter().enumerate().find(|(_, slot)| **slot >= layout.slots() as i64) {
            let expected = format!("below num_pages * page_size = {}, or negative", layout.slots());
            return Err(Error::invalid(format!("slots[{row}]"), slot, expected));
        }
        Ok(())
    }
}

/// Extent and layout of a paged cache of K or V.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheLayout {
    /// Pages.
    pub num_pages: u32,
    /// Tokens per page.
    pub page_size: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Elements per head.
    pub head_dim: u32,
    /// Strides in elements.
    pub strides: KvStrides,
}

impl CacheLayout {
    /// Token slots of the cache.
    pub fn slots(&self) -> u64 {
        u64::from(self.num_pages) * u64::from(self.page_size)
    }

    /// Whether it has as many pages, tokens per page and heads as another one: K and V of a cache do, whatever their head dims.
    pub(crate) fn has_slots_and_heads_of(&self, other: &Self) -> bool {
        Self { head_dim: other.head_dim, strides: other.strides, ..*self } == *other
    }
}

/// Copies each row to its slot, later rows over earlier ones. Memory is given as cells, so that the caches of K and V may lie
/// inside each other.
///
/// # Errors
/// A slot is beyond the cache, a slice is too short for its strides, or a stride is not accepted. Nothing is written then.
pub fn append_rows<T: Element>(new: &NewRows<'_, T>, layout: &CacheLayout, cache: &[Cell<T>]) -> Result<()> {
    append(new, layout, cache, |_, from| from)
}

/// As [`append_rows`], of 16-bit rows into an 8-bit cache: elements are divided by the factor of their KV head (in f32) and
/// rounded to nearest even. What is too large, infinities among it, becomes the largest finite element, NaN the code 0x7f.
///
/// # Errors
/// As [`append_rows`]; or the cache has no 8 bits, or a factor is refused (see [`KvScale`]).
pub fn append_rounded_rows<T: Element, C: KvElement>(
    new: &NewRows<'_, T>,
    layout: &CacheLayout,
    cache: &[Cell<C>],
    scale: KvScale<'_>,
) -> Result<()> {
    if C::DTYPE.bytes() != 1 {
        return Err(Error::invalid("cache", C::DTYPE.name(), "elements of 8 bits"));
    }
    scale.check("scale", layout.kv_heads, true)?;
    append(new, layout, cache, |head, from| C::from_f32(from.to_f32() / scale.of_head(head)))
}

/// Writes `written(head, element)` for each element.
fn append<T: Element, C: KvElement>(
    new: &NewRows<'_, T>,
    layout: &CacheLayout,
    cache: &[Cell<C>],
    written: impl Fn(u32, T) -> C,
) -> Result<()> {
    new.check(layout, cache)?;
    let CacheLayout { page_size, kv_heads, head_dim, strides, .. } = *layout;
    for (row, &slot) in (0i64..).zip(new.slots).filter(|(_, slot)| **slot >= 0) {
        let (page, token) = (slot / i64::from(page_size), slot % i64::from(page_size));
        for head in 0..kv_heads {
            // Not negative and inside both slices: checked above.
            let from = (row * new.strides.sequence + i64::from(head) * new.strides.head) as usize;
            let to = (page * strides.page + token * strides.token + i64::from(head) * strides.head) as usize;
            let target = &cache[to..][..head_dim as usize];
            target.iter().zip(&new.rows[from..]).for_each(|(to, from)| to.set(written(head, from.get())));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::E4m3;
    use half::f16;

    const LAYOUT: CacheLayout = CacheLayout {
        num_pages: 3,
        page_size: 2,
        kv_heads: 2,
        head_dim: 8,
        strides: KvStrides { page: 32, token: 16, head: 8 },
    };

    fn numbers(from: u32, count: u32) -> Vec<f16> {
        (from..from + count).map(|x| f16::from_f32(x as f32)).collect()
    }

    fn append(slots: &[i64], strides: RowStrides, cache: &mut [f16]) -> Result<()> {
        let mut rows = numbers(1, 48);
        let rows = Cell::from_mut(&mut rows[..]).as_slice_of_cells();
        append_rows(&NewRows { rows, strides, slots }, &LAYOUT, Cell::from_mut(cache).as_slice_of_cells())
    }

    #[test]
    fn rows_go_to_their_slots_and_nothing_else_changes() {
        let mut cache = numbers(100, 96);
        append(&[5, -1, 0], RowStrides { sequence: 16, head: 8 }, &mut cache).unwrap();
        let mut expected = numbers(100, 96);
        expected[80..].copy_from_slice(&numbers(1, 16));
        expected[..16].copy_from_slice(&numbers(33, 16));
        assert_eq!(cache, expected);
    }

    #[test]
    fn rows_are_divided_by_the_factor_of_their_head_and_rounded() {
        let largest = f16::from_f32(60_000.0);
        let mut rows = [f16::from_f32(1.5); 16];
        // A tie, beside numbers that are too large, none, and minus zero.
        rows[..5].copy_from_slice(&[f16::from_f32(8.5), largest, f16::NEG_INFINITY, f16::NAN, f16::NEG_ZERO]);
        let rows = Cell::from_mut(&mut rows[..]).as_slice_of_cells();
        let cache = [const { Cell::new(E4m3(0x11)) }; 96];
        let new = NewRows { rows, strides: RowStrides { sequence: 16, head: 8 }, slots: &[1] };
        let layout = CacheLayout { strides: KvStrides { page: 32, token: 16, head: 16 }, kv_heads: 1, ..LAYOUT };
        append_rounded_rows(&new, &layout, &cache, KvScale::Heads(&[0.5])).unwrap();
        let cache_codes = cache.clone().map(Cell::into_inner);
        // 17 lies between 16 and 18, whose last bits are 0 and 1.
        assert_eq!(cache_codes[16..24], [0x58, 0x7e, 0xfe, 0x7f, 0x80, 0x44, 0x44, 0x44].map(E4m3));
        assert!(cache_codes.iter().enumerate().all(|(at, code)| (16..24).contains(&at) || *code == E4m3(0x11)));

        let mut wide = numbers(0, 96);
        let wide = Cell::from_mut(&mut wide[..]).as_slice_of_cells();
        let refusal = append_rounded_rows(&new, &layout, wide, KvScale::ONE).unwrap_err().to_string();
        assert!(refusal.starts_with("cache: got f16, expected elements of 8 bits"), "{refusal}");
        let refusal = append_rounded_rows(&new, &layout, &cache, KvScale::Tensor(0.0)).unwrap_err().to_string();
        assert!(refusal.starts_with("scale: got 0"), "{refusal}");
    }

    #[test]
    fn what_does_not_fit_is_refused_before_anything_is_written() {
        let contiguous = RowStrides { sequence: 16, head: 8 };
        let cases: [(&[i64], RowStrides, usize, &str); 4] = [
            (&[0, 6], contiguous, 96, "slots[1]: got 6"),
            (&[0, 1, 2, 3], contiguous, 96, "rows: got 48"),
            (&[0], contiguous, 95, "cache: got 95"),
            (&[0], RowStrides { sequence: 16, head: -8 }, 96, "rows_strides.head: got -8"),
        ];
        for (slots, strides, elements, message) in cases {
            let mut cache = numbers(100, 96);
            let error = append(slots, strides, &mut cache[..elements]).unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
            assert_eq!(cache, numbers(100, 96));
        }
    }
}
