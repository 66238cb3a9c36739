//! `pat doctor`: what this machine can run.

use anyhow::Result;
use pat_rs::cuda::CudaDevice;

pub(crate) fn run() -> Result<bool> {
    println!("ok    CPU executor     {} threads", std::thread::available_parallelism().map_or(1, usize::from));
    match CudaDevice::new(0) {
        Err(error) => println!("none  CUDA             {error}"),
        Ok(device) => {
            println!("ok    CUDA device      {}, compute capability {}", device.name(), device.compute_capability());
            let profile = device.profile()?;
            let variants: Vec<_> = profile.variants(32).iter().map(|variant| variant.name()).collect();
            println!("ok    tile variants    {} (pages of 32 tokens)", variants.join(", "));
            println!("ok    profile          {}", profile.name);
        }
    }
    Ok(true)
}
