//! What a plan is, in numbers.

use super::Plan;
use super::balance::Balance;
use super::cost::{CostModel, Prediction, VariantTerms};
use pat_abi::{GroupParts, TileVariant, WorkItem};
use serde::Serialize;
use std::fmt;

/// Figures of a plan. KV bytes are K and V over all KV heads.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlanSummary {
    /// Rows of the batch, empty ones included.
    pub sequences: u32,
    /// KV tokens, per KV head, that items read in runs of consecutive pages ([`super::PlanOptions::runs`]).
    pub run_tokens: u64,
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
    /// How uneven the work lies on the device: the largest load of a resident CTA over the mean load, in main-loop steps,
    /// when the items are dealt out in launch order, and one launch runs behind the other. 1 is even; places without work
    /// count, so a plan of fewer CTAs than the device has places for is above 1.
    pub imbalance: f64,
    /// Predicted time by cause.
    pub prediction: Prediction,
    /// Predicted time.
    pub predicted_us: f64,
}

/// The share of one tile variant.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct VariantSummary {
    /// Name of the variant.
    pub variant: &'static str,
    /// Work items (each runs once per KV head, and per part of a group that a tile does not hold).
    pub items: u32,
    /// KV tokens its items read, per KV head: for each part of a group once.
    pub kv_tokens: u64,
    /// Its part of the predicted forward time ([`Prediction::busy_us`]).
    pub predicted_us: f64,
    /// The same as a fraction, 0 to 1.
    pub predicted_share: f64,
    /// [`PlanSummary::imbalance`] of its launch alone.
    pub imbalance: f64,
}

/// The launches of a variant, as predicted.
struct Launch {
    variant: TileVariant,
    /// How many there are: one for each part of a group.
    count: u64,
    forward_us: f64,
    balance: Balance,
}

impl Plan {
    /// The plan in numbers. Predictions by variant are made here, not when planning.
    pub fn summary(&self) -> PlanSummary {
        let token_bytes = self.shape().kv_bytes_per_token();
        let launches = self.launches();
        let forward_us: f64 = launches.iter().map(|launch| launch.forward_us).sum();
        let variants: Vec<_> = launches
            .iter()
            .map(|launch| {
                let items = self.variant_items(launch.variant);
                let predicted_share = launch.forward_us / forward_us;
                VariantSummary {
                    variant: launch.variant.name(),
                    items: items.len() as u32,
                    kv_tokens: launch.count * items.iter().map(|item| self.stream_tokens(item)).sum::<u64>(),
                    predicted_us: predicted_share * self.prediction().busy_us,
                    predicted_share,
                    imbalance: launch.balance.imbalance(),
                }
            })
            .collect();
        let none = Balance { longest_steps: 0, mean_steps: 0.0 };
        let logical_kv_bytes = self.logical_tokens() * token_bytes;
        // Each part of a group reads all of it, too.
        let parts = launches.iter().map(|launch| launch.count).max().unwrap_or(1);
        PlanSummary {
            sequences: self.sequence_count(),
            run_tokens: self
                .items()
                .iter()
                .filter(|item| item.run_pages > 0)
                .map(|item| self.stream_tokens(item))
                .sum(),
            sharing_factor: logical_kv_bytes as f64 / (self.unique_kv_bytes().max(1)) as f64,
            unique_kv_bytes: self.unique_kv_bytes(),
            planned_kv_bytes: variants.iter().map(|v| v.kv_tokens).sum::<u64>() * token_bytes,
            flat_kv_bytes: parts * logical_kv_bytes,
            partial_bytes: self.partial_bytes(),
            upload_bytes: self.bytes().len() as u64,
            merge_rows: self.header().merge_count,
            max_splits: self.merges().iter().map(|merge| merge.slot_count).max().unwrap_or(0),
            variants,
            imbalance: launches.iter().fold(none, |all, launch| all.then(launch.balance)).imbalance(),
            prediction: self.prediction(),
            predicted_us: self.prediction().total_us(),
        }
    }

    /// The launches of the tile variants in use.
    fn launches(&self) -> Vec<Launch> {
        let parts = |variant| u64::from(GroupParts::new(self.shape().group(), variant).count);
        let terms = VariantTerms::all(self.profile(), self.shape());
        // Whole pages, as the cost model counts them.
        let steps = |variant: TileVariant, item: &WorkItem| {
            item.token_count.next_multiple_of(self.entry_tokens(item)).div_ceil(terms[variant.index()].keys)
        };
        let used = || TileVariant::ALL.into_iter().map(|variant| (variant, self.variant_items(variant)));
        let kv_heads = self.shape().kv_heads();
        let all_steps: u64 = used()
            .flat_map(|(variant, items)| items.iter().map(move |item| parts(variant) * u64::from(steps(variant, item))))
            .sum();
        let memory_per_step_us = self.prediction().memory_us / (all_steps as f64 * f64::from(kv_heads)).max(1.0);
        let model = CostModel {
            profile: self.profile(),
            shape: self.shape(),
            page_size: self.page_size(),
            variants: &terms,
            unique_pages: 0,
            shared_pages: 0,
        };
        used()
            .filter(|(_, items)| !items.is_empty())
            .map(|(variant, items)| {
                let item_steps = || items.iter().map(|item| steps(variant, item));
                let ctas = item_steps().map(|steps| (u64::from(steps), u64::from(kv_heads)));
                Launch {
                    variant,
                    count: parts(variant),
                    forward_us: parts(variant) as f64 * model.launch_time_us(variant, item_steps(), memory_per_step_us),
                    balance: Balance::of(ctas, model.places(variant), variant.is_persistent()),
                }
            })
            .collect()
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
            writeln!(
                f,
                "items {:<10} {} ({} KV tokens, {:.1} us, {:.0}% of the forward pass)",
                variant.variant,
                variant.items,
                variant.kv_tokens,
                variant.predicted_us,
                variant.predicted_share * 100.0
            )?;
        }
        if self.run_tokens > 0 {
            let all: u64 = self.variants.iter().map(|variant| variant.kv_tokens).sum();
            writeln!(f, "in runs          {} of {all} KV tokens, 16 pages to an entry", self.run_tokens)?;
        }
        writeln!(f, "imbalance        {:.2} (largest over mean load of the resident CTAs)", self.imbalance)?;
        let p = &self.prediction;
        writeln!(f, "upload           {} bytes", self.upload_bytes)?;
        write!(
            f,
            "predicted        {:.1} us (launches {:.1}, forward {:.1}, merge {:.1}; memory alone {:.1}, tensor alone {:.1})",
            self.predicted_us, p.launch_us, p.busy_us, p.merge_us, p.memory_us, p.tensor_us
        )
    }
}
