//! The C interface of pat-rs. `include/pat.h` is its documentation for C; `cargo xtask c-header` writes it from this crate.
//!
//! `border` is what C calls and the one file with `unsafe`: it turns foreign pointers into references and slices, once they
//! have passed the checks that can be made. Everything behind it is safe Rust over `pat-rs`: the structs of the header
//! (`types`), planning (`planning`), runs in host and device memory (`host`, `device`), and errors (`status`).
#![deny(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::panic, clippy::unreachable))]

pub mod border;
pub mod device;
mod host;
pub mod planning;
pub mod status;
pub mod types;
