//! From measured times to the terms of a profile.
//!
//! | Term | From |
//! |---|---|
//! | `tile_latency_us` | slope of the time of one sequence over its main-loop steps |
//! | `item_latency_us` | slope of the time over waves of one-step items, less a tile latency |
//! | `launch_us` | intercept of the line over steps, less two item latencies |
//! | `hbm_bytes_per_us` | slope over the bytes of distinct pages |
//! | `l2_bytes_per_us` | the highest rate at which a kernel reads resident pages, by the slope over bytes |
//! | `mma_flop_per_us`, `wgmma_flop_per_us` | the highest rate of the family in the same probes, by the slope over FLOP |
//! | `merge_us` | what pairs of batches that differ by a merge differ in, less [`DeviceProfile::partials_us`] |
//!
//! Slopes leave fixed costs out. Lines are least squares of relative errors: the noise of a time grows with it. A kernel that
//! is bound by something else than L2 or the tensor cores reaches less than their rate, hence the highest. Waves of short items
//! are taken to be bound by latency; where the tensor cores take nearly as long, launch and item latency come out by up to 1% off.

use super::{Quantity, Sample};
use pat_abi::Arch;
use pat_rs::profile::KernelTerms;
use pat_rs::{DeviceProfile, Error, Result};

/// The profile of a device whose probes took `samples`. Name, compute capability, SM count and L2 size are `device`'s.
///
/// # Errors
/// A kind of probe is missing, a time is not a positive number, or the times contradict the cost model: a term comes out
/// that no device has ([`DeviceProfile::validate`]).
pub fn fit(device: &DeviceProfile, samples: &[Sample]) -> Result<DeviceProfile> {
    if let Some(bad) = samples.iter().find(|sample| !(sample.measured_us.is_finite() && sample.measured_us > 0.0)) {
        return Err(Error::invalid(format!("time of {}", bad.name), bad.measured_us, "a positive number of us"));
    }
    let over_steps = Line::through("steps of one sequence", samples, |quantity| match quantity {
        Quantity::Steps { steps } => Some(steps),
        _ => None,
    })?;
    let over_waves = Line::through("waves of short items", samples, |quantity| match quantity {
        Quantity::Waves { waves } => Some(waves),
        _ => None,
    })?;
    let over_bytes = Line::through("bytes from DRAM", samples, |quantity| match quantity {
        Quantity::Dram { kv_bytes } => Some(kv_bytes),
        _ => None,
    })?;
    let tile_latency_us = over_steps.slope;
    let item_latency_us = over_waves.slope - tile_latency_us;
    let l2_bytes_per_us = highest_rate(samples, |_, kv_bytes, _| Some(kv_bytes))?;
    let family = |arch| highest_rate(samples, move |of, _, flop| (of == arch).then_some(flop));
    let mut profile = device.clone();
    profile.kernel_terms = KernelTerms::Measured;
    profile.hbm_bytes_per_us = 1.0 / over_bytes.slope;
    profile.l2_bytes_per_us = l2_bytes_per_us;
    profile.mma_flop_per_us = family(Arch::Sm80)?;
    profile.wgmma_flop_per_us = if Arch::Sm90a.runs_on(device.compute_capability) { family(Arch::Sm90a)? } else { 0.0 };
    profile.launch_us = over_steps.intercept - 2.0 * item_latency_us;
    profile.item_latency_us = item_latency_us;
    profile.tile_latency_us = tile_latency_us;
    profile.merge_us = merge_us(samples, &profile)?;
    profile.validate()?;
    Ok(profile)
}

/// The highest rate that a variant reaches on resident pages. `work` is what a probe of an architecture, bytes and FLOP does
/// of what is counted.
fn highest_rate(samples: &[Sample], work: impl Fn(Arch, f64, f64) -> Option<f64>) -> Result<f64> {
    let mut rate: Option<f64> = None;
    for variant in pat_abi::TileVariant::ALL {
        let of_variant = |quantity| match quantity {
            Quantity::Resident { variant: of, kv_bytes, flop } if of == variant => work(of.arch(), kv_bytes, flop),
            _ => None,
        };
        if samples.iter().any(|sample| of_variant(sample.quantity).is_some()) {
            let line = Line::through("resident pages", samples, of_variant)?;
            rate = Some(rate.unwrap_or(0.0).max(1.0 / line.slope));
        }
    }
    rate.ok_or_else(|| Error::invalid("samples", "none of resident pages", "probes of every kernel family"))
}

/// Mean over the pairs.
fn merge_us(samples: &[Sample], profile: &DeviceProfile) -> Result<f64> {
    let of_merge = |sample: &Sample| match sample.quantity {
        Quantity::Merge { pair, partial_bytes } => Some((pair, partial_bytes, sample.measured_us)),
        _ => None,
    };
    let halves: Vec<_> = samples.iter().filter_map(of_merge).collect();
    let differences: Vec<f64> = halves
        .iter()
        .filter(|(_, partial_bytes, _)| *partial_bytes > 0.0)
        .filter_map(|(pair, partial_bytes, merged_us)| {
            let (.., unmerged_us) = halves.iter().find(|half| half.0 == *pair && half.1 == 0.0)?;
            Some(merged_us - unmerged_us - profile.partials_us(*partial_bytes))
        })
        .collect();
    if differences.is_empty() {
        return Err(Error::invalid("samples", "no pair with and without a merge", "at least one"));
    }
    Ok(differences.iter().sum::<f64>() / differences.len() as f64)
}

/// `us = intercept + slope * x`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Line {
    intercept: f64,
    slope: f64,
}

impl Line {
    /// The line with the least squares of relative errors through the samples that have an `x`.
    fn through(what: &str, samples: &[Sample], x: impl Fn(Quantity) -> Option<f64>) -> Result<Self> {
        // Weights are 1 / us^2: sums of w, w x, w x^2, w us, w x us.
        let mut sums = [0.0; 5];
        for sample in samples {
            if let Some(x) = x(sample.quantity) {
                let (us, weight) = (sample.measured_us, sample.measured_us.powi(-2));
                let terms = [1.0, x, x * x, us, x * us];
                sums.iter_mut().zip(terms).for_each(|(sum, term)| *sum += weight * term);
            }
        }
        let [w, wx, wxx, wy, wxy] = sums;
        let spread = w * wxx - wx * wx;
        // Relative to its parts: rounding leaves something of the spread of equal values.
        if spread.is_nan() || spread <= 1e-9 * w * wxx {
            return Err(Error::invalid(format!("samples of {what}"), "fewer than two sizes", "at least two"));
        }
        Ok(Self { intercept: (wxx * wy - wx * wxy) / spread, slope: (w * wxy - wx * wy) / spread })
    }
}

#[cfg(test)]
mod tests {
    use super::super::probes;
    use super::*;

    fn device(name: &str) -> DeviceProfile {
        DeviceProfile::by_name(name).expect("a known device")
    }

    /// What the probes take according to the cost model of `truth`, times a factor of each.
    fn predicted(truth: &DeviceProfile, factor: impl Fn(usize) -> f64) -> Vec<Sample> {
        let of_probe = |(index, probe): (usize, super::super::Probe)| {
            let measured_us = probe.plan(truth).expect("a plan").prediction().total_us() * factor(index);
            Sample { name: probe.name, quantity: probe.quantity, measured_us }
        };
        probes(truth).expect("a known device").into_iter().enumerate().map(of_probe).collect()
    }

    fn terms(profile: &DeviceProfile) -> [(&'static str, f64); 8] {
        [
            ("hbm", profile.hbm_bytes_per_us),
            ("l2", profile.l2_bytes_per_us),
            ("mma", profile.mma_flop_per_us),
            ("wgmma", profile.wgmma_flop_per_us),
            ("launch", profile.launch_us),
            ("merge", profile.merge_us),
            ("item latency", profile.item_latency_us),
            ("tile latency", profile.tile_latency_us),
        ]
    }

    /// Within `tolerance` of the truth; terms in us also within `latency_tolerance_us`.
    fn assert_close(fitted: &DeviceProfile, truth: &DeviceProfile, tolerance: f64, latency_tolerance_us: f64) {
        for ((name, fitted), (_, truth)) in terms(fitted).into_iter().zip(terms(truth)) {
            let is_rate = truth > 1e3;
            let allowed = tolerance * truth + if is_rate { 0.0 } else { latency_tolerance_us };
            assert!((fitted - truth).abs() <= allowed, "{name}: {fitted}, in truth {truth}");
        }
    }

    /// What a calibration starts from: everything that is measured is wrong.
    fn unknown(truth: &DeviceProfile) -> DeviceProfile {
        let mut unknown = device("a100-40");
        unknown.name.clone_from(&truth.name);
        (unknown.compute_capability, unknown.sm_count) = (truth.compute_capability, truth.sm_count);
        unknown.l2_bytes = truth.l2_bytes;
        unknown
    }

    #[test]
    fn the_cost_model_s_own_times_give_its_profile_back() {
        for name in DeviceProfile::known_names() {
            let truth = device(name);
            let fitted = fit(&unknown(&truth), &predicted(&truth, |_| 1.0)).expect("a profile");
            assert_close(&fitted, &truth, 1e-6, 0.0);
            assert_eq!(fitted.kernel_terms, KernelTerms::Measured);
            assert_eq!((fitted.name, fitted.sm_count, fitted.l2_bytes), (truth.name, truth.sm_count, truth.l2_bytes));
        }
    }

    #[test]
    fn other_terms_are_found_as_well() {
        let mut truth = device("h100-sxm");
        (truth.hbm_bytes_per_us, truth.l2_bytes_per_us) = (3.1e6, 5.7e6);
        (truth.mma_flop_per_us, truth.wgmma_flop_per_us) = (211e6, 360e6);
        (truth.launch_us, truth.merge_us) = (4.2, 2.6);
        (truth.item_latency_us, truth.tile_latency_us) = (1.5, 0.55);
        assert_close(&fit(&unknown(&truth), &predicted(&truth, |_| 1.0)).expect("a profile"), &truth, 1e-6, 0.0);
        // Here the tensor cores take nearly as long for a wave of short items as latencies do.
        let mut slow = truth;
        (slow.wgmma_flop_per_us, slow.item_latency_us) = (333e6, 1.3);
        assert_close(&fit(&unknown(&slow), &predicted(&slow, |_| 1.0)).expect("a profile"), &slow, 0.01, 0.0);
    }

    #[test]
    fn noise_of_one_percent_moves_terms_by_a_few() {
        for (name, seed) in DeviceProfile::known_names().flat_map(|name| (0..20).map(move |seed| (name, seed))) {
            let truth = device(name);
            // Uniform in +-1%, from the generator of the test tensors.
            let noise = |index: usize| {
                let hash = pat_abi::generator::mix(pat_abi::generator::mix(seed) + index as u32);
                1.0 + 0.01 * (2.0 * f64::from(hash) / f64::from(u32::MAX) - 1.0)
            };
            let fitted = fit(&unknown(&truth), &predicted(&truth, noise)).expect("a profile");
            // Latencies are differences of times of about 10 us, each of which 1% of noise moves by 0.1 us.
            assert_close(&fitted, &truth, 0.05, 0.2);
        }
    }

    #[test]
    fn samples_that_say_nothing_are_refused() {
        let truth = device("h200");
        let all = predicted(&truth, |_| 1.0);
        let refusal = |samples: &[Sample]| fit(&truth, samples).expect_err("refused").to_string();
        type IsKind = fn(Quantity) -> bool;
        let kinds: [(IsKind, &str); 5] = [
            (|quantity| matches!(quantity, Quantity::Steps { .. }), "samples of steps of one sequence"),
            (|quantity| matches!(quantity, Quantity::Waves { .. }), "samples of waves of short items"),
            (|quantity| matches!(quantity, Quantity::Dram { .. }), "samples of bytes from DRAM"),
            (|quantity| matches!(quantity, Quantity::Resident { .. }), "none of resident pages"),
            (|quantity| matches!(quantity, Quantity::Merge { .. }), "no pair with and without a merge"),
        ];
        for (is_kind, message) in kinds {
            let without: Vec<_> = all.iter().filter(|sample| !is_kind(sample.quantity)).cloned().collect();
            assert!(refusal(&without).contains(message), "{}", refusal(&without));
            if message.starts_with("samples of") {
                let one: Vec<_> = all
                    .iter()
                    .filter(|s| !is_kind(s.quantity))
                    .chain(all.iter().find(|s| is_kind(s.quantity)))
                    .cloned()
                    .collect();
                assert!(refusal(&one).contains("fewer than two sizes"), "{}", refusal(&one));
            }
        }
        for bad in [f64::NAN, 0.0, -1.0, f64::INFINITY] {
            let mut samples = all.clone();
            samples[0].measured_us = bad;
            assert!(refusal(&samples).contains("a positive number of us"), "{}", refusal(&samples));
        }
        // All probes equally long: no time depends on anything.
        let constant: Vec<_> = all.iter().map(|sample| Sample { measured_us: 10.0, ..sample.clone() }).collect();
        assert!(refusal(&constant).contains("device profile: "), "{}", refusal(&constant));
    }
}
