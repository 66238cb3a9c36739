//! What the consumers do differently by the elements of K and V, which are of Q's type or have 8 bits and factors.

use core::borrow::Borrow;
use core::marker::PhantomData;

use super::smem::Smem;
use super::widen::widen;
use crate::cache::{Plain, Rows, ScaledHead, four_codes, row_to_f16, two_codes};
use crate::eight_bit::Code;
use crate::element::{Element, F16};
use pat_abi::reader::PlanView;
use pat_abi::{ForwardParams, ScaledForwardParams};

/// Elements of K and V, of a KV head.
pub(super) trait Format: Rows {
    /// What a kernel is launched with.
    type Params;

    /// What of it no elements are needed for.
    fn forward(params: &Self::Params) -> &ForwardParams;

    /// The elements of a KV head, and what computes with them takes.
    ///
    /// # Safety
    /// Where `params` names factors, there is one for each KV head.
    unsafe fn of_head(params: &Self::Params, kv_head: u32) -> (Self, impl Borrow<ForwardParams>);

    /// Puts A operands, queries as they were loaded, into the type of the products; returns the factors of [`Self::scale`].
    /// Convergent.
    fn arrange<E: Element>(queries: &mut [[u32; 4]]) -> [f32; 2];

    /// Multiplies the scores of the two rows of a lane by what their queries were divided by.
    fn scale<E: Element>(scores: &mut [f32], factors: [f32; 2]);

    /// What the warps do that widen tiles, if there are any.
    ///
    /// # Safety
    /// As [`widen`].
    unsafe fn widen<const HEAD_DIM: u32, const GROUPS: u32, const BYTES: u32>(
        p: &ForwardParams,
        plan: PlanView,
        smem: Smem<HEAD_DIM, GROUPS, BYTES>,
        warp: u32,
    );

    /// Sums of products with elements of V become those of the numbers they stand for.
    fn finish(self, output: &mut [f32]);
}

impl Format for Plain {
    type Params = ForwardParams;

    #[inline(always)]
    fn forward(params: &ForwardParams) -> &ForwardParams {
        params
    }

    #[inline(always)]
    unsafe fn of_head(params: &ForwardParams, _: u32) -> (Self, impl Borrow<ForwardParams>) {
        (Self, params)
    }

    #[inline(always)]
    fn arrange<E: Element>(_: &mut [[u32; 4]]) -> [f32; 2] {
        [1.0; 2]
    }

    #[inline(always)]
    fn scale<E: Element>(_: &mut [f32], _: [f32; 2]) {}

    #[inline(always)]
    unsafe fn widen<const HEAD_DIM: u32, const GROUPS: u32, const BYTES: u32>(
        _: &ForwardParams,
        _: PlanView,
        _: Smem<HEAD_DIM, GROUPS, BYTES>,
        _: u32,
    ) {
    }

    #[inline(always)]
    fn finish(self, _: &mut [f32]) {}
}

/// 8-bit K and V, widened to binary16 whatever Q's type. Rows of queries in bfloat16 become binary16 as for the mma.sync kernels.
#[derive(Clone, Copy)]
pub(super) struct Widened<C> {
    v_scale: f32,
    code: PhantomData<C>,
}

impl<C: Code> Format for Widened<C> {
    type Params = ScaledForwardParams;

    #[inline(always)]
    fn forward(params: &ScaledForwardParams) -> &ForwardParams {
        &params.forward
    }

    #[inline(always)]
    unsafe fn of_head(params: &ScaledForwardParams, kv_head: u32) -> (Self, impl Borrow<ForwardParams>) {
        // SAFETY: the caller's contract.
        let ScaledHead { forward, v_scale } = unsafe { ScaledHead::new(params, kv_head, 1.0) };
        (Self { v_scale, code: PhantomData }, forward)
    }

    #[inline(always)]
    fn arrange<E: Element>(queries: &mut [[u32; 4]]) -> [f32; 2] {
        if E::IS_F16 { [1.0; 2] } else { [0, 1].map(|row| row_to_f16::<E>(queries, row)) }
    }

    #[inline(always)]
    fn scale<E: Element>(scores: &mut [f32], factors: [f32; 2]) {
        if !E::IS_F16 {
            crate::softmax::rescale(scores, factors);
        }
    }

    #[inline(always)]
    unsafe fn widen<const HEAD_DIM: u32, const GROUPS: u32, const BYTES: u32>(
        p: &ForwardParams,
        plan: PlanView,
        smem: Smem<HEAD_DIM, GROUPS, BYTES>,
        warp: u32,
    ) {
        // SAFETY: the caller's contract.
        unsafe { widen::<C, HEAD_DIM, GROUPS, BYTES>(p, plan, smem, warp) };
    }

    #[inline(always)]
    fn finish(self, output: &mut [f32]) {
        for sum in output {
            *sum *= self.v_scale;
        }
    }
}

impl<C: Code> Rows for Widened<C> {
    const BYTES: u32 = 1;

    type Four = u32;

    #[inline(always)]
    unsafe fn load_four(row: u64, query_bytes: u32) -> u32 {
        // SAFETY: the caller's contract.
        unsafe { four_codes(row, query_bytes) }
    }

    #[inline(always)]
    fn two_of_four<E: Element>(four: u32, half: usize) -> [f32; 2] {
        F16::unpack(C::exact(four)[half])
    }

    #[inline(always)]
    unsafe fn two_of_value<E: Element>(self, address: u64) -> [f32; 2] {
        // SAFETY: the caller's contract.
        let word = unsafe { two_codes(address) };
        F16::unpack(C::exact(word)[0]).map(|value| value * self.v_scale)
    }
}
