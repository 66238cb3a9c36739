//! One batch on a CUDA device: tensors drawn there, the answer checked, then timed.
//!
//! Protocol: before each cold call a buffer several times the L2 is *read* (a memset would leave dirty lines whose
//! write-back is then measured too); CUDA events stand around the run alone; medians. Planning and upload are measured by
//! themselves.

use crate::statistics::median;
use pat_rs::cuda::bench_support::{FillSpec, L2Flush, TimingEvent, fill};
use pat_rs::cuda::{CudaEngine, DeviceBuffer, RunArgs, Stream, Workspace};
use pat_rs::{AttentionShape, Element, KvStrides, Plan, Result, RowStrides};
use pat_workloads::{NumericsReport, Oracle, OwnedBatch, RowSample, check};
use std::time::Instant;

use pat_abi::generator::Tensor;

/// Seed of the generator for all measured tensors.
pub const SEED: u32 = 1;

/// How often to call.
#[derive(Clone, Copy, Debug)]
pub struct Repeats {
    /// Calls before the first timed one.
    pub warm_ups: u32,
    /// Timed calls of each kind.
    pub timed: u32,
}

/// Times of one plan, in microseconds.
#[derive(Clone, Debug)]
pub struct Times {
    /// Every timed call with a cold L2.
    pub cold_us: Vec<f64>,
    /// Median of calls behind each other, each synchronised.
    pub warm_us: f64,
    /// One call of a graph of [`Times::GRAPH_RUNS`] runs.
    pub graph_us: f64,
    /// Median of plan uploads, host side and copy.
    pub upload_us: f64,
    /// First run: kernels are compiled by the driver.
    pub first_run_us: f64,
}

impl Times {
    /// Runs per captured graph.
    pub const GRAPH_RUNS: u32 = 10;
}

/// A batch with its tensors in device memory.
#[derive(Debug)]
pub struct DeviceCase<'a> {
    engine: &'a CudaEngine,
    batch: &'a OwnedBatch,
    shape: AttentionShape,
    stream: Stream,
    q: DeviceBuffer,
    k: DeviceBuffer,
    v: DeviceBuffer,
    out: DeviceBuffer,
    lse: DeviceBuffer,
}

impl<'a> DeviceCase<'a> {
    /// Allocates and draws the tensors.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(engine: &'a CudaEngine, batch: &'a OwnedBatch, shape: AttentionShape) -> Result<Self> {
        let device = engine.device();
        let stream = device.new_stream()?;
        let rows = batch.lengths.len();
        let row_elements = shape.q_heads() as usize * shape.head_dim() as usize;
        let pool_elements =
            batch.num_pages as usize * batch.page_size as usize * shape.kv_heads() as usize * shape.head_dim() as usize;
        let case = Self {
            engine,
            batch,
            shape,
            q: DeviceBuffer::zeroed(device, rows * row_elements * 2)?,
            k: DeviceBuffer::zeroed(device, pool_elements * 2)?,
            v: DeviceBuffer::zeroed(device, pool_elements * 2)?,
            out: DeviceBuffer::zeroed(device, rows * row_elements * 2)?,
            lse: DeviceBuffer::zeroed(device, rows * shape.q_heads() as usize * 4)?,
            stream,
        };
        let spec = |tensor, pages, tokens, heads| FillSpec {
            tensor,
            seed: SEED,
            dtype: shape.dtype(),
            pages,
            tokens,
            heads,
            head_dim: shape.head_dim(),
            strides: KvStrides::nhd(tokens, heads, shape.head_dim()),
        };
        let (pages, page_size) = (batch.num_pages, batch.page_size);
        fill(device, case.q.span(), spec(Tensor::Q, rows as u32, 1, shape.q_heads()), &case.stream)?;
        fill(device, case.k.span(), spec(Tensor::K, pages, page_size, shape.kv_heads()), &case.stream)?;
        fill(device, case.v.span(), spec(Tensor::V, pages, page_size, shape.kv_heads()), &case.stream)?;
        case.stream.synchronize()?;
        Ok(case)
    }

    fn args(&self) -> RunArgs<'_> {
        let rows = RowStrides::contiguous(self.shape.q_heads(), self.shape.head_dim());
        let pool = KvStrides::nhd(self.batch.page_size, self.shape.kv_heads(), self.shape.head_dim());
        RunArgs {
            generation: None,
            shape: self.shape,
            page_size: self.batch.page_size,
            num_pages: self.batch.num_pages,
            rows: self.batch.lengths.len() as u32,
            q: self.q.span(),
            q_strides: rows,
            k: self.k.span(),
            k_strides: pool,
            v: self.v.span(),
            v_strides: pool,
            out: self.out.span(),
            out_strides: rows,
            lse: Some((self.lse.span(), RowStrides::lse(self.shape.q_heads()))),
            softmax_scale: softmax_scale(self.shape),
        }
    }

    /// Runs the plan into poisoned outputs and compares with the oracle.
    ///
    /// # Errors
    /// The driver's, or those of the run.
    pub fn verify<T: Element>(&mut self, plan: &Plan, oracle: &Oracle) -> Result<NumericsReport> {
        self.out.fill(0xff)?;
        self.lse.fill(0xff)?;
        let workspace = Workspace::with_capacity(self.engine.device(), Workspace::bytes_for(plan))?;
        let buffers = self.engine.upload(plan, &self.stream)?;
        self.engine.run(&buffers, &self.args(), &workspace, &self.stream)?;
        self.stream.synchronize()?;
        let rows = self.batch.lengths.len() * self.shape.q_heads() as usize;
        let mut out = vec![T::zeroed(); rows * self.shape.head_dim() as usize];
        let mut lse = vec![0f32; rows];
        self.out.read(0, &mut out)?;
        self.lse.read(0, &mut lse)?;
        Ok(check(oracle, self.shape.q_heads(), &out, Some(&lse)))
    }

    /// Times the plan. `flush` makes the L2 cold.
    ///
    /// # Errors
    /// The driver's, or those of the run.
    pub fn time(&self, plan: &Plan, flush: &L2Flush, repeats: Repeats) -> Result<Times> {
        let (engine, stream) = (self.engine, &self.stream);
        let workspace = Workspace::with_capacity(engine.device(), Workspace::bytes_for(plan))?;
        let buffers = engine.upload(plan, stream)?;
        let args = self.args();
        let (start, end) = (TimingEvent::new(engine.device())?, TimingEvent::new(engine.device())?);
        stream.synchronize()?;
        let first = Instant::now();
        engine.run(&buffers, &args, &workspace, stream)?;
        stream.synchronize()?;
        let first_run_us = first.elapsed().as_secs_f64() * 1e6;

        let timed = |cold: bool| -> Result<Vec<f64>> {
            let mut times = Vec::new();
            for call in 0..repeats.warm_ups + repeats.timed {
                if cold {
                    flush.enqueue(stream)?;
                }
                start.record(stream)?;
                engine.run(&buffers, &args, &workspace, stream)?;
                end.record(stream)?;
                stream.synchronize()?;
                if call >= repeats.warm_ups {
                    times.push(end.elapsed_us_since(&start)?);
                }
            }
            Ok(times)
        };
        let cold_us = timed(true)?;
        let warm_us = median(&mut timed(false)?);
        let graph = stream
            .capture(|| (0..Times::GRAPH_RUNS).try_for_each(|_| engine.run(&buffers, &args, &workspace, stream)))?;
        let mut graph_times = Vec::new();
        for _ in 0..5 {
            start.record(stream)?;
            graph.replay()?;
            end.record(stream)?;
            stream.synchronize()?;
            graph_times.push(end.elapsed_us_since(&start)? / f64::from(Times::GRAPH_RUNS));
        }
        let mut upload_times = Vec::new();
        for _ in 0..9 {
            let begin = Instant::now();
            buffers.upload(plan, stream)?;
            stream.synchronize()?;
            upload_times.push(begin.elapsed().as_secs_f64() * 1e6);
        }
        Ok(Times {
            cold_us,
            warm_us,
            graph_us: median(&mut graph_times),
            upload_us: median(&mut upload_times),
            first_run_us,
        })
    }
}

/// `1/sqrt(head_dim)`.
pub fn softmax_scale(shape: AttentionShape) -> f32 {
    1.0 / (shape.head_dim() as f32).sqrt()
}

/// Most work the oracle does for one configuration, as FLOP of the exact result: about a second on two cores.
const ORACLE_FLOP: f64 = 2e9;

/// The rows a measurement checks: 16 (sequence, KV head) pairs, evenly spread; fewer, but no less than two, where the oracle
/// would take longer than [`ORACLE_FLOP`].
pub fn sample(batch: &OwnedBatch, shape: AttentionShape) -> RowSample {
    let all = RowSample::for_batch(batch, shape);
    let total = batch.lengths.len() * shape.kv_heads() as usize;
    let mut pairs = all.pairs.clone();
    for count in [16, 8, 4, 2] {
        pairs = evenly_spread(&all.pairs, count);
        let tokens: f64 = pairs.iter().map(|&(sequence, _)| f64::from(batch.lengths[sequence as usize])).sum();
        if 4.0 * tokens * f64::from(shape.group()) * f64::from(shape.head_dim()) <= ORACLE_FLOP {
            break;
        }
    }
    let name = match pairs.len() {
        count if count == total => all.name,
        count => format!("{count} of {total} (sequence, KV head) pairs, evenly spread"),
    };
    RowSample { name, pairs }
}

fn evenly_spread(pairs: &[(u32, u32)], count: usize) -> Vec<(u32, u32)> {
    if pairs.len() <= count {
        return pairs.to_vec();
    }
    (0..count).map(|i| pairs[i * (pairs.len() - 1) / (count - 1)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use pat_rs::Dtype;

    fn sampled(sequences: u32, tokens: u32, q_heads: u32) -> RowSample {
        let batch = OwnedBatch {
            page_size: 1 << 17,
            num_pages: sequences,
            lengths: vec![tokens; sequences as usize],
            block_tables: (0..sequences).map(|page| vec![page]).collect(),
        };
        sample(&batch, AttentionShape::new(q_heads, 8, 128, Dtype::F16).expect("a valid shape"))
    }

    #[test]
    fn samples_are_spread_and_bounded_by_the_oracles_work() {
        let small = sampled(1, 100, 32);
        assert_eq!((small.name.as_str(), small.pairs.len()), ("all rows", 8));
        let usual = sampled(256, 1024, 32);
        assert_eq!(usual.name, "16 of 2048 (sequence, KV head) pairs, evenly spread");
        assert_eq!((usual.pairs[0], usual.pairs[15]), ((0, 0), (255, 7)));
        let long = sampled(16, 131_072, 64);
        assert_eq!((long.pairs.len(), long.pairs[0], long.pairs[1]), (2, (0, 0), (15, 7)));
        assert_eq!(sampled(0, 0, 32).pairs, []);
    }
}
