//! What the planner knows of a device: plain numbers, no CUDA type.

use pat_abi::TileVariant;
use serde::{Deserialize, Serialize};

/// Rates and sizes the cost model works with. Times in microseconds, rates in bytes or FLOP per microsecond.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceProfile {
    /// Name, for reports.
    pub name: String,
    /// Compute capability, major * 10 + minor.
    pub compute_capability: u32,
    /// Streaming multiprocessors.
    pub sm_count: u32,
    /// Reachable DRAM read bandwidth.
    pub hbm_bytes_per_us: f64,
    /// Reachable L2 read bandwidth.
    pub l2_bytes_per_us: f64,
    /// L2 capacity in bytes.
    pub l2_bytes: u64,
    /// Dense 16-bit tensor throughput that attention kernels reach on the device, by mma.sync.
    pub mma_flop_per_us: f64,
    /// The same by wgmma (0 where there is none).
    pub wgmma_flop_per_us: f64,
    /// Fixed cost of a forward launch, from an empty queue to the first bytes requested.
    pub launch_us: f64,
    /// Fixed cost of the merge launch behind it.
    pub merge_us: f64,
    /// Latency of a work item's dependent loads (plan, page ids, first tile) that nothing overlaps.
    pub item_latency_us: f64,
    /// Least time of one main-loop step of a CTA.
    pub tile_latency_us: f64,
}

impl DeviceProfile {
    /// NVIDIA H200 SXM.
    pub fn h200() -> Self {
        Self {
            name: "NVIDIA H200".into(),
            compute_capability: 90,
            sm_count: 132,
            hbm_bytes_per_us: 4.6e6,
            l2_bytes_per_us: 7.0e6,
            l2_bytes: 50 << 20,
            mma_flop_per_us: 290e6,
            wgmma_flop_per_us: 540e6,
            launch_us: 4.0,
            merge_us: 3.0,
            item_latency_us: 2.5,
            tile_latency_us: 0.5,
        }
    }

    /// Tile variants that run on the device and can read pages of `page_size` tokens, smallest M first.
    pub fn variants(&self, page_size: u32) -> Vec<TileVariant> {
        TileVariant::ALL
            .into_iter()
            .filter(|v| v.supports_page_size(page_size))
            .filter(|v| pat_abi::KERNELS.iter().any(|k| k.family == pat_abi::Family::Forward(*v)))
            .filter(|v| match v.arch() {
                pat_abi::Arch::Sm80 => self.compute_capability >= 80,
                pat_abi::Arch::Sm90a => self.compute_capability == 90,
            })
            .collect()
    }
}
