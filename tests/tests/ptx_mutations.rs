//! Broken PTX is noticed: a kernel whose waits, barriers or products were changed on purpose ends in an error or a wrong
//! answer. This holds the interpreter to its purpose, and the kernels to having no wait that they do not need.

use half::f16;
use pat_abi::{Dtype, Family, TileVariant};
use pat_ptx_interpreter::{Error, Fault};
use pat_rs::plan::PlanMode;
use pat_rs::{AttentionShape, Plan, PlanOptions};
use pat_tests::interpreted::InterpretedRun;
use pat_tests::{Case, judge, plan, softmax_scale};
use pat_workloads::{OwnedBatch, PoolLayout, Tensors};
use rayon::prelude::*;
use std::collections::BTreeMap;

const SEED: u32 = 3;

/// What became of a run.
#[derive(Debug)]
enum Outcome {
    Right,
    Wrong,
    Error(Error),
}

/// A case, its tensors and two plans of it in one tile variant: with masks, and cut into chunks.
struct Subject {
    case: Case,
    plans: [Plan; 2],
    tensors: Tensors<f16>,
}

impl Subject {
    /// Sequences that share a prefix, one alone, an empty one; ragged ends.
    fn new(variant: TileVariant) -> Self {
        let table = |own: std::ops::Range<u32>| (0..4).chain(own).collect::<Vec<u32>>();
        let block_tables = vec![table(4..9), table(9..14), table(14..15), (15..29).collect(), Vec::new()];
        let lengths = block_tables.iter().map(|table: &Vec<u32>| (table.len() as u32 * 16).saturating_sub(5)).collect();
        let case = Case {
            batch: OwnedBatch { page_size: 16, num_pages: 30, lengths, block_tables },
            shape: AttentionShape::new(16, 2, 128, Dtype::F16).unwrap(),
            layout: PoolLayout::Nhd,
        };
        let plans = [PlanMode::Packed, PlanMode::FixedChunk { tokens: 48 }]
            .map(|mode| plan(&case, PlanOptions::from(mode).with_variants([variant])).unwrap());
        let tensors = Tensors::draw(&case.batch, case.shape, case.layout, SEED).unwrap();
        Self { case, plans, tensors }
    }

    fn run(&self, plan: &Plan) -> InterpretedRun {
        let host = self.tensors.host(softmax_scale(self.case.shape));
        let lse = vec![f32::NAN; self.tensors.q.len() / self.case.shape.head_dim() as usize];
        let out = vec![f16::NAN; self.tensors.q.len()];
        InterpretedRun::new(plan, &host, &out, Some(&lse)).unwrap()
    }

    /// The text of the forward kernel.
    fn ptx(&self) -> String {
        let run = self.run(&self.plans[0]);
        let forward = run.launches.iter().find(|record| matches!(record.kernel.family, Family::Forward(_)));
        forward.unwrap().ptx.clone()
    }

    /// Runs the plans with another text of the forward kernel: the first outcome that is not right, if there is one.
    fn outcome(&self, ptx: &str) -> Outcome {
        for plan in &self.plans {
            let mut run = self.run(plan);
            let forward = run.launches.iter_mut().find(|record| matches!(record.kernel.family, Family::Forward(_)));
            forward.unwrap().ptx = ptx.into();
            match run.run::<f16>() {
                Err(error) => return Outcome::Error(error),
                Ok(output) if !judge(&self.case, &output, SEED).unwrap().passed => return Outcome::Wrong,
                Ok(_) => {}
            }
        }
        Outcome::Right
    }

    /// Whether a run comes to a line.
    fn reaches(&self, ptx: &str, line: usize) -> bool {
        let outcome = self.outcome(&with_line(ptx, line, "trap;"));
        matches!(outcome, Outcome::Error(Error::Run { fault: Fault::Trap, .. }))
    }
}

/// The text with another line `line`, counted from 0.
fn with_line(ptx: &str, line: usize, other: &str) -> String {
    let lines = ptx.lines().enumerate().map(|(index, text)| if index == line { other } else { text });
    lines.collect::<Vec<_>>().join("\n")
}

/// Lines that contain `instruction`, with their text.
fn lines_with<'a>(ptx: &'a str, instruction: &str) -> Vec<(usize, &'a str)> {
    ptx.lines().enumerate().filter(|(_, text)| text.contains(instruction)).collect()
}

/// What orders a kernel's threads and copies.
const WAITS: [&str; 12] = [
    "cp.async.wait_group",
    "cp.async.commit_group",
    "cp.async.mbarrier.arrive",
    "bar.sync",
    "barrier.sync",
    "fence.mbarrier_init",
    "fence.proxy",
    "bar.warp.sync",
    "mbarrier.arrive",
    "mbarrier.try_wait",
    "wgmma.fence",
    "wgmma.wait_group",
];

/// The line without what it waits for. A wait in a loop becomes one that is content at once.
fn without_wait(text: &str, instruction: &str) -> String {
    if instruction == "mbarrier.try_wait" {
        let answer = text.split_once("selp.u32 ").and_then(|(_, rest)| rest.split_once(',')).expect("an answer").0;
        return format!("mov.b32 {answer}, 1;");
    }
    String::new()
}

#[test]
fn a_wait_or_barrier_that_is_missing_is_noticed() {
    for variant in TileVariant::ALL {
        let subject = Subject::new(variant);
        let ptx = subject.ptx();
        assert!(matches!(subject.outcome(&ptx), Outcome::Right), "{variant:?}");
        let places: Vec<(&str, (usize, &str))> =
            WAITS.iter().flat_map(|&wait| lines_with(&ptx, wait).into_iter().map(move |place| (wait, place))).collect();
        let reached: Vec<_> = places.into_par_iter().filter(|(_, (line, _))| subject.reaches(&ptx, *line)).collect();
        assert!(reached.len() >= 9, "{variant:?}: {reached:?}");
        let mut unnoticed: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        let outcomes: Vec<Outcome> = reached
            .par_iter()
            .map(|&(wait, (line, text))| subject.outcome(&with_line(&ptx, line, &without_wait(text, wait))))
            .collect();
        for (&(wait, (line, _)), outcome) in reached.iter().zip(outcomes) {
            if matches!(outcome, Outcome::Right) {
                unnoticed.entry(wait).or_default().push(line + 1);
            }
        }
        let counts: Vec<(&str, usize)> = unnoticed.iter().map(|(&wait, lines)| (wait, lines.len())).collect();
        // `mma16` commits two groups without copies where a warp has no tokens, and behind its main loop waits for copies of
        // which none is left, as the loop shows. In the main loop of the wgmma kernels no register of the second product is
        // written behind the fence of the first. Their items of more than 16 rows wait for four slots of Q one by one, where
        // queries arrive and where they have been read: here all are filled, and all are read, together.
        let expected: &[(&str, usize)] = match variant {
            TileVariant::Mma16 => &[("bar.warp.sync", 1), ("cp.async.commit_group", 2), ("cp.async.wait_group", 1)],
            TileVariant::Wgmma64 | TileVariant::Wgmma128 => &[("mbarrier.try_wait", 8), ("wgmma.fence", 1)],
            _ => &[],
        };
        assert_eq!(counts, expected, "{variant:?}, lines {unnoticed:?}");
    }
}

/// The warps that copy come to their barrier from several places of the code, which an aligned instruction may not be for.
#[test]
fn a_barrier_that_is_aligned_where_warps_come_from_several_places_is_noticed() {
    for variant in [TileVariant::Wgmma64, TileVariant::Wgmma128] {
        let subject = Subject::new(variant);
        let Outcome::Error(error) = subject.outcome(&subject.ptx().replace("barrier.sync 2", "bar.sync 2")) else {
            panic!("{variant:?}: nobody says so");
        };
        assert!(error.to_string().contains("other warps come to another one"), "{error}");
    }
}

#[test]
fn a_computation_that_is_missing_is_noticed() {
    const COMPUTATIONS: [&str; 9] = [
        "mma.sync",
        "ldmatrix",
        "wgmma.mma_async",
        "cp.async.cg",
        "cp.async.bulk",
        "ex2.approx",
        "shfl.sync.bfly",
        "st.shared",
        "st.global",
    ];
    /// Of each, so many lines of a kernel.
    const SAMPLES: usize = 3;
    for variant in TileVariant::ALL {
        let subject = Subject::new(variant);
        let ptx = subject.ptx();
        let samples: Vec<(usize, &str)> = COMPUTATIONS
            .iter()
            .flat_map(|instruction| {
                let lines = lines_with(&ptx, instruction);
                let step = lines.len().div_ceil(SAMPLES).max(1);
                lines.into_iter().step_by(step)
            })
            .collect();
        let reached: Vec<_> = samples.into_par_iter().filter(|(line, _)| subject.reaches(&ptx, *line)).collect();
        assert!(reached.len() >= SAMPLES, "{variant:?}: {reached:?}");
        let unnoticed: Vec<_> = reached
            .par_iter()
            .filter(|(line, text)| {
                // What else stands on the line stays.
                let rest = text.split_once(';').map_or("", |(_, rest)| rest);
                matches!(subject.outcome(&with_line(&ptx, *line, rest)), Outcome::Right)
            })
            .collect();
        // Some serve rows that a tile does not have, or are made good where sequences are separated. Of 16 in `wgmma128` these are two
        // exponentials and a store of zeros.
        assert!(unnoticed.len() * 5 <= reached.len(), "{variant:?}, {} lines: {unnoticed:?}", reached.len());
    }
}
