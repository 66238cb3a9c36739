use pat_rs::cuda::{Graph, PlanBuffers, Stream};
use std::sync::Arc;

fn step(graph: Arc<Graph>, buffers: &PlanBuffers, stream: &Stream) -> pat_rs::Result<()> {
    graph.replay(buffers.uploaded()?, stream)
}

fn main() {}
