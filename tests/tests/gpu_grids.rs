//! What the test suites of other attention libraries cover, as random forests, on a device, and a few small ones in interpreted
//! PTX: against the f64 oracle at the tighter of the numerics rule and the tolerance of the library that has the test.
//! `PAT_GPU_GRIDS` sets how many combinations of each row run (default 8; 6 took 51 s on an H200, beside other tests), `PAT_GPU_SEED`
//! which.

use pat_rs::Engine;
use pat_tests::device_test;
use pat_tests::executor::{Executor, Interpreter};
use pat_tests::grids::forest::Size;
use pat_tests::grids::merges;
use pat_tests::grids::run::run_rows;
use std::process::ExitCode;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name}: got {value:?}")))
}

fn run(executor: &(impl Executor + Sync), size: Size, seed: u64, at_once: bool) {
    let mut ran = 0;
    run_rows(executor, size, seed, at_once, |tally| {
        println!("{tally}");
        assert!(tally.ran > 0, "{tally}");
        // What the libraries' grids have and no kernel here: 8-bit K and V with large heads.
        assert!(tally.refused.keys().all(|reason| reason.ends_with("with K and V of e4m3")), "{tally}");
        ran += tally.ran;
    });
    println!("{ran} cases on {}", executor.name());
}

fn grids_of_other_libraries_as_random_forests(engine: &Engine) {
    let cases = number("PAT_GPU_GRIDS", 8) as usize;
    let size = Size { cases, flop: 1e12, elements: 1 << 30, oracle_flop: 1e8, query_tokens: u32::MAX };
    run(engine, size, number("PAT_GPU_SEED", 1), false);
}

fn in_interpreted_ptx(_: &Engine) {
    let size = Size { cases: 4, flop: 3e6, elements: 1 << 19, oracle_flop: 3e6, query_tokens: 5 };
    run(&Interpreter, size, 2, true);
}

fn merged_states_of_every_extent(engine: &Engine) {
    assert_eq!(merges::agree(engine, 1 << 21, 1), 2 * (5 * 6 + 100));
}

fn main() -> ExitCode {
    pat_tests::device_tests::main([
        device_test!(in_interpreted_ptx).on_the_cpu(),
        device_test!(grids_of_other_libraries_as_random_forests),
        device_test!(merged_states_of_every_extent),
    ])
}
