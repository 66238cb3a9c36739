//! Executes a plan on a CUDA device.
//!
//! [`CudaDevice`] retains the device's primary context (the one torch and candle use) and loads kernels; [`PlanBuffers`]
//! is the device copy of a plan; [`Workspace`] holds partials; [`CudaEngine::run`] launches. `run` allocates nothing,
//! waits for nothing, and can be captured into a CUDA graph once the kernels are loaded ([`CudaEngine::prepare`]).
//!
//! All `unsafe` of the host is in `driver`: the rest of this module hands it values it has checked. A caller's raw
//! pointer enters through [`DeviceSpan::from_raw`] or [`CudaDevice::stream_from_raw`], which are `unsafe` for that reason.

mod args;
pub mod bench_support;
mod device;
mod driver;
mod engine;
mod plan_buffers;
mod ptx;
mod tensor_map;

pub use args::{DeviceSpan, RunArgs};
pub use device::CudaDevice;
pub use driver::{DeviceBuffer, Graph, Stream};
pub use engine::CudaEngine;
pub use plan_buffers::{LaunchGeometry, PlanBuffers, Workspace};
pub use ptx::check_embedded_ptx;
