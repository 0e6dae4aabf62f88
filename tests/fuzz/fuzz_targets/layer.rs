//! Extraction of a layer, both ways of expressing whiteouts: nothing outside of its directory changes.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| moxlet_image::fuzzing::layer(data));
