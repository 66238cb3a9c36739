//! The kernel manifest: the single owner of tile shapes, launch bounds and entry names.
//!
//! The device crate takes its constants from here and from [`crate::tile`], the xtask inserts the launch bounds it names and
//! checks what ptxas reports against it, the host sizes launches by it.

use crate::Switches;
use crate::tile::register_limit;

/// Warps of a CTA of the merge kernels.
pub const MERGE_WARPS: u32 = 4;
/// Most columns that a warp of the merge kernels takes: a longer row goes to several.
pub const MERGE_COLUMNS: u32 = 128;
/// How warps of the merge kernels take a row of O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergeShape {
    /// Parts of a row, each of which a warp takes as if it were a row: as few as leave none more than [`MERGE_COLUMNS`].
    pub parts: u32,
    /// Columns of a lane: of 64, two; of more, four.
    pub columns: u32,
    /// Lanes that have columns.
    pub lanes: u32,
}

impl MergeShape {
    /// Of rows of so many elements, a multiple of 16.
    pub const fn of(v_head_dim: u32) -> Self {
        let columns = if v_head_dim <= 64 { 2 } else { 4 };
        let mut parts = v_head_dim.div_ceil(MERGE_COLUMNS);
        while !v_head_dim.is_multiple_of(parts * columns) {
            parts += 1;
        }
        Self { parts, columns, lanes: v_head_dim / parts / columns }
    }
}

/// Threads of a CTA of the kernels of tests and benchmarks.
pub const SUPPORT_THREADS: u32 = 256;

/// Keys of a mask of the wgmma kernels.
pub const MASK_KEYS: u32 = 16;
/// Most tokens of a TMA box: a box does not begin in one main-loop step and end in another.
pub const MAX_BOX_TOKENS: u32 = 64;

/// Tokens of the boxes in which pages come that take `page_keys` keys ([`TileVariant::page_keys`]): the largest power of two that
/// divides both a page and a tile, so that wherever a page begins in a tile no box lies in two of either.
pub const fn box_tokens(page_keys: u32) -> u32 {
    let bits = page_keys | MAX_BOX_TOKENS;
    bits & bits.wrapping_neg()
}

/// The 8-bit element types: calls a macro with what stands in the braces, followed by `[Dtype "name"]` for each of them.
#[macro_export]
macro_rules! eight_bit_types {
    ($callback:ident! { $($prefix:tt)* }) => {
        $callback! { $($prefix)* [E4m3 "e4m3"] [E5m2 "e5m2"] }
    };
}

/// Element type of Q, K, V or O.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Dtype {
    /// IEEE 754 binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// 8 bits, 4 of exponent and 3 of fraction, no infinities.
    E4m3,
    /// 8 bits, 5 of exponent and 2 of fraction.
    E5m2,
}

macro_rules! dtypes {
    ($([$dtype:ident $_name:literal])*) => { &[$(Self::$dtype),*] };
}

impl Dtype {
    /// Those of 8 bits.
    pub const EIGHT_BIT: &[Self] = eight_bit_types!(dtypes! {});

    /// Bytes of an element.
    pub const fn bytes(self) -> u32 {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::E4m3 | Self::E5m2 => 1,
        }
    }

    /// Short name, as used in options and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::E4m3 => "e4m3",
            Self::E5m2 => "e5m2",
        }
    }
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

    /// Whether its kernels run on a device of this compute capability (90 for 9.0).
    pub const fn runs_on(self, compute_capability: u32) -> bool {
        match self {
            Self::Sm80 => compute_capability >= 80,
            Self::Sm90a => compute_capability == 90,
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

/// A tile shape the planner can choose for a work item. The discriminant indexes [`crate::PlanHeader::variants`].
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum TileVariant {
    /// mma.sync, 16 rows, four warps that split the KV tokens between them. Any page size.
    Mma16 = 0,
    /// mma.sync, 32 rows. Any page size.
    Mma32 = 1,
    /// mma.sync, 64 rows. Any page size.
    Mma64 = 2,
    /// mma.sync, 128 rows. Any page size.
    Mma128 = 3,
    /// wgmma fed by TMA, 64 rows. Page sizes that are multiples of 8.
    Wgmma64 = 4,
    /// wgmma fed by TMA, 128 rows, two consumer warpgroups. Page sizes that are multiples of 8.
    Wgmma128 = 5,
}

impl TileVariant {
    /// Whether warps of the variant's kernels compute tiles that few rows attend to each for itself ([`crate::LoneTiles`]), over K
    /// and V of this type and head dimension. In the other wgmma kernels registers do not suffice.
    pub const fn has_lone_tiles(self, kv_dtype: Dtype, head_dim: u32) -> bool {
        matches!(self.arch(), Arch::Sm90a) && kv_dtype.bytes() == 2 && head_dim <= 128
    }
}

impl TileVariant {
    /// All variants in order of discriminant.
    pub const ALL: [Self; 6] = [Self::Mma16, Self::Mma32, Self::Mma64, Self::Mma128, Self::Wgmma64, Self::Wgmma128];

    /// Index into [`crate::PlanHeader::variants`].
    pub const fn index(self) -> usize {
        self as usize
    }

    /// M: packed rows of a tile.
    pub const fn rows(self) -> u32 {
        self.config(128).rows
    }

    /// N: KV tokens that the planner counts as a main-loop step of a CTA, where keys have `head_dim` elements of type `kv_dtype`: of
    /// wgmma kernels those that it has, of mma.sync kernels those at head dim 128, whose time per key is about the same at others.
    pub const fn keys(self, head_dim: u32, kv_dtype: Dtype) -> u32 {
        let head_dim = if self.is_persistent() { head_dim } else { 128 };
        self.config(head_dim).of_elements(kv_dtype.bytes()).keys
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

    /// Whether the variant can read pages of this many tokens. mma.sync tiles take any size. TMA writes boxes under a swizzle that
    /// spans 8 rows.
    pub const fn supports_page_size(self, page_size: u32) -> bool {
        match self.arch() {
            Arch::Sm80 => page_size >= 1,
            Arch::Sm90a => page_size >= 8 && page_size.is_multiple_of(8),
        }
    }

    /// Keys that a page of so many tokens, which the variant can read, takes in its tiles. TMA fills those behind the page with
    /// zeros: what rows attend to is said for [`MASK_KEYS`] keys at a time, so that no page begins within these.
    pub const fn page_keys(self, page_size: u32) -> u32 {
        match self.arch() {
            Arch::Sm80 => page_size,
            Arch::Sm90a => page_size.next_multiple_of(MASK_KEYS),
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
    /// Writes new rows of K and V into a cache. Any head dimension: its rows say 0. Into a cache of the rows' type, whichever
    /// that is: its row says F16.
    Append,
    /// Merges two attention states. Any head dimension: its rows say 0.
    MergeStates,
}

/// One compiled kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelSpec {
    /// Name of the PTX entry.
    pub entry: &'static str,
    /// PTX file that holds it, the first of two that do ([`Self::is_in`]).
    pub arch: Arch,
    /// What it does.
    pub family: Family,
    /// Element type; of K and V see [`Self::kv_dtype`].
    pub dtype: Dtype,
    /// Element type of K and V.
    pub kv_dtype: Dtype,
    /// Elements per head of Q and K; of a merge, of O.
    pub head_dim: u32,
    /// Elements per head of V and O.
    pub v_head_dim: u32,
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

impl KernelSpec {
    /// Whether it may be launched with these switches.
    pub fn serves(&self, switches: Switches) -> bool {
        match self.family {
            Family::Forward(variant) => variant.serves(switches, self.kv_dtype, self.head_dim),
            _ => switches == Switches::OFF,
        }
    }

    /// Whether the PTX file of `arch` holds it. That of sm_90a has another text of what converts E4m3, for which there is an
    /// instruction from sm_89 on.
    pub const fn is_in(&self, arch: Arch) -> bool {
        let is_converted = matches!(self.family, Family::Forward(_)) && matches!(self.kv_dtype, Dtype::E4m3);
        arch as u32 == self.arch as u32 || matches!(arch, Arch::Sm90a) && is_converted
    }

    /// The newest PTX file with a text of it that runs on a device of this compute capability.
    pub fn newest_file(&self, compute_capability: u32) -> Option<Arch> {
        Arch::ALL.into_iter().rev().find(|arch| self.is_in(*arch) && arch.runs_on(compute_capability))
    }

    /// Whether its launches may begin while the one before ends: it reads the plan meanwhile, waits (`griddepcontrol.wait`) before it
    /// touches anything that kernels write, and then reads it past the cache that no write invalidates. `cargo xtask check-ptx` checks
    /// that (xtask/src/overlap.rs).
    pub const fn waits(&self) -> bool {
        matches!(self.arch, Arch::Sm90a) && matches!(self.family, Family::Forward(_) | Family::Merge)
    }
}

/// Which element types and head dimensions wgmma kernels have, and the merge behind them: calls a macro with what stands in the
/// braces, followed by `[head_dim v_head_dim Dtype "name"]` for each of them, and by what stands behind the braces.
#[macro_export]
macro_rules! wgmma_kernel_shapes {
    ($callback:ident! { $($prefix:tt)* } $($more:tt)*) => {
        $callback! { $($prefix)*
            [128 128 F16 "d128_f16"] [128 128 Bf16 "d128_bf16"] [64 64 F16 "d64_f16"] [64 64 Bf16 "d64_bf16"]
            [256 256 F16 "d256_f16"] [256 256 Bf16 "d256_bf16"] $($more)*
        }
    };
}

/// As [`wgmma_kernel_shapes`], of `mma128`, whose registers do not suffice for more.
#[macro_export]
macro_rules! mma128_kernel_shapes {
    ($callback:ident! { $($prefix:tt)* }) => {
        $callback! { $($prefix)*
            [128 128 F16 "d128_f16"] [128 128 Bf16 "d128_bf16"] [64 64 F16 "d64_f16"] [64 64 Bf16 "d64_bf16"]
            [96 96 F16 "d96_f16"] [96 96 Bf16 "d96_bf16"]
        }
    };
}

/// As [`wgmma_kernel_shapes`], of the other mma.sync kernels.
#[macro_export]
macro_rules! mma_kernel_shapes {
    ($callback:ident! { $($prefix:tt)* }) => {
        $crate::wgmma_kernel_shapes! { $callback! { $($prefix)* }
            [96 96 F16 "d96_f16"] [96 96 Bf16 "d96_bf16"]
            [192 128 F16 "d192_v128_f16"] [192 128 Bf16 "d192_v128_bf16"]
        }
    };
}

/// As [`wgmma_kernel_shapes`], of `mma16` and `mma32` where two warps split V's columns.
#[macro_export]
macro_rules! split_kernel_shapes {
    ($callback:ident! { $($prefix:tt)* }) => {
        $callback! { $($prefix)* [512 512 F16 "d512_f16"] [512 512 Bf16 "d512_bf16"] }
    };
}

/// As [`wgmma_kernel_shapes`], of the merge: a shape for each number of elements of O.
#[macro_export]
macro_rules! merge_kernel_shapes {
    ($callback:ident! { $($prefix:tt)* }) => {
        $crate::wgmma_kernel_shapes! { $callback! { $($prefix)* }
            [96 96 F16 "d96_f16"] [96 96 Bf16 "d96_bf16"] [512 512 F16 "d512_f16"] [512 512 Bf16 "d512_bf16"]
        }
    };
}

macro_rules! forward_kernels {
    ($variant:ident, $prefix:literal $([$head_dim:literal $v_head_dim:literal $dtype:ident $name:literal])*) => {
        &[$(forward(
            concat!($prefix, "_", $name),
            TileVariant::$variant,
            (Dtype::$dtype, Dtype::$dtype),
            ($head_dim, $v_head_dim),
        )),*]
    };
    ($variant:ident, $prefix:literal
        $([$head_dim:literal $v_head_dim:literal $dtype:ident $kv_dtype:ident $name:literal])*
    ) => {
        &[$(forward(
            concat!($prefix, "_", $name),
            TileVariant::$variant,
            (Dtype::$dtype, Dtype::$kv_dtype),
            ($head_dim, $v_head_dim),
        )),*]
    };
}

macro_rules! merge_kernels {
    ($arch:ident, $prefix:literal $([$_head_dim:literal $v_head_dim:literal $dtype:ident $name:literal])*) => {
        &[$(merge(concat!($prefix, "_", $name), Arch::$arch, Dtype::$dtype, $v_head_dim)),*]
    };
}

/// Which element types of Q and O, and head dimensions there are kernels for that read K and V of E4m3: calls a macro with what
/// stands in the braces, followed by `[head_dim v_head_dim Dtype KvDtype "name"]` for each of them, and by what stands behind the
/// braces.
#[macro_export]
macro_rules! e4m3_kernel_shapes {
    ($callback:ident! { $($prefix:tt)* } $($more:tt)*) => {
        $callback! { $($prefix)*
            [128 128 F16 E4m3 "d128_f16_e4m3"] [128 128 Bf16 E4m3 "d128_bf16_e4m3"]
            [64 64 F16 E4m3 "d64_f16_e4m3"] [64 64 Bf16 E4m3 "d64_bf16_e4m3"] $($more)*
        }
    };
}

/// As [`e4m3_kernel_shapes`], of both 8-bit types.
#[macro_export]
macro_rules! scaled_kernel_shapes {
    ($callback:ident! { $($prefix:tt)* }) => {
        $crate::e4m3_kernel_shapes! { $callback! { $($prefix)* }
            [128 128 F16 E5m2 "d128_f16_e5m2"] [128 128 Bf16 E5m2 "d128_bf16_e5m2"]
            [64 64 F16 E5m2 "d64_f16_e5m2"] [64 64 Bf16 E5m2 "d64_bf16_e5m2"]
        }
    };
}

/// Forward kernels that read 8-bit K and V.
const SCALED: [&[KernelSpec]; 4] = [
    scaled_kernel_shapes!(forward_kernels! { Mma16, "pat_forward_mma16" }),
    scaled_kernel_shapes!(forward_kernels! { Mma32, "pat_forward_mma32" }),
    scaled_kernel_shapes!(forward_kernels! { Mma64, "pat_forward_mma64" }),
    scaled_kernel_shapes!(forward_kernels! { Wgmma64, "pat_forward_wgmma64" }),
];

/// Forward kernels whose warps split V's columns.
const SPLIT: [&[KernelSpec]; 2] = [
    split_kernel_shapes!(forward_kernels! { Mma16, "pat_forward_mma16" }),
    split_kernel_shapes!(forward_kernels! { Mma32, "pat_forward_mma32" }),
];

/// Forward kernels, by variant.
const FORWARD: [&[KernelSpec]; TileVariant::ALL.len()] = [
    mma_kernel_shapes!(forward_kernels! { Mma16, "pat_forward_mma16" }),
    mma_kernel_shapes!(forward_kernels! { Mma32, "pat_forward_mma32" }),
    mma_kernel_shapes!(forward_kernels! { Mma64, "pat_forward_mma64" }),
    mma128_kernel_shapes!(forward_kernels! { Mma128, "pat_forward_mma128" }),
    wgmma_kernel_shapes!(forward_kernels! { Wgmma64, "pat_forward_wgmma64" }),
    wgmma_kernel_shapes!(forward_kernels! { Wgmma128, "pat_forward_wgmma128" }),
];

const MERGE: [&[KernelSpec]; Arch::ALL.len()] = [
    merge_kernel_shapes!(merge_kernels! { Sm80, "pat_merge" }),
    wgmma_kernel_shapes!(merge_kernels! { Sm90a, "pat_merge_pdl" }),
];

/// Which element types new rows of K and V are rounded from and to: calls a macro with what stands in the braces, followed by
/// `[Dtype KvDtype "name"]` for each pair.
#[macro_export]
macro_rules! rounding_kernel_types {
    ($callback:ident! { $($prefix:tt)* }) => {
        $callback! { $($prefix)*
            [F16 E4m3 "f16_e4m3"] [Bf16 E4m3 "bf16_e4m3"] [F16 E5m2 "f16_e5m2"] [Bf16 E5m2 "bf16_e5m2"]
        }
    };
}

macro_rules! support_kernels {
    ($family:ident, $prefix:literal $([$dtype:ident $name:literal])*) => {
        &[$(support(concat!($prefix, "_", $name), Family::$family, Dtype::$dtype)),*]
    };
    ($family:ident, $prefix:literal $([$dtype:ident $kv_dtype:ident $name:literal])*) => {
        &[$(KernelSpec {
            kv_dtype: Dtype::$kv_dtype,
            ..support(concat!($prefix, "_", $name), Family::$family, Dtype::$dtype)
        }),*]
    };
}

const SUPPORT: [&[KernelSpec]; 5] = [
    support_kernels!(Fill, "pat_fill" [F16 "f16"] [Bf16 "bf16"]),
    eight_bit_types!(support_kernels! { Fill, "pat_fill" }),
    &[support("pat_flush_l2", Family::Flush, Dtype::F16), support("pat_append_kv", Family::Append, Dtype::F16)],
    rounding_kernel_types!(support_kernels! { Append, "pat_append_kv" }),
    support_kernels!(MergeStates, "pat_merge_states" [F16 "f16"] [Bf16 "bf16"]),
];

const fn forward(
    entry: &'static str,
    variant: TileVariant,
    (dtype, kv_dtype): (Dtype, Dtype),
    (head_dim, v_head_dim): (u32, u32),
) -> KernelSpec {
    let config = variant.config(head_dim).of_elements(kv_dtype.bytes());
    KernelSpec {
        entry,
        arch: variant.arch(),
        family: Family::Forward(variant),
        dtype,
        kv_dtype,
        head_dim,
        v_head_dim,
        threads: config.threads(),
        min_ctas_per_sm: config.min_ctas_per_sm,
        smem_bytes: config.smem(head_dim, v_head_dim, kv_dtype.bytes()).total,
        max_registers: register_limit(config.threads(), config.min_ctas_per_sm),
        barriers: config.barriers,
        tensor_maps: if config.producer_warps > 0 { 2 } else { 0 },
    }
}

const fn merge(entry: &'static str, arch: Arch, dtype: Dtype, columns: u32) -> KernelSpec {
    let threads = 32 * MERGE_WARPS;
    // Eight float4 loads in flight with 64-bit addresses, and the outputs of four rows.
    let min_ctas_per_sm = 4;
    KernelSpec {
        entry,
        arch,
        family: Family::Merge,
        dtype,
        kv_dtype: dtype,
        head_dim: columns,
        v_head_dim: columns,
        threads,
        min_ctas_per_sm,
        // The warps' sums of (a part of) a row, where a CTA has one: the columns of 32 lanes.
        smem_bytes: 4 * MERGE_WARPS * 32 * MergeShape::of(columns).columns,
        max_registers: register_limit(threads, min_ctas_per_sm),
        barriers: 1,
        tensor_maps: 0,
    }
}

const fn support(entry: &'static str, family: Family, dtype: Dtype) -> KernelSpec {
    let (threads, min_ctas_per_sm) = (SUPPORT_THREADS, 4);
    KernelSpec {
        entry,
        arch: Arch::Sm80,
        family,
        dtype,
        kv_dtype: dtype,
        head_dim: 0,
        v_head_dim: 0,
        threads,
        min_ctas_per_sm,
        smem_bytes: 0,
        max_registers: register_limit(threads, min_ctas_per_sm),
        barriers: 0,
        tensor_maps: 0,
    }
}

const PART_COUNT: usize = FORWARD.len() + SPLIT.len() + SCALED.len() + MERGE.len() + SUPPORT.len();
const PARTS: [&[KernelSpec]; PART_COUNT] = {
    let mut parts: [&[KernelSpec]; PART_COUNT] = [&[]; PART_COUNT];
    let (forward, others) = parts.split_at_mut(FORWARD.len());
    forward.copy_from_slice(&FORWARD);
    let (split, others) = others.split_at_mut(SPLIT.len());
    split.copy_from_slice(&SPLIT);
    let (scaled, others) = others.split_at_mut(SCALED.len());
    scaled.copy_from_slice(&SCALED);
    let (merge, support) = others.split_at_mut(MERGE.len());
    merge.copy_from_slice(&MERGE);
    support.copy_from_slice(&SUPPORT);
    parts
};

/// The number of kernels, and all of them in a table that is at least so long.
const fn table<const LENGTH: usize>() -> (usize, [KernelSpec; LENGTH]) {
    let mut kernels = [SUPPORT[0][0]; LENGTH];
    let (mut count, mut part) = (0, 0);
    while part < PARTS.len() {
        let mut i = 0;
        while i < PARTS[part].len() {
            if count < LENGTH {
                kernels[count] = PARTS[part][i];
            }
            count += 1;
            i += 1;
        }
        part += 1;
    }
    (count, kernels)
}

/// Every kernel of the project.
pub const KERNELS: &[KernelSpec] = &table::<{ table::<0>().0 }>().1;

/// The kernel of a family for an element type and head dimension, if there is one. Of two merge kernels it is the one
/// that runs on both architectures; [`find_for`] names the file. Of kernels that read or write K and V it is the one whose K
/// and V have the same type and as many elements per head; [`find_forward`] and [`find_append`] ask for others.
pub fn find(family: Family, dtype: Dtype, head_dim: u32) -> Option<&'static KernelSpec> {
    KERNELS.iter().find(|k| {
        k.family == family && [k.dtype, k.kv_dtype] == [dtype; 2] && [k.head_dim, k.v_head_dim] == [head_dim; 2]
    })
}

/// The kernel that appends rows of `dtype` to caches of `kv_dtype`, if there is one.
pub fn find_append(dtype: Dtype, kv_dtype: Dtype) -> Option<&'static KernelSpec> {
    let stated = if dtype == kv_dtype && dtype.bytes() == 2 { (Dtype::F16, Dtype::F16) } else { (dtype, kv_dtype) };
    KERNELS.iter().find(|k| k.family == Family::Append && (k.dtype, k.kv_dtype) == stated)
}

/// The forward kernel of a variant for Q and O of the first type and K and V of the second, and keys and values of so many
/// elements, if there is one.
pub fn find_forward(
    variant: TileVariant,
    dtypes: (Dtype, Dtype),
    head_dims: (u32, u32),
) -> Option<&'static KernelSpec> {
    KERNELS.iter().find(|k| {
        k.family == Family::Forward(variant)
            && (k.dtype, k.kv_dtype) == dtypes
            && (k.head_dim, k.v_head_dim) == head_dims
    })
}

/// As [`find`], in the PTX file of `arch`. The sm_90a merge kernel is launched with programmatic stream serialisation.
pub fn find_for(arch: Arch, family: Family, dtype: Dtype, head_dim: u32) -> Option<&'static KernelSpec> {
    KERNELS.iter().find(|k| k.arch == arch && k.family == family && k.dtype == dtype && k.head_dim == head_dim)
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::format;

    #[test]
    fn entries_are_unique_and_within_their_architecture() {
        for (i, kernel) in KERNELS.iter().enumerate() {
            assert!(KERNELS[..i].iter().all(|other| other.entry != kernel.entry), "{} twice", kernel.entry);
            assert!(kernel.smem_bytes <= kernel.arch.max_smem_bytes(), "{}", kernel.entry);
            assert!(kernel.threads % 32 == 0 && kernel.threads <= 1024, "{}", kernel.entry);
            assert!(kernel.threads * kernel.max_registers * kernel.min_ctas_per_sm <= 65_536, "{}", kernel.entry);
            if let Family::Forward(variant) = kernel.family {
                let name = format!("pat_forward_{}_d{}_", variant.name(), kernel.head_dim);
                assert!(kernel.entry.starts_with(&name) && kernel.arch == variant.arch(), "{}", kernel.entry);
            }
        }
    }

    #[test]
    fn variant_indices_are_dense() {
        for (i, variant) in TileVariant::ALL.iter().enumerate() {
            assert_eq!(variant.index(), i);
        }
    }
}
