use pat_rs::cuda::{BoundRun, PlanBuffers, Stream};

fn step(buffers: PlanBuffers, run: &BoundRun, stream: &Stream) -> pat_rs::Result<()> {
    let uploaded = buffers.uploaded()?;
    drop(buffers);
    run.run(uploaded, stream)
}

fn main() {}
