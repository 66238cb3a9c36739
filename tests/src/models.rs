//! The attention layers of each public model that has a name (`pat models`), with all of their heads, against the f64 oracle. The
//! batch is small; the first and the last KV heads of each sequence are compared.

use crate::executor::Executor;
use half::bf16;
use pat_rs::plan::PlanMode;
use pat_rs::{Dtype, PlanOptions, Planner, Reach, supports};
use pat_workloads::{LayerKind, Oracle, OwnedBatch, PoolLayout, RowSample, Tensors, check, models};

const PAGE_SIZE: u32 = 16;
const SEED: u32 = 11;

/// Layers that no kernel computes, and what the validator says of them.
pub const REFUSED: [(&str, &str); 2] = [
    ("deepseek-v3/full", "head_dim: got 576, expected 64 or 96 or 128 or 192 or 256 or 512"),
    ("kimi-k2/full", "head_dim: got 576, expected 64 or 96 or 128 or 192 or 256 or 512"),
];

/// Hands a macro the name of a test and of a model, for each of them.
#[macro_export]
macro_rules! for_each_model {
    ($tests:ident) => {
        $tests! {
            llama_3_1_8b: "llama-3.1-8b",
            llama_3_1_70b: "llama-3.1-70b",
            llama_3_1_405b: "llama-3.1-405b",
            llama_4_scout: "llama-4-scout",
            muse_glimmer_30b: "muse-glimmer-30b",
            muse_spark_816b: "muse-spark-816b",
            qwen2_5_0_5b: "qwen2.5-0.5b",
            qwen2_5_3b: "qwen2.5-3b",
            qwen2_5_7b: "qwen2.5-7b",
            qwen3_0_6b: "qwen3-0.6b",
            qwen3_4b: "qwen3-4b",
            qwen3_8b: "qwen3-8b",
            qwen3_14b: "qwen3-14b",
            qwen3_32b: "qwen3-32b",
            qwen3_30b_a3b: "qwen3-30b-a3b",
            qwen3_235b_a22b: "qwen3-235b-a22b",
            qwen3_coder_480b: "qwen3-coder-480b",
            qwen3_next_80b: "qwen3-next-80b",
            qwen3_5_0_8b: "qwen3.5-0.8b",
            qwen3_5_9b: "qwen3.5-9b",
            qwen3_5_27b: "qwen3.5-27b",
            qwen3_5_35b_a3b: "qwen3.5-35b-a3b",
            gpt_oss_20b: "gpt-oss-20b",
            gpt_oss_120b: "gpt-oss-120b",
            gemma_2_2b: "gemma-2-2b",
            gemma_3_4b: "gemma-3-4b",
            gemma_3_12b: "gemma-3-12b",
            gemma_4_31b: "gemma-4-31b",
            glm_4_9b: "glm-4-9b",
            glm_4_5: "glm-4.5",
            mistral_7b_v0_1: "mistral-7b-v0.1",
            ministral_3_8b: "ministral-3-8b",
            phi_3_mini: "phi-3-mini",
            phi_3_5_moe: "phi-3.5-moe",
            granite_swash_2b: "granite-swash-2b",
            minimax_m2: "minimax-m2",
            mimo_v2_flash: "mimo-v2-flash",
            hy3: "hy3",
            seed_oss_36b: "seed-oss-36b",
            solar_open_100b: "solar-open-100b",
            olmo_3_7b: "olmo-3-7b",
            smollm3_3b: "smollm3-3b",
            lfm3_1_7b: "lfm3-1.7b",
            inkling_2_small: "inkling-2-small",
            deepseek_v3: "deepseek-v3",
            kimi_k2: "kimi-k2",
        }
    };
}

/// Computes the layers of a model, or sees them refused.
///
/// # Panics
/// An output is not the oracle's, or the validator says something else.
pub fn agree(executor: &impl Executor, name: &str) {
    let (model, _) = models::layer(name).expect("a model of the table");
    for &layer in model.layers {
        let name = format!("{name}/{}", layer.reach.name());
        let verdict = supports(&layer.problem(Dtype::Bf16, PAGE_SIZE).expect("valid"), None, None);
        let refusal = REFUSED.iter().find(|(refused, _)| *refused == name).map(|(_, message)| (*message).to_owned());
        assert_eq!(verdict.err().map(|reason| reason.to_string()), refusal, "{name}");
        if refusal.is_none() {
            verify(executor, &name, layer);
        }
    }
}

/// Sequences that share pages: some shorter than what a row sees, some as long, some longer, by less and by more than a page.
fn batch(reach: Reach) -> OwnedBatch {
    let seen = reach.tokens().unwrap_or(10 * PAGE_SIZE);
    let lengths = vec![seen + 37, seen + 1, seen, 97, 80, 1, 0, 33];
    // All share five pages where they have them; the first two share what is full in both.
    let mut next = seen / PAGE_SIZE;
    let table = |(sequence, &length): (usize, &u32)| {
        let shared = if sequence < 2 { seen / PAGE_SIZE } else { 5 };
        let page = |page| {
            let is_full = (page + 1) * PAGE_SIZE <= length;
            if page < shared && is_full {
                return page;
            }
            next += 1;
            next - 1
        };
        (0..length.div_ceil(PAGE_SIZE)).map(page).collect()
    };
    let block_tables = lengths.iter().enumerate().map(table).collect();
    OwnedBatch { page_size: PAGE_SIZE, num_pages: next + 1, lengths, block_tables }
}

fn verify(executor: &impl Executor, name: &str, layer: LayerKind) {
    let batch = batch(layer.reach);
    let problem = layer.problem(Dtype::Bf16, PAGE_SIZE).expect("valid");
    let shape = problem.shape();
    // About as large as scores are, for some heads larger.
    let sinks: Option<Vec<f32>> =
        layer.has_sinks.then(|| (0..layer.q_heads).map(|head| f32::from(head as u16 % 7) - 3.0).collect());
    let heads = [0, layer.kv_heads - 1];
    let pairs = (0..batch.lengths.len() as u32).flat_map(|sequence| heads.map(|head| (sequence, head)));
    let sample = RowSample { name: "first and last KV heads".into(), pairs: pairs.collect() };
    let oracle = Oracle::compute_problem::<bf16>(&batch, problem, sinks.as_deref(), SEED, sample).expect("valid");
    let tensors = Tensors::<bf16>::draw(&batch, shape, PoolLayout::Nhd, SEED).expect("valid");
    let rows = batch.rows();
    let view = batch.view(&rows).expect("valid");
    for mode in [PlanMode::Auto, PlanMode::Packed] {
        let profile = executor.profile().expect("it can be asked");
        let mut planner = Planner::new(problem, profile, PlanOptions::from(mode)).expect("supported");
        let plan = planner.plan(&view).expect("a plan");
        let host = tensors.host_of(problem, sinks.as_deref());
        let mut out = tensors.nan_out();
        let mut lse = vec![f32::NAN; batch.lengths.len() * layer.q_heads as usize];
        executor.run_host(&plan, &host, &mut out, Some(&mut lse)).expect("a run");
        let report = check(&oracle, layer.q_heads, &out, Some(&lse));
        assert!(report.passed, "{name}, {mode:?}: {report:?}");
    }
}
