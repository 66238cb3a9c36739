//! Forward attention with wgmma fed by TMA, as one persistent stream of tiles.
//!
//! A CTA serves a piece of work of every round, to and fro (work = item x KV head; [`work`]). Its producer warps, one
//! for K, one for V and two for queries, run ahead of its consumer warpgroup *across* items: while the last tile of
//! one item is multiplied, queries, keys and values of the next are already on their way. A short leaf therefore
//! costs its bytes, not a latency chain. Launched with one CTA per piece of work the same code is an ordinary,
//! non-persistent kernel.
//!
//! Shared memory, every tile `head_dim / 64` blocks of `[rows][128 bytes]` (128-byte swizzle), 64 rows of Q and as many
//! of K and V as a step has keys: `[K0 V0 | K1 V1 | K2 V2 | Q | barriers | masks]`.
//!
//! `wgmma64` has one consumer warpgroup, steps of 64 keys (128 at head dimension 64) and two CTAs per multiprocessor.
//! `wgmma128` has two consumers, which multiply the same K and V tiles of 128 keys (64 at head dimension 256) with 64 rows
//! each: a node shared by many sequences is read from L2 half as often. At head dimension 256 `wgmma64` has two consumers,
//! too: both compute the scores of all rows, and each multiplies half of V's columns. There `wgmma128` reads queries from
//! shared memory at each product, where they stay while their item lasts ([`TileConfig::queries_stay`]).
//!
//! 8-bit K and V arrive in stages of their own, behind the queries. Then one warp copies both, one the queries, and two widen
//! tiles for all rows ([`widen`]).
//!
//! An item's stream may hold pages that only some rows attend to ([`pat_abi::PageMask`]). The K producer resolves the
//! masks to one word per 16 keys of a tile and puts them beside the tile; tiles without exception cost a comparison.

mod consume;
mod format;
mod lone;
mod masks;
mod produce;
mod smem;
mod widen;
mod work;

use crate::cache::Plain;
use crate::eight_bit;
use crate::element::{Bf16, Element, F16};
use crate::plan_words::AtOnce;
use crate::ptx::barrier::sync_cta;
use crate::ptx::ldst::prefetch_l2;
use crate::ptx::special::{cta_index, dynamic_smem, thread_index};
use crate::ptx::wgmma::{self, HeadDim, WgmmaOps};
use crate::ptx::{mbarrier, pdl, tma};
use consume::consume;
use format::{Format, Widened};
use pat_abi::reader::PlanView;
use pat_abi::{
    ForwardParams, PlanHeader, ScaledForwardParams, TileConfig, TileVariant, scaled_kernel_shapes, wgmma_kernel_shapes,
};
use produce::{FIRST_Q_WARPS, produce_kv, produce_q};
use smem::{QSlots, Smem, Tensor};
use widen::WIDENING_WARPS;

/// Keys of a span, of which a main-loop step has one or two.
const SPAN_KEYS: u32 = 64;
/// Rows of a consumer warpgroup.
const GROUP_ROWS: u32 = 64;
/// Warps of the producer warpgroup, which comes first.
const PRODUCER_WARPS: u32 = 4;
/// The first of the producer warps that widen 8-bit tiles.
const FIRST_WIDENING_WARP: u32 = PRODUCER_WARPS - WIDENING_WARPS;

/// The whole kernel. `maps` are the generic addresses of the K and V tensor maps.
///
/// # Safety
/// Launched as the manifest says, with parameters the host has checked.
#[inline(always)]
unsafe fn forward<
    E: Element,
    M: Element,
    F: Format,
    const HEAD_DIM: u32,
    const GROUPS: u32,
    const BYTES: u32,
    const Q_REGS: usize,
    const O_REGS: usize,
    const SPANS: usize,
>(
    params: &F::Params,
    maps: (u64, u64),
) where
    (M, HeadDim<HEAD_DIM>): WgmmaOps<Q_REGS, O_REGS, SPANS>,
{
    const { assert!(SPANS as u32 == Smem::<HEAD_DIM, GROUPS, BYTES>::SPANS) };
    let smem = Smem::<HEAD_DIM, GROUPS, BYTES> { base: dynamic_smem() };
    let p = F::forward(params);
    let thread = thread_index();
    // SAFETY: the barriers lie in this CTA's shared memory; the roles are whole warpgroups; a plan buffer has at least
    // `LEAST_BUFFER_BYTES`.
    unsafe {
        if (96..128).contains(&thread) {
            // Header, item, page ids: each load waits for the one before. A small plan is in L2 by the second.
            const LINES: u32 = PlanHeader::LEAST_BUFFER_BYTES / 128;
            let line = (cta_index() * 32 + thread - 96) % LINES;
            prefetch_l2(p.plan + line as u64 * 128);
        }
        if thread == 0 {
            for stage in 0..Smem::<HEAD_DIM, GROUPS, BYTES>::STAGES {
                let arrivals = if Smem::<HEAD_DIM, GROUPS, BYTES>::WIDENS { WIDENING_WARPS } else { 1 };
                mbarrier::init(smem.k_full(stage), arrivals);
                mbarrier::init(smem.v_full(stage), arrivals);
                mbarrier::init(smem.k_empty(stage), Smem::<HEAD_DIM, GROUPS, BYTES>::CONSUMER_WARPS);
                mbarrier::init(smem.v_empty(stage), Smem::<HEAD_DIM, GROUPS, BYTES>::CONSUMER_WARPS);
            }
            if Smem::<HEAD_DIM, GROUPS, BYTES>::WIDENS {
                for stage in 0..Smem::<HEAD_DIM, GROUPS, BYTES>::ARRIVING_STAGES {
                    let (k, v) = (smem.arriving(Tensor::K, stage), smem.arriving(Tensor::V, stage));
                    mbarrier::init(k.full, 1);
                    mbarrier::init(v.full, 1);
                    mbarrier::init(k.empty, WIDENING_WARPS);
                    mbarrier::init(v.empty, WIDENING_WARPS);
                }
            }
            for slot in 0..QSlots::<GROUPS>::COUNT {
                mbarrier::init(smem.q_full(slot), 32 * FIRST_Q_WARPS);
                mbarrier::init(smem.q_empty(slot), Smem::<HEAD_DIM, GROUPS, BYTES>::Q_SLOT_WARPS);
            }
            mbarrier::fence_init();
            tma::prefetch_map(maps.0);
            tma::prefetch_map(maps.1);
        }
        let plan = PlanView::load(AtOnce::new(), p.plan, Smem::<HEAD_DIM, GROUPS, BYTES>::VARIANT, p.kv_heads);
        // The plan alone has been read, which no kernel writes. Behind an ordinary launch there is nothing to wait for.
        pdl::wait_for_prerequisite_grids();
        sync_cta();
        pdl::launch_dependents();
        if thread < 128 {
            wgmma::shrink_registers::<Smem<HEAD_DIM, GROUPS, BYTES>>();
            if Smem::<HEAD_DIM, GROUPS, BYTES>::WIDENS {
                if thread < 32 {
                    produce_kv::<HEAD_DIM, GROUPS, BYTES>(p, plan, smem, (Tensor::K, maps.0), Some(maps.1));
                } else {
                    produce_q::<HEAD_DIM, GROUPS, BYTES>(p, plan, smem, thread / 32 - 1);
                    if thread >= 32 * FIRST_WIDENING_WARP {
                        F::widen::<HEAD_DIM, GROUPS, BYTES>(p, plan, smem, thread / 32 - FIRST_WIDENING_WARP);
                    }
                }
            } else if thread < 32 {
                produce_kv::<HEAD_DIM, GROUPS, BYTES>(p, plan, smem, (Tensor::K, maps.0), None);
            } else {
                produce_q::<HEAD_DIM, GROUPS, BYTES>(p, plan, smem, thread / 32 - 1);
                if thread >= 96 {
                    produce_kv::<HEAD_DIM, GROUPS, BYTES>(p, plan, smem, (Tensor::V, maps.1), None);
                }
            }
        } else {
            wgmma::grow_registers::<Smem<HEAD_DIM, GROUPS, BYTES>>();
            consume::<E, M, F, HEAD_DIM, GROUPS, BYTES, Q_REGS, O_REGS, SPANS>(params, plan, smem, thread / 128 - 1);
        }
    }
}

/// A tensor map (`CUtensorMap`), passed by value. rustc cannot pass a type aligned to 64 bytes: the xtask raises the
/// alignment of the parameter in the PTX.
#[repr(C, align(16))]
#[derive(Clone, Copy)]
pub struct TensorMap([u64; 16]);

macro_rules! entries {
    ($variant:ident $prefix:literal $([$head_dim:literal $_v_head_dim:literal $element:ident $name:literal])*) => {
        $(entries!(@ $variant $head_dim concat!($prefix, "_", $name), ForwardParams,
            $element, $element, Plain, 2);)*
    };
    ($variant:ident $prefix:literal
        $([$head_dim:literal $_v_head_dim:literal $element:ident $code:ident $name:literal])*
    ) => {
        $(entries!(@ $variant $head_dim concat!($prefix, "_", $name), ScaledForwardParams,
            $element, F16, Widened<eight_bit::$code>, 1);)*
    };
    (@ $variant:ident $head_dim:literal $name:expr, $params:ident,
        $element:ident, $multiplied:ident, $format:ty, $bytes:literal
    ) => {
        const _: () = {
            const CONFIG: TileConfig = TileVariant::$variant.config($head_dim).of_elements($bytes);
            const GROUPS: u32 = CONFIG.rows / GROUP_ROWS;
            const SPANS: usize = (CONFIG.keys / SPAN_KEYS) as usize;
            const O_REGS: usize = ($head_dim / 2 / CONFIG.column_splits) as usize;
            /// # Safety
            /// Launched by the host with checked parameters.
            #[unsafe(export_name = $name)]
            unsafe extern "ptx-kernel" fn entry(p: $params, _map_k: TensorMap, _map_v: TensorMap) {
                let (map_k, map_v): (u64, u64);
                // SAFETY: takes the addresses of the parameters, which live as long as the kernel runs.
                unsafe {
                    core::arch::asm!(
                        concat!("{{ .reg .b64 t; mov.b64 t, ", $name, "_param_1; cvta.param.u64 {0}, t; }}"),
                        out(reg64) map_k, options(pure, nomem, nostack, preserves_flags));
                    core::arch::asm!(
                        concat!("{{ .reg .b64 t; mov.b64 t, ", $name, "_param_2; cvta.param.u64 {0}, t; }}"),
                        out(reg64) map_v, options(pure, nomem, nostack, preserves_flags));
                    forward::<
                        $element, $multiplied, $format, $head_dim, GROUPS, $bytes, { $head_dim / 4 }, O_REGS, SPANS,
                    >(&p, (map_k, map_v));
                }
            }
        };
    };
}

wgmma_kernel_shapes!(entries! { Wgmma64 "pat_forward_wgmma64" });
wgmma_kernel_shapes!(entries! { Wgmma128 "pat_forward_wgmma128" });
scaled_kernel_shapes!(entries! { Wgmma64 "pat_forward_wgmma64" });
