//! Register fragments and shared-memory tiles on top of `ptx`.

pub mod fragment;
pub mod gather;
pub mod reduce;
