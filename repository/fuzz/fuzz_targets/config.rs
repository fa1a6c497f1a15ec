//! `repository::fuzzing::config` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    repository::fuzzing::config(data);
});
