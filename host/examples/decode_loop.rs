//! A decode loop as a serving engine runs it: a page allocator that finds shared prompts, sequences that join and leave, one plan
//! per step that is advanced, and two layers that share it. What `python/examples/decode_loop.py` is in Python.
//!
//! `cargo run --release -p pat-rs --example decode_loop`

use half::f16;
use pat_rs::plan::PlanChange;
use pat_rs::{AttentionShape, DecodeBatch, Dtype, Engine, HostTensors, Plan, PlanOptions, Planner, Problem, Result};
use std::collections::{BTreeMap, HashMap};

const PAGE_SIZE: usize = 16;
const NUM_PAGES: usize = 256;
const LAYERS: usize = 2;
const Q_HEADS: usize = 8;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;
const VOCABULARY: u32 = 1000;

/// Hands out pages. Full pages of equal tokens behind equal tokens are handed out once, and counted.
struct Allocator {
    free: Vec<u32>,
    users: HashMap<u32, u32>,
    of_prefix: HashMap<Vec<u32>, u32>,
}

impl Allocator {
    fn new() -> Self {
        Self { free: (0..NUM_PAGES as u32).rev().collect(), users: HashMap::new(), of_prefix: HashMap::new() }
    }

    fn page(&mut self) -> u32 {
        let page = self.free.pop().expect("the pool holds all sequences of this example");
        self.users.insert(page, 1);
        page
    }

    /// Pages for a prompt, and how many of its tokens are in them already.
    fn prompt_pages(&mut self, tokens: &[u32]) -> (Vec<u32>, usize) {
        let full = (PAGE_SIZE..=tokens.len()).step_by(PAGE_SIZE);
        let mut pages: Vec<u32> = full.map_while(|end| self.of_prefix.get(&tokens[..end]).copied()).collect();
        for page in &pages {
            *self.users.entry(*page).or_default() += 1;
        }
        let cached = pages.len() * PAGE_SIZE;
        for begin in (cached..tokens.len()).step_by(PAGE_SIZE) {
            let page = self.page();
            pages.push(page);
            if let Some(prefix) = tokens.get(..begin + PAGE_SIZE) {
                self.of_prefix.insert(prefix.to_vec(), page);
            }
        }
        (pages, cached)
    }

    fn release(&mut self, pages: &[u32]) {
        for page in pages {
            let users = self.users.entry(*page).or_default();
            *users -= 1;
            if *users == 0 {
                self.users.remove(page);
                self.of_prefix.retain(|_, kept| kept != page);
                self.free.push(*page);
            }
        }
    }
}

struct Sequence {
    tokens: Vec<u32>,
    pages: Vec<u32>,
    steps_left: usize,
}

impl Sequence {
    fn append(&mut self, allocator: &mut Allocator, token: u32) {
        if self.tokens.len() == self.pages.len() * PAGE_SIZE {
            self.pages.push(allocator.page());
        }
        self.tokens.push(token);
        self.steps_left -= 1;
    }
}

/// Made-up projections instead of weights: attention is what this is about.
struct Model {
    engine: Engine,
    problem: Problem,
    /// K and V of each layer.
    caches: Vec<[Vec<f16>; 2]>,
}

impl Model {
    fn new(problem: Problem) -> Self {
        let cache = || vec![f16::ZERO; NUM_PAGES * PAGE_SIZE * KV_HEADS * HEAD_DIM];
        Self { engine: Engine::auto(), problem, caches: (0..LAYERS).map(|_| [cache(), cache()]).collect() }
    }

    /// A token's row of `heads` heads.
    fn row(token: u32, heads: usize, salt: usize) -> impl Iterator<Item = f16> {
        let element = move |index: usize| ((token as usize * 31 + salt * 7 + index * 13) % 41) as f32 / 20.0 - 1.0;
        (0..heads * HEAD_DIM).map(move |index| f16::from_f32(element(index)))
    }

    /// Writes K and V of the tokens of a sequence from `begin` on.
    fn write(&mut self, sequence: &Sequence, begin: usize) {
        for (position, &token) in sequence.tokens.iter().enumerate().skip(begin) {
            let slot = sequence.pages[position / PAGE_SIZE] as usize * PAGE_SIZE + position % PAGE_SIZE;
            for (layer, caches) in self.caches.iter_mut().enumerate() {
                for (cache, salt) in caches.iter_mut().zip([layer, layer + 7]) {
                    let row = &mut cache[slot * KV_HEADS * HEAD_DIM..][..KV_HEADS * HEAD_DIM];
                    row.iter_mut().zip(Self::row(token, KV_HEADS, salt)).for_each(|(at, value)| *at = value);
                }
            }
        }
    }

    /// The next token of each sequence; any function of the layers' outputs does.
    fn step(&self, tokens: &[u32], plan: &Plan) -> Result<Vec<u32>> {
        let mut sums = vec![0f32; tokens.len()];
        for (layer, [k, v]) in self.caches.iter().enumerate() {
            let q: Vec<f16> = tokens.iter().flat_map(|&token| Self::row(token, Q_HEADS, layer)).collect();
            let mut out = vec![f16::ZERO; q.len()];
            self.engine.run_host(plan, &HostTensors::new(self.problem, &q, k, v), &mut out, None)?;
            for (sum, row) in sums.iter_mut().zip(out.chunks_exact(Q_HEADS * HEAD_DIM)) {
                *sum += row.iter().map(|value| value.to_f32().abs()).sum::<f32>();
            }
        }
        Ok(sums.into_iter().map(|sum| (sum * 10.0) as u32 % VOCABULARY).collect())
    }
}

/// How often a step has changed how much of the plan, and the pages that are free in the end.
fn run(total_steps: usize) -> Result<(BTreeMap<PlanChange, usize>, usize)> {
    let shape = AttentionShape::new(Q_HEADS as u32, KV_HEADS as u32, HEAD_DIM as u32, Dtype::F16)?;
    let problem = Problem::new(shape, PAGE_SIZE as u32);
    let (mut allocator, mut model) = (Allocator::new(), Model::new(problem));
    let mut planner = Planner::new(problem, model.engine.profile()?, PlanOptions::default())?;
    let (mut running, mut plan, mut changes) = (Vec::<Sequence>::new(), None, BTreeMap::new());
    for step in 0..total_steps {
        if step % 4 == 0 && step < 30 {
            // A system prompt of 100 tokens, and what this request asks.
            let question = (0..step as u32 % 23).map(|i| step as u32 * 31 + i);
            let tokens: Vec<u32> = (0..100).chain(question).collect();
            let (pages, cached) = allocator.prompt_pages(&tokens);
            let sequence = Sequence { tokens, pages, steps_left: 18 };
            model.write(&sequence, cached);
            running.push(sequence);
        }
        if running.is_empty() {
            break;
        }
        let tables: Vec<&[u32]> = running.iter().map(|sequence| &*sequence.pages).collect();
        let lengths: Vec<u32> = running.iter().map(|sequence| sequence.tokens.len() as u32).collect();
        let batch = DecodeBatch::from_block_tables(&tables, &lengths, PAGE_SIZE as u32, NUM_PAGES as u32)?;
        let plan = match &mut plan {
            None => plan.insert(planner.plan(&batch)?),
            Some(plan) => {
                *changes.entry(planner.advance(&batch, None, plan)?).or_default() += 1;
                plan
            }
        };
        let newest: Vec<u32> = running.iter().filter_map(|sequence| sequence.tokens.last().copied()).collect();
        for (sequence, token) in running.iter_mut().zip(model.step(&newest, plan)?) {
            sequence.append(&mut allocator, token);
            model.write(sequence, sequence.tokens.len() - 1);
        }
        let (done, others): (Vec<_>, Vec<_>) = running.into_iter().partition(|sequence| sequence.steps_left == 0);
        done.iter().for_each(|sequence| allocator.release(&sequence.pages));
        running = others;
    }
    Ok((changes, allocator.free.len()))
}

fn main() -> Result<()> {
    let (changes, free) = run(60)?;
    println!("what changed from step to step: {changes:?}");
    println!("{free} of {NUM_PAGES} pages are free again");
    Ok(())
}

#[test]
fn the_loop_advances_its_plan_and_frees_all_pages() {
    let (changes, free) = run(60).unwrap();
    assert_eq!(free, NUM_PAGES);
    let seen: Vec<PlanChange> = changes.into_keys().collect();
    assert_eq!(seen, [PlanChange::Lengths, PlanChange::Pages, PlanChange::Forest]);
}
