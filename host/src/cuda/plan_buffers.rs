//! The device copy of a plan, and the memory for partials.

use super::CudaDevice;
use super::args::DeviceSpan;
use super::driver::{DeviceBuffer, StagingRing, Stream};
use crate::plan::{PlanCapacity, PlanGeneration};
use crate::problem::Planned;
use crate::{AttentionShape, Error, Plan, Result};
use pat_abi::{MAX_TILE_VARIANTS, TileVariant};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Upper bounds of what a launch covers. CUDA graphs need one that does not change from plan to plan: kernels exit where
/// a plan has less.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaunchGeometry {
    /// Work items per tile variant (by discriminant); a variant with 0 is not launched.
    pub max_items: [u32; MAX_TILE_VARIANTS],
    /// Rows of the merge; with 0 it is not launched.
    pub max_merge_rows: u32,
    /// Partial slots.
    pub max_slots: u32,
    /// Rows of the batch.
    pub max_sequences: u32,
}

impl LaunchGeometry {
    /// Exactly what one plan needs.
    pub fn of(plan: &Plan) -> Self {
        let header = plan.header();
        Self {
            max_items: header.variant_count,
            max_merge_rows: header.merge_count,
            max_slots: header.slot_count,
            max_sequences: header.sequence_count,
        }
    }

    /// What every plan within `capacity` needs that uses `variants` alone ([`crate::Planner::tile_variants`]).
    pub fn for_capacity(capacity: &PlanCapacity, variants: &[TileVariant]) -> Self {
        let mut max_items = [0; MAX_TILE_VARIANTS];
        variants.iter().for_each(|variant| max_items[variant.index()] = capacity.max_items);
        Self {
            max_items,
            max_merge_rows: capacity.max_sequences,
            max_slots: capacity.max_slots,
            max_sequences: capacity.max_sequences,
        }
    }

    /// The smallest geometry that covers both.
    pub fn union(self, other: Self) -> Self {
        Self {
            max_items: std::array::from_fn(|i| self.max_items[i].max(other.max_items[i])),
            max_merge_rows: self.max_merge_rows.max(other.max_merge_rows),
            max_slots: self.max_slots.max(other.max_slots),
            max_sequences: self.max_sequences.max(other.max_sequences),
        }
    }

    /// Names the first bound that `needed` exceeds.
    fn check_covers(&self, needed: &Self) -> Result<()> {
        let items =
            self.max_items.iter().zip(&needed.max_items).map(|(&have, &need)| ("items of a variant", have, need));
        let rest = [
            ("merge rows", self.max_merge_rows, needed.max_merge_rows),
            ("partial slots", self.max_slots, needed.max_slots),
            ("sequences", self.max_sequences, needed.max_sequences),
        ];
        match items.chain(rest).find(|(_, have, need)| need > have) {
            None => Ok(()),
            Some((what, have, need)) => Err(Error::PlanMismatch {
                what: format!("the fixed launch geometry ({what})"),
                plan: need.to_string(),
                call: have.to_string(),
            }),
        }
    }
}

/// What the plan in a [`PlanBuffers`] was made for, and what a launch must cover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Uploaded {
    pub(super) generation: PlanGeneration,
    pub(super) planned: Planned,
    pub(super) num_pages: u32,
    pub(super) limits: LaunchGeometry,
}

/// A plan in device memory, at an address that never changes, with two pinned staging buffers before it.
///
/// Upload once per decode step, run once per layer, on one stream (or order the streams yourself). Uploading takes a
/// shared reference, because a captured graph goes on borrowing the buffers.
#[derive(Debug)]
pub struct PlanBuffers {
    /// At least [`pat_abi::PlanHeader::LEAST_BUFFER_BYTES`], whatever the capacity.
    device: DeviceBuffer,
    capacity_bytes: usize,
    fixed: Option<LaunchGeometry>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    staging: StagingRing,
    uploaded: Option<Uploaded>,
}

impl PlanBuffers {
    /// Room for plans of up to `bytes` bytes ([`Plan::bytes`]); each launch covers exactly the plan's items.
    ///
    /// # Errors
    /// The driver cannot allocate.
    pub fn with_capacity(device: &CudaDevice, bytes: usize) -> Result<Self> {
        let bytes = bytes.max(size_of::<pat_abi::PlanHeader>()).next_multiple_of(16);
        Ok(Self {
            device: DeviceBuffer::zeroed(device, bytes.max(pat_abi::PlanHeader::LEAST_BUFFER_BYTES as usize))?,
            capacity_bytes: bytes,
            fixed: None,
            state: Mutex::new(State { staging: StagingRing::new(device, bytes)?, uploaded: None }),
        })
    }

    /// As [`Self::with_capacity`], for CUDA graphs: every launch covers `geometry`, whatever the plan, so that a captured
    /// run serves every later upload. All uploads must have the first one's shape, page size and pool.
    ///
    /// # Errors
    /// The driver cannot allocate.
    pub fn with_fixed_geometry(device: &CudaDevice, bytes: usize, geometry: LaunchGeometry) -> Result<Self> {
        Ok(Self { fixed: Some(geometry), ..Self::with_capacity(device, bytes)? })
    }

    /// As [`Self::with_fixed_geometry`], for every plan of a planner with this capacity
    /// ([`crate::Planner::with_capacity`]); `variants` are the planner's for the page size.
    ///
    /// # Errors
    /// The driver cannot allocate.
    pub fn for_capacity(device: &CudaDevice, capacity: &PlanCapacity, variants: &[TileVariant]) -> Result<Self> {
        Self::with_fixed_geometry(device, capacity.plan_bytes(), LaunchGeometry::for_capacity(capacity, variants))
    }

    /// Bytes of the largest plan that fits.
    pub fn capacity_bytes(&self) -> usize {
        self.capacity_bytes
    }

    /// Enqueues one asynchronous copy. Waits only where both staging buffers are still being read by earlier copies.
    ///
    /// # Errors
    /// The plan is larger than the capacity or exceeds the fixed geometry, or (fixed geometry) was made for another
    /// shape, page size or pool: nothing has been copied and the former plan stays. The driver's copy fails: no plan.
    pub fn upload(&self, plan: &Plan, stream: &Stream) -> Result<()> {
        if plan.bytes().len() > self.capacity_bytes() {
            return Err(Error::PlanMismatch {
                what: "the capacity of the plan buffers".into(),
                plan: format!("{} bytes", plan.bytes().len()),
                call: format!("{} bytes", self.capacity_bytes()),
            });
        }
        let exact = LaunchGeometry::of(plan);
        if let Some(fixed) = &self.fixed {
            fixed.check_covers(&exact)?;
        }
        let uploaded = Uploaded {
            generation: plan.generation(),
            planned: plan.problem().planned(),
            num_pages: plan.num_pages(),
            limits: self.fixed.unwrap_or(exact),
        };
        let mut state = self.state();
        // A captured graph has the strides' meaning, the page size and the pool's extent baked in.
        if let (Some(_), Some(former)) = (self.fixed, state.uploaded)
            && (Uploaded { generation: uploaded.generation, ..former }) != uploaded
        {
            return Err(Error::PlanMismatch {
                what: "the plans these buffers were captured with".into(),
                plan: format!("{uploaded:?}"),
                call: format!("{former:?}"),
            });
        }
        // Nothing is there until the copy has been enqueued.
        state.uploaded = None;
        state.staging.upload(plan.bytes(), &self.device, stream)?;
        state.uploaded = Some(uploaded);
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // `uploaded` is `None` while an upload is under way: a panic there leaves buffers without a plan.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn uploaded(&self) -> Result<Uploaded> {
        self.state().uploaded.ok_or_else(|| Error::PlanMismatch {
            what: "the plan buffers".into(),
            plan: "nothing uploaded".into(),
            call: "a run".into(),
        })
    }

    pub(super) fn address(&self) -> u64 {
        self.device.span().address()
    }
}

/// Memory for partial outputs and their log-sum-exps: owned, or the caller's own.
///
/// One workspace serves any number of runs in stream order; runs that may overlap need one each.
#[derive(Debug)]
pub struct Workspace<'a> {
    memory: Memory<'a>,
}

#[derive(Debug)]
enum Memory<'a> {
    Owned(DeviceBuffer),
    Borrowed(DeviceSpan<'a>),
}

impl<'a> Workspace<'a> {
    /// Bytes a run of `plan` needs.
    pub fn bytes_for(plan: &Plan) -> u64 {
        Self::bytes_for_slots(plan.shape(), plan.header().slot_count)
    }

    /// Bytes for `slots` partial slots (see [`LaunchGeometry::max_slots`]).
    pub fn bytes_for_slots(shape: AttentionShape, slots: u32) -> u64 {
        u64::from(slots) * shape.partial_bytes()
    }

    /// Allocates `bytes` bytes on the device.
    ///
    /// # Errors
    /// The driver cannot allocate.
    pub fn with_capacity(device: &CudaDevice, bytes: u64) -> Result<Self> {
        let bytes = usize::try_from(bytes).map_err(|_| Error::invalid("bytes", bytes, "an address range"))?;
        Ok(Self { memory: Memory::Owned(DeviceBuffer::zeroed(device, bytes.max(16))?) })
    }

    /// Uses memory of the caller; 16-byte aligned.
    pub fn from_span(span: DeviceSpan<'a>) -> Self {
        Self { memory: Memory::Borrowed(span) }
    }

    /// The memory.
    pub fn span(&self) -> DeviceSpan<'_> {
        match &self.memory {
            Memory::Owned(buffer) => buffer.span(),
            Memory::Borrowed(span) => *span,
        }
    }

    /// Addresses of (partial outputs, partial LSEs). They depend on the workspace and the shape alone, not on the plan,
    /// so that a captured graph stays valid when the plan changes.
    pub(super) fn layout(span: DeviceSpan<'_>, shape: AttentionShape, slots: u32) -> Result<(u64, u64)> {
        if slots > 0 && !span.address().is_multiple_of(16) {
            return Err(Error::invalid(
                "workspace",
                format!("address {:#x}", span.address()),
                "a multiple of 16 bytes",
            ));
        }
        let needed = Self::bytes_for_slots(shape, slots);
        if needed > span.bytes() {
            return Err(Error::invalid(
                "workspace",
                format!("{} bytes", span.bytes()),
                format!("at least {needed} bytes for {slots} partial slots"),
            ));
        }
        let capacity_slots = span.bytes() / shape.partial_bytes();
        let out_bytes = capacity_slots * u64::from(shape.q_heads()) * u64::from(shape.head_dim()) * 4;
        Ok((span.address(), span.address() + out_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_geometry_covers_itself_and_its_union() {
        let mut a = LaunchGeometry { max_merge_rows: 3, max_slots: 9, max_sequences: 4, ..Default::default() };
        a.max_items[0] = 7;
        let b = LaunchGeometry { max_merge_rows: 5, ..Default::default() };
        a.check_covers(&a).unwrap();
        let both = a.union(b);
        both.check_covers(&a).unwrap();
        both.check_covers(&b).unwrap();
        assert!(a.check_covers(&b).unwrap_err().to_string().contains("merge rows"));

        let capacity = PlanCapacity { max_sequences: 5, max_pages: 9, max_items: 7, max_slots: 9 };
        let geometry = LaunchGeometry::for_capacity(&capacity, &[TileVariant::Mma16]);
        geometry.check_covers(&both).unwrap();
        assert!(geometry.check_covers(&LaunchGeometry { max_sequences: 6, ..a }).is_err());
    }
}
