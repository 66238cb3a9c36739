//! The 16-bit element types.

use crate::Dtype;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Element type of K and V on the host.
pub trait KvElement: bytemuck::Pod + Send + Sync + 'static {
    /// The type's name in shapes and plans.
    const DTYPE: Dtype;

    /// The nearest element, ties to even. Numbers too large for an 8-bit type become its largest finite element.
    fn from_f32(value: f32) -> Self;

    /// The value, exactly.
    fn to_f32(self) -> f32;

    /// Widens `source` into `destination`, which has the same length, exactly.
    ///
    /// # Panics
    /// When the lengths differ.
    fn widen(source: &[Self], destination: &mut [f32]);
}

/// Element type of Q and O on the host, and of K and V that have the same.
pub trait Element: KvElement {
    /// Distance between 1 and the next larger value: the relative size of one unit in the last place.
    const EPSILON: f32;
}

macro_rules! element {
    ($type:ty, $dtype:ident, $epsilon:expr) => {
        impl KvElement for $type {
            const DTYPE: Dtype = Dtype::$dtype;

            fn from_f32(value: f32) -> Self {
                Self::from_f32(value)
            }

            fn to_f32(self) -> f32 {
                self.to_f32()
            }

            fn widen(source: &[Self], destination: &mut [f32]) {
                source.convert_to_f32_slice(destination);
            }
        }

        impl Element for $type {
            const EPSILON: f32 = $epsilon;
        }
    };
}

// 10 and 7 bits of fraction.
element!(f16, F16, 1.0 / 1024.0);
element!(bf16, Bf16, 1.0 / 128.0);
