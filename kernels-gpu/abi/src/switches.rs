//! Specialisation constants: features that are compiled into a kernel or out of it when the driver compiles it, so that one entry serves
//! all of them and those that are off cost nothing.
//!
//! Device code moves a symbol into a register. The PTX does not define the symbol: whoever assembles a kernel replaces it in the text of
//! that kernel by a number. `cargo xtask check-ptx` proves that with all switches off a kernel has the instructions of a build without
//! them, but for one in a thousand that ptxas chooses differently.

use crate::{Arch, Dtype, TileVariant};
#[cfg(not(target_arch = "nvptx64"))]
use alloc::string::String;

/// The symbol of [`Switches::soft_cap`], as a literal.
#[macro_export]
macro_rules! soft_cap_symbol {
    () => {
        "PAT_SPEC_SOFT_CAP"
    };
}

/// The symbol of [`Switches::window`], as a literal.
#[macro_export]
macro_rules! window_symbol {
    () => {
        "PAT_SPEC_WINDOW"
    };
}

/// The switches of a forward kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Switches {
    /// Scores are capped: `cap * tanh(score / cap)`.
    pub soft_cap: bool,
    /// Rows attend to the later tokens only of some pages of their stream: of the first, under a sliding window or in chunks that
    /// begin within pages; of any, where query tokens form trees.
    pub window: bool,
}

impl Switches {
    /// What the symbols begin with.
    pub const PREFIX: &str = "PAT_SPEC_";
    /// None.
    pub const OFF: Self = Self { soft_cap: false, window: false };
    /// All that change scores.
    pub const SCORES: Self = Self { soft_cap: true, ..Self::OFF };
    /// Every combination.
    pub const ALL: [Self; 4] = {
        let mut all = [Self::OFF; 4];
        let mut i = 0;
        while i < all.len() {
            all[i] = Self { soft_cap: i & 1 != 0, window: i & 2 != 0 };
            i += 1;
        }
        all
    };

    /// Those of either.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self { soft_cap: self.soft_cap || other.soft_cap, window: self.window || other.window }
    }

    /// What those that are on stand for, in words.
    #[cfg(not(target_arch = "nvptx64"))]
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        let all = [(self.soft_cap, "a soft_cap"), (self.window, "rows that see part of their pages")];
        all.into_iter().filter(|(is_on, _)| *is_on).map(|(_, name)| name)
    }

    /// PTX with numbers for the symbols: what the driver or ptxas takes.
    #[cfg(not(target_arch = "nvptx64"))]
    pub fn specialise(self, ptx: &str) -> String {
        self.values().iter().fold(String::from(ptx), |text, (symbol, value)| text.replace(symbol, value))
    }

    /// Symbols and what replaces them.
    pub const fn values(self) -> [(&'static str, &'static str); 2] {
        const fn digit(is_on: bool) -> &'static str {
            if is_on { "1" } else { "0" }
        }
        [(soft_cap_symbol!(), digit(self.soft_cap)), (window_symbol!(), digit(self.window))]
    }
}

impl TileVariant {
    /// Whether the variant's kernels may be launched with these switches, over K and V of this type and head dimension. `wgmma128`
    /// has no registers left to cap scores with, and of the wgmma kernels `wgmma64` alone some for windows, up to head dimension 128
    /// and over 16-bit K and V.
    pub const fn serves(self, switches: Switches, kv_dtype: Dtype, head_dim: u32) -> bool {
        let lacks_soft_cap = matches!(self, Self::Wgmma128);
        let lacks_window = match self {
            Self::Wgmma64 => kv_dtype.bytes() == 1 || head_dim > 128,
            _ => matches!(self.arch(), Arch::Sm90a),
        };
        !(switches.soft_cap && lacks_soft_cap || switches.window && lacks_window)
    }
}
