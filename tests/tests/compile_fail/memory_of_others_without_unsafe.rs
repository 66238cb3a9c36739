#![forbid(unsafe_code)]

use pat_rs::cuda::DeviceSpan;

fn span() -> DeviceSpan {
    DeviceSpan::from_raw(0x1000, 16)
}

fn main() {}
