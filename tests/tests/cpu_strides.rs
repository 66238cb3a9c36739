//! The CPU executor follows the strides of Q, O and LSE, and leaves what lies between the rows alone.

use half::{bf16, f16};
use pat_rs::plan::PlanMode;
use pat_rs::{Dtype, Engine, PlanOptions};
use pat_tests::{random_case, strided};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

#[test]
fn strides_of_q_o_and_lse_are_followed() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for _ in 0..40 {
        let case = random_case(&mut rng, Dtype::F16);
        let chunk = PlanMode::FixedChunk { tokens: 2 * case.batch.page_size };
        for mode in [PlanMode::Auto, chunk] {
            strided::check::<f16>(&Engine::cpu(), &case, mode.into(), 5);
        }
        let case = random_case(&mut rng, Dtype::Bf16);
        strided::check::<bf16>(&Engine::cpu(), &case, PlanOptions::default(), 5);
    }
}
