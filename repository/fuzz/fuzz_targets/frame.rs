//! `repository::fuzzing::frame` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    repository::fuzzing::frame(data);
});
