//! Prefix-aware decode attention on candle tensors.
//!
//! A [`PlannedStep`] is a plan of `pat-rs` on a candle device: made, or advanced, once per decode step. [`PlannedStep::attend`]
//! runs it, once per layer, as a [`CustomOp3`](candle_core::CustomOp3) of q and the layer's caches, on the device's own stream.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use pat_candle::{Layer, PlannedStep};
//! use pat_rs::{AttentionShape, DecodeBatch, DeviceProfile, Dtype, PlanOptions, Planner, Problem};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // 8 query heads over 2 KV heads of 64 elements, pages of 16 tokens; two sequences that share pages 0 and 1.
//! let device = Device::Cpu; // or `Device::new_cuda(0)?`, with the feature `cuda`
//! let problem = Problem::new(AttentionShape::new(8, 2, 64, Dtype::Bf16)?, 16);
//! let mut planner = Planner::new(problem, DeviceProfile::h200(), PlanOptions::default())?;
//! let tables: [&[u32]; 2] = [&[0, 1, 2], &[0, 1, 3]];
//! let plan = planner.plan(&DecodeBatch::from_block_tables(&tables, &[40, 45], 16, 4)?)?;
//! let mut step = PlannedStep::new(plan, &device)?;
//!
//! // Once per layer.
//! let q = Tensor::ones((2, 8, 64), DType::BF16, &device)?;
//! let k_cache = Tensor::ones((4, 16, 2, 64), DType::BF16, &device)?;
//! let v_cache = (Tensor::ones((4, 16, 2, 64), DType::BF16, &device)? * 0.5)?;
//! let out = step.attend(&q, &k_cache, &v_cache, Layer::default())?;
//! assert_eq!(out.dims(), [2, 8, 64]);
//!
//! // The next decode step: each sequence has one token more.
//! step.advance(&mut planner, &DecodeBatch::from_block_tables(&tables, &[41, 46], 16, 4)?, None)?;
//! # Ok(())
//! # }
//! ```
#![deny(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::panic, clippy::unreachable))]

#[cfg(feature = "cuda")]
mod border;
mod op;
mod operands;
mod step;

pub use operands::CacheLayout;
pub use step::{Layer, PlannedStep};
