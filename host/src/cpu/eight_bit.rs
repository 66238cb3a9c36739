//! The 8-bit element types of K and V.

use super::element::KvElement;
use crate::Dtype;

/// 8 bits: a sign, 4 of exponent, 3 of fraction. No infinities; NaN is the code whose other bits are all set (`float8_e4m3fn`).
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct E4m3(pub u8);

/// 8 bits: a sign, 5 of exponent, 2 of fraction. The largest exponent is that of infinities and NaN (`float8_e5m2`).
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct E5m2(pub u8);

macro_rules! eight_bit {
    ($type:ident, $fraction_bits:literal, $bias:literal, $largest:literal, $nan:literal, $has_infinities:literal) => {
        impl $type {
            /// The value, exactly.
            pub fn to_f32(self) -> f32 {
                let (exponent, fraction) =
                    (i32::from(self.0 & 0x7f) >> $fraction_bits, self.0 & ((1 << $fraction_bits) - 1));
                let magnitude = self.0 & 0x7f;
                let value = if magnitude > $largest && $has_infinities && fraction == 0 {
                    f32::INFINITY
                } else if magnitude > $largest {
                    f32::NAN
                } else if exponent == 0 {
                    f32::from(fraction) * 2f32.powi(1 - $bias - $fraction_bits)
                } else {
                    f32::from(fraction | 1 << $fraction_bits) * 2f32.powi(exponent - $bias - $fraction_bits)
                };
                if self.0 & 0x80 == 0 { value } else { -value }
            }

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

eight_bit!(E4m3, 3, 7, 0x7e, 0x7f, false);
eight_bit!(E5m2, 2, 15, 0x7b, 0x7f, true);

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;

    #[test]
    fn all_codes_are_what_they_say() {
        for code in 0..=u8::MAX {
            // The upper byte of a binary16.
            let expected = f16::from_bits(u16::from(code) << 8).to_f32();
            let value = E5m2(code).to_f32();
            assert!(
                value == expected && value.is_sign_negative() == expected.is_sign_negative()
                    || expected.is_nan() && value.is_nan()
            );
            // Exponent and fraction in the same places of a binary16, whose bias is 8 more.
            let bits = u16::from(code & 0x80) << 8 | u16::from(code & 0x7f) << 7;
            let expected = f16::from_bits(bits).to_f32() * 256.0;
            let value = E4m3(code).to_f32();
            let is_nan = code & 0x7f == 0x7f;
            assert_eq!(value.is_nan(), is_nan, "{code:#x}");
            assert!(
                is_nan || value == expected && value.is_sign_negative() == expected.is_sign_negative(),
                "{code:#x}"
            );
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
