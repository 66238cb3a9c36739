//! x
use half::f16;
use pat_rs::plan::PlanMode;
use pat_rs::{AttentionShape, DeviceProfile, Dtype, PlanOptions, Planner, TileVariant};
use pat_tests::interpreted::InterpretedRun;
use pat_tests::{Case, Output, judge, softmax_scale};
use pat_workloads::{OwnedBatch, PoolLayout, Tensors};

#[test]
fn smoke() {
    let batch = OwnedBatch {
        page_size: 16,
        num_pages: 30,
        lengths: vec![100, 90, 0, 70, 33],
        block_tables: vec![
            vec![3, 5, 7, 9, 11, 13, 15],
            vec![3, 5, 7, 9, 12, 14],
            vec![],
            vec![3, 5, 1, 2, 17],
            vec![20, 21, 22],
        ],
    };
    let shape = AttentionShape::new(8, 2, 128, Dtype::F16).unwrap();
    let case = Case { batch, shape, layout: PoolLayout::Nhd };
    for variant in TileVariant::ALL {
        for mode in [PlanMode::Packed, PlanMode::Flat, PlanMode::FixedChunk { tokens: 32 }] {
            let begin = std::time::Instant::now();
            let tensors = Tensors::<f16>::draw(&case.batch, case.shape, case.layout, 1).unwrap();
            let rows = case.batch.rows();
            let options = PlanOptions::from(mode).with_variants([variant]);
            let plan = Planner::new(case.batch.problem(shape), DeviceProfile::h200(), options)
                .unwrap()
                .plan(&case.batch.view(&rows).unwrap())
                .unwrap();
            let host = tensors.host(softmax_scale(shape));
            let mut run = InterpretedRun::new(&plan, &host, (tensors.q.len(), tensors.q.len() / 128)).unwrap();
            let output: Output<f16> = match run.run() {
                Ok(o) => o,
                Err(e) => {
                    println!("{variant:?} {mode:?}: {e}");
                    continue;
                }
            };
            let report = judge(&case, &output, 1).unwrap();
            println!("{variant:?} {mode:?} {:?} {report:?}", begin.elapsed());
        }
    }
}
