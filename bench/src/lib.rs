//! Measuring attention on a CUDA device: the protocol, the Figure-10 grid, the result file, the calibration of the cost model.

pub mod calibrate;
pub mod compare;
pub mod device;
pub mod grid;
pub mod result;
