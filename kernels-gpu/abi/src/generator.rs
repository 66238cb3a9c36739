//! Counter-based test tensors: every element is an integer hash of its coordinates, so that Rust, PTX and torch programs
//! draw the same pools without shipping them.
//!
//! With `mix` the 32-bit finaliser `lowbias32` (xorshift 16, times 0x7feb352d, xorshift 15, times 0x846ca68b,
//! xorshift 16; all modulo 2^32):
//!
//! ```text
//! row     = mix(mix(mix(mix(seed) + tensor) + page) + token) + head)      (one more mix per coordinate)
//! h       = mix(row + dim),  g = mix(h ^ 0x9e3779b9)
//! s       = (h & 0xffff) + (h >> 16) + (g & 0xffff) + (g >> 16)           (four uniforms: close to normal)
//! element = (s - 131070) * 2.6428996e-5                                   (f32; mean 0, standard deviation 1)
//! ```
//!
//! and then rounded to nearest even to the 16-bit type. Q uses `page` = sequence, `token` = 0.

/// Which tensor an element belongs to.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tensor {
    /// Queries.
    Q = 0,
    /// Keys.
    K = 1,
    /// Values.
    V = 2,
}

/// The bijective finaliser `lowbias32`.
#[inline(always)]
pub const fn mix(mut x: u32) -> u32 {
    x ^= x >> 16;
    x = x.wrapping_mul(0x7feb_352d);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// The hash of everything but the position in the head: one row of `head_dim` elements.
#[inline(always)]
pub const fn row_key(seed: u32, tensor: u32, page: u32, token: u32, head: u32) -> u32 {
    let mut key = mix(seed);
    key = mix(key.wrapping_add(tensor));
    key = mix(key.wrapping_add(page));
    key = mix(key.wrapping_add(token));
    mix(key.wrapping_add(head))
}

/// The element at position `dim` of a row, before rounding to the 16-bit type.
#[inline(always)]
pub const fn element(row_key: u32, dim: u32) -> f32 {
    let h = mix(row_key.wrapping_add(dim));
    let g = mix(h ^ 0x9e37_79b9);
    let sum = (h & 0xffff) + (h >> 16) + (g & 0xffff) + (g >> 16);
    (sum as i32 - 131_070) as f32 * 2.642_899_6e-5
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_standardised_and_differ_between_rows() {
        let (mut sum, mut squares, mut n) = (0f64, 0f64, 0u32);
        for page in 0..64 {
            for token in 0..16 {
                let key = row_key(7, Tensor::K as u32, page, token, 3);
                for dim in 0..128 {
                    let x = f64::from(element(key, dim));
                    sum += x;
                    squares += x * x;
                    n += 1;
                }
            }
        }
        let mean = sum / f64::from(n);
        let variance = squares / f64::from(n) - mean * mean;
        assert!(mean.abs() < 0.02, "{mean}");
        assert!((variance - 1.0).abs() < 0.02, "{variance}");
        assert_ne!(row_key(7, 1, 0, 1, 0), row_key(7, 1, 1, 0, 0));
    }
}
