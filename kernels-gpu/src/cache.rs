//! How the mma.sync kernels read K and V, whose elements are of Q's type or have 8 bits and factors.

use core::borrow::Borrow;
use core::marker::PhantomData;

use pat_abi::layout::{key_matrix_row, key_matrix_step, swizzled_chunk, value_matrix_chunk, value_matrix_row};
use pat_abi::{ForwardParams, ScaledForwardParams};

use crate::eight_bit::{Code, factor_of_head};
use crate::element::Element;
use crate::ptx::bytes::permute;
use crate::ptx::ldst::{load_global_u32, load_global_u32x2};
use crate::ptx::mma::{ldmatrix_x4, ldmatrix_x4_transposed};
use crate::ptx::{shuffle, special, switches};
use crate::tile::fragment::{self, Accumulator, Operand, Queries};

// Which two bytes of a word go to the upper bytes of its halves.
const FIRST: u32 = 0x1404;
const SECOND: u32 = 0x3424;
const EVEN: u32 = 0x2404;
const ODD: u32 = 0x3414;

/// What the forward kernels do differently by the elements of K and V.
pub trait Cache: Copy {
    /// What a kernel is launched with.
    type Params;
    /// Bytes of an element.
    const BYTES: u32;

    /// Which four elements of 16 of a query lane `l` holds for a product: two at `l % 4` times as many bytes,
    const QUERY_LANE_BYTES: u64;
    /// and two so many bytes behind them.
    const QUERY_HALF_BYTES: u64;

    /// The cache of this CTA's KV head, and what the kernels beside it take.
    ///
    /// # Safety
    /// Where `params` names factors, there is one for each KV head.
    unsafe fn of(params: &Self::Params) -> (Self, impl Borrow<ForwardParams>);

    /// As [`fragment::scores`].
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

/// K and V of Q's type.
#[derive(Clone, Copy)]
pub struct Plain;

impl Cache for Plain {
    type Params = ForwardParams;
    const BYTES: u32 = 2;
    const QUERY_LANE_BYTES: u64 = 4;
    const QUERY_HALF_BYTES: u64 = 16;

    #[inline(always)]
    unsafe fn of(params: &ForwardParams) -> (Self, impl Borrow<ForwardParams>) {
        (Self, params)
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

    type Four = [u32; 2];

    #[inline(always)]
    unsafe fn load_four(row: u64, query_bytes: u32) -> [u32; 2] {
        // SAFETY: the caller's contract.
        unsafe { load_global_u32x2(row + query_bytes as u64) }
    }

    #[inline(always)]
    fn two_of_four<E: Element>(four: [u32; 2], half: usize) -> [f32; 2] {
        E::unpack(four[half])
    }

    #[inline(always)]
    unsafe fn two_of_value<E: Element>(self, address: u64) -> [f32; 2] {
        // SAFETY: the caller's contract.
        E::unpack(unsafe { load_global_u32(address) })
    }
}

/// 8-bit K and V.
///
/// `ldmatrix` moves 16 bits at a time, two elements. Where a lane expects two columns of a key it gets four: they are taken as
/// the columns of the two halves of a product's 16, and Q's columns are put into the same order. Where it expects a column of
/// two tokens' values it gets two columns of each: these go to two products, and the order of the output's columns is put
/// right at the end.
#[derive(Clone, Copy)]
pub struct EightBit<C> {
    v_scale: f32,
    code: PhantomData<C>,
}

impl<C: Code> EightBit<C> {
    #[inline(always)]
    fn widen<E: Element, const SELECTOR: u32>(word: u32) -> u32 {
        E::widen::<C>(permute::<SELECTOR>(word))
    }
}

impl<C: Code> Cache for EightBit<C> {
    type Params = ScaledForwardParams;
    const BYTES: u32 = 1;
    const QUERY_LANE_BYTES: u64 = 8;
    const QUERY_HALF_BYTES: u64 = 4;

    #[inline(always)]
    unsafe fn of(params: &ScaledForwardParams) -> (Self, impl Borrow<ForwardParams>) {
        let (_, kv_head) = params.forward.kv_heads_divisor.divide_remainder(special::cta_index());
        // SAFETY: the caller's contract.
        let of_head = |factors: u64| unsafe { factor_of_head(factors, kv_head) };
        // K's factor is part of the scores' scale.
        let k_scale = params.k_scale * of_head(params.k_scales);
        let mut forward = params.forward;
        // A cap is of what comes behind the scale, and without one its factor is not used.
        forward.soft_cap_scale *= k_scale;
        forward.scale_log2 *= switches::one_under_cap(k_scale);
        (Self { v_scale: params.v_scale * of_head(params.v_scales), code: PhantomData }, forward)
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
                        let word = b[2 * half + step];
                        let b = [Self::widen::<E, FIRST>(word), Self::widen::<E, SECOND>(word)];
                        // SAFETY: the queries are in registers.
                        E::multiply(&mut s[block][half], &unsafe { q.step(2 * pair + step, lane) }, b);
                    }
                }
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
                    let words = [b[2 * step], b[2 * step + 1]];
                    let products = &mut accumulator[2 * pair + step];
                    E::multiply(&mut products[0], &p[block], words.map(Self::widen::<E, EVEN>));
                    E::multiply(&mut products[1], &p[block], words.map(Self::widen::<E, ODD>));
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
                        products[half][2 * row + parity] = shuffle::from_lane_f32(pairs[half], source) * self.v_scale;
                    }
                }
            }
        }
    }

    type Four = u32;

    #[inline(always)]
    unsafe fn load_four(row: u64, query_bytes: u32) -> u32 {
        // SAFETY: the caller's contract.
        unsafe { load_global_u32(row + query_bytes as u64 / 2) }
    }

    #[inline(always)]
    fn two_of_four<E: Element>(four: u32, half: usize) -> [f32; 2] {
        E::unpack(if half == 0 { Self::widen::<E, FIRST>(four) } else { Self::widen::<E, SECOND>(four) })
    }

    #[inline(always)]
    unsafe fn two_of_value<E: Element>(self, address: u64) -> [f32; 2] {
        // Words are loaded whole.
        let shift = (address & 2) as u32 * 8;
        // SAFETY: the caller's contract; rows are multiples of four bytes.
        let word = unsafe { load_global_u32(address & !3) } >> shift;
        E::unpack(Self::widen::<E, FIRST>(word)).map(|value| value * self.v_scale)
    }
}
