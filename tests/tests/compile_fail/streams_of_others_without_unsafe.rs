#![forbid(unsafe_code)]

use pat_rs::cuda::{CudaDevice, Stream};

fn stream(device: CudaDevice) -> pat_rs::Result<Stream> {
    device.stream_from_raw(0x1000)
}

fn main() {}
