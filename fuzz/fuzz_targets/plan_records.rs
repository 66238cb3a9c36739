#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pat_tests::fuzzing::check("plan_records", bytes));
