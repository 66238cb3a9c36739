//! Where a sliding window begins: what kernels ask of a token beside its mask. Where they are not compiled for windows, nothing of it
//! is left.

use pat_abi::reader::{PlanView, PlanWords, Stream, Work};
use pat_abi::{ForwardParams, PageMask};

use crate::plan_words::WhenUsed;
use crate::ptx::switches::{load_global_u32_under_window, load_global_u32_under_window_if, zero_before_window};

/// The mask of entry `entry` of the stream, which has masks, for token `in_page` of the entry's page: of no rows where the token stands in
/// front of their window.
///
/// What it needs beside the masks it loads where it is asked: held from the item on, it would cost kernels without windows registers.
///
/// # Safety
/// The stream is of the plan of `params`, which is one for windows where the kernel is compiled for them; it has the entry.
#[inline(always)]
pub unsafe fn mask_in_window(params: &ForwardParams, stream: &Stream, entry: u32, in_page: u32) -> PageMask {
    // SAFETY: the caller's contract.
    let mask = stream.mask(unsafe { WhenUsed::new() }, entry);
    // Such a plan has a first token for each mask.
    let first_token = stream.first_token(UnderWindow, params.plan, entry);
    PageMask(zero_before_window(mask.0, in_page, first_token))
}

/// The first token that counts of the page of entry `entry` of `work`; 0 where the item has no masks.
///
/// # Safety
/// The item is of the plan of `params`, which is one for windows where the kernel is compiled for them; it has the entry.
#[inline(always)]
pub unsafe fn first_token_in_window(params: &ForwardParams, plan: PlanView, work: &Work, entry: u32) -> u32 {
    plan.first_token(UnderWindowIf(work.has_masks()), params.plan, work, entry)
}

/// As [`UnderWindow`], where they are wanted. Of this file, too.
#[derive(Clone, Copy)]
struct UnderWindowIf(bool);

impl PlanWords for UnderWindowIf {
    #[inline(always)]
    fn word(self, address: u64) -> u32 {
        // SAFETY: a word of a plan buffer where it is wanted, which nothing writes while a kernel reads it.
        unsafe { load_global_u32_under_window_if(self.0, address) }
    }
}

/// Words of a plan buffer in kernels that are compiled for windows; 0 in others. Of this file: it asks for words of the plan alone.
#[derive(Clone, Copy)]
struct UnderWindow;

impl PlanWords for UnderWindow {
    #[inline(always)]
    fn word(self, address: u64) -> u32 {
        // SAFETY: a word of a plan buffer, which nothing writes while a kernel reads it.
        unsafe { load_global_u32_under_window(address) }
    }
}
