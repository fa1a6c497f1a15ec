//! `repository::fuzzing::checkpoint` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    repository::fuzzing::checkpoint(data);
});
