//! The 8-bit element types of K and V.

use super::element::KvElement;
use crate::Dtype;
use half::f16;

/// 8 bits: a sign, 4 of exponent, 3 of fraction. No infinities; NaN is the code whose other bits are all set (`float8_e4m3fn`).
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct E4m3(pub u8);

/// 8 bits: a sign, 5 of exponent, 2 of fraction. The largest exponent is that of infinities and NaN (`float8_e5m2`).
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct E5m2(pub u8);

impl E4m3 {
    /// The value, exactly.
    pub fn to_f32(self) -> f32 {
        let Self(code) = self;
        if code & 0x7f == 0x7f {
            return f32::NAN;
        }
        // Exponent and fraction in their places of a binary16, whose bias is 8 more.
        let bits = u16::from(code & 0x80) << 8 | u16::from(code & 0x7f) << 7;
        f16::from_bits(bits).to_f32() * 256.0
    }
}

impl E5m2 {
    /// The value, exactly.
    pub fn to_f32(self) -> f32 {
        // The upper byte of a binary16.
        f16::from_bits(u16::from(self.0) << 8).to_f32()
    }
}

macro_rules! eight_bit {
    ($type:ident, $fraction_bits:literal, $bias:literal, $largest:literal, $nan:literal) => {
        impl $type {
            /// The nearest element, ties to even; what is too large, infinities among it, becomes the largest finite element.
            pub fn from_f32(value: f32) -> Self {
                if value.is_nan() {
                    return Self($nan);
                }
                let magnitude = f64::from(value.abs());
                let bits = f64::from(value.abs().max(2f32.powi(1 - $bias))).log2().floor() as i32 - $fraction_bits;
                let unit = 2f64.powi(bits);
                // In units of the last place, of which a power of 2 has `1 << fraction_bits`; subnormal numbers have fewer.
                let units = (magnitude / unit).round_ties_even();
                let code = if magnitude.is_infinite() {
                    f64::INFINITY
                } else {
                    f64::from((bits - (1 - $bias - $fraction_bits)) << $fraction_bits) + units
                };
                Self((code.min(f64::from($largest)) as u8) | (u8::from(value.is_sign_negative()) << 7))
            }
        }

        impl KvElement for $type {
            const DTYPE: Dtype = Dtype::$type;

            fn from_f32(value: f32) -> Self {
                Self::from_f32(value)
            }

            fn to_f32(self) -> f32 {
                self.to_f32()
            }

            fn widen(source: &[Self], destination: &mut [f32]) {
                for (element, value) in source.iter().zip(destination) {
                    *value = element.to_f32();
                }
            }
        }
    };
}

eight_bit!(E4m3, 3, 7, 0x7e, 0x7f);
eight_bit!(E5m2, 2, 15, 0x7b, 0x7f);

#[cfg(test)]
mod tests {
    use super::*;

    /// By the definition: `fraction_bits`, the bias, the largest finite magnitude's code.
    fn value(code: u8, fraction_bits: i32, bias: i32, largest: u8, has_infinities: bool) -> f32 {
        let (magnitude, fraction) = (code & 0x7f, f32::from(code & ((1 << fraction_bits) - 1)));
        let exponent = i32::from(magnitude >> fraction_bits);
        let value = if magnitude > largest {
            if has_infinities && fraction == 0.0 { f32::INFINITY } else { f32::NAN }
        } else if exponent == 0 {
            fraction * 2f32.powi(1 - bias - fraction_bits)
        } else {
            (fraction + 2f32.powi(fraction_bits)) * 2f32.powi(exponent - bias - fraction_bits)
        };
        if code & 0x80 == 0 { value } else { -value }
    }

    #[test]
    fn all_codes_are_what_they_say() {
        for code in 0..=u8::MAX {
            let e4m3 = (E4m3(code).to_f32(), value(code, 3, 7, 0x7e, false));
            let e5m2 = (E5m2(code).to_f32(), value(code, 2, 15, 0x7b, true));
            for (found, expected) in [e4m3, e5m2] {
                let is_equal = found == expected && found.is_sign_negative() == expected.is_sign_negative();
                assert!(is_equal || found.is_nan() && expected.is_nan(), "{code:#x}: {found}, {expected}");
            }
        }
        assert_eq!((E4m3(0x7e).to_f32(), E4m3(0x08).to_f32(), E4m3(0x81).to_f32()), (448.0, 0.015_625, -0.001_953_125));
        assert_eq!((E5m2(0x7b).to_f32(), E5m2(0xfc).to_f32()), (57_344.0, f32::NEG_INFINITY));
    }

    #[test]
    fn numbers_become_the_nearest_element() {
        for code in (0..=u8::MAX).filter(|code| E4m3(*code).to_f32().is_finite()) {
            assert_eq!(E4m3::from_f32(E4m3(code).to_f32()), E4m3(code));
        }
        for code in (0..=u8::MAX).filter(|code| E5m2(*code).to_f32().is_finite()) {
            assert_eq!(E5m2::from_f32(E5m2(code).to_f32()), E5m2(code));
        }
        // Between neighbours: the nearer one, and of two the even one.
        for code in 0..0x7e {
            let [low, high] = [code, code + 1].map(|code| E4m3(code).to_f32());
            let middle = (low + high) / 2.0;
            assert_eq!(E4m3::from_f32(middle), E4m3(code + code % 2), "{code:#x}");
            assert_eq!(E4m3::from_f32(middle.next_down()), E4m3(code));
            assert_eq!(E4m3::from_f32(-middle.next_up()), E4m3((code + 1) | 0x80));
        }
        for large in [449.0, 1e30, f32::INFINITY] {
            assert_eq!(E4m3::from_f32(large), E4m3(0x7e));
            assert_eq!(E5m2::from_f32(-large * 1e3).0 & 0x80, 0x80);
        }
        assert_eq!(E5m2::from_f32(f32::INFINITY), E5m2(0x7b));
        assert!(E4m3::from_f32(f32::NAN).to_f32().is_nan() && E5m2::from_f32(f32::NAN).to_f32().is_nan());
        assert_eq!((E4m3::from_f32(-0.0), E4m3::from_f32(1e-9)), (E4m3(0x80), E4m3(0)));
    }
}
