//! One wrapper per PTX instruction.
//!
//! Each doc line names the instruction (PTX ISA 8.0 names) and the first architecture that has it. *Convergent* means
//! that all 32 lanes of a warp (or all threads of the CTA, for barriers) must execute the call together. rustc attaches
//! no `convergent` attribute to `asm!`, so:
//!
//! - barriers, shuffles and votes go through LLVM intrinsics, which carry the attribute;
//! - other collectives (`ldmatrix`, `mma`, `wgmma`) are volatile `asm!`, never `pure`, and are called only in
//!   warp-uniform code; a `pure` block may be sunk into a divergent branch;
//! - the crate is built without MIR jump threading, and the xtask counts the barriers of every entry.
//!
//! Global memory is reached by explicit `.global` instructions on `u64` addresses: pointers inside a by-value parameter
//! struct would compile to generic loads and stores.

pub mod barrier;
pub mod bytes;
pub mod cp_async;
pub mod ldst;
pub mod math;
#[cfg(pat_sm90a)]
pub mod mbarrier;
pub mod mma;
#[cfg(pat_sm90a)]
pub mod pdl;
pub mod shuffle;
pub mod special;
pub mod switches;
#[cfg(pat_sm90a)]
pub mod tma;
#[cfg(pat_sm90a)]
pub mod wgmma;
