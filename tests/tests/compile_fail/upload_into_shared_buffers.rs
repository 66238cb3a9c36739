use pat_rs::Plan;
use pat_rs::cuda::{PlanBuffers, Stream};
use std::sync::Arc;

fn step(buffers: Arc<PlanBuffers>, plan: &Plan, stream: &Stream) -> bool {
    buffers.upload(plan, stream).is_ok()
}

fn main() {}
