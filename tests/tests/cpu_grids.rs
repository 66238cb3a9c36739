//! What the test suites of other attention libraries cover, as random forests, thinned, on the CPU executor: against the f64
//! oracle at the tighter of the numerics rule and the tolerance of the library that has the test.

use pat_rs::Engine;
use pat_tests::grids::forest::Size;
use pat_tests::grids::merges;
use pat_tests::grids::run::run_rows;

#[test]
fn grids_of_other_libraries_as_small_random_forests() {
    let size = Size { cases: 16, flop: 3e7, elements: 1 << 22, oracle_flop: 1e7, query_tokens: 17 };
    run_rows(&Engine::cpu(), size, 1, true, |tally| {
        println!("{tally}");
        assert!(tally.ran >= 8, "{tally}");
        // What the libraries' grids have and no kernel here: 8-bit K and V with large heads.
        assert!(tally.refused.keys().all(|reason| reason.ends_with("with K and V of e4m3")), "{tally}");
    });
}

#[test]
fn merged_states_of_every_extent() {
    assert_eq!(merges::agree(&Engine::cpu(), 1 << 16, 1), 2 * (5 * 6 + 100));
}
