//! Of repeated timings.

/// Middle value, or the mean of the two in the middle; 0 for nothing. Sorts.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    quantile(values, 0.5)
}

/// First and third quartile, interpolated; 0 for nothing. Sorts.
pub fn quartiles(values: &mut [f64]) -> [f64; 2] {
    values.sort_by(f64::total_cmp);
    [quantile(values, 0.25), quantile(values, 0.75)]
}

/// Of positive values; 1 for nothing.
pub fn geometric_mean(values: impl IntoIterator<Item = f64>) -> f64 {
    let (sum, count) = values.into_iter().fold((0.0, 0u32), |(sum, count), value| (sum + value.ln(), count + 1));
    (sum / f64::from(count.max(1))).exp()
}

/// Of sorted values, interpolated between neighbours; 0 for nothing.
pub fn quantile(sorted: &[f64], part: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let position = part * last as f64;
    let (below, above) = (sorted[position.floor() as usize], sorted[position.ceil() as usize]);
    below + (above - below) * position.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_interpolated() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0, 3.0, 2.0]), 2.5);
        assert_eq!(quartiles(&mut [5.0, 1.0, 2.0, 3.0, 4.0]), [2.0, 4.0]);
        assert_eq!(quartiles(&mut [7.0]), [7.0; 2]);
        assert_eq!((median(&mut []), quartiles(&mut [])), (0.0, [0.0; 2]));
    }

    #[test]
    fn the_geometric_mean_is_that_of_ratios() {
        assert!((geometric_mean([2.0, 8.0]) - 4.0).abs() < 1e-12);
        assert_eq!(geometric_mean([]), 1.0);
    }
}
