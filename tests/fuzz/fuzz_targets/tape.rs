//! Tapes as a damaged disk may hold them.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| moxlet_image::fuzzing::tape(data));
