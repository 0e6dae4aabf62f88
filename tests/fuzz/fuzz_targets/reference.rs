//! References as a pod may name them.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| moxlet_image::fuzzing::reference(data));
