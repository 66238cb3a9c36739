//! How the mma.sync kernels read K and V, whose elements are of Q's type or have 8 bits and factors. What wgmma kernels need of
//! it, too, stands here as well.

use core::borrow::Borrow;
use core::marker::PhantomData;

use pat_abi::layout::{key_matrix_row, key_matrix_step, swizzled_chunk, value_matrix_chunk, value_matrix_row};
use pat_abi::{ForwardParams, ScaledForwardParams};

use crate::eight_bit::{Code, factor_of_head};
use crate::element::{Element, F16};
use crate::ptx::ldst::{load_written_u32, load_written_u32x2};
use crate::ptx::mma::{ldmatrix_x4, ldmatrix_x4_transposed};
use crate::ptx::{math, shuffle, special};
use crate::softmax::scale_products;
use crate::tile::fragment::{self, Accumulator, Operand, Queries};

/// Single elements of K and V, as rows that are computed once more take them ([`crate::isolation`]).
pub trait Rows: Copy {
    /// Bytes of an element.
    const BYTES: u32;

    /// Four elements of a row.
    type Four: Copy;

    /// The four elements of a key that stand beside those of the query `query_bytes` behind its first.
    ///
    /// # Safety
    /// They lie there; the row and `query_bytes` are multiples of four elements.
    unsafe fn load_four(row: u64, query_bytes: u32) -> Self::Four;

    /// The first or the last two of four elements, without K's factor.
    fn two_of_four<E: Element>(four: Self::Four, half: usize) -> [f32; 2];

    /// Two elements of a token's values, with their factor; the address is that of the first.
    ///
    /// # Safety
    /// They lie there; the address is a multiple of two elements.
    unsafe fn two_of_value<E: Element>(self, address: u64) -> [f32; 2];
}

/// What the mma.sync kernels do differently by the elements of K and V.
pub trait Cache: Rows {
    /// What a kernel is launched with.
    type Params;

    /// Which four elements of 16 of a query lane `l` holds for a product: two at `l % 4` times as many bytes,
    const QUERY_LANE_BYTES: u64;
    /// and two so many bytes behind them.
    const QUERY_HALF_BYTES: u64;

    /// The cache of this CTA's KV head, and what the kernels beside it take.
    ///
    /// # Safety
    /// Where `params` names factors, there is one for each KV head.
    unsafe fn of(params: &Self::Params) -> (Self, impl Borrow<ForwardParams>);

    /// Puts queries as they were loaded into the form that [`Self::scores`] takes; returns the factors of [`Queries::scales`].
    /// Convergent.
    fn arrange<E: Element, const STEPS: usize>(queries: &mut Operand<STEPS>) -> [f32; 2];

    /// The weights of [`Self::accumulate`].
    fn weights<E: Element, const STEPS: usize>(p: &Accumulator<STEPS>) -> Operand<STEPS>;

    /// As [`fragment::scores`], without K's factor.
    ///
    /// # Safety
    /// As [`fragment::scores`].
    unsafe fn scores<E: Element, const HEAD_STEPS: usize, const KEY_STEPS: usize>(
        q: &Queries<HEAD_STEPS>,
        keys: u32,
        lane: u32,
    ) -> Accumulator<KEY_STEPS>;

    /// As [`fragment::accumulate`], in an order of columns of its own, without V's factor: [`Self::finish`] has both.
    ///
    /// # Safety
    /// As [`fragment::accumulate`].
    unsafe fn accumulate<E: Element, const STEPS: usize, const ROW_STEPS: usize, const KEY_STEPS: usize>(
        accumulator: &mut Accumulator<STEPS>,
        p: &Operand<KEY_STEPS>,
        values: u32,
        lane: u32,
    );

    /// What [`Self::accumulate`] has made becomes the output. Convergent.
    fn finish<const STEPS: usize>(self, accumulator: &mut Accumulator<STEPS>, lane: u32);
}

/// K and V of Q's type.
#[derive(Clone, Copy)]
pub struct Plain;

impl Cache for Plain {
    type Params = ForwardParams;
    const QUERY_LANE_BYTES: u64 = 4;
    const QUERY_HALF_BYTES: u64 = 16;

    #[inline(always)]
    unsafe fn of(params: &ForwardParams) -> (Self, impl Borrow<ForwardParams>) {
        (Self, params)
    }

    #[inline(always)]
    fn arrange<E: Element, const STEPS: usize>(_: &mut Operand<STEPS>) -> [f32; 2] {
        [1.0; 2]
    }

    #[inline(always)]
    fn weights<E: Element, const STEPS: usize>(p: &Accumulator<STEPS>) -> Operand<STEPS> {
        fragment::to_operand::<E, STEPS>(p)
    }

    #[inline(always)]
    unsafe fn scores<E: Element, const HEAD_STEPS: usize, const KEY_STEPS: usize>(
        q: &Queries<HEAD_STEPS>,
        keys: u32,
        lane: u32,
    ) -> Accumulator<KEY_STEPS> {
        // SAFETY: the caller's contract.
        unsafe { fragment::scores::<E, HEAD_STEPS, KEY_STEPS>(q, keys, lane) }
    }

    #[inline(always)]
    unsafe fn accumulate<E: Element, const STEPS: usize, const ROW_STEPS: usize, const KEY_STEPS: usize>(
        accumulator: &mut Accumulator<STEPS>,
        p: &Operand<KEY_STEPS>,
        values: u32,
        lane: u32,
    ) {
        // SAFETY: the caller's contract.
        unsafe { fragment::accumulate::<E, STEPS, ROW_STEPS, KEY_STEPS>(accumulator, p, values, lane) };
    }

    #[inline(always)]
    fn finish<const STEPS: usize>(self, _: &mut Accumulator<STEPS>, _: u32) {}
}

impl Rows for Plain {
    const BYTES: u32 = 2;

    type Four = [u32; 2];

    #[inline(always)]
    unsafe fn load_four(row: u64, query_bytes: u32) -> [u32; 2] {
        // SAFETY: the caller's contract.
        unsafe { load_written_u32x2(row + query_bytes as u64) }
    }

    #[inline(always)]
    fn two_of_four<E: Element>(four: [u32; 2], half: usize) -> [f32; 2] {
        E::unpack(four[half])
    }

    #[inline(always)]
    unsafe fn two_of_value<E: Element>(self, address: u64) -> [f32; 2] {
        // SAFETY: the caller's contract.
        E::unpack(unsafe { load_written_u32(address) })
    }
}

/// 8-bit K and V, which are multiplied as binary16 whatever Q's type.
///
/// `ldmatrix` moves 16 bits at a time, two elements. Where a lane expects two columns of a key it gets four: they are taken as
/// the columns of the two halves of a product's 16, and Q's columns are put into the same order. Where it expects a column of
/// two tokens' values it gets two columns of each: these go to two products, and the order of the output's columns is put
/// right at the end.
///
/// A row of queries in bfloat16 becomes one in binary16 by a power of 2 that makes its largest element about 2^14: bits are lost
/// of elements alone that are less than 2^-31 of it. Weights are at most 1.
#[derive(Clone, Copy)]
pub struct EightBit<C> {
    /// Divided by that of widened numbers.
    v_scale: f32,
    code: PhantomData<C>,
}

/// Of 16-bit numbers, two to a word: those of lower halves, those of upper halves.
#[inline(always)]
const fn transposed(words: [u32; 2]) -> [u32; 2] {
    [words[0] & 0xffff | words[1] << 16, words[0] >> 16 | words[1] & 0xffff_0000]
}

/// What a KV head's factors make of a kernel's parameters.
pub struct ScaledHead {
    /// K's factor is part of the scores' scale.
    pub forward: ForwardParams,
    /// What sums of products with elements of V are multiplied with.
    pub v_scale: f32,
}

impl ScaledHead {
    /// Of numbers that are to be multiplied with `factor` besides.
    ///
    /// # Safety
    /// Where `params` names factors, there is one for this KV head.
    #[inline(always)]
    pub unsafe fn new(params: &ScaledForwardParams, kv_head: u32, factor: f32) -> Self {
        // SAFETY: the caller's contract.
        let of_head = |factors: u64| unsafe { factor_of_head(factors, kv_head) } * factor;
        let k_scale = params.k_scale * of_head(params.k_scales);
        let mut forward = params.forward;
        scale_products(&mut forward, k_scale);
        Self { forward, v_scale: params.v_scale * of_head(params.v_scales) }
    }
}

/// Puts row `row` (0 or 1) of a lane's A operands into binary16; returns what scores with it are to be multiplied with.
/// Convergent.
#[inline(always)]
pub fn row_to_f16<E: Element>(queries: &mut [[u32; 4]], row: usize) -> f32 {
    let halves = [row, row + 2];
    let mut largest = 0.0;
    for step in queries.iter() {
        for half in halves {
            let [a, b] = E::unpack(step[half]).map(f32::abs);
            largest = math::max(largest, math::max(a, b));
        }
    }
    largest = math::max(largest, shuffle::xor_f32(largest, 1));
    largest = math::max(largest, shuffle::xor_f32(largest, 2));
    // Neither power of 2 below is infinite or subnormal.
    let exponent = largest.to_bits() >> 23;
    let exponent = if exponent < 15 { 15 } else { exponent };
    let scale = f32::from_bits((268 - exponent) << 23);
    for step in queries.iter_mut() {
        for half in halves {
            let [a, b] = E::unpack(step[half]).map(|element| element * scale);
            step[half] = F16::pack(a, b);
        }
    }
    f32::from_bits((exponent - 14) << 23)
}

impl<C: Code> Cache for EightBit<C> {
    type Params = ScaledForwardParams;
    const QUERY_LANE_BYTES: u64 = 8;
    const QUERY_HALF_BYTES: u64 = 4;

    #[inline(always)]
    unsafe fn of(params: &ScaledForwardParams) -> (Self, impl Borrow<ForwardParams>) {
        let (_, kv_head) = params.forward.kv_heads_divisor.divide_remainder(special::cta_index());
        // SAFETY: the caller's contract.
        let ScaledHead { forward, v_scale } = unsafe { ScaledHead::new(params, kv_head, 1.0 / C::FACTOR) };
        (Self { v_scale, code: PhantomData }, forward)
    }

    #[inline(always)]
    fn arrange<E: Element, const STEPS: usize>(queries: &mut Operand<STEPS>) -> [f32; 2] {
        let mut scales = [1.0; 2];
        for row in 0..2 {
            if !E::IS_F16 {
                scales[row] = row_to_f16::<E>(queries, row);
            }
            // Even elements of four beside even ones, where widened keys are.
            for step in 0..if C::KEYS_IN_ORDER { 0 } else { STEPS } {
                [queries[step][row], queries[step][row + 2]] = transposed([queries[step][row], queries[step][row + 2]]);
            }
        }
        scales
    }

    #[inline(always)]
    fn weights<E: Element, const STEPS: usize>(p: &Accumulator<STEPS>) -> Operand<STEPS> {
        fragment::to_operand::<F16, STEPS>(p)
    }

    #[inline(always)]
    unsafe fn scores<E: Element, const HEAD_STEPS: usize, const KEY_STEPS: usize>(
        q: &Queries<HEAD_STEPS>,
        keys: u32,
        lane: u32,
    ) -> Accumulator<KEY_STEPS> {
        const { assert!(!Queries::<HEAD_STEPS>::IN_SMEM) };
        let row_bytes = 16 * HEAD_STEPS as u32;
        let row = key_matrix_row(lane);
        let mut s = [[[0.0; 4]; 2]; KEY_STEPS];
        for pair in 0..HEAD_STEPS / 2 {
            let chunk = swizzled_chunk(HEAD_STEPS as u32, row, 2 * pair as u32 + key_matrix_step(lane));
            for block in 0..KEY_STEPS {
                // SAFETY: inside the tile: `row < 16` and `chunk < HEAD_STEPS`.
                let b = unsafe { ldmatrix_x4(keys + row * row_bytes + chunk * 16 + block as u32 * 16 * row_bytes) };
                for half in 0..2 {
                    for step in 0..2 {
                        // SAFETY: the queries are in registers.
                        let q = unsafe { q.step(2 * pair + step, lane) };
                        F16::multiply(&mut s[block][half], &q, C::keys(b[2 * half + step]));
                    }
                }
            }
        }
        for scores in s.as_flattened_mut() {
            for (index, score) in scores.iter_mut().enumerate() {
                let settled = C::settle(*score);
                *score = if E::IS_F16 { settled } else { settled * q.scales[index / 2] };
            }
        }
        s
    }

    #[inline(always)]
    unsafe fn accumulate<E: Element, const STEPS: usize, const ROW_STEPS: usize, const KEY_STEPS: usize>(
        accumulator: &mut Accumulator<STEPS>,
        p: &Operand<KEY_STEPS>,
        values: u32,
        lane: u32,
    ) {
        const { assert!(STEPS == ROW_STEPS) };
        let row_bytes = 16 * STEPS as u32;
        let row = value_matrix_row(lane);
        for block in 0..KEY_STEPS {
            for pair in 0..STEPS / 2 {
                let chunk = swizzled_chunk(STEPS as u32, row, 2 * pair as u32 + value_matrix_chunk(lane));
                let address = values + row * row_bytes + chunk * 16 + block as u32 * 16 * row_bytes;
                // SAFETY: inside the tile: `row < 16` and `chunk < STEPS`.
                let b = unsafe { ldmatrix_x4_transposed(address) };
                for step in 0..2 {
                    let [first, second] = [b[2 * step], b[2 * step + 1]].map(C::widen);
                    let products = &mut accumulator[2 * pair + step];
                    F16::multiply(&mut products[0], &p[block], [first[0], second[0]]);
                    F16::multiply(&mut products[1], &p[block], [first[1], second[1]]);
                }
            }
        }
    }

    #[inline(always)]
    fn finish<const STEPS: usize>(self, accumulator: &mut Accumulator<STEPS>, lane: u32) {
        let is_upper = lane & 2 != 0;
        let source = lane & !3 | (lane & 1) << 1 | lane >> 1 & 1;
        for products in accumulator {
            let made = *products;
            for row in 0..2 {
                for parity in 0..2 {
                    // Of the 16 columns, pairs `2 * (lane % 4)` and the next are here: columns of one parity are those of one
                    // product. Pairs `lane % 4` and `lane % 4 + 4` are wanted. First lanes that differ in the index's upper
                    // bit exchange a pair, then pairs go to the lanes whose index has its bits the other way round.
                    let [low, high] = [made[parity][2 * row], made[parity][2 * row + 1]];
                    let received = shuffle::xor_f32(if is_upper { low } else { high }, 2);
                    let pairs = if is_upper { [received, high] } else { [low, received] };
                    for half in 0..2 {
                        let sum = shuffle::from_lane_f32(pairs[half], source);
                        products[half][2 * row + parity] = C::settle(sum) * self.v_scale;
                    }
                }
            }
        }
    }
}

/// [`Rows::load_four`] of codes.
///
/// # Safety
/// As there.
#[inline(always)]
pub(crate) unsafe fn four_codes(row: u64, query_bytes: u32) -> u32 {
    // SAFETY: the caller's contract.
    unsafe { load_written_u32(row + query_bytes as u64 / 2) }
}

/// The codes that [`Rows::two_of_value`] is asked for, in the lower half of a word: words are loaded whole.
///
/// # Safety
/// As there.
#[inline(always)]
pub(crate) unsafe fn two_codes(address: u64) -> u32 {
    let shift = (address & 2) as u32 * 8;
    // SAFETY: the caller's contract; rows are multiples of four bytes.
    unsafe { load_written_u32(address & !3) >> shift }
}

impl<C: Code> Rows for EightBit<C> {
    const BYTES: u32 = 1;

    type Four = u32;

    #[inline(always)]
    unsafe fn load_four(row: u64, query_bytes: u32) -> u32 {
        // SAFETY: the caller's contract.
        unsafe { four_codes(row, query_bytes) }
    }

    #[inline(always)]
    fn two_of_four<E: Element>(four: u32, half: usize) -> [f32; 2] {
        let [even, odd] = C::widen(four).map(F16::unpack);
        [even[half], odd[half]].map(C::settle)
    }

    #[inline(always)]
    unsafe fn two_of_value<E: Element>(self, address: u64) -> [f32; 2] {
        // SAFETY: the caller's contract.
        let word = unsafe { two_codes(address) };
        C::widen(word).map(|pair| C::settle(F16::unpack(pair)[0]) * self.v_scale)
    }
}
