//! Attention shapes of public models, by name.
//!
//! The numbers are those of the `config.json` that the repository [`KnownModel::source`] publishes on Hugging Face, as the
//! configuration classes of transformers 5.24, LMCache's table of models or (Gemma 4 31B, Qwen3.5) test programs repeat them
//! (November 2026). Left out: models whose number of heads differs from layer to layer in no fixed pattern (Step-3.7, Laguna),
//! those that choose tokens per query by an index (DeepSeek V3.2, GLM-5, MiniMax M3), and layers without a KV cache (linear
//! attention, convolutions).

use pat_rs::{AttentionShape, Dtype, Error, Problem, Reach};

/// A model, and what its attention layers are like.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct KnownModel {
    /// Name, in lower case.
    pub name: &'static str,
    /// The repository whose `config.json` has the numbers.
    pub source: &'static str,
    /// Its kinds of attention layers, full ones first.
    pub layers: &'static [LayerKind],
}

/// Layers of a model that have the same attention.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct LayerKind {
    /// What a row sees of its sequence.
    pub reach: Reach,
    /// So many layers are of this kind, of so many: in each period of the model's pattern, or in all where it has none.
    pub share: (u32, u32),
    /// Query heads.
    pub q_heads: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Elements per head of Q and K.
    pub head_dim: u32,
    /// Elements per head of V and O.
    pub v_head_dim: u32,
    /// Cap of the scores.
    pub soft_cap: Option<f32>,
    /// Whether there is an attention sink for each query head.
    pub has_sinks: bool,
}

impl LayerKind {
    const fn of(self, layers: u32, all: u32) -> Self {
        Self { share: (layers, all), ..self }
    }

    const fn windowed(self, tokens: u32) -> Self {
        Self { reach: Reach::Window(tokens), ..self }
    }

    const fn chunked(self, tokens: u32) -> Self {
        Self { reach: Reach::Chunk(tokens), ..self }
    }

    const fn values_of(self, v_head_dim: u32) -> Self {
        Self { v_head_dim, ..self }
    }

    const fn capped(self, soft_cap: f32) -> Self {
        Self { soft_cap: Some(soft_cap), ..self }
    }

    const fn sunk(self) -> Self {
        Self { has_sinks: true, ..self }
    }

    /// The heads that one of `ranks` tensor-parallel ranks has: those of Q are divided, and those of K and V too, or, where there
    /// are fewer than ranks, each is held by several (vLLM's rule).
    ///
    /// # Errors
    /// `ranks` is 0 or does not divide the query heads, or neither divides the KV heads nor is a multiple of them.
    pub fn of_rank(self, ranks: u32) -> pat_rs::Result<Self> {
        let Self { q_heads, kv_heads, .. } = self;
        let divides = |heads: u32| ranks > 0 && heads.is_multiple_of(ranks);
        if !divides(q_heads) || !(divides(kv_heads) || ranks.is_multiple_of(kv_heads)) {
            let accepted = format!(
                "a divisor of the {q_heads} query heads that divides the {kv_heads} KV heads or is a multiple of them"
            );
            return Err(Error::invalid("tensor_parallel", ranks, accepted));
        }
        Ok(Self { q_heads: q_heads / ranks, kv_heads: (kv_heads / ranks).max(1), ..self })
    }

    /// Heads and head dimensions.
    ///
    /// # Errors
    /// As [`AttentionShape::new`]; none for a layer of [`MODELS`].
    pub fn shape(self, dtype: Dtype) -> pat_rs::Result<AttentionShape> {
        AttentionShape::new(self.q_heads, self.kv_heads, self.head_dim, dtype)?.with_v_head_dim(self.v_head_dim)
    }

    /// What the kernels are asked for.
    ///
    /// # Errors
    /// As [`Self::shape`].
    pub fn problem(self, dtype: Dtype, page_size: u32) -> pat_rs::Result<Problem> {
        let mut problem = Problem::new(self.shape(dtype)?, page_size).with_reach(self.reach);
        if let Some(cap) = self.soft_cap {
            problem = problem.with_soft_cap(cap);
        }
        Ok(if self.has_sinks { problem.with_sinks() } else { problem })
    }
}

const fn model(name: &'static str, source: &'static str, layers: &'static [LayerKind]) -> KnownModel {
    KnownModel { name, source, layers }
}

/// All of a model's layers, alike.
const fn full(q_heads: u32, kv_heads: u32, head_dim: u32) -> LayerKind {
    LayerKind {
        reach: Reach::Full,
        share: (1, 1),
        q_heads,
        kv_heads,
        head_dim,
        v_head_dim: head_dim,
        soft_cap: None,
        has_sinks: false,
    }
}

/// The models that have a name here.
pub const MODELS: &[KnownModel] = &[
    model("llama-3.1-8b", "meta-llama/Llama-3.1-8B", &[full(32, 8, 128)]),
    model("llama-3.1-70b", "meta-llama/Llama-3.1-70B", &[full(64, 8, 128)]),
    model("llama-3.1-405b", "meta-llama/Llama-3.1-405B", &[full(128, 8, 128)]),
    model(
        "llama-4-scout",
        "meta-llama/Llama-4-Scout-17B-16E",
        &[full(40, 8, 128).of(12, 48), full(40, 8, 128).chunked(8192).of(36, 48)],
    ),
    model(
        "muse-glimmer-30b",
        "meta-models/Muse-Glimmer-30B",
        &[full(32, 2, 128).of(1, 4), full(32, 2, 128).windowed(2048).of(3, 4)],
    ),
    model(
        "muse-spark-816b",
        "meta-models/Muse-Spark-Open-816B-A42B",
        &[full(128, 16, 64).of(1, 4), full(128, 16, 64).windowed(2048).of(3, 4)],
    ),
    model("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", &[full(14, 2, 64)]),
    model("qwen2.5-3b", "Qwen/Qwen2.5-3B", &[full(16, 2, 128)]),
    model("qwen2.5-7b", "Qwen/Qwen2.5-7B", &[full(28, 4, 128)]),
    model("qwen3-0.6b", "Qwen/Qwen3-0.6B", &[full(16, 8, 128)]),
    model("qwen3-4b", "Qwen/Qwen3-4B", &[full(32, 8, 128)]),
    model("qwen3-8b", "Qwen/Qwen3-8B", &[full(32, 8, 128)]),
    model("qwen3-14b", "Qwen/Qwen3-14B", &[full(40, 8, 128)]),
    model("qwen3-32b", "Qwen/Qwen3-32B", &[full(64, 8, 128)]),
    model("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", &[full(32, 4, 128)]),
    model("qwen3-235b-a22b", "Qwen/Qwen3-235B-A22B", &[full(64, 4, 128)]),
    model("qwen3-coder-480b", "Qwen/Qwen3-Coder-480B-A35B-Instruct", &[full(96, 8, 128)]),
    model("qwen3-next-80b", "Qwen/Qwen3-Next-80B-A3B-Instruct", &[full(16, 2, 256).of(1, 4)]),
    model("qwen3.5-0.8b", "Qwen/Qwen3.5-0.8B", &[full(8, 2, 256).of(1, 4)]),
    model("qwen3.5-9b", "Qwen/Qwen3.5-9B", &[full(16, 4, 256).of(1, 4)]),
    model("qwen3.5-27b", "Qwen/Qwen3.5-27B", &[full(24, 4, 256).of(1, 4)]),
    model("qwen3.5-35b-a3b", "Qwen/Qwen3.5-35B-A3B", &[full(16, 2, 256).of(1, 4)]),
    model(
        "gpt-oss-20b",
        "openai/gpt-oss-20b",
        &[full(64, 8, 64).sunk().of(1, 2), full(64, 8, 64).sunk().windowed(128).of(1, 2)],
    ),
    model(
        "gpt-oss-120b",
        "openai/gpt-oss-120b",
        &[full(64, 8, 64).sunk().of(1, 2), full(64, 8, 64).sunk().windowed(128).of(1, 2)],
    ),
    model(
        "gemma-2-2b",
        "google/gemma-2-2b",
        &[full(8, 4, 256).capped(50.0).of(1, 2), full(8, 4, 256).capped(50.0).windowed(4096).of(1, 2)],
    ),
    model("gemma-3-4b", "google/gemma-3-4b-it", &[full(8, 4, 256).of(1, 6), full(8, 4, 256).windowed(1024).of(5, 6)]),
    model(
        "gemma-3-12b",
        "google/gemma-3-12b-it",
        &[full(16, 8, 256).of(1, 6), full(16, 8, 256).windowed(1024).of(5, 6)],
    ),
    model(
        "gemma-4-31b",
        "google/gemma-4-31b-it",
        &[full(32, 4, 512).of(1, 6), full(32, 16, 256).windowed(1024).of(5, 6)],
    ),
    model("glm-4-9b", "zai-org/GLM-4-9B-0414", &[full(32, 2, 128)]),
    model("glm-4.5", "zai-org/GLM-4.5", &[full(96, 8, 128)]),
    model("mistral-7b-v0.1", "mistralai/Mistral-7B-v0.1", &[full(32, 8, 128).windowed(4096)]),
    model("ministral-3-8b", "mistralai/Ministral-3-8B-Base-2512", &[full(32, 8, 128)]),
    model("phi-3-mini", "microsoft/Phi-3-mini-4k-instruct", &[full(32, 32, 96)]),
    model("phi-3.5-moe", "microsoft/Phi-3.5-MoE-instruct", &[full(32, 8, 128)]),
    model(
        "granite-swash-2b",
        "ibm-granite/granite-swash-2b",
        &[full(20, 4, 128).sunk().of(1, 4), full(20, 4, 128).sunk().windowed(128).of(3, 4)],
    ),
    model("minimax-m2", "MiniMaxAI/MiniMax-M2", &[full(48, 8, 128)]),
    model(
        "mimo-v2-flash",
        "XiaomiMiMo/MiMo-V2-Flash",
        &[full(64, 4, 192).values_of(128).of(9, 48), full(64, 8, 192).values_of(128).sunk().windowed(128).of(39, 48)],
    ),
    model("hy3", "tencent/Hy3-preview", &[full(64, 8, 128)]),
    model("seed-oss-36b", "ByteDance-Seed/Seed-OSS-36B-Instruct", &[full(80, 8, 128)]),
    model("solar-open-100b", "upstage/Solar-Open-100B", &[full(64, 8, 128)]),
    model(
        "olmo-3-7b",
        "allenai/Olmo-3-7B-Instruct",
        &[full(32, 32, 128).of(1, 4), full(32, 32, 128).windowed(4096).of(3, 4)],
    ),
    model("smollm3-3b", "HuggingFaceTB/SmolLM3-3B", &[full(16, 4, 128)]),
    model("lfm3-1.7b", "LiquidAI/LFM3-1.7B", &[full(16, 4, 128).of(6, 24), full(16, 4, 128).windowed(256).of(5, 24)]),
    model(
        "inkling-2-small",
        "thinkingmachines/Inkling-2-Small-MXFP8",
        &[full(48, 8, 128).of(1, 6), full(48, 8, 128).windowed(1024).of(5, 6)],
    ),
    // Latent attention with its projections absorbed: one KV head, the value a part of the key.
    model("deepseek-v3", "deepseek-ai/DeepSeek-V3", &[full(128, 1, 576).values_of(512)]),
    model("kimi-k2", "moonshotai/Kimi-K2-Instruct", &[full(64, 1, 576).values_of(512)]),
];

/// There is no such model, or it has no such layers.
///
/// Fix: take a name that `pat models` lists, with `/full`, `/window` or `/chunk` behind it where a model's layers differ.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("model: got {name:?}, expected {accepted}")]
pub struct ModelError {
    name: String,
    accepted: String,
}

/// The layers that a text names: `NAME` (the full ones, or those of the model's only kind) or `NAME/KIND`.
///
/// # Errors
/// See [`ModelError`].
pub fn layer(text: &str) -> Result<(&'static KnownModel, LayerKind), ModelError> {
    let refused = |accepted: String| ModelError { name: text.into(), accepted };
    let (name, kind) = text.split_once('/').map_or((text, None), |(name, kind)| (name, Some(kind)));
    let Some(model) = MODELS.iter().find(|model| model.name.eq_ignore_ascii_case(name)) else {
        return Err(refused(format!("a name that `pat models` lists{}", similar(name))));
    };
    let found = match kind {
        None => model.layers.first(),
        Some(kind) => model.layers.iter().find(|layer| layer.reach.name() == kind),
    };
    let kinds = || model.layers.iter().map(|layer| format!("{}/{}", model.name, layer.reach.name()));
    found.map(|layer| (model, *layer)).ok_or_else(|| refused(kinds().collect::<Vec<_>>().join(" or ")))
}

/// Names that begin as `name` does, for messages.
fn similar(name: &str) -> String {
    let family =
        name.split(['-', '.']).next().unwrap_or_default().trim_end_matches(|c: char| c.is_ascii_digit()).to_lowercase();
    let names = MODELS.iter().map(|model| model.name).filter(|other| !family.is_empty() && other.starts_with(&family));
    match names.collect::<Vec<_>>()[..] {
        [] => String::new(),
        ref names => format!(", such as {}", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_model_has_a_name_and_layers_of_its_own() {
        for (index, model) in MODELS.iter().enumerate() {
            assert!(MODELS[..index].iter().all(|other| other.name != model.name), "{}", model.name);
            assert_eq!(model.name, model.name.to_lowercase());
            assert!(model.source.contains('/') && !model.layers.is_empty(), "{}", model.name);
            let layers: u32 = model.layers.iter().map(|layer| layer.share.0).sum();
            for (place, layer) in model.layers.iter().enumerate() {
                assert!(layer.problem(Dtype::Bf16, 16).is_ok() && layer.share.1 >= layers, "{}", model.name);
                assert!(model.layers[..place].iter().all(|other| other.reach.name() != layer.reach.name()));
                assert!(layer.reach != Reach::Full || place == 0, "{}: full layers first", model.name);
            }
        }
    }

    #[test]
    fn layers_are_found_by_name_and_kind() {
        let reach = |text: &str| layer(text).expect(text).1.reach;
        assert_eq!(reach("gpt-oss-20b"), Reach::Full);
        assert_eq!(reach("GPT-OSS-20B/window"), Reach::Window(128));
        assert_eq!(reach("mistral-7b-v0.1"), Reach::Window(4096));
        assert_eq!(reach("llama-4-scout/chunk"), Reach::Chunk(8192));
        let refusal = |text: &str| layer(text).unwrap_err().to_string();
        assert_eq!(refusal("qwen3-8b/window"), "model: got \"qwen3-8b/window\", expected qwen3-8b/full");
        assert_eq!(
            refusal("gpt-oss-20b/"),
            "model: got \"gpt-oss-20b/\", expected gpt-oss-20b/full or gpt-oss-20b/window"
        );
        assert_eq!(
            refusal("gemma-9"),
            "model: got \"gemma-9\", expected a name that `pat models` lists, such as gemma-2-2b, gemma-3-4b, gemma-3-12b, \
             gemma-4-31b"
        );
        for text in ["", "/", "8b", "/full"] {
            assert!(refusal(text).ends_with("expected a name that `pat models` lists"), "{}", refusal(text));
        }
    }

    #[test]
    fn ranks_divide_query_heads_and_divide_or_share_kv_heads() {
        let heads = |name: &str, ranks| {
            let rank = layer(name).expect(name).1.of_rank(ranks)?;
            Ok::<_, Error>((rank.q_heads, rank.kv_heads))
        };
        assert_eq!(heads("llama-3.1-70b", 1).expect("whole heads"), (64, 8));
        assert_eq!(heads("llama-3.1-70b", 8).expect("whole heads"), (8, 1));
        assert_eq!(heads("llama-3.1-70b", 16).expect("whole heads"), (4, 1));
        assert_eq!(heads("qwen3-30b-a3b", 8).expect("whole heads"), (4, 1));
        for (name, ranks) in [("llama-3.1-70b", 0), ("llama-3.1-70b", 3), ("qwen2.5-7b", 8), ("minimax-m2", 12)] {
            let message = heads(name, ranks).unwrap_err().to_string();
            assert!(
                message.starts_with(&format!("tensor_parallel: got {ranks}, expected a divisor of the")),
                "{message}"
            );
        }
    }
}
