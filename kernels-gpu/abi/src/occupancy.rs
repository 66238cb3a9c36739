//! How many CTAs of a kernel share a multiprocessor: a function of the kernel and of what a multiprocessor has.

use crate::KernelSpec;

/// What a multiprocessor has. (CUDA C++ Programming Guide, "Technical specifications per compute capability".)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceLimits {
    /// Shared memory, the part that the system keeps of each CTA included.
    pub smem_per_sm_bytes: u32,
    /// Shared memory of a CTA at most.
    pub smem_per_cta_bytes: u32,
    /// 32-bit registers.
    pub registers_per_sm: u32,
    /// Resident threads.
    pub threads_per_sm: u32,
    /// Resident CTAs.
    pub ctas_per_sm: u32,
}

/// Shared memory of a CTA that the system keeps for itself.
const RESERVED_SMEM_BYTES: u32 = 1024;
/// A warp gets registers in units of so many.
const REGISTER_UNIT: u32 = 256;
const WARP_THREADS: u32 = 32;

impl DeviceLimits {
    /// Of a compute capability (90 for 9.0). One that is not known has the least that any known one has.
    pub const fn of(compute_capability: u32) -> Self {
        let (smem_kib, threads_per_sm, ctas_per_sm) = match compute_capability {
            80 => (164, 2048, 32),
            87 => (164, 1536, 16),
            89 | 120 | 121 => (100, 1536, 24),
            90 | 100 | 103 => (228, 2048, 32),
            101 | 110 => (228, 1536, 24),
            _ => (100, 1536, 16),
        };
        Self {
            smem_per_sm_bytes: smem_kib * 1024,
            smem_per_cta_bytes: smem_kib * 1024 - RESERVED_SMEM_BYTES,
            registers_per_sm: 65_536,
            threads_per_sm,
            ctas_per_sm,
        }
    }

    /// CTAs of `kernel` that run on a multiprocessor at a time; 0 where not even one does.
    pub const fn occupancy(&self, kernel: &KernelSpec) -> u32 {
        if kernel.smem_bytes > self.smem_per_cta_bytes {
            return 0;
        }
        let warps = kernel.threads.div_ceil(WARP_THREADS);
        let warp_registers = (kernel.max_registers * WARP_THREADS).next_multiple_of(REGISTER_UNIT);
        let by_smem = self.smem_per_sm_bytes / (kernel.smem_bytes + RESERVED_SMEM_BYTES);
        let by_registers = self.registers_per_sm / (warps * warp_registers);
        let by_threads = self.threads_per_sm / (warps * WARP_THREADS);
        least(least(by_smem, by_registers), least(by_threads, self.ctas_per_sm))
    }
}

const fn least(a: u32, b: u32) -> u32 {
    if a < b { a } else { b }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Arch, Dtype, Family, KERNELS, TileVariant, manifest};

    fn occupancy(compute_capability: u32, variant: TileVariant, head_dim: u32) -> u32 {
        let kernel = manifest::find(Family::Forward(variant), Dtype::F16, head_dim).expect("a kernel");
        DeviceLimits::of(compute_capability).occupancy(kernel)
    }

    #[test]
    fn hopper_holds_what_kernels_are_compiled_for() {
        for kernel in KERNELS.iter().filter(|kernel| matches!(kernel.family, Family::Forward(_))) {
            assert_eq!(DeviceLimits::of(90).occupancy(kernel), kernel.min_ctas_per_sm, "{}", kernel.entry);
        }
    }

    #[test]
    fn devices_with_less_shared_memory_hold_fewer() {
        // 65,792 bytes and the system's 1,024: twice in the A100's 164 KiB, once in 100 KiB.
        assert_eq!(occupancy(90, TileVariant::Mma16, 64), 3);
        assert_eq!(occupancy(80, TileVariant::Mma16, 64), 2);
        for compute_capability in [86, 89, 120, 121, 999] {
            assert_eq!(occupancy(compute_capability, TileVariant::Mma16, 64), 1, "{compute_capability}");
            assert_eq!(occupancy(compute_capability, TileVariant::Mma16, 128), 1, "{compute_capability}");
            // 33,024 bytes.
            assert_eq!(occupancy(compute_capability, TileVariant::Mma32, 64), 3, "{compute_capability}");
        }
    }

    #[test]
    fn every_limit_counts() {
        let limits = DeviceLimits::of(90);
        let kernel = KernelSpec { threads: 128, max_registers: 32, smem_bytes: 1024, ..KERNELS[0] };
        assert_eq!(limits.occupancy(&kernel), 16, "threads");
        assert_eq!(DeviceLimits { ctas_per_sm: 5, ..limits }.occupancy(&kernel), 5);
        // A warp's 33 * 32 registers take five units of 256.
        let odd = KernelSpec { max_registers: 33, ..kernel };
        assert_eq!(DeviceLimits { registers_per_sm: 4 * 1280 * 3, ..limits }.occupancy(&odd), 3);
        assert_eq!(DeviceLimits { registers_per_sm: 4 * 1280 * 3 - 1, ..limits }.occupancy(&odd), 2);
        assert_eq!(DeviceLimits { smem_per_sm_bytes: 3 * 2048, ..limits }.occupancy(&kernel), 3);
        let too_large = KernelSpec { smem_bytes: 227 * 1024 + 1, ..kernel };
        assert_eq!(limits.occupancy(&too_large), 0);
        assert_eq!(limits.occupancy(&KernelSpec { smem_bytes: 227 * 1024, ..kernel }), 1);
    }

    #[test]
    fn every_portable_kernel_fits_every_device() {
        // But for the larger of two tiles at head dimension 512.
        let is_large = |kernel: &KernelSpec| kernel.entry.starts_with("pat_forward_mma32_d512");
        for kernel in KERNELS.iter().filter(|kernel| kernel.arch == Arch::Sm80 && !is_large(kernel)) {
            for compute_capability in [80, 86, 87, 89, 90, 100, 103, 110, 120, 121] {
                assert!(DeviceLimits::of(compute_capability).occupancy(kernel) > 0, "{}", kernel.entry);
            }
        }
    }
}
