//! Executes a plan on a CUDA device.
//!
//! [`CudaDevice`] is a device's primary context (the one torch and candle use) with the kernels loaded on it; [`PlanBuffers`]
//! is the device copy of a plan; [`Workspace`] holds partials. [`CudaEngine::bind`] checks the arguments of a run once and gives
//! a [`BoundRun`], which owns what it uses and can be launched again and again, from any thread, on any stream:
//!
//! ```no_run
//! # use pat_rs::cuda::{CudaEngine, PlanBuffers, RunArgs, Workspace};
//! # use pat_rs::Plan;
//! # fn f(engine: CudaEngine, plan: Plan, next_plan: Plan, args: RunArgs, workspace: Workspace) -> pat_rs::Result<()> {
//! # let mut buffers = PlanBuffers::with_capacity(engine.device(), 0)?;
//! let stream = engine.device().new_stream()?;
//! buffers.upload(&plan, &stream)?;
//! let run = engine.bind(&buffers, &args, &workspace)?; // once per layer
//!
//! let uploaded = buffers.upload(&next_plan, &stream)?; // once per step
//! run.run(uploaded, &stream)?; // once per layer and step
//! # Ok(())
//! # }
//! ```
//!
//! **Who owns what.** Spans of a [`DeviceBuffer`] keep its memory; memory of other libraries enters by
//! [`DeviceSpan::from_raw`] and may bring an owner ([`DeviceSpan::with_owner`]). A bound run holds the plan's memory, the workspace
//! and the owners of its tensors; a [`Graph`] holds its bound runs; a graph that another library captures is made to hold them,
//! too. Kernels stay loaded as long as the process runs. Whatever is dropped first, nothing that work still uses is freed.
//!
//! **Which plan a run reads.** An upload borrows the buffers mutably, and its token [`Uploaded`] keeps that borrow: between the
//! check of a run and its launches no other thread can upload. On the device uploads and runs are ordered by events where they are on
//! different streams; on one stream there is nothing to do. Buffers of exact geometry serve runs bound to the plan in them, buffers of
//! fixed geometry ([`PlanBuffers::for_capacity`]) every plan within their bounds: only those are for graphs.
//!
//! **What a run costs.** [`BoundRun::run`] allocates nothing, takes no lock and waits for nothing (where the upload was on
//! another stream, two events are exchanged, under a lock of the buffers).
//!
//! All `unsafe` of the host is in `driver`: the rest of this module hands it values it has checked. A caller's raw
//! pointer enters through [`DeviceSpan::from_raw`], [`CudaDevice::stream_from_raw`] (or its checked form) or
//! [`BoundRun::run_with`], which are `unsafe` for that reason.

mod args;
pub mod bench_support;
mod bound_run;
mod device;
mod driver;
mod engine;
#[cfg(feature = "fault-injection")]
pub mod faults;
mod graph;
#[cfg(feature = "launch-records")]
pub mod launch_records;
mod plan_buffers;
mod ptx;
mod row_ops;
mod tensor_map;

pub use args::{DeviceKvScale, DeviceSpan, RunArgs};
pub use bound_run::BoundRun;
pub use device::CudaDevice;
pub use driver::{DeviceBuffer, Stream};
pub use engine::CudaEngine;
pub use graph::Graph;
pub use plan_buffers::{LaunchGeometry, PlanBuffers, Uploaded, Workspace};
pub use ptx::check_embedded_ptx;
pub use row_ops::{AppendArgs, DeviceState};
