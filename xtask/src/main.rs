//! Build tasks: device code to PTX, its checks, the bundle for GPU machines without cargo.
#![forbid(unsafe_code)]

mod build_ptx;
mod c_header;
mod check_cuda_linking;
mod check_ptx;
mod core_source;
#[cfg(test)]
mod dependencies;
mod dist;
mod doctor;
mod error_doc;
#[cfg(test)]
mod findings;
mod fuzz;
mod gpu_bundle;
mod lint_kernels;
mod overlap;
mod ptx;
mod ptxas;
mod public_api;
mod stubs;
mod sysroot;
mod test_long;
mod test_torch;
mod toolchain;
mod wheel;
mod workspace;

use clap::{Parser, Subcommand};

/// Build tasks of pat-rs.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Compile kernels-gpu to PTX and write it where the host crate embeds it.
    BuildPtx(build_ptx::Args),
    /// Check the committed PTX: text rules, then registers, spills and shared memory as ptxas reports them.
    CheckPtx(check_ptx::Args),
    /// Check that the build looks at no CUDA toolkit, and that a tree which also holds candle can be built.
    CheckCudaLinking,
    /// Format check and clippy for the device crate.
    LintKernels,
    /// Write docs/errors.md from the error types.
    ErrorDoc(workspace::Generated),
    /// Write the header of the C interface, capi/include/pat.h.
    CHeader(workspace::Generated),
    /// Say what works on this machine, and how to fix what does not.
    Doctor,
    /// Collect test executables, the tool and a runner in one folder for a GPU machine without cargo.
    GpuBundle(gpu_bundle::Args),
    /// Build the Python package as a wheel, and list what is in it.
    Wheel(wheel::Args),
    /// Write the type stubs of the Python extension.
    Stubs(workspace::Generated),
    /// Write what callers of the published crates can name, and hold it against the last release.
    PublicApi(workspace::Generated),
    /// Build the fuzz targets and run them.
    Fuzz(fuzz::Args),
    /// Collect what a release consists of, checked, in one folder.
    Dist(dist::Args),
    /// Run the long property tests.
    TestLong,
    /// Test the Python package without a GPU, with one version of torch after another: gigabytes from PyPI.
    TestTorch(test_torch::Args),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::BuildPtx(args) => build_ptx::run(&args),
        Command::CheckPtx(args) => check_ptx::run(&args),
        Command::CheckCudaLinking => check_cuda_linking::run(),
        Command::LintKernels => lint_kernels::run(),
        Command::ErrorDoc(page) => error_doc::run(&page),
        Command::CHeader(header) => c_header::run(&header),
        Command::Doctor => doctor::run(),
        Command::GpuBundle(args) => gpu_bundle::run(&args),
        Command::Wheel(args) => wheel::run(&args),
        Command::Stubs(stubs) => stubs::run(&stubs),
        Command::PublicApi(listing) => public_api::run(&listing),
        Command::Fuzz(args) => fuzz::run(&args),
        Command::Dist(args) => dist::run(&args),
        Command::TestLong => test_long::run(),
        Command::TestTorch(args) => test_torch::run(&args),
    }
}
