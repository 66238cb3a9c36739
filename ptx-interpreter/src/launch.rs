//! Launching a kernel: its parameters, and every CTA of the grid.

use crate::cta;
use crate::error::{Error, Result};
use crate::global::GlobalMemory;
use crate::kernel::{Kernel, PARAMS_BEGIN};
use crate::tensor::TensorMap;

/// A parameter of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Param<'a> {
    /// A record, by its bytes.
    Bytes(&'a [u8]),
    /// A tensor map, whose 128 bytes only the hardware understands.
    TensorMap(TensorMap),
}

/// What a kernel reads from shared memory that nothing was written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unset {
    /// Nothing: it is a fault.
    Fault,
    /// This byte everywhere: for kernels whose results must not depend on it.
    Reads(u8),
}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// CTAs. They run one after the other.
    pub ctas: u32,
    /// Threads of a CTA, a multiple of 32.
    pub threads: u32,
    /// Dynamic shared memory of a CTA.
    pub shared_bytes: usize,
    /// What it holds at the start.
    pub unset_shared: Unset,
    /// The parameters, in order.
    pub params: &'a [Param<'a>],
}

impl Kernel {
    /// Runs every CTA of a launch.
    ///
    /// # Errors
    /// The launch does not fit the kernel; or an instruction did what it must not do, or threads wait in vain: the memory is as
    /// it was then.
    pub fn launch(&self, launch: &Launch<'_>, memory: &mut GlobalMemory) -> Result<()> {
        let refuse = |what: String| Err(Error::Launch(format!("{}: {what}", self.name)));
        if launch.threads == 0
            || !launch.threads.is_multiple_of(32)
            || launch.threads > self.max_threads.unwrap_or(1024)
        {
            let most = self.max_threads.unwrap_or(1024);
            return refuse(format!("{} threads, not a multiple of 32 up to {most}", launch.threads));
        }
        if launch.params.len() != self.params.len() {
            return refuse(format!("{} parameters, not {}", launch.params.len(), self.params.len()));
        }
        let mut bytes = vec![0; self.params.last().map_or(0, |last| last.offset + last.bytes)];
        for (index, (given, declared)) in launch.params.iter().zip(&self.params).enumerate() {
            match given {
                Param::Bytes(given) if given.len() == declared.bytes => {
                    bytes[declared.offset..][..declared.bytes].copy_from_slice(given);
                }
                Param::Bytes(given) => {
                    return refuse(format!("parameter {index} has {} bytes, not {}", given.len(), declared.bytes));
                }
                Param::TensorMap(map) => map.check().or_else(|what| refuse(format!("parameter {index}: {what}")))?,
            }
        }
        (0..launch.ctas).try_for_each(|cta| {
            memory.begin_cta(cta == 0);
            cta::run(self, launch, &bytes, cta, memory)
        })
    }

    /// The tensor map whose parameter is at `address`.
    pub(crate) fn tensor_map<'a>(&self, launch: &Launch<'a>, address: u64) -> Option<&'a TensorMap> {
        let index = self.params.iter().position(|param| PARAMS_BEGIN + param.offset as u64 == address)?;
        match launch.params.get(index)? {
            Param::TensorMap(map) => Some(map),
            Param::Bytes(_) => None,
        }
    }
}
