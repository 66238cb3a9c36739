//! Measuring attention: batches to measure, the protocol on a CUDA device and on the CPU, the result file, the exchange with
//! peers, the calibration of the cost model.
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::panic, clippy::unreachable))]

pub mod calibrate;
pub mod ceiling;
pub mod compare;
pub mod cpu;
pub mod device;
pub mod exchange;
pub mod measure;
pub mod memory;
pub mod peers;
pub mod plot;
pub mod provenance;
pub mod result;
pub mod sample;
pub mod statistics;
pub mod suites;
