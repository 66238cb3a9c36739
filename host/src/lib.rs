//! Prefix-aware decode attention over a paged KV cache.
//!
//! Data flows one way: [`DecodeBatch`] -> prefix forest -> packs -> [`Plan`] -> launch -> merge -> output. The planner
//! ([`plan`]) is a pure function and knows no CUDA type; [`cpu`] and [`cuda`] execute the same plan.
//!
//! The operation, for sequence `b` of `L_b` tokens, query head `h` and KV head `g = h / (q_heads / kv_heads)`:
//! `O[b,h] = sum_t softmax_t(scale * Q[b,h]·K[t,g]) V[t,g]`, `LSE[b,h] = ln sum_t exp(scale * Q[b,h]·K[t,g])`;
//! `L_b = 0` gives `O = 0`, `LSE = -inf`.

pub mod batch;
pub mod cpu;
pub mod cuda;
pub mod engine;
pub mod error;
pub mod layout;
pub mod plan;
pub mod profile;
pub mod shape;

pub use batch::DecodeBatch;
pub use cpu::{Element, HostTensors};
pub use engine::{Engine, Features, Reason, supports};
pub use error::{Error, Result};
pub use layout::{KvStrides, RowStrides};
pub use pat_abi::{Dtype, TileVariant};
pub use plan::{Plan, PlanOptions, Planner};
pub use profile::DeviceProfile;
pub use shape::AttentionShape;
