//! 8-bit K and V: on the CPU, in interpreted PTX and on a device, against the f64 oracle of the numbers that they stand for.

use half::{bf16, f16};
use pat_abi::generator::Tensor;
use pat_abi::{Family, KERNELS, KernelSpec, Switches, TileVariant};
use pat_rs::cpu::{E4m3, E5m2};
use pat_rs::plan::PlanMode;
use pat_rs::{
    AttentionShape, DeviceProfile, Dtype, Element, Engine, HostTensors, KvElement, KvScale, PlanOptions, Planner,
    Problem, supports,
};
use pat_tests::executor::{Executor, Interpreter, OldestInterpreter};
use pat_tests::{Case, device_test, draw_sinks, random_case, softmax_scale};
use pat_workloads::{Oracle, RowSample, Tensors, check};
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use std::process::ExitCode;

const SEED: u32 = 29;
/// Forests that each kernel computes.
const FORESTS: u64 = 10;

/// An 8-bit type.
trait EightBit: KvElement {
    /// Codes of no finite number.
    const SPECIAL: [Self; 2];
}

impl EightBit for E4m3 {
    const SPECIAL: [Self; 2] = [Self(0x7f), Self(0xff)];
}

impl EightBit for E5m2 {
    const SPECIAL: [Self; 2] = [Self(0x7c), Self(0x7e)];
}

/// Factors of K and V, by head: powers of 2, so that the numbers are exact in 16 bits.
struct Scales {
    k: Vec<f32>,
    v: Vec<f32>,
    by_head: bool,
}

impl Scales {
    fn draw(rng: &mut impl Rng, kv_heads: u32) -> Self {
        let by_head = rng.random_bool(0.5);
        let mut draw = || {
            let all = 2f32.powi(rng.random_range(-4..3));
            (0..kv_heads).map(|_| if by_head { 2f32.powi(rng.random_range(-4..3)) } else { all }).collect()
        };
        Self { k: draw(), v: draw(), by_head }
    }

    fn of(&self) -> [KvScale<'_>; 2] {
        [&self.k, &self.v].map(|scales| if self.by_head { KvScale::Heads(scales) } else { KvScale::Tensor(scales[0]) })
    }
}

/// A sequence and a page that it alone attends to, if there are any.
fn page_of_one(case: &Case) -> Option<(u32, u32)> {
    let used = |sequence: usize| {
        let pages = case.batch.lengths[sequence].div_ceil(case.batch.page_size) as usize;
        &case.batch.block_tables[sequence][..pages]
    };
    let count = case.batch.lengths.len();
    (0..count).find_map(|sequence| {
        let alone = |page: &&u32| (0..count).all(|other| other == sequence || !used(other).contains(page));
        used(sequence).iter().find(alone).map(|&page| (sequence as u32, page))
    })
}

fn run_forest<T: Element, C: EightBit>(
    executor: &impl Executor,
    kernel: &KernelSpec,
    variant: TileVariant,
    index: u64,
) {
    let mut rng = ChaCha8Rng::seed_from_u64(index);
    let case = loop {
        let case = random_case(&mut rng, T::DTYPE);
        if case.shape.group() <= variant.rows() && variant.supports_page_size(case.batch.page_size) {
            break case;
        }
    };
    let (mut q_heads, kv_heads) = (case.shape.q_heads(), case.shape.kv_heads());
    if variant == TileVariant::Mma64 && index == 1 {
        // In two parts: no tile holds it.
        q_heads = 101 * kv_heads;
    }
    let plain = AttentionShape::new(q_heads, kv_heads, kernel.head_dim, T::DTYPE).unwrap();
    let case = Case { shape: plain, ..case };
    let scales = Scales::draw(&mut rng, plain.kv_heads());
    let mut tensors = Tensors::<T>::draw(&case.batch, plain, case.layout, SEED).unwrap();
    let mut codes: Vec<C> = tensors
        .narrow(|tensor, head| if tensor == Tensor::K { scales.k[head as usize] } else { scales.v[head as usize] });
    // What one sequence's values hold reaches that sequence alone.
    let alone = (index % 3 == 2).then(|| page_of_one(&case)).flatten();
    if let Some((_, page)) = alone {
        for head in 0..plain.kv_heads() {
            let at = tensors.row_begin(Tensor::V, page, 0, head);
            codes[at + 5] = C::SPECIAL[head as usize % 2];
        }
    }

    let scale = softmax_scale(plain) * [1.0, 16.0, 1.0, 64.0][index as usize % 4];
    let mut problem = Problem::new(plain.with_kv_dtype(C::DTYPE), case.batch.page_size).with_scale(scale);
    if rng.random_bool(0.3) {
        problem = problem.with_soft_cap(2.0);
    }
    let has_windows = kernel.serves(Switches { window: true, ..Switches::OFF });
    if alone.is_none() && rng.random_bool(0.3) && has_windows {
        problem = problem.with_window(*[1, 20, 100].choose(&mut rng).unwrap());
    }
    let sinks = draw_sinks(&mut rng, plain);
    if sinks.is_some() {
        problem = problem.with_sinks();
    }
    let chunk = PlanMode::FixedChunk { tokens: 2 * case.batch.page_size };
    let mode = [PlanMode::Auto, PlanMode::Packed, PlanMode::PerNode, PlanMode::Flat, chunk][index as usize % 5];
    let what = format!("{}, forest {index}, {mode:?}, {problem:?} {sinks:?}\n{case:?}", kernel.entry);

    let rows = case.batch.rows();
    let view = case.batch.view(&rows).unwrap();
    let options = PlanOptions::from(mode).with_variants([variant]);
    let plan = Planner::new(problem, DeviceProfile::h200(), options).unwrap().plan(&view).unwrap();
    let [k_scale, v_scale] = scales.of();
    let mut host = HostTensors::new(problem, &tensors.q, &codes, &codes[tensors.v_begin.min(codes.len())..])
        .with_kv_strides(tensors.k_strides, tensors.v_strides)
        .with_kv_scales(k_scale, v_scale);
    host.sinks = sinks.as_deref();
    let mut out = vec![T::from_f32(f32::NAN); tensors.q.len()];
    let mut lse = vec![f32::NAN; tensors.q.len() / plain.head_dim() as usize];
    executor.run_host(&plan, &host, &mut out, Some(&mut lse)).unwrap_or_else(|error| panic!("{error}: {what}"));
    let mut everything = RowSample::for_batch(&case.batch, plain);
    if let Some((alone, _)) = alone {
        everything.pairs.retain(|(sequence, _)| *sequence != alone);
        let (heads, dim) = (plain.q_heads() as usize, plain.head_dim() as usize);
        let own = &out[alone as usize * heads * dim..][..heads * dim];
        assert!(own.chunks_exact(dim).all(|row| !row[5].to_f32().is_finite()), "{what}");
    }
    let asked = (problem, sinks.as_deref());
    let oracle = Oracle::of_problem_tensors(&case.batch, &tensors, asked, everything).unwrap();
    let report = check(&oracle, plain.q_heads(), &out, Some(&lse));
    assert!(report.passed, "{report:?}: {what}");
}

/// Runs forests through every forward kernel of 8-bit K and V.
fn run_all(executor: &(impl Executor + Sync)) {
    let runs: Vec<(&KernelSpec, TileVariant, u64)> = KERNELS
        .iter()
        .filter(|kernel| kernel.kv_dtype.bytes() == 1)
        .filter_map(|kernel| match kernel.family {
            Family::Forward(variant) => Some((kernel, variant)),
            _ => None,
        })
        .flat_map(|(kernel, variant)| (0..FORESTS).map(move |index| (kernel, variant, index)))
        .collect();
    assert_eq!(runs.len() as u64, 4 * 2 * 2 * 2 * FORESTS);
    runs.into_par_iter().for_each(|(kernel, variant, index)| match (kernel.dtype, kernel.kv_dtype) {
        (Dtype::F16, Dtype::E4m3) => run_forest::<f16, E4m3>(executor, kernel, variant, index),
        (Dtype::F16, Dtype::E5m2) => run_forest::<f16, E5m2>(executor, kernel, variant, index),
        (Dtype::Bf16, Dtype::E4m3) => run_forest::<bf16, E4m3>(executor, kernel, variant, index),
        (Dtype::Bf16, Dtype::E5m2) => run_forest::<bf16, E5m2>(executor, kernel, variant, index),
        other => panic!("no forest is drawn in {other:?}"),
    });
}

fn on_the_cpu(engine: &Engine) {
    run_all(engine);
}

fn in_interpreted_ptx(_: &Engine) {
    run_all(&Interpreter);
    run_all(&OldestInterpreter);
}

fn on_a_device(engine: &Engine) {
    run_all(engine);
    all_codes(engine);
}

/// One sequence whose only token has all codes as values, one per column and head: outputs are the numbers themselves.
fn codes_through<T: Element, C: EightBit>(executor: &impl Executor, code: impl Fn(u8) -> C) {
    const DIM: usize = 128;
    let shape = AttentionShape::new(2, 2, DIM as u32, T::DTYPE).unwrap().with_kv_dtype(C::DTYPE);
    let problem = Problem::new(shape, 16);
    let tables: [&[u32]; 1] = [&[0]];
    let batch = pat_rs::DecodeBatch::from_block_tables(&tables, &[1], 16, 1).unwrap();
    let q = vec![T::from_f32(0.0); 2 * DIM];
    let k = vec![code(0); 16 * 2 * DIM];
    let mut v = vec![code(0x7f); 16 * 2 * DIM];
    (0..=u8::MAX).for_each(|byte| v[usize::from(byte)] = code(byte));
    for variant in DeviceProfile::h200().variants(&problem) {
        let options = PlanOptions::default().with_variants([variant]);
        let plan = Planner::new(problem, DeviceProfile::h200(), options).unwrap().plan(&batch).unwrap();
        for v_scale in [1.0, 0.25] {
            let host = HostTensors::new(problem, &q, &k, &v).with_kv_scales(KvScale::ONE, KvScale::Tensor(v_scale));
            let mut out = vec![T::from_f32(9.0); 2 * DIM];
            executor.run_host(&plan, &host, &mut out, None).unwrap();
            for (byte, value) in out.iter().enumerate() {
                let (value, expected) = (value.to_f32(), T::from_f32(v[byte].to_f32() * v_scale).to_f32());
                assert!(value == expected || value.is_nan() && expected.is_nan(), "{byte:#x}: {value}, not {expected}");
            }
        }
    }
}

fn all_codes(executor: &impl Executor) {
    codes_through::<f16, _>(executor, E4m3);
    codes_through::<f16, _>(executor, E5m2);
    codes_through::<bf16, _>(executor, E4m3);
    codes_through::<bf16, _>(executor, E5m2);
}

fn all_codes_are_read_exactly(engine: &Engine) {
    all_codes(engine);
    all_codes(&Interpreter);
    all_codes(&OldestInterpreter);
}

fn what_has_no_kernel_is_refused(_: &Engine) {
    let shape = |head_dim| AttentionShape::new(8, 2, head_dim, Dtype::F16).unwrap().with_kv_dtype(Dtype::E4m3);
    let refusal = |problem: Problem| supports(&problem, None, None).unwrap_err().to_string();
    assert_eq!(refusal(Problem::new(shape(256), 16)), "head_dim: got 256, expected 64 or 128 with K and V of e4m3");
    supports(&Problem::new(shape(128), 16).with_window(5).with_soft_cap(3.0), None, None).unwrap();
    for variant in DeviceProfile::h200().variants(&Problem::new(shape(64), 16).with_window(5)) {
        assert!(variant.serves(Switches { window: true, ..Switches::OFF }, Dtype::E4m3, 64), "{variant:?}");
    }
}

fn factors_that_are_none_are_refused(engine: &Engine) {
    let shape = AttentionShape::new(2, 2, 64, Dtype::F16).unwrap().with_kv_dtype(Dtype::E4m3);
    let problem = Problem::new(shape, 16);
    let tables: [&[u32]; 1] = [&[0]];
    let batch = pat_rs::DecodeBatch::from_block_tables(&tables, &[1], 16, 1).unwrap();
    let plan = Planner::new(problem, DeviceProfile::h200(), PlanOptions::default()).unwrap().plan(&batch).unwrap();
    let (q, pool) = (vec![f16::ZERO; 128], vec![E4m3(0); 16 * 128]);
    let mut out = vec![f16::ONE; 128];
    for (k_scale, v_scale, part) in [
        (KvScale::Tensor(0.0), KvScale::ONE, "k_scale: got 0"),
        (KvScale::ONE, KvScale::Tensor(f32::NAN), "v_scale: got NaN"),
        (KvScale::Heads(&[1.0]), KvScale::ONE, "k_scale: got 1 factors"),
        (KvScale::ONE, KvScale::Heads(&[1.0, f32::INFINITY]), "v_scale: got inf"),
    ] {
        let host = HostTensors::new(problem, &q, &pool, &pool).with_kv_scales(k_scale, v_scale);
        let error = engine.run_host(&plan, &host, &mut out, None).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    assert!(out.iter().all(|&value| value == f16::ONE));
    let wide = HostTensors::new(problem, &q, &q, &q);
    assert!(engine.run_host(&plan, &wide, &mut out, None).is_err());
}

fn main() -> ExitCode {
    pat_tests::device_tests::main([
        device_test!(on_the_cpu).on_the_cpu(),
        device_test!(in_interpreted_ptx).on_the_cpu(),
        device_test!(all_codes_are_read_exactly).on_the_cpu(),
        device_test!(what_has_no_kernel_is_refused).on_the_cpu(),
        device_test!(factors_that_are_none_are_refused).on_the_cpu(),
        device_test!(on_a_device),
    ])
}
