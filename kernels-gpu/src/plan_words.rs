//! How kernels load the words of a plan.

use pat_abi::reader::PlanWords;

use crate::ptx::ldst::{
    load_global_u32, load_global_u32x2, load_global_u32x4, request_global_u32, request_global_u32x2,
    request_global_u32x4,
};

/// Loads that stand where they are first used.
#[derive(Clone, Copy)]
pub(crate) struct WhenUsed(());

/// Loads that stand where they are asked for, so that several are under way together.
#[derive(Clone, Copy)]
pub(crate) struct AtOnce(());

macro_rules! words {
    ($name:ident, $word:ident, $pair:ident, $quad:ident) => {
        impl $name {
            /// # Safety
            /// Whatever is asked of it lies in a plan buffer, or at least in a readable header, and is aligned as [`PlanWords`] says.
            #[inline(always)]
            pub(crate) const unsafe fn new() -> Self {
                Self(())
            }
        }

        impl PlanWords for $name {
            #[inline(always)]
            fn word(self, address: u64) -> u32 {
                // SAFETY: the contract of `new`; nothing writes a plan while a kernel reads it.
                unsafe { $word(address) }
            }

            #[inline(always)]
            fn pair(self, address: u64) -> [u32; 2] {
                // SAFETY: as above.
                unsafe { $pair(address) }
            }

            #[inline(always)]
            fn quad(self, address: u64) -> [u32; 4] {
                // SAFETY: as above.
                unsafe { $quad(address) }
            }
        }
    };
}

words!(WhenUsed, load_global_u32, load_global_u32x2, load_global_u32x4);
words!(AtOnce, request_global_u32, request_global_u32x2, request_global_u32x4);
