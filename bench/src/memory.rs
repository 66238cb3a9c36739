//! Whether a batch's tensors fit into this machine's memory.

use pat_rs::{AttentionShape, Plan};
use pat_workloads::OwnedBatch;

/// A batch that is too large to be executed on the CPU here.
///
/// Fix: use fewer or shorter sequences, another machine, or `--device cuda`.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error(
    "the batch needs {:.1} GB of memory for its KV pool and partials, this machine has {:.1} GB left: use fewer sequences, \
     or --device cuda",
    needed_bytes / 1e9,
    available_bytes / 1e9
)]
pub struct TooLarge {
    /// What the batch needs.
    pub needed_bytes: f64,
    /// What can still be allocated.
    pub available_bytes: f64,
}

/// Bytes of K and V of the pages that are read: others are not drawn.
pub fn pool_bytes(batch: &OwnedBatch, shape: AttentionShape) -> u64 {
    batch.unique_pages() as u64 * u64::from(batch.page_size) * shape.kv_bytes_per_token()
}

/// Refuses a batch whose pool and partials would fill more than nine tenths of what is left. Passes where the system does
/// not say.
///
/// # Errors
/// [`TooLarge`].
pub fn check_fits(batch: &OwnedBatch, shape: AttentionShape, plan: &Plan) -> Result<(), TooLarge> {
    let needed_bytes = pool_bytes(batch, shape) as f64 + plan.partial_bytes() as f64;
    match available_bytes() {
        Some(available_bytes) if needed_bytes > 0.9 * available_bytes => {
            Err(TooLarge { needed_bytes, available_bytes })
        }
        _ => Ok(()),
    }
}

/// What Linux says can still be allocated.
fn available_bytes() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse::<f64>().ok().map(|kib| kib * 1024.0)
}
