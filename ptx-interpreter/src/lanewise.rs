//! Instructions in which each lane computes a register from up to three of its own: integers, floating point, comparisons,
//! conversions. PTX ISA, "Integer Arithmetic Instructions" to "Data Movement and Conversion Instructions".
//!
//! The approximations (`ex2`, `lg2`, `rcp`) are the correctly rounded functions of the host, with subnormals flushed where the
//! instruction says so: a device's differ from them by a few units in the last place.

use crate::lanes::{Float16, Lanes, Pair, Scalar};
use half::{bf16, f16};
use std::cmp::Ordering;

/// Computes a register from the operands; behind the last one stands any.
pub(crate) type Lanewise = fn([&Lanes; 3]) -> Lanes;

macro_rules! lanes {
    (|$a:ident: $ta:ty| $result:expr) => {
        (1, |[x, _, _]: [&Lanes; 3]| {
            std::array::from_fn(|lane| {
                let $a = <$ta as Scalar>::from_bits(x[lane]);
                Scalar::into_bits($result)
            })
        })
    };
    (|$a:ident: $ta:ty, $b:ident: $tb:ty| $result:expr) => {
        (2, |[x, y, _]: [&Lanes; 3]| {
            std::array::from_fn(|lane| {
                let ($a, $b) = (<$ta as Scalar>::from_bits(x[lane]), <$tb as Scalar>::from_bits(y[lane]));
                Scalar::into_bits($result)
            })
        })
    };
    (|$a:ident: $ta:ty, $b:ident: $tb:ty, $c:ident: $tc:ty| $result:expr) => {
        (3, |[x, y, z]: [&Lanes; 3]| {
            std::array::from_fn(|lane| {
                let ($a, $b) = (<$ta as Scalar>::from_bits(x[lane]), <$tb as Scalar>::from_bits(y[lane]));
                let $c = <$tc as Scalar>::from_bits(z[lane]);
                Scalar::into_bits($result)
            })
        })
    };
}

/// The number of operands of an instruction that is computed lane by lane, and how; or `None` for any other.
pub(crate) fn find(opcode: &str) -> Option<(usize, Lanewise)> {
    integer(opcode)
        .or_else(|| bits(opcode))
        .or_else(|| float(opcode))
        .or_else(|| comparison(opcode))
        .or_else(|| moving(opcode))
}

fn integer(opcode: &str) -> Option<(usize, Lanewise)> {
    Some(match opcode {
        "add.s32" | "add.u32" => lanes!(|a: u32, b: u32| a.wrapping_add(b)),
        "add.s64" | "add.u64" => lanes!(|a: u64, b: u64| a.wrapping_add(b)),
        "sub.s32" | "sub.u32" => lanes!(|a: u32, b: u32| a.wrapping_sub(b)),
        "sub.s64" | "sub.u64" => lanes!(|a: u64, b: u64| a.wrapping_sub(b)),
        "mul.lo.s32" | "mul.lo.u32" => lanes!(|a: u32, b: u32| a.wrapping_mul(b)),
        "mul.lo.s64" | "mul.lo.u64" => lanes!(|a: u64, b: u64| a.wrapping_mul(b)),
        "mul.wide.u32" => lanes!(|a: u32, b: u32| u64::from(a) * u64::from(b)),
        "mul.wide.s32" => lanes!(|a: i32, b: i32| i64::from(a) * i64::from(b)),
        "mul.hi.u32" => lanes!(|a: u32, b: u32| (u64::from(a) * u64::from(b)) >> 32),
        "mad.lo.s32" | "mad.lo.u32" => lanes!(|a: u32, b: u32, c: u32| a.wrapping_mul(b).wrapping_add(c)),
        "mad.lo.s64" | "mad.lo.u64" => lanes!(|a: u64, b: u64, c: u64| a.wrapping_mul(b).wrapping_add(c)),
        "mad.wide.u32" => lanes!(|a: u32, b: u32, c: u64| (u64::from(a) * u64::from(b)).wrapping_add(c)),
        "neg.s32" => lanes!(|a: u32| a.wrapping_neg()),
        "neg.s64" => lanes!(|a: u64| a.wrapping_neg()),
        "abs.s32" => lanes!(|a: i32| a.wrapping_abs()),
        "min.u32" => lanes!(|a: u32, b: u32| a.min(b)),
        "max.u32" => lanes!(|a: u32, b: u32| a.max(b)),
        "min.s32" => lanes!(|a: i32, b: i32| a.min(b)),
        "max.s32" => lanes!(|a: i32, b: i32| a.max(b)),
        "min.u64" => lanes!(|a: u64, b: u64| a.min(b)),
        "max.u64" => lanes!(|a: u64, b: u64| a.max(b)),
        "min.s64" => lanes!(|a: i64, b: i64| a.min(b)),
        "max.s64" => lanes!(|a: i64, b: i64| a.max(b)),
        _ => return None,
    })
}

fn bits(opcode: &str) -> Option<(usize, Lanewise)> {
    Some(match opcode {
        "and.b16" | "and.b32" | "and.b64" | "and.pred" => lanes!(|a: u64, b: u64| a & b),
        "or.b16" | "or.b32" | "or.b64" | "or.pred" => lanes!(|a: u64, b: u64| a | b),
        "xor.b16" | "xor.b32" | "xor.b64" | "xor.pred" => lanes!(|a: u64, b: u64| a ^ b),
        "not.pred" => lanes!(|a: bool| !a),
        "not.b16" => lanes!(|a: u16| !a),
        "not.b32" => lanes!(|a: u32| !a),
        "not.b64" => lanes!(|a: u64| !a),
        // Shifts by the width and more give what is shifted in.
        "shl.b16" => lanes!(|a: u16, b: u32| if b < 16 { a << b } else { 0 }),
        "shl.b32" => lanes!(|a: u32, b: u32| if b < 32 { a << b } else { 0 }),
        "shl.b64" => lanes!(|a: u64, b: u32| if b < 64 { a << b } else { 0 }),
        "shr.u16" | "shr.b16" => lanes!(|a: u16, b: u32| if b < 16 { a >> b } else { 0 }),
        "shr.u32" | "shr.b32" => lanes!(|a: u32, b: u32| if b < 32 { a >> b } else { 0 }),
        "shr.u64" | "shr.b64" => lanes!(|a: u64, b: u32| if b < 64 { a >> b } else { 0 }),
        "shr.s32" => lanes!(|a: i32, b: u32| a >> b.min(31)),
        "shr.s64" => lanes!(|a: i64, b: u32| a >> b.min(63)),
        "shf.l.wrap.b32" => lanes!(|a: u32, b: u32, c: u32| (join(a, b) << (c % 32)) >> 32),
        "shf.r.wrap.b32" => lanes!(|a: u32, b: u32, c: u32| (join(a, b) >> (c % 32)) as u32),
        "bfe.u32" => lanes!(|a: u32, b: u32, c: u32| bit_field(a, b & 0xff, c & 0xff)),
        "bfe.s32" => lanes!(|a: u32, b: u32, c: u32| signed_bit_field(a, b & 0xff, c & 0xff)),
        "prmt.b32" => lanes!(|a: u32, b: u32, c: u32| permute_bytes(join(a, b), c)),
        "popc.b32" => lanes!(|a: u32| a.count_ones()),
        "popc.b64" => lanes!(|a: u64| a.count_ones()),
        "clz.b32" => lanes!(|a: u32| a.leading_zeros()),
        "brev.b32" => lanes!(|a: u32| a.reverse_bits()),
        _ => return None,
    })
}

fn join(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn bit_field(a: u32, begin: u32, length: u32) -> u32 {
    let mask = if length < 32 { (1 << length) - 1 } else { u32::MAX };
    if begin < 32 { a >> begin & mask } else { 0 }
}

/// With the field's uppermost bit in all bits above it.
fn signed_bit_field(a: u32, begin: u32, length: u32) -> u32 {
    let above = 32 - length.clamp(1, 32);
    if length == 0 { 0 } else { ((bit_field(a, begin, length) << above) as i32 >> above) as u32 }
}

/// PTX ISA, "prmt", the default mode: a nibble selects a byte of the eight, or (bit 3) its sign in every bit.
fn permute_bytes(bytes: u64, selectors: u32) -> u32 {
    (0..4).fold(0, |result, place| {
        let selector = selectors >> (4 * place) & 0xf;
        let byte = (bytes >> (8 * (selector & 7))) as u8;
        let byte = if selector & 8 == 0 { byte } else { ((byte as i8) >> 7) as u8 };
        result | u32::from(byte) << (8 * place)
    })
}

fn float(opcode: &str) -> Option<(usize, Lanewise)> {
    Some(match opcode {
        "add.rn.f32" | "add.f32" => lanes!(|a: f32, b: f32| a + b),
        "sub.rn.f32" | "sub.f32" => lanes!(|a: f32, b: f32| a - b),
        "mul.rn.f32" | "mul.f32" => lanes!(|a: f32, b: f32| a * b),
        "div.rn.f32" => lanes!(|a: f32, b: f32| a / b),
        "fma.rn.f32" => lanes!(|a: f32, b: f32, c: f32| a.mul_add(b, c)),
        "neg.f32" => lanes!(|a: f32| -a),
        "abs.f32" => lanes!(|a: f32| a.abs()),
        // Of a NaN and a number the number.
        "max.f32" => lanes!(|a: f32, b: f32| a.max(b)),
        "min.f32" => lanes!(|a: f32, b: f32| a.min(b)),
        "ex2.approx.ftz.f32" => lanes!(|a: f32| flush(flush(a).exp2())),
        "lg2.approx.ftz.f32" => lanes!(|a: f32| flush(flush(a).log2())),
        "rcp.approx.ftz.f32" => lanes!(|a: f32| flush(flush(a).recip())),
        "fma.rn.f16x2" => lanes!(|a: Pair<f16>, b: Pair<f16>, c: Pair<f16>| Pair::map3(a, b, c, f64::mul_add)),
        "fma.rn.bf16x2" => lanes!(|a: Pair<bf16>, b: Pair<bf16>, c: Pair<bf16>| Pair::map3(a, b, c, f64::mul_add)),
        "mul.rn.f16x2" | "mul.f16x2" => lanes!(|a: Pair<f16>, b: Pair<f16>| Pair::map2(a, b, |a, b| a * b)),
        "add.rn.f16x2" | "add.f16x2" => lanes!(|a: Pair<f16>, b: Pair<f16>| Pair::map2(a, b, |a, b| a + b)),
        "sub.rn.f16x2" | "sub.f16x2" => lanes!(|a: Pair<f16>, b: Pair<f16>| Pair::map2(a, b, |a, b| a - b)),
        // The first source becomes the high half.
        "cvt.rn.f16x2.f32" => lanes!(|a: f32, b: f32| Pair(f16::from_f32(b), f16::from_f32(a))),
        "cvt.rn.bf16x2.f32" => lanes!(|a: f32, b: f32| Pair(bf16::from_f32(b), bf16::from_f32(a))),
        "cvt.rn.f16x2.e4m3x2" => lanes!(|a: u16| Pair(e4m3(a as u8), e4m3((a >> 8) as u8))),
        "cvt.rn.f16.f32" => lanes!(|a: f32| f16::from_f32(a)),
        "cvt.rn.bf16.f32" => lanes!(|a: f32| bf16::from_f32(a)),
        "cvt.f32.f16" => lanes!(|a: f16| Float16::to_f32(a)),
        "cvt.f32.bf16" => lanes!(|a: bf16| Float16::to_f32(a)),
        "cvt.rn.f32.s32" => lanes!(|a: i32| a as f32),
        "cvt.rn.f32.u32" => lanes!(|a: u32| a as f32),
        _ => return None,
    })
}

/// A subnormal number becomes 0 with its sign.
fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

/// A number of 4 bits of exponent and 3 of fraction; where all are set, NaN.
fn e4m3(code: u8) -> f16 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let magnitude = match code & 0x7f {
        0x7f => f64::NAN,
        _ if exponent == 0 => fraction * 2f64.powi(-9),
        _ => (8.0 + fraction) * 2f64.powi(exponent - 10),
    };
    f16::from_f64(if code & 0x80 == 0 { magnitude } else { -magnitude })
}

fn comparison(opcode: &str) -> Option<(usize, Lanewise)> {
    let rest = opcode.strip_prefix("setp.")?;
    let (operator, of_type) = rest.split_once('.')?;
    match of_type {
        "b16" | "u16" => ordered::<u16>(operator),
        "s16" => ordered::<i16>(operator),
        "b32" | "u32" => ordered::<u32>(operator),
        "s32" => ordered::<i32>(operator),
        "b64" | "u64" => ordered::<u64>(operator),
        "s64" => ordered::<i64>(operator),
        "f32" => float_comparison(operator),
        _ => None,
    }
}

fn ordered<T: Scalar + Ord>(operator: &str) -> Option<(usize, Lanewise)> {
    Some(match operator {
        "eq" => lanes!(|a: T, b: T| a == b),
        "ne" => lanes!(|a: T, b: T| a != b),
        "lt" | "lo" => lanes!(|a: T, b: T| a < b),
        "le" | "ls" => lanes!(|a: T, b: T| a <= b),
        "gt" | "hi" => lanes!(|a: T, b: T| a > b),
        "ge" | "hs" => lanes!(|a: T, b: T| a >= b),
        _ => return None,
    })
}

/// Where an operand is NaN, those that end in `u` are true and the others false.
fn float_comparison(operator: &str) -> Option<(usize, Lanewise)> {
    Some(match operator {
        "eq" => lanes!(|a: f32, b: f32| a.partial_cmp(&b).is_some_and(Ordering::is_eq)),
        "ne" => lanes!(|a: f32, b: f32| a.partial_cmp(&b).is_some_and(Ordering::is_ne)),
        "lt" => lanes!(|a: f32, b: f32| a.partial_cmp(&b).is_some_and(Ordering::is_lt)),
        "le" => lanes!(|a: f32, b: f32| a.partial_cmp(&b).is_some_and(Ordering::is_le)),
        "gt" => lanes!(|a: f32, b: f32| a.partial_cmp(&b).is_some_and(Ordering::is_gt)),
        "ge" => lanes!(|a: f32, b: f32| a.partial_cmp(&b).is_some_and(Ordering::is_ge)),
        "equ" => lanes!(|a: f32, b: f32| a.partial_cmp(&b).is_none_or(Ordering::is_eq)),
        "neu" => lanes!(|a: f32, b: f32| a.partial_cmp(&b).is_none_or(Ordering::is_ne)),
        "ltu" => lanes!(|a: f32, b: f32| a.partial_cmp(&b).is_none_or(Ordering::is_lt)),
        "leu" => lanes!(|a: f32, b: f32| a.partial_cmp(&b).is_none_or(Ordering::is_le)),
        "gtu" => lanes!(|a: f32, b: f32| a.partial_cmp(&b).is_none_or(Ordering::is_gt)),
        "geu" => lanes!(|a: f32, b: f32| a.partial_cmp(&b).is_none_or(Ordering::is_ge)),
        "num" => lanes!(|a: f32, b: f32| a.partial_cmp(&b).is_some()),
        "nan" => lanes!(|a: f32, b: f32| a.partial_cmp(&b).is_none()),
        _ => return None,
    })
}

fn moving(opcode: &str) -> Option<(usize, Lanewise)> {
    Some(match opcode {
        "mov.b16" | "mov.u16" => lanes!(|a: u16| a),
        "mov.b32" | "mov.u32" | "mov.f32" => lanes!(|a: u32| a),
        "mov.b64" | "mov.u64" => lanes!(|a: u64| a),
        "mov.pred" => lanes!(|a: bool| a),
        // Of all bits where it holds.
        "set.lt.u32.u32" => lanes!(|a: u32, b: u32| if a < b { u32::MAX } else { 0 }),
        "selp.b16" | "selp.u16" => lanes!(|a: u16, b: u16, c: bool| if c { a } else { b }),
        "selp.b32" | "selp.u32" | "selp.s32" | "selp.f32" => lanes!(|a: u32, b: u32, c: bool| if c { a } else { b }),
        "selp.b64" | "selp.u64" | "selp.s64" => lanes!(|a: u64, b: u64, c: bool| if c { a } else { b }),
        "cvt.u16.u32" | "cvt.u16.u64" | "cvt.u32.u16" | "cvt.u64.u16" => lanes!(|a: u16| a),
        "cvt.u32.u64" | "cvt.u64.u32" => lanes!(|a: u32| a),
        "cvt.s64.s32" => lanes!(|a: i32| i64::from(a)),
        "cvt.u32.s32" | "cvt.s32.u32" => lanes!(|a: u32| a),
        // Parameters have the same addresses in the generic window.
        "cvta.param.u64" => lanes!(|a: u64| a),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compute(opcode: &str, operands: &[u64]) -> u64 {
        let (count, function) = find(opcode).expect(opcode);
        assert_eq!(count, operands.len(), "{opcode}");
        let operand = |index: usize| [operands.get(index).copied().unwrap_or(0); 32];
        let lanes = function([&operand(0), &operand(1), &operand(2)]);
        assert!(lanes.iter().all(|&lane| lane == lanes[0]));
        lanes[0]
    }

    fn bits(value: f32) -> u64 {
        u64::from(value.to_bits())
    }

    #[test]
    fn integers_wrap_at_their_width() {
        assert_eq!(compute("add.s32", &[0xffff_ffff, 2]), 1);
        assert_eq!(compute("sub.s32", &[1, 2]), 0xffff_ffff);
        assert_eq!(compute("add.s64", &[0xffff_ffff, 2]), 0x1_0000_0001);
        assert_eq!(compute("mul.wide.u32", &[0xffff_ffff, 2]), 0x1_ffff_fffe);
        assert_eq!(compute("mul.hi.u32", &[0xffff_ffff, 2]), 1);
        assert_eq!(compute("mad.lo.s32", &[0x1_0000, 0x1_0000, 5]), 5);
        // An immediate -1 of a 32-bit instruction has 64 bits.
        assert_eq!(compute("max.s32", &[u64::MAX, 3]), 3);
        assert_eq!(compute("cvt.s64.s32", &[0xffff_ffff]), u64::MAX);
        assert_eq!(compute("cvt.u64.u32", &[0xffff_ffff]), 0xffff_ffff);
        assert_eq!(compute("neg.s32", &[1]), 0xffff_ffff);
    }

    #[test]
    fn shifts_and_fields() {
        assert_eq!(compute("shl.b32", &[1, 31]), 1 << 31);
        assert_eq!(compute("shl.b32", &[1, 32]), 0);
        assert_eq!(compute("shr.s32", &[0x8000_0000, 40]), 0xffff_ffff);
        assert_eq!(compute("shr.u64", &[1 << 40, 40]), 1);
        assert_eq!(compute("bfe.u32", &[0xabcd, 4, 8]), 0xbc);
        assert_eq!(compute("bfe.s32", &[0xabcd, 4, 8]), 0xffff_ffbc);
        assert_eq!(compute("bfe.s32", &[0xabcd, 4, 5]), 0xffff_fffc);
        assert_eq!(compute("bfe.u32", &[0xabcd_0123, 0, 32]), 0xabcd_0123);
        assert_eq!(compute("shf.l.wrap.b32", &[0x8000_0000, 1, 1]), 3);
        assert_eq!(compute("shf.r.wrap.b32", &[0x8000_0000, 1, 31]), 3);
        assert_eq!(compute("prmt.b32", &[0x8382_8180, 0x0706_0504, 0x7430]), 0x0704_8380);
        assert_eq!(compute("prmt.b32", &[0x8382_8180, 0x0706_0504, 0xf8f8]), 0x00ff_00ff);
        // 1 and -448, then the smallest numbers.
        assert_eq!(compute("cvt.rn.f16x2.e4m3x2", &[0xfe38]), 0xdf00_3c00);
        assert_eq!(compute("cvt.rn.f16x2.e4m3x2", &[0x8101]), 0x9800_1800);
        assert_eq!(compute("not.pred", &[1]), 0);
        assert_eq!(compute("not.b32", &[1]), 0xffff_fffe);
    }

    #[test]
    fn floating_point() {
        assert_eq!(compute("ex2.approx.ftz.f32", &[bits(-3.0)]), bits(0.125));
        assert_eq!(compute("ex2.approx.ftz.f32", &[bits(-130.0)]), 0);
        assert_eq!(compute("ex2.approx.ftz.f32", &[bits(f32::NEG_INFINITY)]), 0);
        assert_eq!(compute("lg2.approx.ftz.f32", &[bits(8.0)]), bits(3.0));
        assert_eq!(compute("rcp.approx.ftz.f32", &[0]), bits(f32::INFINITY));
        assert_eq!(compute("max.f32", &[bits(f32::NAN), bits(-1.0)]), bits(-1.0));
        assert_eq!(compute("fma.rn.f32", &[bits(3.0), bits(2.0), bits(1.0)]), bits(7.0));
        // High half first.
        assert_eq!(compute("cvt.rn.f16x2.f32", &[bits(1.0), bits(2.0)]), 0x3c00_4000);
        assert_eq!(compute("cvt.rn.bf16x2.f32", &[bits(1.0), bits(2.0)]), 0x3f80_4000);
        assert_eq!(compute("cvt.f32.f16", &[0x4000]), bits(2.0));
        assert_eq!(compute("fma.rn.f16x2", &[0x3c00_4000, 0x4000_4000, 0x3c00_3c00]), 0x4200_4500);
        assert_eq!(compute("mul.f16x2", &[0x3c00_4000, 0x4000_4000]), 0x4000_4400);
        assert_eq!(compute("cvt.rn.f32.s32", &[u64::from(u32::MAX)]), bits(-1.0));
    }

    #[test]
    fn comparisons_of_nan() {
        let nan = bits(f32::NAN);
        for (operator, expected) in
            [("eq", 0), ("ne", 0), ("neu", 1), ("leu", 1), ("gt", 0), ("ltu", 1), ("nan", 1), ("num", 0)]
        {
            assert_eq!(compute(&format!("setp.{operator}.f32"), &[nan, bits(1.0)]), expected, "{operator}");
        }
        assert_eq!(compute("setp.ne.f32", &[bits(2.0), bits(1.0)]), 1);
        assert_eq!(compute("setp.lt.s32", &[0xffff_ffff, 0]), 1);
        assert_eq!(compute("setp.lt.u32", &[0xffff_ffff, 0]), 0);
        assert_eq!(compute("setp.ge.u64", &[1 << 40, 7]), 1);
        assert_eq!(compute("set.lt.u32.u32", &[1, 2]), 0xffff_ffff);
        assert_eq!(compute("set.lt.u32.u32", &[2, 2]), 0);
    }

    #[test]
    fn moves_cut_to_their_width() {
        assert_eq!(compute("mov.b32", &[u64::MAX]), 0xffff_ffff);
        assert_eq!(compute("cvt.u16.u32", &[0x1_2345]), 0x2345);
        assert_eq!(compute("selp.b32", &[u64::MAX, 2, 1]), 0xffff_ffff);
        assert_eq!(compute("selp.b64", &[7, 2, 0]), 2);
    }

    #[test]
    fn unknown_instructions_are_none() {
        assert!(find("add.sat.s32").is_none() && find("setp.eq.f64").is_none() && find("bra").is_none());
    }
}
