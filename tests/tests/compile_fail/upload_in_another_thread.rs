use pat_rs::Plan;
use pat_rs::cuda::{BoundRun, PlanBuffers, Stream};

fn step(buffers: &mut PlanBuffers, plan: &Plan, run: &BoundRun, stream: &Stream) -> pat_rs::Result<()> {
    let uploaded = buffers.uploaded()?;
    std::thread::scope(|scope| {
        scope.spawn(|| buffers.upload(plan, stream).is_ok());
        run.run(uploaded, stream)
    })
}

fn main() {}
