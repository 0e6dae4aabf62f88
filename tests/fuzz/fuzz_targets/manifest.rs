//! Manifests and indexes as a registry may send them.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| moxlet_image::fuzzing::manifest(data));
