//! Every call into the CUDA driver that is `unsafe`, and nothing else.
//!
//! What makes these calls sound is decided elsewhere and carried by types: a `PreparedRun` exists only after all
//! arguments were checked, a [`DeviceSpan`](super::DeviceSpan) only for memory that is owned or that somebody vouches for, a
//! [`Kernel`] only for an entry of the manifest, whose parameter types the manifest's family fixes, a [`CurrentStream`] only
//! for a live stream whose context is current. All calls pass `call`.
#![allow(unsafe_code, reason = "the border to the driver")]

mod call;
mod context;
mod event;
mod graph;
mod kernel;
mod memory;
mod stream;

pub(super) use call::{DriverCall, attempt, attempt_for, describe};
pub(super) use context::{CurrentContext, driver_version, library_is_present};
pub(super) use event::Event;
pub(super) use graph::{GraphExec, drop_released, retain_in_capture};
#[cfg(feature = "launch-records")]
pub(super) use kernel::max_grid;
pub(super) use kernel::{
    BareLaunch, Kernel, TensorMap, encode_tensor_maps, launch_append, launch_fill, launch_flush, launch_forward,
    launch_merge, launch_merge_states,
};
pub(super) use memory::{Allocation, StagingRing};
pub(super) use stream::{CaptureStatus, CurrentStream};

pub use memory::DeviceBuffer;
pub use stream::Stream;
