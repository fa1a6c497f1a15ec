//! `repository::fuzzing::key_file` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    repository::fuzzing::key_file(data);
});
