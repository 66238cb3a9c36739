//! pat-rs beside the other methods of a result file, in numbers.

use crate::plot::{Figures, Point};
use crate::result::METHOD;
use crate::statistics::geometric_mean;

/// pat-rs against one method, over the configurations that both were measured on.
#[derive(Clone, Debug, PartialEq)]
pub struct Versus {
    /// The method, or [`BEST_PEER`].
    pub method: String,
    /// Configurations that both were measured on.
    pub configurations: usize,
    /// Of the ratios of times: below 1, pat-rs is faster.
    pub geometric_mean: f64,
    /// Largest ratio.
    pub worst: f64,
    /// Configurations in which pat-rs is slower.
    pub slower: usize,
}

/// What stands for the fastest peer of each configuration.
pub const BEST_PEER: &str = "best peer of each configuration";

/// One entry for each peer, in the order of the figures, and one for the best of them; empty where there is none.
pub fn versus(figures: &Figures) -> Vec<Versus> {
    let mut entries: Vec<Versus> = figures
        .peers()
        .filter_map(|method| against(figures, method, |point| point.cold_us.get(method.as_str()).copied()))
        .collect();
    if !entries.is_empty() {
        entries.extend(against(figures, BEST_PEER, Point::best_peer_us));
    }
    entries
}

fn against(figures: &Figures, method: &str, time_us: impl Fn(&Point) -> Option<f64>) -> Option<Versus> {
    let ratio = |point: &Point| Some(point.cold_us.get(METHOD)? / time_us(point)?);
    let ratios: Vec<f64> = figures.points.iter().filter_map(ratio).collect();
    Some(Versus {
        method: method.into(),
        configurations: ratios.len(),
        geometric_mean: geometric_mean(ratios.iter().copied()),
        worst: ratios.iter().copied().max_by(f64::total_cmp)?,
        slower: ratios.iter().filter(|ratio| **ratio > 1.0).count(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::{Path, PathBuf};

    fn results(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("results").join(name)
    }

    #[test]
    fn committed_results_are_compared_method_by_method() {
        let ours = results("2026-11-24-h200-eb98a1f.json");
        let figures = Figures::read(&ours, &[results("peers-h200-recorded.json")]).expect("committed results");
        let entries = versus(&figures);
        let names: Vec<&str> = entries.iter().map(|entry| entry.method.as_str()).collect();
        assert_eq!(
            names,
            ["pat", "flashinfer_fa2", "flashinfer_cudacore", "flashinfer_cascade", "fasttree", BEST_PEER]
        );
        let counts: Vec<usize> = entries.iter().map(|entry| entry.configurations).collect();
        assert_eq!(counts, [80, 80, 80, 80, 30, 80]);
        let best = entries.last().expect("the last entry");
        for entry in &entries {
            assert!(entry.geometric_mean <= entry.worst);
            assert!(entry.geometric_mean <= best.geometric_mean && entry.worst <= best.worst, "{entry:?}");
            assert_eq!(entry.slower > 0, entry.worst > 1.0);
        }
        assert_eq!(versus(&Figures::read(&ours, &[]).expect("a committed result")), []);
    }
}
