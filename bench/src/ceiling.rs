//! What a device allows: the least time that moving a configuration's bytes and multiplying its matrices can take on it.

use pat_rs::DeviceProfile;

/// How fast a device moves bytes and multiplies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// DRAM reads, bytes per microsecond.
    pub bytes_per_us: f64,
    /// Tensor cores, 16-bit inputs, FLOP per microsecond.
    pub flop_per_us: f64,
}

/// The rates of a device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeviceRates {
    /// What kernels have reached: the ceiling.
    pub reached: Rates,
    /// NVIDIA's datasheet: the floor.
    pub datasheet: Rates,
}

impl Rates {
    /// The longer of moving `bytes` bytes and multiplying `flop` times, which overlap at best.
    pub fn time_us(self, bytes: f64, flop: f64) -> f64 {
        (bytes / self.bytes_per_us).max(flop / self.flop_per_us)
    }
}

impl DeviceRates {
    /// The rates of the device that a result file names. `None` for a CPU, and for GPUs on which nobody has measured what can
    /// be reached.
    pub fn of(device: &str) -> Option<Self> {
        let rates = |reached: f64, datasheet: f64| Self {
            reached: Rates { bytes_per_us: reached, flop_per_us: 650e6 },
            datasheet: Rates { bytes_per_us: datasheet, flop_per_us: 989e6 },
        };
        match DeviceProfile::by_name(device).ok()?.name.as_str() {
            "NVIDIA H200" => Some(rates(4.6e6, 4.8e6)),
            "NVIDIA H100 80GB HBM3" => Some(rates(3.12e6, 3.35e6)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_has_its_own_rates() {
        let us = |device: &str| DeviceRates::of(device).expect(device).reached.time_us(4.6e6, 1.0);
        assert_eq!(us("NVIDIA H200"), 1.0);
        assert_eq!(us("NVIDIA H100 80GB HBM3"), 4.6e6 / 3.12e6);
        assert_eq!(DeviceRates::of("NVIDIA H200").expect("known").reached.time_us(0.0, 1300e6), 2.0);
        for unknown in ["CPU (a model)", "NVIDIA L40S", "NVIDIA A100-SXM4-80GB", ""] {
            assert_eq!(DeviceRates::of(unknown), None, "{unknown}");
        }
    }
}
