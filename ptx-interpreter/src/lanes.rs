//! Registers of a warp: one value per lane, as wide as the widest register. Narrower values are zero-extended.

use half::{bf16, f16};

/// Lanes of a warp.
pub(crate) const WARP: usize = 32;

/// A register of every lane. A predicate is 0 or 1.
pub(crate) type Lanes = [u64; WARP];

/// What a register holds, by its type in the instruction.
pub(crate) trait Scalar {
    fn from_bits(bits: u64) -> Self;
    fn into_bits(self) -> u64;
}

macro_rules! integers {
    ($($type:ty as $unsigned:ty),*) => {
        $(impl Scalar for $type {
            fn from_bits(bits: u64) -> Self {
                bits as Self
            }
            fn into_bits(self) -> u64 {
                self as $unsigned as u64
            }
        })*
    };
}

integers!(u16 as u16, i16 as u16, u32 as u32, i32 as u32, u64 as u64, i64 as u64);

impl Scalar for f32 {
    fn from_bits(bits: u64) -> Self {
        Self::from_bits(bits as u32)
    }
    fn into_bits(self) -> u64 {
        u64::from(self.to_bits())
    }
}

impl Scalar for bool {
    fn from_bits(bits: u64) -> Self {
        bits != 0
    }
    fn into_bits(self) -> u64 {
        u64::from(self)
    }
}

/// A 16-bit floating-point type.
pub(crate) trait Float16: Copy {
    fn from_f64(value: f64) -> Self;
    fn to_f32(self) -> f32;
    fn from_u16(bits: u16) -> Self;
    fn to_u16(self) -> u16;
}

macro_rules! floats16 {
    ($($type:ty),*) => {
        $(impl Float16 for $type {
            fn from_f64(value: f64) -> Self {
                Self::from_f64(value)
            }
            fn to_f32(self) -> f32 {
                self.to_f32()
            }
            fn from_u16(bits: u16) -> Self {
                Self::from_bits(bits)
            }
            fn to_u16(self) -> u16 {
                self.to_bits()
            }
        }
        impl Scalar for $type {
            fn from_bits(bits: u64) -> Self {
                Self::from_bits(bits as u16)
            }
            fn into_bits(self) -> u64 {
                u64::from(self.to_bits())
            }
        })*
    };
}

floats16!(f16, bf16);

/// `f16x2`, `bf16x2`: the first element is in the low half.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Pair<T>(pub(crate) T, pub(crate) T);

impl<T: Float16> Scalar for Pair<T> {
    fn from_bits(bits: u64) -> Self {
        Self(T::from_u16(bits as u16), T::from_u16((bits >> 16) as u16))
    }
    fn into_bits(self) -> u64 {
        u64::from(self.0.to_u16()) | u64::from(self.1.to_u16()) << 16
    }
}

impl<T: Float16> Pair<T> {
    /// Elementwise; `f` is exact, its result is rounded once.
    pub(crate) fn map3(a: Self, b: Self, c: Self, f: impl Fn(f64, f64, f64) -> f64) -> Self {
        let wide = |x: T| f64::from(x.to_f32());
        let element = |a, b, c| T::from_f64(f(wide(a), wide(b), wide(c)));
        Self(element(a.0, b.0, c.0), element(a.1, b.1, c.1))
    }

    pub(crate) fn map2(a: Self, b: Self, f: impl Fn(f64, f64) -> f64) -> Self {
        Self::map3(a, b, a, |a, b, _| f(a, b))
    }
}

/// Lanes of a mask.
pub(crate) fn lanes_of(mask: u32) -> impl Iterator<Item = usize> {
    (0..WARP).filter(move |lane| mask >> lane & 1 == 1)
}
