//! Prefix-aware decode attention over a paged KV cache.
//!
//! Data flows one way: [`DecodeBatch`] -> prefix forest -> row tiles -> [`Plan`] -> launch -> merge -> output. The planner
//! ([`plan`]) is a pure function and knows no CUDA type; [`cpu`] and [`cuda`] execute the same plan.
//!
//! The operation, for sequence `b` of `L_b` tokens, query head `h` and KV head `g = h / (q_heads / kv_heads)`:
//! `O[b,h] = sum_t softmax_t(scale * Q[b,h]·K[t,g]) V[t,g]`, `LSE[b,h] = ln sum_t exp(scale * Q[b,h]·K[t,g])`;
//! `L_b = 0` gives `O = 0`, `LSE = -inf`.
//!
//! Two sequences that share their first two pages, on the device if there is one and on the CPU otherwise:
//!
//! ```
//! use half::f16;
//! use pat_rs::{
//!     AttentionShape, DecodeBatch, Dtype, Engine, HostTensors, PlanOptions, Planner, Problem,
//! };
//!
//! # fn main() -> pat_rs::Result<()> {
//! let (q_heads, kv_heads, head_dim, page_size, num_pages) = (8, 2, 64, 16, 4);
//! let shape = AttentionShape::new(q_heads, kv_heads, head_dim, Dtype::F16)?;
//! let problem = Problem::new(shape, page_size); // plain decode attention, scores scaled by 1 / sqrt(head_dim)
//!
//! // 40 and 45 tokens; pages 0 and 1 are full and shared, the last page is each sequence's own.
//! let tables: [&[u32]; 2] = [&[0, 1, 2], &[0, 1, 3]];
//! let batch = DecodeBatch::from_block_tables(&tables, &[40, 45], page_size, num_pages)?;
//!
//! // Once per decode step:
//! let engine = Engine::auto();
//! let mut planner = Planner::new(problem, engine.profile()?, PlanOptions::default())?;
//! let plan = planner.plan(&batch)?;
//! assert!(plan.summary().sharing_factor > 1.5);
//!
//! // Once per layer. Equal values everywhere: the average of V is V.
//! let pool = vec![f16::from_f32(0.5); (num_pages * page_size * kv_heads * head_dim) as usize];
//! let q = vec![f16::ONE; (2 * q_heads * head_dim) as usize];
//! let tensors = HostTensors::new(problem, &q, &pool, &pool); // contiguous; other strides: `with_kv_strides`
//! let mut out = vec![f16::ZERO; q.len()];
//! engine.run_host(&plan, &tensors, &mut out, None)?;
//! assert!(out.iter().all(|x| (x.to_f32() - 0.5).abs() < 1e-3));
//! # Ok(())
//! # }
//! ```
//!
//! A serving engine keeps its tensors on the device and binds each layer once ([`cuda::CudaEngine::bind`]) with raw addresses and
//! strides;
//! see [`cuda`]. [`supports`] answers without a device whether a model's attention can be served.
// `cuda/driver/` and the three entry points for raw handles carry the allowances.
#![deny(unsafe_code)]
// Bad input is an error; an `expect` states what no input can change.
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::panic, clippy::unreachable))]

mod arguments;
pub mod batch;
pub mod cpu;
pub mod cuda;
pub mod eligibility;
pub mod engine;
pub mod error;
mod features;
mod kv_scale;
pub mod layout;
pub mod plan;
pub mod problem;
pub mod profile;
mod query_tokens;
pub mod shape;
mod tree;
mod visible;

pub use batch::{DecodeBatch, Int32};
pub use cpu::{Element, HostTensors, KvElement};
pub use eligibility::{Part, Reason, supports};
pub use engine::Engine;
pub use error::{Error, ErrorCode, Result};
pub use kv_scale::KvScale;
pub use layout::{KvStrides, RowStrides};
pub use pat_abi::{Dtype, TileVariant};
pub use plan::{Plan, PlanOptions, Planner};
pub use problem::{Problem, Reach, Score, Visibility};
pub use profile::DeviceProfile;
pub use query_tokens::QueryTokens;
pub use shape::AttentionShape;
pub use visible::VisibleBatch;

/// Compiles and runs the Rust snippets of the README and the guide.
#[cfg(doctest)]
mod documents {
    #[doc = include_str!("../../README.md")]
    struct Readme;
    #[doc = include_str!("../../docs/guide.md")]
    struct Guide;
}
