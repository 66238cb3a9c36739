//! What a plan is, in numbers.

use super::Plan;
use super::cost::Prediction;
use pat_abi::TileVariant;
use serde::Serialize;
use std::fmt;

/// Figures of a plan. KV bytes are K and V over all KV heads.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlanSummary {
    /// Rows of the batch, empty ones included.
    pub sequences: u32,
    /// Logical KV bytes over unique KV bytes: how often the average byte would be read without sharing.
    pub sharing_factor: f64,
    /// KV bytes of distinct pages.
    pub unique_kv_bytes: u64,
    /// KV bytes the plan reads: every item its stream.
    pub planned_kv_bytes: u64,
    /// KV bytes that reading every sequence's own KV would take.
    pub flat_kv_bytes: u64,
    /// Bytes of partial outputs and log-sum-exps, written once and read once.
    pub partial_bytes: u64,
    /// Bytes of the plan buffer: one upload.
    pub upload_bytes: u64,
    /// Sequences the merge kernel writes.
    pub merge_rows: u32,
    /// Largest number of partials of a sequence.
    pub max_splits: u32,
    /// Work items by tile variant, of the variants used.
    pub variants: Vec<VariantSummary>,
    /// Predicted time by cause.
    pub prediction: Prediction,
    /// Predicted time.
    pub predicted_us: f64,
}

/// The share of one tile variant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VariantSummary {
    /// Name of the variant.
    pub variant: &'static str,
    /// Work items (each runs once per KV head).
    pub items: u32,
    /// KV tokens its items read, per KV head.
    pub kv_tokens: u64,
}

impl Plan {
    /// The plan in numbers.
    pub fn summary(&self) -> PlanSummary {
        let token_bytes = self.shape().kv_bytes_per_token();
        let tokens = |variant| self.variant_items(variant).iter().map(|item| self.stream_tokens(item)).sum::<u64>();
        let variants: Vec<_> = TileVariant::ALL
            .into_iter()
            .filter(|&variant| !self.variant_items(variant).is_empty())
            .map(|variant| VariantSummary {
                variant: variant.name(),
                items: self.variant_items(variant).len() as u32,
                kv_tokens: tokens(variant),
            })
            .collect();
        let flat_kv_bytes = self.logical_tokens() * token_bytes;
        PlanSummary {
            sequences: self.sequence_count(),
            sharing_factor: flat_kv_bytes as f64 / (self.unique_kv_bytes().max(1)) as f64,
            unique_kv_bytes: self.unique_kv_bytes(),
            planned_kv_bytes: variants.iter().map(|v| v.kv_tokens).sum::<u64>() * token_bytes,
            flat_kv_bytes,
            partial_bytes: self.partial_bytes(),
            upload_bytes: self.bytes().len() as u64,
            merge_rows: self.header().merge_count,
            max_splits: self.merges().iter().map(|merge| merge.slot_count).max().unwrap_or(0),
            variants,
            prediction: self.prediction(),
            predicted_us: self.prediction().total_us(),
        }
    }
}

impl fmt::Display for PlanSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        writeln!(
            f,
            "sequences        {} ({} merged, at most {} partials)",
            self.sequences, self.merge_rows, self.max_splits
        )?;
        writeln!(f, "sharing factor   {:.2}", self.sharing_factor)?;
        writeln!(
            f,
            "KV read          {:.1} MiB planned, {:.1} MiB unique, {:.1} MiB without sharing",
            mib(self.planned_kv_bytes),
            mib(self.unique_kv_bytes),
            mib(self.flat_kv_bytes)
        )?;
        writeln!(f, "partials         {:.1} MiB", mib(self.partial_bytes))?;
        for variant in &self.variants {
            writeln!(f, "items {:<10} {} ({} KV tokens)", variant.variant, variant.items, variant.kv_tokens)?;
        }
        let p = &self.prediction;
        writeln!(f, "upload           {} bytes", self.upload_bytes)?;
        write!(
            f,
            "predicted        {:.1} us (launches {:.1}, forward {:.1}, merge {:.1}; memory alone {:.1}, tensor alone {:.1})",
            self.predicted_us, p.launch_us, p.busy_us, p.merge_us, p.memory_us, p.tensor_us
        )
    }
}
