//! What the fuzz targets (`tests/fuzz`) call. Each takes any bytes and panics where a promise does not hold.

#![allow(clippy::panic, reason = "a panic is how a fuzz target says no")]

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use moxlet_storage::WhiteoutStyle;

use crate::{
    Reference,
    layer::{self, Claim, Fault, Target, tape::Tape},
    registry::manifest,
};

/// A directory that goes with its owner; in memory where the system has such a place.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let memory = Path::new("/dev/shm");
        let base = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let name = format!("moxlet-fuzz-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        fs::create_dir(base.join(&name))?;
        Ok(Self(base.join(name)))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Extracts the bytes as two layers, on top of each other and side by side; links in them find a directory beside the root.
pub fn layer(data: &[u8]) {
    let Ok(scratch) = Scratch::new() else { return };
    for style in [WhiteoutStyle::Overlay, WhiteoutStyle::Apply] {
        let dir = scratch.0.join(format!("{style:?}"));
        let (root, out) = (dir.join("root"), dir.join("out"));
        if fs::create_dir_all(&root).is_err() || fs::create_dir_all(&out).is_err() {
            return;
        }
        let _ = fs::write(out.join("secret"), "untouched");
        let before = look(&out);
        let half = data.len() / 2 / 512 * 512;
        for (bottom, part) in [(true, &data[..half]), (false, &data[half..])] {
            let tape = dir.join(format!("{bottom}.tape"));
            let (mut root, mut below): (_, Option<layer::Below<'_>>) = (root.clone(), None);
            if style == WhiteoutStyle::Overlay && !bottom {
                let lower = vec![root];
                below = Some(Box::new(move || Ok(lower.into())));
                root = dir.join("beside");
                if fs::create_dir(&root).is_err() {
                    return;
                }
            }
            let target = Target { root: &root, style, bottom, tape: Some(&tape), below };
            match layer::unpack_reader(part, &Claim::default(), target) {
                Ok(unpacked) => {
                    let again = layer::check(&root, &tape, style, bottom).map(|c| c.diff_id);
                    assert_eq!(again.ok(), Some(unpacked.diff_id), "the archive is not the same again");
                }
                Err(Fault::Bad(_) | Fault::System { .. }) => {}
                Err(other) => panic!("{other:?}"),
            }
            assert_eq!(look(&out), before, "something outside of the root has changed");
        }
    }
}

fn look(out: &Path) -> Option<(i64, i64, usize, Vec<u8>, u64)> {
    let meta = fs::metadata(out).ok()?;
    let secret = fs::metadata(out.join("secret")).ok()?;
    let names = fs::read_dir(out).ok()?.count();
    Some((meta.mtime(), meta.mtime_nsec(), names, fs::read(out.join("secret")).ok()?, secret.nlink()))
}

/// Reads the bytes as an archive of images, plain or compressed. Nothing of it stays.
pub fn import(data: &[u8]) {
    let Ok(scratch) = Scratch::new() else { return };
    let (dir, out) = (scratch.0.join("members"), scratch.0.join("out"));
    if fs::create_dir(&out).is_err() {
        return;
    }
    let _ = fs::write(out.join("secret"), "untouched");
    let before = look(&out);
    crate::import::fuzz(data, dir.clone());
    assert!(!dir.exists(), "members of the archive are left");
    assert_eq!(look(&out), before, "something outside of the directory has changed");
}

/// Reads the bytes as a manifest.
pub fn manifest(data: &[u8]) {
    manifest::fuzz(data);
}

/// Makes an archive from the bytes as a tape, over a directory with a few files.
pub fn tape(data: &[u8]) {
    let Ok(scratch) = Scratch::new() else { return };
    let (path, view) = (scratch.0.join("tape"), scratch.0.join("view"));
    if fs::create_dir(&view).is_err() || fs::write(&path, data).is_err() {
        return;
    }
    for (name, content) in [("a", "x"), ("b", "content")] {
        let _ = fs::write(view.join(name), content);
    }
    let _ = std::os::unix::fs::symlink("/etc", view.join("out"));
    let Ok(rebuilt) = Tape::open(&path).and_then(|tape| tape.over(&view)) else { return };
    // A tape may ask for much of nothing.
    let _ = io::copy(&mut io::Read::take(rebuilt, 16 << 20), &mut io::sink());
}

/// Reads the bytes as a reference; what is one is one again when it is written.
pub fn reference(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(reference) = Reference::parse(text) {
        let again = Reference::parse(&reference.to_string());
        assert_eq!(again.ok(), Some(reference), "{text:?} is another reference when it is written");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    fn seeds(target: &str) -> Vec<Vec<u8>> {
        let package = std::env::var_os("CARGO_MANIFEST_DIR").unwrap();
        let dir = Path::new(&package).join("../../tests/fuzz/corpus").join(target);
        fs::read_dir(dir).unwrap().map(|e| fs::read(e.unwrap().path()).unwrap()).collect()
    }

    /// A seed, some bytes of which are others, or a part of which is missing or there twice.
    fn mutated(target: &'static str) -> impl Strategy<Value = Vec<u8>> {
        let places = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8);
        let cut =
            prop::option::of((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<bool>()));
        (prop::sample::select(seeds(target)), places, cut).prop_map(|(mut seed, places, cut)| {
            for (at, byte) in places.iter().filter(|_| !seed.is_empty()).collect::<Vec<_>>() {
                let at = at.index(seed.len());
                seed[at] = *byte;
            }
            if let Some((a, b, twice)) = cut.filter(|_| !seed.is_empty()) {
                let (a, b) = (a.index(seed.len()), b.index(seed.len()));
                let part = seed[a.min(b)..a.max(b)].to_vec();
                seed.splice(a.min(b)..a.max(b), if twice { part.repeat(2) } else { Vec::new() });
            }
            seed
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

        #[test]
        fn layers_stay_in_their_place(data in mutated("layer")) {
            layer(&data);
        }

        #[test]
        fn archives_of_images_are_read_or_refused(data in mutated("import")) {
            import(&data);
        }

        #[test]
        fn manifests_are_read_or_refused(data in mutated("manifest")) {
            manifest(&data);
        }

        #[test]
        fn tapes_are_read_or_refused(data in mutated("tape")) {
            tape(&data);
        }

        #[test]
        fn references_are_read_or_refused(data in mutated("reference")) {
            reference(&data);
        }
    }
}
