//! The rows of several query tokens per sequence, written out without the library.

use pat_workloads::OwnedBatch;

/// The batch that names the row of every query token by hand: the last `counts[b]` tokens of sequence `b`.
///
/// # Panics
/// There are fewer counts than sequences, or a sequence that is not empty has fewer tokens than its count.
pub fn written_out(batch: &OwnedBatch, counts: &[u32]) -> OwnedBatch {
    let mut rows = OwnedBatch { lengths: Vec::new(), block_tables: Vec::new(), ..*batch };
    for ((&length, table), &count) in batch.lengths.iter().zip(&batch.block_tables).zip(counts) {
        for token in 0..count {
            rows.lengths.push(if length == 0 { 0 } else { length - count + 1 + token });
            rows.block_tables.push(table.clone());
        }
    }
    rows
}
