//! What executes plans over tensors in host memory: the library's engines, and the interpreter of its PTX. The tests of one are
//! the tests of the others.

use crate::interpreted::InterpretedRun;
use pat_rs::cuda::launch_records;
use pat_rs::{DeviceProfile, Element, Engine, HostTensors, KvElement, Plan};
use std::error::Error;

/// Executes plans over tensors in host memory.
pub trait Executor {
    /// For messages.
    fn name(&self) -> String;

    /// What plans are made for.
    ///
    /// # Errors
    /// The device cannot be asked.
    fn profile(&self) -> pat_rs::Result<DeviceProfile>;

    /// As [`Engine::run_host`].
    ///
    /// # Errors
    /// Those of the library and of the interpreter.
    fn run_host<T: Element, C: KvElement>(
        &self,
        plan: &Plan,
        tensors: &HostTensors<'_, T, C>,
        out: &mut [T],
        lse: Option<&mut [f32]>,
    ) -> Result<(), Box<dyn Error>>;
}

impl Executor for Engine {
    fn name(&self) -> String {
        Self::name(self).into()
    }

    fn profile(&self) -> pat_rs::Result<DeviceProfile> {
        self.profile()
    }

    fn run_host<T: Element, C: KvElement>(
        &self,
        plan: &Plan,
        tensors: &HostTensors<'_, T, C>,
        out: &mut [T],
        lse: Option<&mut [f32]>,
    ) -> Result<(), Box<dyn Error>> {
        Ok(self.run_host(plan, tensors, out, lse)?)
    }
}

/// Executes the PTX of the kernels on the CPU.
#[derive(Clone, Copy, Debug)]
pub struct Interpreter;

impl Executor for Interpreter {
    fn name(&self) -> String {
        "interpreted PTX".into()
    }

    /// Of a device that all kernels are for.
    fn profile(&self) -> pat_rs::Result<DeviceProfile> {
        Ok(DeviceProfile::h200())
    }

    fn run_host<T: Element, C: KvElement>(
        &self,
        plan: &Plan,
        tensors: &HostTensors<'_, T, C>,
        out: &mut [T],
        lse: Option<&mut [f32]>,
    ) -> Result<(), Box<dyn Error>> {
        interpret(InterpretedRun::new(plan, tensors, out, lse.as_deref())?, out, lse)
    }
}

/// As [`Interpreter`], with the text of each kernel that devices older than its newest one compile.
#[derive(Clone, Copy, Debug)]
pub struct OldestInterpreter;

impl Executor for OldestInterpreter {
    fn name(&self) -> String {
        "interpreted PTX of the oldest architecture".into()
    }

    fn profile(&self) -> pat_rs::Result<DeviceProfile> {
        Interpreter.profile()
    }

    fn run_host<T: Element, C: KvElement>(
        &self,
        plan: &Plan,
        tensors: &HostTensors<'_, T, C>,
        out: &mut [T],
        lse: Option<&mut [f32]>,
    ) -> Result<(), Box<dyn Error>> {
        let mut run = InterpretedRun::new(plan, tensors, out, lse.as_deref())?;
        for record in &mut run.launches {
            record.ptx = launch_records::module_of(record.kernel, record.kernel.arch, record.switches)?;
        }
        interpret(run, out, lse)
    }
}

fn interpret<T: Element>(
    mut run: InterpretedRun,
    out: &mut [T],
    lse: Option<&mut [f32]>,
) -> Result<(), Box<dyn Error>> {
    let output = run.run()?;
    out.copy_from_slice(&output.out);
    if let Some(lse) = lse {
        lse.copy_from_slice(&output.lse);
    }
    Ok(())
}
