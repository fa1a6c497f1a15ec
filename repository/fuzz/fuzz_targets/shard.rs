//! `repository::fuzzing::shard` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    repository::fuzzing::shard(data);
});
