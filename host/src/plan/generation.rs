//! Which plan is which: a number that no two plans of a process share.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Identifies one result of planning, for as long as the process runs; later plans have larger ones. A run that names the
/// generation it means is refused when another plan is uploaded ([`crate::cuda::Uploaded::expect`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PlanGeneration(u64);

impl PlanGeneration {
    pub(crate) fn next() -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        // Only the numbers matter, nothing is published with them.
        Self(LAST.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// The number.
    pub fn number(self) -> u64 {
        self.0
    }
}

impl fmt::Display for PlanGeneration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
