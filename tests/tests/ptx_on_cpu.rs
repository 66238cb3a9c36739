//! The committed PTX, interpreted on the CPU: every entry of the manifest computes what it should. Where there is no GPU, this
//! is what executes the kernels.

use half::{bf16, f16};
use pat_abi::generator::{self, Tensor};
use pat_abi::{
    Arch, Dtype, Family, FastDivisor, FillParams, FlushParams, KERNELS, KernelSpec, Switches, TileVariant, manifest,
};
use pat_ptx_interpreter::Access;
use pat_rs::cpu::{CacheLayout, E4m3, E5m2, NewRows, State};
use pat_rs::cuda::launch_records::{self, LaunchRecord};
use pat_rs::cuda::{AppendArgs, DeviceKvScale, DeviceState};
use pat_rs::plan::PlanMode;
use pat_rs::{
    AttentionShape, Element, KvElement, KvScale, KvStrides, PlanOptions, Planner, Problem, QueryTokens, Reach,
    RowStrides,
};
use pat_tests::executor::{Executor, Interpreter};
use pat_tests::interpreted::{DeviceMemory, InterpretedRun};
use pat_tests::{Case, Output, draw_sinks, random_case, random_case_of_pages, softmax_scale, strided};
use pat_workloads::{Oracle, OwnedBatch, PoolLayout, RowSample, Tensors, check};
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use std::cell::Cell;
use std::collections::BTreeSet;

const SEED: u32 = 23;

/// Forests that each forward kernel computes.
const FORESTS: u64 = 10;

/// Forward kernels of 16-bit K and V with their variants. (Of 8-bit ones: gpu_eight_bit.)
fn forward_kernels() -> impl Iterator<Item = (&'static KernelSpec, TileVariant)> {
    KERNELS.iter().filter(|kernel| kernel.kv_dtype == kernel.dtype).filter_map(|kernel| match kernel.family {
        Family::Forward(variant) => Some((kernel, variant)),
        _ => None,
    })
}

/// A forest of a kernel's head dimension and with pages that it reads.
fn draw_case(rng: &mut impl Rng, kernel: &KernelSpec, variant: TileVariant) -> Case {
    loop {
        let case = random_case(rng, kernel.dtype);
        if variant.supports_page_size(case.batch.page_size) {
            let (q_heads, kv_heads) = (case.shape.q_heads(), case.shape.kv_heads());
            let shape = AttentionShape::new(q_heads, kv_heads, kernel.head_dim, kernel.dtype).unwrap();
            return Case { shape: shape.with_v_head_dim(kernel.v_head_dim).unwrap(), ..case };
        }
    }
}

/// Pages that no engine has, but those of hybrid models: their boxes have 16 to 64 tokens, and those of some are filled up.
const ODD_PAGES: [u32; 7] = [8, 24, 40, 48, 96, 112, 192];

/// The batch of query tokens as rows, written out.
fn rows_of_tokens(batch: &OwnedBatch, tokens: u32) -> (OwnedBatch, Vec<u32>) {
    let counts: Vec<u32> =
        batch.lengths.iter().map(|&length| if length == 0 { 1 } else { length.min(tokens) }).collect();
    let mut rows = OwnedBatch { lengths: Vec::new(), block_tables: Vec::new(), ..*batch };
    for ((&length, table), &count) in batch.lengths.iter().zip(&batch.block_tables).zip(&counts) {
        for token in 0..count {
            rows.lengths.push(if length == 0 { 0 } else { length - count + 1 + token });
            rows.block_tables.push(table.clone());
        }
    }
    (rows, counts)
}

/// Runs one forest of several query tokens, scales, modes, caps, windows, chunks and sinks through a kernel; tells which
/// entries were launched.
fn run_forest<T: Element>(kernel: &KernelSpec, variant: TileVariant, index: u64) -> BTreeSet<&'static str> {
    let mut rng = ChaCha8Rng::seed_from_u64(index);
    let case = draw_case(&mut rng, kernel, variant);
    run_case::<T>(&mut rng, case, kernel, variant, index).iter().map(|record| record.kernel.entry).collect()
}

/// As [`run_forest`], of a case; tells the launches.
fn run_case<T: Element>(
    mut rng: &mut ChaCha8Rng,
    case: Case,
    kernel: &KernelSpec,
    variant: TileVariant,
    index: u64,
) -> Vec<LaunchRecord> {
    let scale = softmax_scale(case.shape) * [1.0, 16.0, 1.0, 64.0][index as usize % 4];
    let query_tokens = *[1, 1, 1, 3, 5].choose(&mut rng).unwrap();
    let mut problem = case.batch.problem(case.shape).with_scale(scale).with_query_tokens(query_tokens);
    if kernel.serves(Switches { soft_cap: true, ..Switches::OFF }) && rng.random_bool(0.3) {
        problem = problem.with_soft_cap(2.0);
    }
    if kernel.serves(Switches { window: true, ..Switches::OFF }) && rng.random_bool(0.4) {
        // Of less than a page, of a page, of several, in many nodes, and larger than any context.
        let page_size = case.batch.page_size;
        let tokens = *[1, page_size.div_ceil(2), page_size, page_size + 1, 33, 1 << 20].choose(&mut rng).unwrap();
        problem = problem.with_reach(if rng.random_bool(0.7) { Reach::Window(tokens) } else { Reach::Chunk(tokens) });
    }
    if problem.visibility().reach == Reach::Full && rng.random_bool(0.2) {
        // Of whole pages: every kernel serves them.
        problem = problem.with_chunk(2 * case.batch.page_size);
    }
    let sinks = draw_sinks(&mut rng, case.shape);
    if sinks.is_some() {
        problem = problem.with_sinks();
    }
    let chunk = PlanMode::FixedChunk { tokens: 2 * case.batch.page_size };
    let mode = [PlanMode::Auto, PlanMode::Packed, PlanMode::PerNode, PlanMode::Flat, chunk][index as usize % 5];
    let what = format!("{}, forest {index}, {mode:?}, {problem:?} {sinks:?}\n{case:?}", kernel.entry);

    let (rows, counts) = rows_of_tokens(&case.batch, query_tokens);
    let slices = case.batch.rows();
    let view = case.batch.view(&slices).unwrap();
    let queries = QueryTokens::ragged(&view, &counts).unwrap();
    let options = PlanOptions::from(mode).with_variants([variant]);
    let plan = Planner::new(problem, Interpreter.profile().unwrap(), options).unwrap().plan(&queries.batch()).unwrap();
    let tensors = Tensors::<T>::draw(&rows, case.shape, case.layout, SEED).unwrap();
    let host = tensors.host_of(problem, sinks.as_deref());
    let out = tensors.nan_out();
    let lse = vec![f32::NAN; tensors.q.len() / case.shape.head_dim() as usize];
    let mut run = InterpretedRun::new(&plan, &host, &out, Some(&lse)).unwrap();
    let Output { out, lse } = run.run::<T>().unwrap_or_else(|error| panic!("{error}: {what}"));
    let everything = RowSample::for_batch(&rows, case.shape);
    let oracle = Oracle::compute_problem::<T>(&rows, problem, sinks.as_deref(), SEED, everything).unwrap();
    let report = check(&oracle, case.shape.q_heads(), &out, Some(&lse));
    assert!(report.passed, "{report:?}: {what}");
    run.launches
}

/// Tiles that begin and end within pages, windows and trees' switch among them.
#[test]
fn wgmma_kernels_read_pages_of_any_multiple_of_8_tokens() {
    let kernels: Vec<_> = forward_kernels().filter(|(_, variant)| variant.arch() == Arch::Sm90a).collect();
    assert_eq!(kernels.len(), 12);
    let runs: Vec<_> = kernels.iter().flat_map(|&kernel| (0..12).map(move |index| (kernel, index))).collect();
    runs.into_par_iter().for_each(|((kernel, variant), index)| {
        let mut rng = ChaCha8Rng::seed_from_u64(1000 + index);
        let drawn = random_case_of_pages(&mut rng, kernel.dtype, &ODD_PAGES);
        let (q_heads, kv_heads) = (drawn.shape.q_heads(), drawn.shape.kv_heads());
        let shape = AttentionShape::new(q_heads, kv_heads, kernel.head_dim, kernel.dtype).unwrap();
        let case = Case { shape, ..drawn };
        match kernel.dtype {
            Dtype::F16 => run_case::<f16>(&mut rng, case, kernel, variant, index),
            Dtype::Bf16 => run_case::<bf16>(&mut rng, case, kernel, variant, index),
            other => panic!("no forest is drawn in {other:?}"),
        };
    });
}

/// Sequences behind one node, with private ends of any length, some of them in two levels.
fn draw_private_ends(rng: &mut impl Rng, kernel: &KernelSpec) -> Case {
    let page_size = *[8, 16, 24, 32, 32, 48, 64].choose(rng).unwrap();
    let group = *[2, 4, 5, 8].choose(rng).unwrap();
    let shape = AttentionShape::new(group, 1, kernel.head_dim, kernel.dtype).unwrap();
    let node: Vec<u32> = (0..rng.random_range(1..=200u32.div_ceil(page_size))).collect();
    let (mut num_pages, mut lengths, mut block_tables) = (node.len() as u32, Vec::new(), Vec::<Vec<u32>>::new());
    for sequence in 0..rng.random_range(24 / group..=130 / group) as usize {
        let mut table = if sequence % 3 == 2 { block_tables[sequence - 1].clone() } else { node.clone() };
        table.truncate(table.len().saturating_sub(1).max(node.len()));
        let begin = table.len() as u32 * page_size;
        let tokens = *[1, page_size, 32, rng.random_range(1..150)].choose(rng).unwrap();
        let pages = tokens.div_ceil(page_size);
        table.extend(num_pages..num_pages + pages);
        num_pages += pages;
        lengths.push(begin + tokens);
        block_tables.push(table);
    }
    // Only full pages are shared: who shares the pages of a sequence in front of it ends with some of its own.
    for sequence in 0..lengths.len() {
        let full = block_tables[sequence].len() as u32 * page_size;
        if sequence % 3 == 1 {
            lengths[sequence] = full;
        }
    }
    Case { batch: OwnedBatch { page_size, num_pages, lengths, block_tables }, shape, layout: PoolLayout::Nhd }
}

/// Tiles that few rows attend to: each warp goes its own way, in front of the tiles of the whole warpgroup and behind them.
#[test]
fn private_ends_agree_with_the_oracle() {
    let kernels: Vec<_> = forward_kernels().filter(|(_, variant)| variant.arch() == Arch::Sm90a).collect();
    let runs: Vec<_> = kernels.iter().flat_map(|&kernel| (0..6).map(move |index| (kernel, index))).collect();
    runs.into_par_iter().for_each(|((kernel, variant), index)| {
        let mut rng = ChaCha8Rng::seed_from_u64(2000 + index);
        let case = draw_private_ends(&mut rng, kernel);
        // Packed.
        let index = 5 * index + 1;
        match kernel.dtype {
            Dtype::F16 => run_case::<f16>(&mut rng, case, kernel, variant, index),
            Dtype::Bf16 => run_case::<bf16>(&mut rng, case, kernel, variant, index),
            other => panic!("no forest is drawn in {other:?}"),
        };
    });
}

/// Groups of more heads than any tile has rows: a launch for each part.
#[test]
fn parts_of_groups_agree_with_the_oracle() {
    let runs: Vec<_> = forward_kernels()
        .filter(|(kernel, variant)| match kernel.head_dim {
            192 => matches!(variant, TileVariant::Mma64),
            512 => matches!(variant, TileVariant::Mma32),
            _ => matches!(variant, TileVariant::Mma128 | TileVariant::Wgmma128),
        })
        .flat_map(|(kernel, variant)| (0..4).map(move |index| (kernel, variant, index)))
        .collect();
    assert_eq!(runs.len(), (2 * 2 * 2 + 4 * 2) * 4);
    runs.into_par_iter().for_each(|(kernel, variant, index)| {
        let mut rng = ChaCha8Rng::seed_from_u64(100 + index);
        let mut case = draw_case(&mut rng, kernel, variant);
        case.batch.lengths.truncate(4);
        case.batch.block_tables.truncate(4);
        let group = [256, variant.rows() + 1, 131, 2 * variant.rows() - 1][index as usize];
        let kv_heads = 1 + index as u32 % 2;
        case.shape = AttentionShape::new(group * kv_heads, kv_heads, kernel.head_dim, kernel.dtype)
            .and_then(|shape| shape.with_v_head_dim(kernel.v_head_dim))
            .unwrap();
        let launches = match kernel.dtype {
            Dtype::F16 => run_case::<f16>(&mut rng, case, kernel, variant, index),
            Dtype::Bf16 => run_case::<bf16>(&mut rng, case, kernel, variant, index),
            other => panic!("no forest is drawn in {other:?}"),
        };
        let forward = launches.iter().filter(|record| record.kernel.entry == kernel.entry);
        assert_eq!(forward.count() as u32, group.div_ceil(variant.rows()));
    });
}

#[test]
fn every_forward_and_merge_kernel_agrees_with_the_oracle() {
    let kernels: Vec<_> = forward_kernels().collect();
    let runs: Vec<(&KernelSpec, TileVariant, u64)> =
        kernels.iter().flat_map(|&(kernel, variant)| (0..FORESTS).map(move |index| (kernel, variant, index))).collect();
    let launched: BTreeSet<&str> = runs
        .into_par_iter()
        .flat_map_iter(|(kernel, variant, index)| match kernel.dtype {
            Dtype::F16 => run_forest::<f16>(kernel, variant, index),
            Dtype::Bf16 => run_forest::<bf16>(kernel, variant, index),
            other => panic!("no forest is drawn in {other:?}"),
        })
        .collect();
    let missing: Vec<&str> = KERNELS
        .iter()
        .filter(|kernel| matches!(kernel.family, Family::Forward(_) | Family::Merge) && kernel.kv_dtype == kernel.dtype)
        .map(|kernel| kernel.entry)
        .filter(|entry| !launched.contains(entry))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn merge_kernels_of_both_architectures_give_the_same_bits() {
    for kernel in KERNELS.iter().filter(|kernel| kernel.family == Family::Merge && kernel.arch == Arch::Sm90a) {
        match kernel.dtype {
            Dtype::F16 => merge_behind_sm_80::<f16>(kernel),
            Dtype::Bf16 => merge_behind_sm_80::<bf16>(kernel),
            other => panic!("no merge is run in {other:?}"),
        }
    }
}

/// Partials of sm_80 tiles, merged by that architecture's kernel and by `other`.
fn merge_behind_sm_80<T: Element>(other: &'static KernelSpec) {
    let variant = TileVariant::Mma16;
    let forward = manifest::find(Family::Forward(variant), T::DTYPE, other.head_dim).unwrap();
    let case = draw_case(&mut ChaCha8Rng::seed_from_u64(5), forward, variant);
    let options = PlanOptions::from(PlanMode::FixedChunk { tokens: case.batch.page_size }).with_variants([variant]);
    let plan = pat_tests::plan(&case, options).unwrap();
    let tensors = Tensors::<T>::draw(&case.batch, case.shape, case.layout, SEED).unwrap();
    let out = tensors.nan_out();
    let mut run = InterpretedRun::new(&plan, &tensors.host(softmax_scale(case.shape)), &out, None).unwrap();
    let mut with_other = run.clone();
    let merge = with_other.launches.last_mut().unwrap();
    assert!(merge.kernel.family == Family::Merge && merge.kernel.arch == Arch::Sm80);
    (merge.kernel, merge.ptx) = (other, launch_records::module(other, Switches::OFF).unwrap());
    let [expected, actual] = [&mut run, &mut with_other].map(|run| run.run::<T>().unwrap().out);
    assert!(bytemuck::cast_slice::<T, u16>(&expected) == bytemuck::cast_slice::<T, u16>(&actual), "{}", other.entry);
    assert!(expected.iter().all(|value| value.to_f32().is_finite()), "{}", other.entry);
}

#[test]
fn strides_of_q_o_and_lse_are_followed() {
    forward_kernels().collect::<Vec<_>>().into_par_iter().filter(|(kernel, _)| kernel.dtype == Dtype::F16).for_each(
        |(kernel, variant)| {
            let case = draw_case(&mut ChaCha8Rng::seed_from_u64(7), kernel, variant);
            for mode in [PlanMode::Packed, PlanMode::FixedChunk { tokens: case.batch.page_size }] {
                strided::check::<f16>(&Interpreter, &case, PlanOptions::from(mode).with_variants([variant]), SEED);
            }
            if variant == TileVariant::Mma128 {
                let shape = AttentionShape::new(2 * 131, 2, kernel.head_dim, kernel.dtype).unwrap();
                let mut wide = Case { shape, ..case };
                wide.batch.lengths.truncate(2);
                wide.batch.block_tables.truncate(2);
                let options = PlanOptions::from(PlanMode::FixedChunk { tokens: wide.batch.page_size });
                strided::check::<f16>(&Interpreter, &wide, options.with_variants([variant]), SEED);
            }
        },
    );
}

/// New rows of K and V in caches of several pages: in interpreted PTX and on the CPU, whose caches are given.
fn append<T: Element, C: KvElement>(
    [k_dim, v_dim]: [u32; 2],
    (new, caches): (&[Vec<T>; 2], [Vec<C>; 2]),
    factors: [&[f32]; 2],
    on_cpu: impl Fn(&NewRows<'_, T>, &CacheLayout, &[Cell<C>], &[f32]),
) {
    let (num_pages, page_size, kv_heads) = (4, 16, APPEND_HEADS);
    let layouts =
        [(k_dim, KvStrides::nhd(page_size, kv_heads, k_dim)), (v_dim, KvStrides::hnd(page_size, kv_heads, v_dim))]
            .map(|(head_dim, strides)| CacheLayout { num_pages, page_size, kv_heads, head_dim, strides });
    let new_strides = [k_dim, v_dim].map(append_strides);
    // The host cannot look at slots: those that are negative or beyond the cache are skipped.
    let slots: Vec<i64> = vec![5, -1, 63, 0, 64, 17, i64::MAX, 40, i64::MIN];

    let mut memory = DeviceMemory::new();
    let [k_new, v_new] = [&new[0], &new[1]].map(|new| memory.add("new rows", new, Access::Read));
    let [k_cache, v_cache] = [&caches[0], &caches[1]].map(|cache| memory.add("a cache", cache, Access::ReadWrite));
    let mut scale = |factors: &[f32]| match factors {
        [all] => DeviceKvScale::Tensor(*all),
        heads => DeviceKvScale::Heads(memory.add("factors", heads, Access::Read)),
    };
    let [k_scale, v_scale] = factors.map(&mut scale);
    let record = launch_records::append_kv(&AppendArgs {
        dtype: T::DTYPE,
        kv_dtype: C::DTYPE,
        k_scale,
        v_scale,
        rows: slots.len() as u32,
        k_new,
        k_new_strides: new_strides[0],
        v_new,
        v_new_strides: new_strides[1],
        k_cache: k_cache.clone(),
        k_layout: layouts[0],
        v_cache: v_cache.clone(),
        v_layout: layouts[1],
        slots: memory.add("slots", &slots, Access::Read),
    });
    memory.launch(&record.unwrap()).unwrap();
    for (index, (cache, span)) in caches.into_iter().zip([k_cache, v_cache]).enumerate() {
        let new: Vec<Cell<T>> = new[index].iter().copied().map(Cell::new).collect();
        let expected: Vec<Cell<C>> = cache.into_iter().map(Cell::new).collect();
        let inside: Vec<i64> = slots.iter().map(|&slot| if slot < 64 { slot } else { -1 }).collect();
        let rows = NewRows { rows: &new, strides: new_strides[index], slots: &inside };
        on_cpu(&rows, &layouts[index], &expected, factors[index]);
        let expected: Vec<C> = expected.into_iter().map(Cell::into_inner).collect();
        let actual = memory.read::<C>(&span);
        let bytes = [&actual, &expected].map(|cache| bytemuck::cast_slice::<C, u8>(cache));
        let differing = bytes[0].iter().zip(bytes[1]).position(|(actual, expected)| actual != expected);
        let of = [T::DTYPE.name(), C::DTYPE.name()];
        assert_eq!(differing, None, "{of:?} by {factors:?}, head dims {k_dim} and {v_dim}");
    }
}

const APPEND_HEADS: u32 = 3;
const APPEND_DIM: u32 = 64;
/// Head dims of K and of V.
const APPEND_DIMS: [[u32; 2]; 4] = [[64, 64], [192, 128], [64, 512], [8, 24]];
const APPEND_NEW: usize = 9 * append_strides(APPEND_DIM).sequence as usize;
const APPEND_CACHE: usize = 4 * 16 * (APPEND_HEADS * APPEND_DIM) as usize;

/// Of new rows, which lie apart.
const fn append_strides(head_dim: u32) -> RowStrides {
    RowStrides { sequence: (APPEND_HEADS * head_dim + 16) as i64, head: head_dim as i64 }
}

#[test]
fn new_rows_are_appended_as_on_the_cpu() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut draw =
        |count: u32| -> Vec<f16> { (0..count).map(|_| f16::from_f32(rng.random_range(-1.0..1.0))).collect() };
    for dims in APPEND_DIMS {
        let new = dims.map(|dim| draw(9 * append_strides(dim).sequence as u32));
        let caches = dims.map(|dim| draw(4 * 16 * APPEND_HEADS * dim));
        append(dims, (&new, caches), [&[1.0], &[1.0]], |rows, layout, cache, _| {
            pat_rs::cpu::append_rows(rows, layout, cache).unwrap();
        });
    }
}

#[test]
fn new_rows_of_any_head_dims_are_rounded_as_on_the_cpu() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut draw =
        |count: u32| -> Vec<bf16> { (0..count).map(|_| bf16::from_f32(rng.random_range(-500.0..500.0))).collect() };
    // Heads of 8-bit caches begin at multiples of 16 bytes.
    for dims in APPEND_DIMS.into_iter().filter(|dims| dims.iter().all(|dim| dim.is_multiple_of(16))) {
        let new = dims.map(|dim| draw(9 * append_strides(dim).sequence as u32));
        let caches = dims.map(|dim| vec![E4m3(0x55); (4 * 16 * APPEND_HEADS * dim) as usize]);
        append(dims, (&new, caches), [&[0.5], &[1.0, 3.0, 0.7]], append_rounded_on_cpu);
    }
}

fn append_rounded_on_cpu<T: Element, C: KvElement>(
    rows: &NewRows<'_, T>,
    layout: &CacheLayout,
    cache: &[Cell<C>],
    factors: &[f32],
) {
    let scale = if let [all] = factors { KvScale::Tensor(*all) } else { KvScale::Heads(factors) };
    pat_rs::cpu::append_rounded_rows(rows, layout, cache, scale).unwrap();
}

/// All 65,536 numbers of a 16-bit type, in as many launches as it takes, divided by factors and rounded to 8 bits.
fn append_all_numbers<T: Element, C: KvElement>() {
    let numbers: Vec<T> = (0..=u16::MAX).map(|bits| bytemuck::pod_read_unaligned(&bits.to_ne_bytes())).collect();
    let factors: [[&[f32]; 2]; 3] = [[&[1.0], &[0.037]], [&[1.0, 3.0, 0.7], &[512.0]], [&[1e-3], &[1e3, 0.01, 5e-8]]];
    // Of nine rows, five are written.
    let written = [0usize, 2, 3, 5, 7];
    let per_launch = 2 * written.len() * (APPEND_HEADS * APPEND_DIM) as usize;
    for (launch, chunk) in numbers.chunks(per_launch).enumerate() {
        let mut new = [vec![T::zeroed(); APPEND_NEW], vec![T::zeroed(); APPEND_NEW]];
        for (at, row) in chunk.chunks((APPEND_HEADS * APPEND_DIM) as usize).enumerate() {
            let begin = written[at / 2] * append_strides(APPEND_DIM).sequence as usize;
            new[at % 2][begin..][..row.len()].copy_from_slice(row);
        }
        for factors in factors {
            // Both orders: each number is divided by each factor.
            for factors in [factors, [factors[1], factors[0]]] {
                let code = C::from_f32(launch as f32);
                let caches = [vec![code; APPEND_CACHE], vec![code; APPEND_CACHE]];
                append([APPEND_DIM; 2], (&new, caches), factors, append_rounded_on_cpu);
            }
        }
    }
}

#[test]
fn all_16_bit_numbers_are_rounded_to_8_bits_as_on_the_cpu() {
    type Check = fn();
    let checks: [Check; 4] = [
        append_all_numbers::<f16, E4m3>,
        append_all_numbers::<bf16, E4m3>,
        append_all_numbers::<f16, E5m2>,
        append_all_numbers::<bf16, E5m2>,
    ];
    checks.into_par_iter().for_each(|check| check());
}

fn merge_states<T: Element>() {
    let (rows, heads, head_dim) = (5u32, 3u32, 136u32);
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let (out_strides, lse_strides) =
        (RowStrides { sequence: 3 * 144 + 8, head: 144 }, RowStrides { sequence: 1, head: 5 });
    let elements = rows as usize * out_strides.sequence as usize;
    let mut draw = || {
        let out: Vec<T> = (0..elements).map(|_| T::from_f32(rng.random_range(-2.0..2.0))).collect();
        let mut lse: Vec<f32> = (0..15).map(|_| rng.random_range(-5.0..5.0)).collect();
        lse[rng.random_range(0..15)] = f32::NEG_INFINITY;
        (out, lse)
    };
    let [mut a, mut b] = [draw(), draw()];
    // A row that neither has tokens of: what A's output holds there must not matter.
    (a.1[7], b.1[7]) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    // Row 2 of head 1.
    a.0[2 * out_strides.sequence as usize + 144] = T::from_f32(f32::NAN);

    let mut memory = DeviceMemory::new();
    let mut state = |name: &str, (out, lse): &(Vec<T>, Vec<f32>)| DeviceState {
        out: memory.add(name, out, Access::ReadWrite),
        out_strides,
        lse: memory.add(name, lse, Access::ReadWrite),
        lse_strides,
    };
    let [state_a, state_b] = [state("A", &a), state("B", &b)];
    // The result lies where A does.
    let record =
        launch_records::merge_states((rows, heads, head_dim), T::DTYPE, [&state_a, &state_b], &state_a).unwrap();
    memory.launch(&record).unwrap();

    let [a, b] = [&a, &b].map(|(out, lse)| -> (Vec<Cell<T>>, Vec<Cell<f32>>) {
        (out.iter().copied().map(Cell::new).collect(), lse.iter().copied().map(Cell::new).collect())
    });
    let [on_cpu, other] = [&a, &b].map(|(out, lse)| State { out, out_strides, lse, lse_strides });
    pat_rs::cpu::merge_states((rows, heads, head_dim), [&on_cpu, &other], &on_cpu).unwrap();
    for (index, (actual, expected)) in memory.read::<T>(&state_a.out).iter().zip(&a.0).enumerate() {
        let (actual, expected) = (actual.to_f32(), expected.get().to_f32());
        // One rounding of the result.
        assert!((actual - expected).abs() <= T::EPSILON * expected.abs(), "{index}: {actual}, not {expected}");
    }
    for (actual, expected) in memory.read::<f32>(&state_a.lse).iter().zip(&a.1) {
        let expected = expected.get();
        assert!(*actual == expected || (actual - expected).abs() < 1e-5, "{actual}, not {expected}");
    }
}

#[test]
fn states_are_merged_as_on_the_cpu() {
    merge_states::<f16>();
    merge_states::<bf16>();
}

/// A launch of a kernel of tests and benchmarks, whose parameters no argument of a run becomes.
fn support_record(family: Family, dtype: Dtype, params: &[u8]) -> LaunchRecord {
    let kernel = manifest::find(family, dtype, 0).unwrap();
    let ptx = launch_records::module(kernel, Switches::OFF).unwrap();
    LaunchRecord { kernel, switches: Switches::OFF, ptx, ctas: 3, params: params.to_vec(), tensor_maps: Vec::new() }
}

fn fill<T: KvElement>() {
    let bytes = i64::from(T::DTYPE.bytes());
    let (pages, tokens, heads, dim) = (3, 5, 2, 64);
    let strides = KvStrides { page: 5 * 160, token: 160, head: 80 };
    let mut memory = DeviceMemory::new();
    let target = memory.add("a tensor", &[T::from_f32(7.0); 3 * 5 * 160], Access::ReadWrite);
    let params = FillParams {
        base: target.address(),
        page_stride: strides.page * bytes,
        token_stride: strides.token * bytes,
        head_stride: strides.head * bytes,
        tokens: FastDivisor::new(tokens),
        heads: FastDivisor::new(heads),
        pages,
        dim,
        seed: SEED,
        tensor: Tensor::V as u32,
    };
    memory.launch(&support_record(Family::Fill, T::DTYPE, bytemuck::bytes_of(&params))).unwrap();
    let drawn = memory.read::<T>(&target);
    for (row, values) in drawn.chunks_exact(80).enumerate() {
        let (row, head) = (row as u32 / heads, row as u32 % heads);
        let key = generator::row_key(SEED, Tensor::V as u32, row / tokens, row % tokens, head);
        let expected = (0..dim).map(|at| T::from_f32(generator::element(key, at))).chain([T::from_f32(7.0); 16]);
        assert!(
            values.iter().map(|value| value.to_f32()).eq(expected.map(KvElement::to_f32)),
            "row {row}, head {head}"
        );
    }
}

#[test]
fn the_generator_draws_what_it_draws_on_the_cpu() {
    fill::<f16>();
    fill::<bf16>();
    fill::<E4m3>();
    fill::<E5m2>();
}

#[test]
fn the_flush_reads_its_buffer_once() {
    let mut memory = DeviceMemory::new();
    let words: Vec<u32> = (0..4096).map(|word: u32| word.wrapping_mul(2_654_435_761)).collect();
    let buffer = memory.add("a buffer", &words, Access::Read);
    let sums = memory.add("sums", &[0u32; 3], Access::ReadWrite);
    let params = FlushParams { buffer: buffer.address(), bytes: buffer.bytes(), sums: sums.address() };
    memory.launch(&support_record(Family::Flush, Dtype::F16, bytemuck::bytes_of(&params))).unwrap();
    // Of each CTA the first warp's, 4 words per thread.
    let mut expected = [0u32; 3];
    for (chunk, words) in words.chunks_exact(4).enumerate() {
        let (cta, thread) =
            (chunk / manifest::SUPPORT_THREADS as usize % 3, chunk % manifest::SUPPORT_THREADS as usize);
        if thread < 32 {
            expected[cta] = words.iter().fold(expected[cta], |sum, &word| sum.wrapping_add(word));
        }
    }
    assert_eq!(memory.read::<u32>(&sums), expected);
}

/// A problem that every variant but one serves.
#[test]
fn what_no_kernel_serves_is_launched_by_none() {
    let kernel = manifest::find(Family::Forward(TileVariant::Wgmma128), Dtype::F16, 128).unwrap();
    let case = draw_case(&mut ChaCha8Rng::seed_from_u64(3), kernel, TileVariant::Wgmma128);
    let plan = pat_tests::plan(&case, PlanOptions::default().with_variants([TileVariant::Wgmma128])).unwrap();
    let tensors = Tensors::<f16>::draw(&case.batch, case.shape, case.layout, SEED).unwrap();
    let host = tensors.host_of(Problem::new(case.shape, case.batch.page_size).with_soft_cap(30.0), None);
    let error = InterpretedRun::new(&plan, &host, &tensors.q, None).unwrap_err().to_string();
    assert!(error.contains("wgmma128"), "{error}");
}
