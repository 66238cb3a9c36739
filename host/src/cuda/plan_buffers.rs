//! The device copy of a plan, and the memory for partials.

use super::CudaDevice;
use super::args::DeviceSpan;
use super::driver::{self, Allocation, CaptureStatus, DeviceBuffer, Event, StagingRing, Stream};
use crate::arguments::same;
use crate::plan::{PlanCapacity, PlanGeneration};
use crate::problem::Planned;
use crate::{AttentionShape, Error, Plan, Result};
use pat_abi::{NO_MASKS, TileVariant, WorkItem};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Upper bounds of what a launch covers. CUDA graphs need one that does not change from plan to plan: kernels exit where
/// a plan has less.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaunchGeometry {
    /// Work items per tile variant (by discriminant); a variant with 0 is not launched.
    pub max_items: [u32; TileVariant::ALL.len()],
    /// Likewise, of those in runs of pages, which plans for pages of one token may have ([`crate::PlanOptions::runs`]).
    pub max_run_items: [u32; TileVariant::ALL.len()],
    /// Rows of the merge; with 0 it is not launched.
    pub max_merge_rows: u32,
    /// Partial slots.
    pub max_slots: u32,
    /// Rows of the batch.
    pub max_sequences: u32,
    /// CTAs of the launch of each tile variant (by discriminant) whose kernel is persistent, where these are to be more than fit on
    /// the device, which then hands out the work as places get free; 0: as many as fit, which deal it out among themselves.
    pub ctas: [u32; TileVariant::ALL.len()],
}

impl LaunchGeometry {
    /// Exactly what one plan needs.
    pub fn of(plan: &Plan) -> Self {
        let header = plan.header();
        Self {
            ctas: TileVariant::ALL.map(|variant| ctas_to_hand_out(plan, variant)),
            max_items: std::array::from_fn(|variant| header.variants[variant].count),
            max_run_items: plan.runs_header().map_or([0; TileVariant::ALL.len()], |header| {
                std::array::from_fn(|variant| header.variants[variant].count)
            }),
            max_merge_rows: header.merge_count,
            max_slots: header.slot_count,
            max_sequences: header.sequence_count,
        }
    }

    /// What every plan within `capacity` needs that uses `variants` alone ([`crate::Planner::tile_variants`]).
    pub fn for_capacity(capacity: &PlanCapacity, variants: &[TileVariant]) -> Self {
        let mut max_items = [0; TileVariant::ALL.len()];
        variants.iter().for_each(|variant| max_items[variant.index()] = capacity.max_items);
        Self {
            max_items,
            // Under a capacity pages are planned one by one.
            max_run_items: [0; TileVariant::ALL.len()],
            // Most plans have far less work than this.
            ctas: [0; TileVariant::ALL.len()],
            max_merge_rows: capacity.max_sequences,
            max_slots: capacity.max_slots,
            max_sequences: capacity.max_sequences,
        }
    }

    /// The smallest geometry that covers both.
    pub fn union(self, other: Self) -> Self {
        Self {
            max_items: std::array::from_fn(|i| self.max_items[i].max(other.max_items[i])),
            max_run_items: std::array::from_fn(|i| self.max_run_items[i].max(other.max_run_items[i])),
            max_merge_rows: self.max_merge_rows.max(other.max_merge_rows),
            max_slots: self.max_slots.max(other.max_slots),
            max_sequences: self.max_sequences.max(other.max_sequences),
            ctas: std::array::from_fn(|i| if self.ctas[i] == other.ctas[i] { self.ctas[i] } else { 0 }),
        }
    }

    /// Names the first bound that `needed` exceeds.
    fn check_covers(&self, needed: &Self) -> Result<()> {
        // What the caller knows comes first.
        let bounds = [
            ("sequences", self.max_sequences, needed.max_sequences),
            ("merge rows", self.max_merge_rows, needed.max_merge_rows),
            ("partial slots", self.max_slots, needed.max_slots),
        ];
        let items = [&self.max_items, &self.max_run_items].into_iter().flatten();
        let items = items.zip([&needed.max_items, &needed.max_run_items].into_iter().flatten());
        let items = items.map(|(&have, &need)| ("items of a variant", have, need));
        match bounds.into_iter().chain(items).find(|(_, have, need)| need > have) {
            None => Ok(()),
            Some((what, have, need)) => Err(Error::PlanMismatch {
                what: format!("the fixed launch geometry ({what})"),
                plan: need.to_string(),
                call: have.to_string(),
            }),
        }
    }
}

/// Tokens per item from which the beginning of a CTA does not count.
const LONG_ITEM_TOKENS: u64 = 1024;

/// [`LaunchGeometry::ctas`] of a plan. Work that shares nothing needs no neighbours, and where it is long nothing is lost by a CTA
/// for each piece of it. Dealt out, items of different lengths leave some multiprocessors idle at the end, and of many rounds of
/// equal ones the last may have few CTAs: a CTA each is 1 to 6% faster. Few rounds of equal ones are best in CTAs of half of
/// these (0.4%; one each takes 0.6% longer). Tiles of shared pages are dealt out: handed out they take up to 7% longer.
fn ctas_to_hand_out(plan: &Plan, variant: TileVariant) -> u32 {
    const FEW_ROUNDS: u64 = 4;
    const MANY_ROUNDS: u64 = 16;
    let (items, shape) = (plan.variant_items(variant), plan.shape());
    let is_shared = |item: &WorkItem| item.mask_begin != NO_MASKS || item.row_count > shape.group();
    if !variant.is_persistent() || items.iter().any(is_shared) {
        return 0;
    }
    let tokens = || items.iter().map(|item| u64::from(item.token_count));
    let (shortest, longest) = (tokens().min().unwrap_or(0), tokens().max().unwrap_or(0));
    let pieces = items.len() as u64 * u64::from(shape.kv_heads());
    let round = u64::from(plan.profile().sm_count) * 2;
    let ctas = if tokens().sum::<u64>() < LONG_ITEM_TOKENS * items.len() as u64 || pieces <= round {
        0
    } else if longest * 4 > shortest * 5 || pieces >= MANY_ROUNDS * round {
        pieces
    } else if pieces >= FEW_ROUNDS * round {
        2 * round
    } else {
        0
    };
    u32::try_from(ctas).unwrap_or(0)
}

/// What a plan is for: bound runs, and graphs that hold them, have it in their launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PlanTerms {
    pub(super) planned: Planned,
    pub(super) num_pages: u32,
}

impl PlanTerms {
    /// Refuses others, by name. `what` has these terms.
    pub(super) fn check_are(&self, other: &Self, what: &str) -> Result<()> {
        if self == other {
            return Ok(());
        }
        self.planned.check_is(&other.planned, what)?;
        same(&format!("the num_pages of {what}"), self.num_pages, other.num_pages)
    }
}

/// The plan in a [`PlanBuffers`].
#[derive(Clone, Copy, Debug)]
struct UploadedPlan {
    generation: PlanGeneration,
    terms: PlanTerms,
    /// What its launches cover.
    limits: LaunchGeometry,
}

/// What a run is bound to.
pub(super) struct BindingTerms {
    pub(super) terms: PlanTerms,
    pub(super) limits: LaunchGeometry,
    /// The one plan it serves; `None` where it serves every plan.
    pub(super) generation: Option<PlanGeneration>,
}

/// A plan in device memory, at an address that never changes, with two pinned staging buffers before it.
///
/// Upload once per decode step, run once per layer. An upload needs the buffers for itself, and gives an [`Uploaded`] that
/// borrows them: while runs are enqueued with it, no thread can upload another plan. Threads that share buffers put them
/// behind a lock of theirs. On the device all uploads and runs of the buffers are done in the order they were enqueued in,
/// whatever the streams; so that a workspace which all runs of one `PlanBuffers` share is safe, too.
#[derive(Debug)]
pub struct PlanBuffers {
    /// At least [`pat_abi::PlanHeader::LEAST_ALLOCATION_BYTES`], whatever the capacity.
    memory: DeviceBuffer,
    capacity_bytes: usize,
    fixed: Option<LaunchGeometry>,
    /// With a fixed geometry: what all plans have in common, settled by the first upload or the first run that is bound.
    terms: OnceLock<PlanTerms>,
    staging: StagingRing,
    /// `None` before the first upload, and where a copy has failed.
    uploaded: Option<UploadedPlan>,
    /// The stream of the last upload. All work on the buffers is done before what this stream does next.
    home: Option<Stream>,
    /// Orders one stream behind another.
    crossing: Mutex<Event>,
}

impl PlanBuffers {
    /// Room for plans of up to `bytes` bytes ([`Plan::bytes`]); each launch covers exactly the plan's items.
    ///
    /// # Errors
    /// The driver cannot allocate.
    pub fn with_capacity(device: &CudaDevice, bytes: usize) -> Result<Self> {
        let bytes = bytes.max(size_of::<pat_abi::PlanHeader>()).next_multiple_of(16);
        Ok(Self {
            memory: DeviceBuffer::zeroed(device, bytes.max(pat_abi::PlanHeader::LEAST_ALLOCATION_BYTES as usize))?,
            capacity_bytes: bytes,
            fixed: None,
            terms: OnceLock::new(),
            staging: StagingRing::new(*device, bytes)?,
            uploaded: None,
            home: None,
            crossing: Mutex::new(Event::new(*device)?),
        })
    }

    /// As [`Self::with_capacity`], for CUDA graphs: every launch covers `geometry`, whatever the plan, so that a captured
    /// run serves every later upload. All uploads and bound runs must have the first one's shape, page size and pool.
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

    /// Whether every launch covers the same geometry, as CUDA graphs need it.
    pub fn has_fixed_geometry(&self) -> bool {
        self.fixed.is_some()
    }

    /// The device.
    pub fn device(&self) -> CudaDevice {
        self.memory.memory().device()
    }

    /// Enqueues one asynchronous copy, behind all runs of the buffers. The host waits only where both staging buffers are
    /// still being read by earlier copies. Between replays of a graph that another library captured, upload on the stream
    /// that replays it: that order is the caller's.
    ///
    /// # Errors
    /// The stream is another device's or is captured; the plan is larger than the capacity or exceeds the fixed geometry, or
    /// (fixed geometry) was made for another shape, page size or pool: nothing has been copied and the former plan stays. The
    /// driver's copy fails: no plan.
    pub fn upload(&mut self, plan: &Plan, stream: &Stream) -> Result<Uploaded<'_>> {
        // An engine binds at its start and then only uploads.
        driver::drop_released();
        if plan.bytes().len() > self.capacity_bytes {
            return Err(Error::PlanMismatch {
                what: "the capacity of the plan buffers".into(),
                plan: format!("{} bytes", plan.bytes().len()),
                call: format!("{} bytes", self.capacity_bytes),
            });
        }
        let exact = LaunchGeometry::of(plan);
        let terms = PlanTerms { planned: plan.problem().planned(), num_pages: plan.num_pages() };
        if let Some(fixed) = &self.fixed {
            fixed.check_covers(&exact)?;
            self.check_terms(&terms)?;
        }
        not_captured(stream, self.device(), "uploads are not captured: upload before, and between replays")?;
        if let Some(home) = self.home.as_ref().filter(|home| !home.is(stream)) {
            self.order(home, stream)?;
        }
        self.home = Some(stream.clone());
        // Nothing is there until the copy has been enqueued.
        self.uploaded = None;
        self.staging.upload(plan.bytes(), self.memory.memory(), stream)?;
        if self.fixed.is_some() {
            self.settle_terms(terms)?;
        }
        let limits = self.fixed.unwrap_or(exact);
        self.uploaded = Some(UploadedPlan { generation: plan.generation(), terms, limits });
        self.uploaded()
    }

    /// The plan that was uploaded last.
    ///
    /// # Errors
    /// Nothing was uploaded yet, or the last copy failed.
    pub fn uploaded(&self) -> Result<Uploaded<'_>> {
        match (&self.uploaded, &self.home) {
            (Some(plan), Some(home)) => Ok(Uploaded { buffers: self, plan, home }),
            _ => Err(Error::PlanMismatch {
                what: "the plan buffers".into(),
                plan: "nothing uploaded".into(),
                call: "a run".into(),
            }),
        }
    }

    /// What a run with `terms` would be bound to.
    pub(super) fn binding_terms(&self, terms: PlanTerms) -> Result<BindingTerms> {
        if let Some(limits) = self.fixed {
            self.check_terms(&terms)?;
            return Ok(BindingTerms { terms, limits, generation: None });
        }
        let UploadedPlan { generation, terms: of_plan, limits } = *self.uploaded()?.plan;
        of_plan.check_are(&terms, "the uploaded plan")?;
        Ok(BindingTerms { terms, limits, generation: Some(generation) })
    }

    /// From now on buffers of fixed geometry take no other terms.
    pub(super) fn settle_terms(&self, terms: PlanTerms) -> Result<()> {
        self.terms.get_or_init(|| terms).check_are(&terms, "what these buffers are bound to")
    }

    fn check_terms(&self, terms: &PlanTerms) -> Result<()> {
        self.terms.get().map_or(Ok(()), |settled| settled.check_are(terms, "what these buffers are bound to"))
    }

    pub(super) fn memory(&self) -> &Arc<Allocation> {
        self.memory.memory()
    }

    /// What `later` is given from now on starts after what `earlier` was given so far.
    fn order(&self, earlier: &Stream, later: &Stream) -> Result<()> {
        not_captured(earlier, self.device(), "the stream of the last upload: finish its capture first")?;
        // The event is only a carrier: a panic elsewhere leaves nothing behind in it.
        let event = self.crossing.lock().unwrap_or_else(PoisonError::into_inner);
        event.record(earlier)?;
        event.hold_back(later)
    }
}

fn not_captured(stream: &Stream, device: CudaDevice, accepted: &str) -> Result<()> {
    match stream.enter(device)?.capture_status()? {
        CaptureStatus::None => Ok(()),
        status => Err(Error::invalid("stream", format!("one that is captured ({status:?})"), accepted)),
    }
}

/// A plan that is in its buffers, and stays there as long as this lives. Runs take it.
#[derive(Clone, Copy, Debug)]
pub struct Uploaded<'a> {
    buffers: &'a PlanBuffers,
    plan: &'a UploadedPlan,
    home: &'a Stream,
}

impl<'a> Uploaded<'a> {
    /// Which plan it is ([`Plan::generation`]).
    pub fn generation(self) -> PlanGeneration {
        self.plan.generation
    }

    /// The same, if it is the plan that is meant: so that a plan of an earlier step is not taken for this one's.
    ///
    /// # Errors
    /// Another plan was uploaded last.
    pub fn expect(self, generation: PlanGeneration) -> Result<Self> {
        same("the plan uploaded last", self.plan.generation, generation)?;
        Ok(self)
    }

    pub(super) fn buffers(self) -> &'a PlanBuffers {
        self.buffers
    }

    /// Refuses a stream on which work is recorded instead of run.
    pub(super) fn check_not_captured(self, stream: &Stream) -> Result<()> {
        not_captured(stream, self.buffers.device(), "a stream that is not captured")
    }

    /// Enqueues work that reads the plan on `stream`, in order with uploads and with all other runs.
    pub(super) fn enqueue_on(self, stream: &Stream, enqueue: impl FnOnce() -> Result<()>) -> Result<()> {
        if self.home.is(stream) {
            return enqueue();
        }
        self.buffers.order(self.home, stream)?;
        let enqueued = enqueue();
        // Also where a later launch failed: what was launched reads the plan.
        let ordered = self.buffers.order(stream, self.home);
        if ordered.is_err() {
            // An upload must not overtake what was launched.
            stream.synchronize()?;
        }
        enqueued.and(ordered)
    }
}

/// Memory for partial outputs and their log-sum-exps: owned, or the caller's own.
///
/// One workspace serves all runs of one [`PlanBuffers`], and any number of runs in stream order; runs that may overlap need one
/// each.
#[derive(Clone, Debug)]
pub struct Workspace {
    span: DeviceSpan,
}

impl Workspace {
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
        Ok(Self::from_span(DeviceBuffer::zeroed(device, bytes.max(16))?.span()))
    }

    /// Uses memory of the caller; 16-byte aligned.
    pub fn from_span(span: DeviceSpan) -> Self {
        Self { span }
    }

    /// The memory.
    pub fn span(&self) -> &DeviceSpan {
        &self.span
    }

    /// Addresses of (partial outputs, partial LSEs). They depend on the workspace and the shape alone, not on the plan,
    /// so that a captured graph stays valid when the plan changes.
    pub(super) fn layout(&self, shape: AttentionShape, slots: u32) -> Result<(u64, u64)> {
        let span = &self.span;
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
        let out_bytes = capacity_slots * u64::from(shape.q_heads()) * u64::from(shape.v_head_dim()) * 4;
        Ok((span.address(), span.address() + out_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DecodeBatch, DeviceProfile, Dtype, PlanOptions, Planner, Problem};

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

    /// The geometry for sequences of such lengths behind `shared` common pages.
    fn geometry(kv_heads: u32, shared: u32, lengths: &[u32]) -> LaunchGeometry {
        const PAGE_SIZE: u32 = 32;
        let mut pages = shared;
        let table = |&length: &u32| -> Vec<u32> {
            let own = length.div_ceil(PAGE_SIZE) - shared;
            pages += own;
            (0..shared).chain(pages - own..pages).collect()
        };
        let tables: Vec<Vec<u32>> = lengths.iter().map(table).collect();
        let tables: Vec<&[u32]> = tables.iter().map(Vec::as_slice).collect();
        let problem = Problem::new(AttentionShape::new(32, kv_heads, 128, Dtype::F16).unwrap(), PAGE_SIZE);
        let batch = DecodeBatch::from_block_tables(&tables, lengths, PAGE_SIZE, pages).unwrap();
        let mut planner = Planner::new(problem, DeviceProfile::h200(), PlanOptions::default()).unwrap();
        LaunchGeometry::of(&planner.plan(&batch).unwrap())
    }

    #[test]
    fn long_work_without_sharing_is_handed_out() {
        let ctas = |kv_heads, shared, lengths: &[u32]| {
            let ctas = geometry(kv_heads, shared, lengths).ctas;
            assert_eq!(ctas.iter().sum::<u32>(), ctas[TileVariant::Wgmma64.index()]);
            ctas[TileVariant::Wgmma64.index()]
        };
        // 31 rounds of 264 and 8 pieces more; 7.8 rounds; 1.9.
        assert_eq!(ctas(32, 0, &[1024; 256]), 32 * 256);
        assert_eq!(ctas(8, 0, &[1024; 256]), 2 * 264);
        assert_eq!(ctas(8, 0, &[1024; 64]), 0);
        // Of different lengths, but for short ones and those that share.
        let uneven: Vec<u32> = (1..=64).map(|row| 128 * row).collect();
        assert!(ctas(8, 0, &uneven) >= 8 * 64);
        assert_eq!(ctas(8, 0, &uneven.iter().map(|length| length / 8).collect::<Vec<_>>()), 0);
        assert_eq!(ctas(8, 64, &uneven.iter().map(|length| 2048 + length).collect::<Vec<_>>()), 0);
        let equal = geometry(32, 0, &[1024; 256]);
        assert_eq!(equal.union(equal).ctas, equal.ctas);
        assert_eq!(equal.union(LaunchGeometry::default()).ctas, [0; TileVariant::ALL.len()]);
    }
}
