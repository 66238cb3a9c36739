//! Decode-attention kernels for NVIDIA GPUs, compiled by rustc to PTX.
//!
//! The tree follows the hardware: `ptx` has one wrapper per instruction, `tile` builds register and shared-memory tiles
//! on it, `kernels` has the entry points. `--cfg pat_sm90a` (set by the xtask) selects the wgmma kernels
//! instead of the mma.sync ones, but for those that convert E4m3, for which that architecture has an instruction.
#![no_std]
#![feature(abi_ptx, asm_experimental_arch, stdarch_nvptx, link_llvm_intrinsics)]
#![allow(internal_features)]

pub mod cache;
pub mod eight_bit;
pub mod element;
pub mod epilogue;
pub mod finish;
pub mod isolation;
pub mod item;
pub mod kernels;
mod plan_words;
pub mod ptx;
pub mod softmax;
pub mod tile;
pub mod window;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: `trap` ends the kernel; it has no precondition.
    unsafe { core::arch::nvptx::trap() }
}
