//! What texts say of a model: heads and element types.

use pat_rs::Dtype;

/// What a file or a command says of the model a batch is of. What it does not say is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ModelParts {
    /// Query heads and KV heads.
    pub heads: Option<(u32, u32)>,
    /// Elements per head.
    pub head_dim: Option<u32>,
    /// Element type.
    pub dtype: Option<Dtype>,
}

/// `32/8`: query heads, KV heads. `None` where the text has another form.
pub fn parse_heads(text: &str) -> Option<(u32, u32)> {
    let (q, kv) = text.split_once('/')?;
    Some((q.parse().ok()?, kv.parse().ok()?))
}

/// The type that [`Dtype::name`] names so; `fp16` and `half` are f16 too.
pub fn parse_dtype(name: &str) -> Option<Dtype> {
    match name {
        "f16" | "fp16" | "half" => Some(Dtype::F16),
        "bf16" => Some(Dtype::Bf16),
        _ => None,
    }
}
