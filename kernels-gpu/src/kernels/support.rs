//! Kernels of tests and benchmarks: drawing pools on the device, and flushing the L2 cache by reading.

use pat_abi::generator::{element, row_key};
use pat_abi::manifest::SUPPORT_THREADS as THREADS;
use pat_abi::params::{FillParams, FlushParams};

use crate::eight_bit::{self, Code};
use crate::element::{self, Element};
use crate::ptx::ldst::{load_global_u32x4, store_global_u32, store_global_u32x2, store_global_u32x4};
use crate::ptx::{shuffle, special};

/// Writes 8 elements of a type that numbers are rounded to.
trait Eight {
    /// Of an element.
    const BYTES: u64;

    /// # Safety
    /// `address` is of as many bytes that may be written, and a multiple of them.
    unsafe fn store(address: u64, number: impl Fn(u32) -> f32);
}

/// 16-bit elements.
struct Wide<E>(E);

impl<E: Element> Eight for Wide<E> {
    const BYTES: u64 = 2;

    #[inline(always)]
    unsafe fn store(address: u64, number: impl Fn(u32) -> f32) {
        let pair = |i: u32| E::pack(number(i), number(i + 1));
        // SAFETY: the caller's contract.
        unsafe { store_global_u32x4(address, [pair(0), pair(2), pair(4), pair(6)]) };
    }
}

/// 8-bit elements.
struct Narrow<C>(C);

impl<C: Code> Eight for Narrow<C> {
    const BYTES: u64 = 1;

    #[inline(always)]
    unsafe fn store(address: u64, number: impl Fn(u32) -> f32) {
        let four = |i: u32| C::nearest_four([number(i), number(i + 1), number(i + 2), number(i + 3)]);
        // SAFETY: the caller's contract.
        unsafe { store_global_u32x2(address, [four(0), four(4)]) };
    }
}

/// Fills a tensor `[pages, tokens, heads, dim]` from the counter generator; a CTA of 256 threads, any grid.
///
/// # Safety
/// `params` describes a live, writable buffer.
#[inline(always)]
unsafe fn fill<T: Eight>(params: &FillParams) {
    // A thread writes 8 elements at a time: `chunks` per row.
    let chunks = params.dim / 8;
    let total = params.pages as u64 * params.tokens.divisor as u64 * params.heads.divisor as u64 * chunks as u64;
    let step = special::cta_count() as u64 * THREADS as u64;
    let mut index = special::cta_index() as u64 * THREADS as u64 + special::thread_index() as u64;
    while index < total {
        // `dim` is a power of two, so are the chunks.
        let dim = (index as u32 & (chunks - 1)) * 8;
        let row = (index >> chunks.trailing_zeros()) as u32;
        let (row, head) = params.heads.divide_remainder(row);
        let (page, token) = params.tokens.divide_remainder(row);
        let key = row_key(params.seed, params.tensor, page, token, head);
        let address = params
            .base
            .wrapping_add((page as i64).wrapping_mul(params.page_stride) as u64)
            .wrapping_add((token as i64).wrapping_mul(params.token_stride) as u64)
            .wrapping_add((head as i64).wrapping_mul(params.head_stride) as u64)
            .wrapping_add(dim as u64 * T::BYTES);
        // SAFETY: the caller's contract; strides are multiples of 16 bytes.
        unsafe { T::store(address, |i| element(key, dim + i)) };
        index += step;
    }
}

macro_rules! fill_entries {
    ($bytes:ident $types:ident $([$type:ident $name:literal])*) => {
        $(const _: () = {
            /// Fills a tensor of this type.
            ///
            /// # Safety
            /// As [`FillParams`] says.
            #[unsafe(export_name = concat!("pat_fill_", $name))]
            unsafe extern "ptx-kernel" fn entry(params: FillParams) {
                // SAFETY: the caller's contract.
                unsafe { fill::<$bytes<$types::$type>>(&params) }
            }
        };)*
    };
}

fill_entries!(Wide element [F16 "f16"] [Bf16 "bf16"]);
pat_abi::eight_bit_types!(fill_entries! { Narrow eight_bit });

/// Evicts the L2 cache by reading a large buffer. Reading leaves no dirty lines whose write-back would be charged to
/// what is timed next. One word per CTA is written, so that the loads are not dead.
///
/// # Safety
/// As [`FlushParams`] says.
#[unsafe(no_mangle)]
pub unsafe extern "ptx-kernel" fn pat_flush_l2(params: FlushParams) {
    let thread = special::thread_index();
    let step = special::cta_count() as u64 * THREADS as u64 * 16;
    let mut offset = (special::cta_index() as u64 * THREADS as u64 + thread as u64) * 16;
    let mut sum = 0u32;
    while offset < params.bytes {
        // SAFETY: below `bytes`, which is a multiple of 16.
        let words = unsafe { load_global_u32x4(params.buffer + offset) };
        for word in words {
            sum = sum.wrapping_add(word);
        }
        offset += step;
    }
    for i in 0..5 {
        sum = sum.wrapping_add(shuffle::xor_u32(sum, 16 >> i));
    }
    if thread == 0 {
        // SAFETY: the caller provides one word per CTA.
        unsafe { store_global_u32(params.sums + special::cta_index() as u64 * 4, sum) };
    }
}
