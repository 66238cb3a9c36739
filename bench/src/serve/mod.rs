//! Serving: requests sent to an OpenAI-compatible server in open loop, the figures of a run, and its record.
//!
//! `docs/serving.md` defines every figure. `bench/serve` measures the same inside the engine's process.

mod client;
mod load;
mod metrics;
mod record;
mod server;
mod sweep;

pub use client::{Endpoint, EndpointError, Failure, FailureKind, Patience};
pub use load::{Counters, Load, Run, Sent, Window};
pub use metrics::{LIMITS, Limit, Summary};
pub use record::{
    Config, Goodput, PAT_RATES, QUICK_RATES, Record, RecordError, Requests, SCHEMA_VERSION, Status, StepTime, append,
    key, read,
};
pub use server::{ServerCommand, ServerError, ServerProcess, gpus};
pub use sweep::{Event, Job, Sweep, Target};
