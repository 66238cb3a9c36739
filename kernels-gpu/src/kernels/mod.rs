//! Entry points and main loops, one module per kernel family.

#[cfg(not(pat_sm90a))]
mod append;
mod forward_mma16;
mod forward_mma_tile;
#[cfg(pat_sm90a)]
mod forward_wgmma_stream;
mod merge;
#[cfg(not(pat_sm90a))]
mod merge_states;
#[cfg(not(pat_sm90a))]
mod support;
