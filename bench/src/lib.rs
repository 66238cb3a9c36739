//! Measuring attention on a CUDA device: the protocol, the Figure-10 grid, the result file, the exchange with peers.

pub mod compare;
pub mod device;
pub mod exchange;
pub mod grid;
pub mod result;
