//! What the planner knows of a device: plain numbers, no CUDA type.

use crate::eligibility::variant_supports;
use crate::{Error, Problem, Result};
use pat_abi::{Arch, DeviceLimits, TileVariant};
use serde::{Deserialize, Serialize};

/// Rates and sizes the cost model works with. Times in microseconds, rates in bytes or FLOP per microsecond.
///
/// Profiles of known devices have names ([`Self::by_name`]); `pat calibrate` measures one and writes it as JSON, which serde
/// reads. [`crate::Planner::new`] refuses one that is not plausible ([`Self::validate`]).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct DeviceProfile {
    /// Name, for reports.
    pub name: String,
    /// Whether the terms below that only a kernel can tell were measured on this kind of device.
    #[serde(default)]
    pub kernel_terms: KernelTerms,
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
    /// Shared memory of a multiprocessor; where it is not said, what the compute capability has ([`DeviceLimits::of`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smem_per_sm_bytes: Option<u32>,
    /// Registers of a multiprocessor, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registers_per_sm: Option<u32>,
    /// Resident threads of a multiprocessor, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads_per_sm: Option<u32>,
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

/// Where a profile's kernel terms (tensor and L2 rates, launch, merge, item and tile latencies) come from. SM count, L2
/// size and DRAM bandwidth are facts of the device in every case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KernelTerms {
    /// Measured on this kind of device.
    Measured,
    /// The H200's, rates scaled by SMs and clock: good for choosing between plans, not for predicting times.
    #[default]
    Scaled,
}

/// What a datasheet (or the driver) says of a device: enough to scale a measured profile to it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Datasheet {
    /// Compute capability, major * 10 + minor.
    pub(crate) compute_capability: u32,
    /// Streaming multiprocessors.
    pub(crate) sm_count: u32,
    /// Largest SM clock.
    pub(crate) sm_clock_mhz: f64,
    /// Peak DRAM bandwidth.
    pub(crate) dram_bytes_per_us: f64,
    /// L2 capacity in bytes.
    pub(crate) l2_bytes: u64,
}

/// The devices a profile is kept for: short name, how the driver's name of it begins, and NVIDIA's datasheet (A100:
/// nvidia-a100-datasheet, 2021; H100: NVIDIA H100 Tensor Core GPU Architecture, table 3; H200: H200 datasheet, 2024).
const KNOWN: [(&str, &[&str], Datasheet); 5] = [
    (
        "a100-40",
        &["NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"],
        Datasheet {
            compute_capability: 80,
            sm_count: 108,
            sm_clock_mhz: 1410.0,
            dram_bytes_per_us: 1.555e6,
            l2_bytes: 40 << 20,
        },
    ),
    (
        "a100-80",
        &["NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"],
        Datasheet {
            compute_capability: 80,
            sm_count: 108,
            sm_clock_mhz: 1410.0,
            dram_bytes_per_us: 2.039e6,
            l2_bytes: 40 << 20,
        },
    ),
    (
        "h100-sxm",
        &["NVIDIA H100 80GB HBM3"],
        Datasheet {
            compute_capability: 90,
            sm_count: 132,
            sm_clock_mhz: 1980.0,
            dram_bytes_per_us: 3.35e6,
            l2_bytes: 50 << 20,
        },
    ),
    (
        "h100-pcie",
        &["NVIDIA H100 PCIe"],
        Datasheet {
            compute_capability: 90,
            sm_count: 114,
            sm_clock_mhz: 1755.0,
            dram_bytes_per_us: 2.039e6,
            l2_bytes: 50 << 20,
        },
    ),
    ("h200", &["NVIDIA H200"], H200_DATASHEET),
];

/// What unknown devices are scaled from.
pub(crate) const H200_DATASHEET: Datasheet = Datasheet {
    compute_capability: 90,
    sm_count: 132,
    sm_clock_mhz: 1980.0,
    dram_bytes_per_us: 4.8e6,
    l2_bytes: 50 << 20,
};

/// Partials cost, beside the launch of the merge, what reading their bytes so many times from L2 costs: they are written eight bytes at a
/// time, and the rows of a merge wait for little each. Fitted with the constants of `plan/cost.rs` (docs/planner-quality.md).
const PARTIAL_PASSES: f64 = 4.5;

impl DeviceProfile {
    /// What so many bytes of partials add to the merge's fixed cost.
    pub fn partials_us(&self, partial_bytes: f64) -> f64 {
        PARTIAL_PASSES * partial_bytes / self.l2_bytes_per_us
    }

    /// NVIDIA H200 SXM: runs of `pat calibrate` on three of them, rounded. Launch and merge are the last run's (1528e5d; the kernels
    /// before took longer); the latency of a step is that of the kernels since then on an H100, which has the same multiprocessors.
    pub fn h200() -> Self {
        Self {
            name: "NVIDIA H200".into(),
            kernel_terms: KernelTerms::Measured,
            compute_capability: H200_DATASHEET.compute_capability,
            sm_count: H200_DATASHEET.sm_count,
            hbm_bytes_per_us: 4.55e6,
            l2_bytes_per_us: 8.7e6,
            l2_bytes: H200_DATASHEET.l2_bytes,
            smem_per_sm_bytes: None,
            registers_per_sm: None,
            threads_per_sm: None,
            mma_flop_per_us: 280e6,
            wgmma_flop_per_us: 520e6,
            launch_us: 2.2,
            merge_us: 1.5,
            item_latency_us: 1.6,
            tile_latency_us: 0.64,
        }
    }

    /// NVIDIA H100 SXM: runs of `pat calibrate` on three of them, rounded.
    pub fn h100_sxm() -> Self {
        Self {
            name: "NVIDIA H100 80GB HBM3".into(),
            hbm_bytes_per_us: 3.12e6,
            l2_bytes_per_us: 8.2e6,
            launch_us: 2.5,
            merge_us: 1.8,
            item_latency_us: 1.65,
            ..Self::h200()
        }
    }

    /// Short names that [`Self::by_name`] knows.
    pub fn known_names() -> impl Iterator<Item = &'static str> {
        KNOWN.iter().map(|(short, ..)| *short)
    }

    /// The profile of a known device, by short name (`h100-sxm`) or by the driver's name (`NVIDIA H100 80GB HBM3`).
    ///
    /// # Errors
    /// The name is neither; the message lists the short ones.
    pub fn by_name(name: &str) -> Result<Self> {
        let known = KNOWN.iter().find(|(short, driver_names, _)| {
            short.eq_ignore_ascii_case(name) || driver_names.iter().any(|prefix| is_device(name, prefix))
        });
        let Some((short, driver_names, datasheet)) = known else {
            let names: Vec<_> = Self::known_names().collect();
            return Err(Error::invalid("device profile", name, format!("one of {}", names.join(", "))));
        };
        Ok(match *short {
            "h200" => Self::h200(),
            "h100-sxm" => Self::h100_sxm(),
            _ => Self::scaled(driver_names[0], *datasheet),
        })
    }

    /// The H200's measured terms scaled to another device: rates by SMs times clock, DRAM by its peak, latencies as they
    /// are. The planner's choices depend on ratios of these terms far more than on their size.
    pub(crate) fn scaled(name: &str, device: Datasheet) -> Self {
        let h200 = Self::h200();
        let cores = f64::from(device.sm_count) * device.sm_clock_mhz
            / (f64::from(H200_DATASHEET.sm_count) * H200_DATASHEET.sm_clock_mhz);
        let reached = h200.hbm_bytes_per_us / H200_DATASHEET.dram_bytes_per_us;
        Self {
            name: name.into(),
            kernel_terms: KernelTerms::Scaled,
            compute_capability: device.compute_capability,
            sm_count: device.sm_count,
            hbm_bytes_per_us: device.dram_bytes_per_us * reached,
            l2_bytes_per_us: h200.l2_bytes_per_us * cores,
            l2_bytes: device.l2_bytes,
            mma_flop_per_us: h200.mma_flop_per_us * cores,
            wgmma_flop_per_us: if Arch::Sm90a.runs_on(device.compute_capability) {
                h200.wgmma_flop_per_us * cores
            } else {
                0.0
            },
            ..h200
        }
    }

    /// Whether the numbers can be those of a device: a profile may come from a file.
    ///
    /// # Errors
    /// Names the first field that is not a number within its bounds. They are wide (from a tenth of the smallest device of
    /// compute capability 8.0 on) and there to catch zeros, NaN, and other units.
    pub fn validate(&self) -> Result<()> {
        let whole = [
            ("compute_capability", u64::from(self.compute_capability), 80, 999),
            ("sm_count", u64::from(self.sm_count), 1, 10_000),
            ("l2_bytes", self.l2_bytes, 1 << 16, 1 << 40),
        ];
        let limits = self.limits();
        let whole = whole.into_iter().chain([
            ("smem_per_sm_bytes", u64::from(limits.smem_per_sm_bytes), 32 << 10, 1 << 24),
            ("registers_per_sm", u64::from(limits.registers_per_sm), 1 << 14, 1 << 24),
            ("threads_per_sm", u64::from(limits.threads_per_sm), 512, 1 << 16),
        ]);
        for (field, value, least, most) in whole {
            if !(least..=most).contains(&value) {
                return Err(Error::invalid(format!("device profile: {field}"), value, format!("{least} to {most}")));
            }
        }
        const BYTES_PER_US: [f64; 2] = [1e4, 1e9];
        const FLOP_PER_US: [f64; 2] = [1e5, 1e11];
        const LATENCY_US: [f64; 2] = [1e-3, 1e4];
        let has_wgmma = Arch::Sm90a.runs_on(self.compute_capability);
        let terms = [
            ("hbm_bytes_per_us", self.hbm_bytes_per_us, BYTES_PER_US),
            ("l2_bytes_per_us", self.l2_bytes_per_us, BYTES_PER_US),
            ("mma_flop_per_us", self.mma_flop_per_us, FLOP_PER_US),
            ("wgmma_flop_per_us", self.wgmma_flop_per_us, if has_wgmma { FLOP_PER_US } else { [0.0, FLOP_PER_US[1]] }),
            ("launch_us", self.launch_us, LATENCY_US),
            ("merge_us", self.merge_us, LATENCY_US),
            ("item_latency_us", self.item_latency_us, LATENCY_US),
            ("tile_latency_us", self.tile_latency_us, LATENCY_US),
        ];
        for (field, value, [least, most]) in terms {
            if !(least..=most).contains(&value) {
                let expected = format!("{least:e} to {most:e}");
                return Err(Error::invalid(format!("device profile: {field}"), value, expected));
            }
        }
        Ok(())
    }

    /// What a multiprocessor has: as the profile says, and otherwise as its compute capability has it.
    pub fn limits(&self) -> DeviceLimits {
        let usual = DeviceLimits::of(self.compute_capability);
        DeviceLimits {
            smem_per_sm_bytes: self.smem_per_sm_bytes.unwrap_or(usual.smem_per_sm_bytes),
            registers_per_sm: self.registers_per_sm.unwrap_or(usual.registers_per_sm),
            threads_per_sm: self.threads_per_sm.unwrap_or(usual.threads_per_sm),
            ..usual
        }
    }

    /// Tile variants whose kernels can compute `problem` on the device, in the order of [`TileVariant::ALL`].
    pub fn variants(&self, problem: &Problem) -> Vec<TileVariant> {
        let can = |variant: &TileVariant| variant_supports(*variant, problem, self.compute_capability).is_ok();
        TileVariant::ALL.into_iter().filter(can).collect()
    }
}

/// Whether the driver's name `name` is `prefix`, perhaps with more words behind it (a MIG slice's, say).
fn is_device(name: &str, prefix: &str) -> bool {
    name.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AttentionShape, Dtype};

    #[test]
    fn known_devices_are_found_by_either_name() {
        let problem = Problem::new(AttentionShape::new(32, 8, 128, Dtype::F16).unwrap(), 16);
        for short in DeviceProfile::known_names() {
            let profile = DeviceProfile::by_name(short).unwrap();
            assert_eq!(DeviceProfile::by_name(&profile.name).unwrap(), profile);
            profile.validate().unwrap();
            assert!(!profile.variants(&problem).is_empty(), "{short}");
            let measured = profile.kernel_terms == KernelTerms::Measured;
            assert_eq!(measured, ["h100-sxm", "h200"].contains(&short), "{short}");
        }
        let [a40, a80, pcie, sxm, h200] =
            ["a100-40", "NVIDIA A100 80GB PCIe", "H100-PCIe", "NVIDIA H100 80GB HBM3", "NVIDIA H200"]
                .map(|name| DeviceProfile::by_name(name).unwrap());
        let bandwidths = [&a40, &a80, &pcie, &sxm, &h200].map(|profile| profile.hbm_bytes_per_us);
        assert!(bandwidths.is_sorted(), "{bandwidths:?}");
        assert_eq!((a80.sm_count, pcie.sm_count, sxm.sm_count), (108, 114, 132));
        assert_eq!(a40.wgmma_flop_per_us, 0.0);
    }

    #[test]
    fn a_profile_is_read_back_as_it_was_written() {
        for short in DeviceProfile::known_names() {
            let profile = DeviceProfile::by_name(short).unwrap();
            let text = serde_json::to_string(&profile).unwrap();
            assert_eq!(serde_json::from_str::<DeviceProfile>(&text).unwrap(), profile);
            let mut smaller = profile.clone();
            smaller.smem_per_sm_bytes = Some(100 << 10);
            let of_file = serde_json::from_str::<DeviceProfile>(&serde_json::to_string(&smaller).unwrap()).unwrap();
            assert_eq!((of_file.limits().smem_per_sm_bytes, &of_file), (100 << 10, &smaller));
            let foreign = text.replacen('{', r#"{"hbm_gb_s":4600,"#, 1);
            let error = serde_json::from_str::<DeviceProfile>(&foreign).unwrap_err().to_string();
            assert!(error.contains("unknown field `hbm_gb_s`"), "{error}");
        }
    }

    #[test]
    fn implausible_numbers_are_named() {
        type Change = fn(&mut DeviceProfile);
        let cases: [(&str, Change); 15] = [
            ("compute_capability: got 75", |p| p.compute_capability = 75),
            ("sm_count: got 0", |p| p.sm_count = 0),
            ("l2_bytes: got 0", |p| p.l2_bytes = 0),
            ("smem_per_sm_bytes: got 228,", |p| p.smem_per_sm_bytes = Some(228)), // KiB
            ("registers_per_sm: got 64,", |p| p.registers_per_sm = Some(64)),
            ("threads_per_sm: got 0,", |p| p.threads_per_sm = Some(0)),
            ("hbm_bytes_per_us: got 4600,", |p| p.hbm_bytes_per_us = 4600.0), // GB/s
            ("l2_bytes_per_us: got inf", |p| p.l2_bytes_per_us = f64::INFINITY),
            ("mma_flop_per_us: got -1", |p| p.mma_flop_per_us = -1.0),
            ("wgmma_flop_per_us: got 0", |p| p.wgmma_flop_per_us = 0.0),
            ("launch_us: got NaN", |p| p.launch_us = f64::NAN),
            ("merge_us: got 0", |p| p.merge_us = 0.0),
            ("item_latency_us: got -2", |p| p.item_latency_us = -2.0),
            ("tile_latency_us: got 0", |p| p.tile_latency_us = 0.0),
            ("wgmma_flop_per_us: got NaN", |p| (p.compute_capability, p.wgmma_flop_per_us) = (80, f64::NAN)),
        ];
        for (expected, change) in cases {
            let mut profile = DeviceProfile::h200();
            change(&mut profile);
            let error = profile.validate().unwrap_err().to_string();
            assert!(error.starts_with(&format!("device profile: {expected}")), "{expected}: {error}");
        }
    }

    #[test]
    fn unknown_names_are_refused_with_the_known_ones() {
        for name in ["", "NVIDIA", "NVIDIA H20", "NVIDIA H2000", "B200"] {
            let error = DeviceProfile::by_name(name).unwrap_err().to_string();
            assert!(error.contains("a100-40") && error.contains("h200"), "{error}");
        }
    }
}
