//! What measurements need beside the engine: drawing tensors on the device, a cold L2, events.

use super::args::check_address;
use super::driver::{self, DeviceBuffer, DriverCall, Event, Kernel, Stream, attempt};
use super::{BoundRun, CudaDevice, DeviceSpan, Uploaded};
use crate::arguments::check_tensor;
use crate::eligibility::VECTOR_BYTES;
use crate::{Dtype, Error, KvStrides, Result};
use pat_abi::generator::Tensor;
use pat_abi::{Arch, Family, FastDivisor, FillParams, FlushParams, KernelSpec, Switches, manifest};
use std::time::Instant;

/// CTAs of the support kernels, per multiprocessor: their launch bounds ask for as many to fit.
const CTAS_PER_SM: u32 = 4;

/// The tensor to draw: sizes, and its strides in elements. For Q, `pages` is the number of sequences, `tokens` 1, and
/// `strides.page` the sequence stride.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FillSpec {
    /// Which tensor of the generator.
    pub tensor: Tensor,
    /// The generator's seed.
    pub seed: u32,
    /// Element type.
    pub dtype: Dtype,
    /// Pages.
    pub pages: u32,
    /// Tokens per page.
    pub tokens: u32,
    /// Heads.
    pub heads: u32,
    /// Elements per head, a power of two from 8 on.
    pub head_dim: u32,
    /// Layout.
    pub strides: KvStrides,
}

/// Enqueues the drawing of a tensor: the same elements as [`pat_abi::generator`] gives on the CPU.
///
/// # Errors
/// A size, a stride or the span does not fit, or the driver refuses the launch.
pub fn fill(device: &CudaDevice, target: DeviceSpan, spec: FillSpec, stream: &Stream) -> Result<()> {
    let rows = u64::from(spec.pages) * u64::from(spec.tokens) * u64::from(spec.heads);
    if spec.tokens == 0 || spec.heads == 0 || rows >= 1 << 31 {
        let got = format!("{} * {} * {}", spec.pages, spec.tokens, spec.heads);
        return Err(Error::invalid(
            "pages * tokens * heads",
            got,
            "tokens and heads of 1 or more, fewer than 2^31 rows",
        ));
    }
    if spec.head_dim < 8 || !spec.head_dim.is_power_of_two() {
        return Err(Error::invalid("head_dim", spec.head_dim, "a power of two, at least 8"));
    }
    let dims = [
        ("page", spec.pages, spec.strides.page),
        ("token", spec.tokens, spec.strides.token),
        ("head", spec.heads, spec.strides.head),
    ];
    target.check_device("target", *device)?;
    check_tensor("target", target.bytes() / u64::from(spec.dtype.bytes()), &dims, spec.head_dim, spec.dtype)?;
    if rows == 0 {
        return Ok(());
    }
    check_address("target", &target, VECTOR_BYTES)?;
    let params = FillParams {
        base: target.address(),
        page_stride: spec.strides.page * i64::from(spec.dtype.bytes()),
        token_stride: spec.strides.token * i64::from(spec.dtype.bytes()),
        head_stride: spec.strides.head * i64::from(spec.dtype.bytes()),
        tokens: FastDivisor::new(spec.tokens),
        heads: FastDivisor::new(spec.heads),
        pages: spec.pages,
        dim: spec.head_dim,
        seed: spec.seed,
        tensor: spec.tensor as u32,
    };
    let kernel = device.kernel(support_kernel(Family::Fill, spec.dtype)?, Switches::OFF)?;
    driver::launch_fill(kernel, &CheckedFill(params), CTAS_PER_SM * device.sm_count(), &stream.enter(*device)?)
}

/// Parameters of a fill whose target was checked to hold them.
pub(super) struct CheckedFill(pub(super) FillParams);

/// Evicts the L2 cache by reading a buffer several times its size: unlike a memset it leaves no dirty lines to write
/// back during the next measurement.
#[derive(Debug)]
pub struct L2Flush {
    device: CudaDevice,
    kernel: &'static Kernel,
    buffer: DeviceBuffer,
    sums: DeviceBuffer,
    ctas: u32,
}

impl L2Flush {
    /// # Errors
    /// The driver cannot allocate four times the L2's size or load the kernel.
    pub fn new(device: &CudaDevice) -> Result<Self> {
        let ctas = CTAS_PER_SM * device.sm_count();
        let bytes = usize::try_from(4 * device.l2_bytes()?).unwrap_or(usize::MAX).next_multiple_of(16).max(64 << 20);
        Ok(Self {
            device: *device,
            kernel: device.kernel(support_kernel(Family::Flush, Dtype::F16)?, Switches::OFF)?,
            buffer: DeviceBuffer::zeroed(device, bytes)?,
            sums: DeviceBuffer::zeroed(device, ctas as usize * size_of::<u32>())?,
            ctas,
        })
    }

    /// Enqueues the eviction.
    ///
    /// # Errors
    /// The driver refuses the launch.
    pub fn enqueue(&self, stream: &Stream) -> Result<()> {
        driver::launch_flush(self.kernel, self, self.ctas, &stream.enter(self.device)?)
    }

    pub(super) fn params(&self) -> FlushParams {
        FlushParams {
            buffer: self.buffer.span().address(),
            bytes: self.buffer.bytes(),
            sums: self.sums.span().address(),
        }
    }
}

/// A point in a stream, for timing. Create it once and record it as often as needed.
#[derive(Debug)]
pub struct TimingEvent {
    event: Event,
}

impl TimingEvent {
    /// # Errors
    /// The driver cannot create one.
    pub fn new(device: &CudaDevice) -> Result<Self> {
        Ok(Self { event: Event::with_time(*device)? })
    }

    /// Marks the stream's present end.
    ///
    /// # Errors
    /// The driver refuses it; the stream is another device's.
    pub fn record(&self, stream: &Stream) -> Result<()> {
        self.event.record(stream)
    }

    /// Waits for this event and tells the GPU time that passed since `start`, in microseconds.
    ///
    /// # Errors
    /// One of the two was never recorded, or work before it failed.
    pub fn elapsed_us_since(&self, start: &Self) -> Result<f64> {
        self.event.elapsed_us_since(&start.event)
    }
}

/// Host times of one call each, in microseconds.
#[derive(Clone, Debug, Default)]
pub struct HostTimes {
    /// Of [`BoundRun::run`].
    pub run_us: Vec<f64>,
    /// Of the driver calls that it makes, alone: same kernels, grids and parameters.
    pub bare_us: Vec<f64>,
    /// How many driver calls those are.
    pub launches: usize,
}

/// Times `calls` runs, and as many times their bare driver calls in between. Every few calls it waits for the device, untimed, so
/// that no call waits for a place in the queue.
///
/// # Errors
/// Those of the run.
pub fn host_times(run: &BoundRun, uploaded: Uploaded<'_>, stream: &Stream, calls: u32) -> Result<HostTimes> {
    const CALLS_IN_FLIGHT: u32 = 16;
    let current = stream.enter(run.device())?;
    let mut bare = run.bare_launches(&current);
    let mut times = HostTimes { launches: bare.len(), ..HostTimes::default() };
    let elapsed_us = |begin: Instant| begin.elapsed().as_secs_f64() * 1e6;
    for call in 0..calls {
        if call % CALLS_IN_FLIGHT == 0 {
            stream.synchronize()?;
        }
        let begin = Instant::now();
        run.run(uploaded, stream)?;
        times.run_us.push(elapsed_us(begin));
        let begin = Instant::now();
        let launched = bare.iter_mut().try_for_each(driver::BareLaunch::enqueue);
        times.bare_us.push(elapsed_us(begin));
        attempt(DriverCall::LaunchKernel, || launched)?;
    }
    stream.synchronize()?;
    Ok(times)
}

fn support_kernel(family: Family, dtype: Dtype) -> Result<&'static KernelSpec> {
    manifest::find_for(Arch::Sm80, family, dtype, 0)
        .ok_or_else(|| Error::invalid("kernel", format!("{family:?} for {dtype:?}"), "one of the manifest"))
}
