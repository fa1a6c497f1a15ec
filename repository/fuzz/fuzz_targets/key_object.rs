//! `repository::fuzzing::key_object` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    repository::fuzzing::key_object(data);
});
