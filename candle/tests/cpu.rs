//! On candle's CPU storage.

mod common;

use candle_core::Device;

#[test]
fn every_layout_is_right() {
    common::every_layout_is_right(&Device::Cpu);
}

#[test]
fn steps_follow_each_other() {
    common::steps_follow_each_other(&Device::Cpu);
}

#[test]
fn bad_tensors_are_refused() {
    common::bad_tensors_are_refused(&Device::Cpu);
}
