//! `Capacity`.

use crate::device::Device;
use crate::errors::{Integer, Result, invalid};
use crate::profile::PyProfile;
use pat_rs::plan::PlanCapacity;
use pyo3::prelude::*;

/// What the plans of a planner need at most, so that device memory and launches are sized once: for CUDA graphs and engines.
///
/// Args:
///     max_sequences: rows of a batch, padding rows included.
///     max_pages: pages of all rows together, a shared page counted for each row that names it.
///     device_or_profile: for what the work items are sized: ``"cuda:0"``, a torch.device, or a :class:`DeviceProfile`.
///     max_items: work items of a plan, at least ``max_sequences``; by default enough to fill the device several times.
///     max_slots: partial results of a plan; 0 means that no sequence is cut; by default as many as fill the device.
///
/// Raises:
///     ValueError: ``max_items`` is below ``max_sequences``.
///     CudaUnavailable: the device is not there.
#[pyclass(frozen, eq, module = "prefix_attn", name = "Capacity")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PyCapacity {
    pub(crate) inner: PlanCapacity,
}

#[pymethods]
impl PyCapacity {
    #[new]
    #[pyo3(signature = (max_sequences, max_pages, device_or_profile: "DeviceProfile | torch.device | str", max_items = None, max_slots = None))]
    fn new(
        max_sequences: Integer,
        max_pages: Integer,
        device_or_profile: &Bound<'_, PyAny>,
        max_items: Option<Integer>,
        max_slots: Option<Integer>,
    ) -> Result<Self> {
        let (max_sequences, max_pages) = (max_sequences.count("max_sequences", 0)?, max_pages.count("max_pages", 0)?);
        let max_items = max_items.map(|count| count.count("max_items", 0)).transpose()?;
        let max_slots = max_slots.map(|count| count.count("max_slots", 0)).transpose()?;
        let profile = match device_or_profile.cast::<PyProfile>() {
            Ok(profile) => profile.get().inner.clone(),
            Err(_) => PyProfile::of(Device::parse("device_or_profile", device_or_profile)?)?.inner,
        };
        let usual = PlanCapacity::for_batches(max_sequences, max_pages, &profile);
        let inner = PlanCapacity {
            max_items: max_items.unwrap_or(usual.max_items),
            max_slots: max_slots.unwrap_or(usual.max_slots),
            ..usual
        };
        if inner.max_items < max_sequences {
            return Err(invalid("max_items", inner.max_items, format!("at least max_sequences = {max_sequences}")));
        }
        Ok(Self { inner })
    }

    /// Rows of a batch.
    #[getter]
    fn max_sequences(&self) -> u32 {
        self.inner.max_sequences
    }

    /// Pages of all rows together.
    #[getter]
    fn max_pages(&self) -> u32 {
        self.inner.max_pages
    }

    /// Work items of a plan.
    #[getter]
    fn max_items(&self) -> u32 {
        self.inner.max_items
    }

    /// Partial results of a plan.
    #[getter]
    fn max_slots(&self) -> u32 {
        self.inner.max_slots
    }

    fn __repr__(&self) -> String {
        let PlanCapacity { max_sequences, max_pages, max_items, max_slots } = self.inner;
        format!(
            "Capacity(max_sequences={max_sequences}, max_pages={max_pages}, max_items={max_items}, max_slots={max_slots})"
        )
    }
}
