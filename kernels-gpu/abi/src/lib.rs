//! What the device code and the host must agree on, and nothing else: plan records, kernel parameters, tile shapes, the kernel
//! manifest. `no_std`, builds for every target; every layout is `repr(C)` with its size asserted at compile time.
//!
//! A *plan* is one contiguous buffer: a [`PlanHeader`], then [`WorkItem`]s at the fixed offset
//! [`PlanHeader::ITEMS_OFFSET_BYTES`] (behind a second header where pages have one token), then [`ItemQuery`]s, page ids
//! (`u32`), [`MergeRow`]s and [`PageMask`]s at the offsets the header names.
#![no_std]
#![forbid(unsafe_code)]

// The device has no heap.
#[cfg(not(target_arch = "nvptx64"))]
extern crate alloc;

pub mod generator;
pub mod group;
pub mod layout;
pub mod manifest;
pub mod occupancy;
pub mod params;
pub mod plan;
pub mod reader;
pub mod row_params;
pub mod switches;
pub mod tile;

pub use group::GroupParts;
pub use manifest::{Arch, Dtype, Family, KERNELS, KernelSpec, TileVariant};
pub use occupancy::DeviceLimits;
pub use params::{FastDivisor, FillParams, FlushParams, ForwardParams, MergeParams, ScaledForwardParams};
pub use plan::{
    DIRECT_SLOT, ItemQuery, LoneTiles, MAX_TILE_VARIANTS, MergeRow, NO_MASKS, NONE, PLAN_MAGIC, PLAN_VERSION, PageMask,
    PlanHeader, RUN_PAGES, VariantItems, WorkItem,
};
pub use row_params::{AppendParams, MergeStatesParams, ScaledAppendParams, StateParams};
pub use switches::Switches;
pub use tile::{NamedBarrier, SmemLayout, TileConfig};
