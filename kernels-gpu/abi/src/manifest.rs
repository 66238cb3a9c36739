//! The kernel manifest: the single owner of tile shapes, launch bounds and entry names.
//!
//! The device crate takes its constants from here, the xtask inserts the launch bounds it names and checks what ptxas
//! reports against it, the host sizes launches by it.

/// Element type of Q, K, V and O.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE 754 binary16.
    F16,
    /// bfloat16.
    Bf16,
}

/// Which PTX file holds a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Arch {
    /// Runs on compute capability 8.0 and everything later.
    Sm80,
    /// Runs on compute capability 9.0 only (wgmma, TMA).
    Sm90a,
}

impl Arch {
    /// Both, oldest first.
    pub const ALL: [Self; 2] = [Self::Sm80, Self::Sm90a];

    /// The name rustc (`-C target-cpu`) and ptxas (`-arch`) use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sm80 => "sm_80",
            Self::Sm90a => "sm_90a",
        }
    }

    /// Dynamic shared memory a CTA may use: 163 KiB on the A100, 227 KiB on Hopper.
    /// (CUDA C++ Programming Guide, "Technical specifications per compute capability".)
    pub const fn max_smem_bytes(self) -> u32 {
        match self {
            Self::Sm80 => 163 * 1024,
            Self::Sm90a => 227 * 1024,
        }
    }
}

/// A tile shape the planner can choose for a work item. The discriminant indexes `PlanHeader::variant_*`.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TileVariant {
    /// mma.sync, 16 rows, four warps that split the KV tokens between them. Any page size.
    Mma16 = 0,
    /// mma.sync, 32 rows. Any page size.
    Mma32 = 1,
    /// mma.sync, 64 rows. Any page size.
    Mma64 = 2,
    /// mma.sync, 128 rows. Any page size.
    Mma128 = 3,
    /// wgmma fed by TMA, 64 rows. Page sizes that are powers of two from 16 on.
    Wgmma64 = 4,
    /// wgmma fed by TMA, 128 rows, two consumer warpgroups. Page sizes that are powers of two from 16 on.
    Wgmma128 = 5,
}

impl TileVariant {
    /// All variants in order of discriminant.
    pub const ALL: [Self; 6] = [Self::Mma16, Self::Mma32, Self::Mma64, Self::Mma128, Self::Wgmma64, Self::Wgmma128];

    /// Index into `PlanHeader::variant_begin` and `variant_count`.
    pub const fn index(self) -> usize {
        self as usize
    }

    /// M: packed rows of a tile.
    pub const fn rows(self) -> u32 {
        match self {
            Self::Mma16 => 16,
            Self::Mma32 => 32,
            Self::Mma64 | Self::Wgmma64 => 64,
            Self::Mma128 | Self::Wgmma128 => 128,
        }
    }

    /// N: KV tokens a CTA processes per main-loop step.
    pub const fn keys(self) -> u32 {
        match self {
            Self::Mma16 | Self::Wgmma128 => 128,
            Self::Mma32 | Self::Mma64 | Self::Mma128 | Self::Wgmma64 => 64,
        }
    }

    /// Short name, as used in entry names and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mma16 => "mma16",
            Self::Mma32 => "mma32",
            Self::Mma64 => "mma64",
            Self::Mma128 => "mma128",
            Self::Wgmma64 => "wgmma64",
            Self::Wgmma128 => "wgmma128",
        }
    }

    /// The PTX file that holds this variant's kernels.
    pub const fn arch(self) -> Arch {
        match self {
            Self::Mma16 | Self::Mma32 | Self::Mma64 | Self::Mma128 => Arch::Sm80,
            Self::Wgmma64 | Self::Wgmma128 => Arch::Sm90a,
        }
    }

    /// Whether a CTA serves a piece of work of every round, dealt first CTA to last and back, instead of one piece alone:
    /// launched with as many CTAs as fit the device, however large the plan.
    pub const fn is_persistent(self) -> bool {
        matches!(self, Self::Wgmma64 | Self::Wgmma128)
    }

    /// Whether the variant can read pages of this many tokens. TMA boxes want powers of two; mma.sync tiles take any size.
    pub const fn supports_page_size(self, page_size: u32) -> bool {
        match self.arch() {
            Arch::Sm80 => page_size >= 1,
            Arch::Sm90a => page_size >= 16 && page_size.is_power_of_two(),
        }
    }
}

/// What a kernel does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// Attention of one work item; writes partials or the final output.
    Forward(TileVariant),
    /// Combines partials by their log-sum-exp.
    Merge,
    /// Draws a tensor from the counter generator (tests, benchmarks). Any head dimension: its rows say 0.
    Fill,
    /// Evicts the L2 cache by reading (benchmarks). Any element type and head dimension: its row says F16 and 0.
    Flush,
    /// Writes new rows of K and V into a cache. Any 16-bit type and head dimension: its row says F16 and 0.
    Append,
    /// Merges two attention states. Any head dimension: its rows say 0.
    MergeStates,
}

/// One compiled kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelSpec {
    /// Name of the PTX entry.
    pub entry: &'static str,
    /// PTX file that holds it.
    pub arch: Arch,
    /// What it does.
    pub family: Family,
    /// Element type.
    pub dtype: Dtype,
    /// Elements per head.
    pub head_dim: u32,
    /// Threads per CTA (`.maxntid`).
    pub threads: u32,
    /// Minimum CTAs per multiprocessor the compiler must make room for (`.minnctapersm`).
    pub min_ctas_per_sm: u32,
    /// Dynamic shared memory per CTA.
    pub smem_bytes: u32,
    /// Most registers per thread ptxas may report.
    pub max_registers: u32,
    /// CTA-wide and named barrier instructions (`bar.sync`, `bar.arrive`, `barrier.*`) in the PTX: more means that a
    /// compiler pass has duplicated one into a divergent branch.
    pub barriers: u32,
    /// Tensor-map parameters (128 bytes each) behind the first parameter.
    pub tensor_maps: u32,
}

macro_rules! forward {
    ($entry:literal, $variant:ident, $dtype:ident, $head_dim:literal, threads $threads:literal, ctas $ctas:literal, smem $smem:expr, regs $regs:literal, bars $bars:literal, maps $maps:literal) => {
        KernelSpec {
            entry: $entry,
            arch: TileVariant::$variant.arch(),
            family: Family::Forward(TileVariant::$variant),
            dtype: Dtype::$dtype,
            head_dim: $head_dim,
            threads: $threads,
            min_ctas_per_sm: $ctas,
            smem_bytes: $smem,
            max_registers: $regs,
            barriers: $bars,
            tensor_maps: $maps,
        }
    };
}

macro_rules! merge {
    ($entry:literal, $arch:ident, $dtype:ident, $head_dim:literal) => {
        KernelSpec {
            entry: $entry,
            arch: Arch::$arch,
            family: Family::Merge,
            dtype: Dtype::$dtype,
            head_dim: $head_dim,
            threads: 128,
            // Eight float4 loads in flight with 64-bit addresses, and the outputs of four rows.
            min_ctas_per_sm: 4,
            // Four warps' sums of a row, where a CTA has one row.
            smem_bytes: 4 * 4 * $head_dim,
            max_registers: 128,
            barriers: 1,
            tensor_maps: 0,
        }
    };
}

macro_rules! support {
    ($entry:literal, $family:ident, $dtype:ident) => {
        KernelSpec {
            entry: $entry,
            arch: Arch::Sm80,
            family: Family::$family,
            dtype: Dtype::$dtype,
            head_dim: 0,
            threads: 256,
            min_ctas_per_sm: 4,
            smem_bytes: 0,
            max_registers: 64,
            barriers: 0,
            tensor_maps: 0,
        }
    };
}

/// Every kernel of the project.
///
/// At head dimension 128, `mma16` and `mma32` ask for two CTAs per multiprocessor: three would leave 168 registers, which
/// ptxas meets only by spilling. Two keep 128 KiB in flight, and an A100 has shared memory for no more.
#[rustfmt::skip]
pub const KERNELS: &[KernelSpec] = &[
    forward!("pat_forward_mma16_d128_f16",     Mma16,  F16,  128, threads 128, ctas 2, smem 66_048, regs 255, bars 1, maps 0),
    forward!("pat_forward_mma16_d128_bf16",    Mma16,  Bf16, 128, threads 128, ctas 2, smem 66_048, regs 255, bars 1, maps 0),
    forward!("pat_forward_mma16_d64_f16",      Mma16,  F16,  64,  threads 128, ctas 3, smem 66_048, regs 168, bars 1, maps 0),
    forward!("pat_forward_mma16_d64_bf16",     Mma16,  Bf16, 64,  threads 128, ctas 3, smem 66_048, regs 168, bars 1, maps 0),
    forward!("pat_forward_mma32_d128_f16",     Mma32,  F16,  128, threads 128, ctas 2, smem 66_048, regs 255, bars 4, maps 0),
    forward!("pat_forward_mma32_d128_bf16",    Mma32,  Bf16, 128, threads 128, ctas 2, smem 66_048, regs 255, bars 4, maps 0),
    forward!("pat_forward_mma32_d64_f16",      Mma32,  F16,  64,  threads 128, ctas 3, smem 33_280, regs 168, bars 4, maps 0),
    forward!("pat_forward_mma32_d64_bf16",     Mma32,  Bf16, 64,  threads 128, ctas 3, smem 33_280, regs 168, bars 4, maps 0),
    forward!("pat_forward_mma64_d128_f16",     Mma64,  F16,  128, threads 128, ctas 2, smem 66_048, regs 255, bars 3, maps 0),
    forward!("pat_forward_mma64_d128_bf16",    Mma64,  Bf16, 128, threads 128, ctas 2, smem 66_048, regs 255, bars 3, maps 0),
    forward!("pat_forward_mma64_d64_f16",      Mma64,  F16,  64,  threads 128, ctas 2, smem 33_280, regs 255, bars 3, maps 0),
    forward!("pat_forward_mma64_d64_bf16",     Mma64,  Bf16, 64,  threads 128, ctas 2, smem 33_280, regs 255, bars 3, maps 0),
    forward!("pat_forward_mma128_d128_f16",    Mma128, F16,  128, threads 256, ctas 1, smem 66_048, regs 255, bars 3, maps 0),
    forward!("pat_forward_mma128_d128_bf16",   Mma128, Bf16, 128, threads 256, ctas 1, smem 66_048, regs 255, bars 3, maps 0),
    forward!("pat_forward_mma128_d64_f16",     Mma128, F16,  64,  threads 256, ctas 1, smem 33_280, regs 255, bars 3, maps 0),
    forward!("pat_forward_mma128_d64_bf16",    Mma128, Bf16, 64,  threads 256, ctas 1, smem 33_280, regs 255, bars 3, maps 0),
    // Shared memory: 3 stages of K and V, Q, and 160 bytes of barriers.
    forward!("pat_forward_wgmma64_d128_f16",   Wgmma64, F16,  128, threads 256, ctas 2, smem 114_896, regs 128, bars 5, maps 2),
    forward!("pat_forward_wgmma64_d128_bf16",  Wgmma64, Bf16, 128, threads 256, ctas 2, smem 114_896, regs 128, bars 5, maps 2),
    forward!("pat_forward_wgmma64_d64_f16",    Wgmma64, F16,  64,  threads 256, ctas 2, smem 57_552,  regs 128, bars 5, maps 2),
    forward!("pat_forward_wgmma64_d64_bf16",   Wgmma64, Bf16, 64,  threads 256, ctas 2, smem 57_552,  regs 128, bars 5, maps 2),
    forward!("pat_forward_wgmma128_d128_f16", Wgmma128, F16, 128, threads 384, ctas 1, smem 229_696, regs 168, bars 5, maps 2),
    forward!("pat_forward_wgmma128_d128_bf16", Wgmma128, Bf16, 128, threads 384, ctas 1, smem 229_696, regs 168, bars 5, maps 2),
    forward!("pat_forward_wgmma128_d64_f16", Wgmma128, F16, 64, threads 384, ctas 1, smem 115_008, regs 168, bars 5, maps 2),
    forward!("pat_forward_wgmma128_d64_bf16", Wgmma128, Bf16, 64, threads 384, ctas 1, smem 115_008, regs 168, bars 5, maps 2),
    merge!("pat_merge_d128_f16",      Sm80,  F16,  128),
    merge!("pat_merge_d128_bf16",     Sm80,  Bf16, 128),
    merge!("pat_merge_d64_f16",       Sm80,  F16,  64),
    merge!("pat_merge_d64_bf16",      Sm80,  Bf16, 64),
    merge!("pat_merge_pdl_d128_f16",  Sm90a, F16,  128),
    merge!("pat_merge_pdl_d128_bf16", Sm90a, Bf16, 128),
    merge!("pat_merge_pdl_d64_f16",   Sm90a, F16,  64),
    merge!("pat_merge_pdl_d64_bf16",  Sm90a, Bf16, 64),
    support!("pat_fill_f16",  Fill,  F16),
    support!("pat_fill_bf16", Fill,  Bf16),
    support!("pat_flush_l2",  Flush, F16),
    support!("pat_append_kv", Append, F16),
    support!("pat_merge_states_f16",  MergeStates, F16),
    support!("pat_merge_states_bf16", MergeStates, Bf16),
];

/// The kernel of a family for an element type and head dimension, if there is one. Of two merge kernels it is the one
/// that runs on both architectures; [`find_for`] names the file.
pub fn find(family: Family, dtype: Dtype, head_dim: u32) -> Option<&'static KernelSpec> {
    KERNELS.iter().find(|k| k.family == family && k.dtype == dtype && k.head_dim == head_dim)
}

/// As [`find`], in the PTX file of `arch`. The sm_90a merge kernel is launched with programmatic stream serialisation.
pub fn find_for(arch: Arch, family: Family, dtype: Dtype, head_dim: u32) -> Option<&'static KernelSpec> {
    KERNELS.iter().find(|k| k.arch == arch && k.family == family && k.dtype == dtype && k.head_dim == head_dim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_unique_and_within_their_architecture() {
        for (i, kernel) in KERNELS.iter().enumerate() {
            assert!(KERNELS[..i].iter().all(|other| other.entry != kernel.entry), "{} twice", kernel.entry);
            assert!(kernel.smem_bytes <= kernel.arch.max_smem_bytes(), "{}", kernel.entry);
            assert!(kernel.threads % 32 == 0 && kernel.threads <= 1024, "{}", kernel.entry);
            assert!(kernel.threads * kernel.max_registers * kernel.min_ctas_per_sm <= 65_536, "{}", kernel.entry);
        }
    }

    #[test]
    fn variant_indices_are_dense() {
        for (i, variant) in TileVariant::ALL.iter().enumerate() {
            assert_eq!(variant.index(), i);
        }
    }
}
