//! An archive of images: it is read within bounds, and nothing of it stays.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| moxlet_image::fuzzing::import(data));
