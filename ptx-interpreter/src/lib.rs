//! Runs PTX on the CPU: the very text that a driver would compile, so that a machine without a GPU can tell whether it is right.
//!
//! It is a tool for tests, written for the kernels of this project: it knows the instructions that they use, and refuses any
//! other by name. [`Kernel::parse`] reads one entry of a PTX text, [`GlobalMemory`] holds the buffers, [`Kernel::launch`] runs
//! every CTA:
//!
//! ```
//! use pat_ptx_interpreter::{Access, GlobalMemory, Kernel, Launch, Param, Unset};
//!
//! let text = "
//! .entry doubled(.param .u64 values)
//! {
//!     .reg .b32 %r<3>;
//!     .reg .b64 %rd<4>;
//!     ld.param.b64 %rd1, [values];
//!     mov.u32 %r1, %tid.x;
//!     mul.wide.u32 %rd2, %r1, 4;
//!     add.s64 %rd3, %rd1, %rd2;
//!     ld.global.u32 %r2, [%rd3];
//!     add.s32 %r2, %r2, %r2;
//!     st.global.u32 [%rd3], %r2;
//!     ret;
//! }";
//! let mut memory = GlobalMemory::new();
//! let values: Vec<u8> = (0..32u32).flat_map(u32::to_le_bytes).collect();
//! let address = memory.add("values", values, Access::ReadWrite);
//! let params = [Param::Bytes(&address.to_le_bytes())];
//! let kernel = Kernel::parse(text, "doubled")?;
//! let launch = Launch { ctas: 1, threads: 32, shared_bytes: 0, unset_shared: Unset::Fault, params: &params };
//! kernel.launch(&launch, &mut memory)?;
//! assert_eq!(memory.bytes(address).unwrap()[7 * 4], 14);
//!
//! // One thread too many for the buffer:
//! let error = kernel.launch(&Launch { threads: 64, ..launch }, &mut memory).unwrap_err();
//! assert!(error.to_string().contains("128 bytes from the start of values, which has 128"));
//! # Ok::<(), pat_ptx_interpreter::Error>(())
//! ```
//!
//! # What it finds
//!
//! - **Wrong results**, by comparing what kernels wrote with what they should have.
//! - **Accesses outside** every buffer or the CTA's shared memory, misaligned ones, writes to what is only read, accesses to what
//!   another CTA of the launch has written.
//! - **Reads of shared memory that nothing was written to**, or that an asynchronous copy is still writing. Copies and matrix
//!   products happen as late as the waits allow, so that a missing wait shows.
//! - **Races** in shared memory: two accesses of different warps or lanes, one of them a write, that no barrier orders; and
//!   writes that TMA or wgmma might not see, for lack of a proxy fence.
//! - **Registers of a matrix product under way** that something else touches, or that no `wgmma.fence` stands in front of.
//! - **Deadlocks**, with who waits where; instructions that want all lanes of a warp and do not get them.
//!
//! # What it does not
//!
//! Time, registers and caches; races in global memory within a CTA; CTAs that wait for each other (they run one after the other).
//! Approximate instructions are rounded correctly, and tensor cores add in order and round to nearest, where a device differs in
//! the last places. Registers start at 0.
//!
//! # Where semantics come from
//!
//! The PTX ISA manual; where a layout or a rule is not obvious, the comment names the section.
#![forbid(unsafe_code)]

mod barrier;
mod cta;
mod decode;
mod error;
mod execute;
mod global;
mod instruction;
mod kernel;
mod lanes;
mod lanewise;
mod launch;
mod matrix;
mod order;
mod shared;
mod tensor;
mod text;
mod warp;

pub use error::{Error, Fault, Place, Result};
pub use global::{Access, GlobalMemory};
pub use kernel::Kernel;
pub use launch::{Launch, Param, Unset};
pub use tensor::TensorMap;
