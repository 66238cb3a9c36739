use pat_rs::Plan;
use pat_rs::cuda::{BoundRun, PlanBuffers, Stream};

fn step(buffers: &mut PlanBuffers, plans: [&Plan; 2], run: &BoundRun, stream: &Stream) -> pat_rs::Result<()> {
    let uploaded = buffers.upload(plans[0], stream)?;
    buffers.upload(plans[1], stream)?;
    run.run(uploaded, stream)
}

fn main() {}
