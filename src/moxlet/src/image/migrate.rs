//! `moxlet image migrate`: all images of a store on ZFS to another one.

use std::path::Path;

use anyhow::{Context, Result, bail};
use moxlet_image::{MigratedImage, MigrationOutcome};

use super::{
    args::{StorageKind, StoreArgs},
    connect::{need_root, zfs_config},
    say,
};

/// How images come from one kind of store into another one.
const OTHERWISE: &str =
    "take `moxlet image export … -o FILE` there and `moxlet image import FILE` here, or pull them anew";

/// Copies all images, and says of each what was done.
pub(super) async fn migrate(args: &StoreArgs, to: &Path) -> Result<()> {
    let (from, to) = datasets(args, to)?;
    need_root()?;
    let mut sums = Sums::default();
    let (source, target) = (zfs_config(&from), zfs_config(&to));
    let left_out = moxlet_image::migrate(&source, &target, |image| sums.tell(image))
        .await
        .with_context(|| format!("cannot bring the images of {from} to {to}"))?;
    eprintln!("{}", sums.text(&from, &to));
    for record in &left_out {
        eprintln!("moxlet: left out: {}: {}", record.path.display(), record.reason);
    }
    if !left_out.is_empty() {
        bail!(
            "{} images of {from} are damaged and were left out (`moxlet image verify` there)",
            left_out.len()
        );
    }
    Ok(())
}

/// The two datasets, if it is two of them.
fn datasets(args: &StoreArgs, to: &Path) -> Result<(String, String)> {
    let Some(from) = &args.store else {
        bail!(
            "a migration opens both stores itself: stop their agents, and give --store DATASET --storage zfs --to DATASET"
        );
    };
    if args.storage() == StorageKind::Overlay {
        bail!(
            "{} is a store on OverlayFS (--storage overlay): only a store on ZFS migrates, to another one on ZFS; {OTHERWISE}",
            from.display()
        );
    }
    if to.is_absolute() || to.starts_with(".") || to.starts_with("..") {
        bail!(
            "{} is a directory: a store on ZFS migrates only to another dataset; for a store on OverlayFS {OTHERWISE}",
            to.display()
        );
    }
    let name = |path: &Path| {
        path.to_str().map(str::to_owned).with_context(|| format!("{} is no dataset", path.display()))
    };
    let (from, to) = (name(from)?, name(to)?);
    let below =
        |upper: &str, lower: &str| lower.strip_prefix(upper).is_some_and(|rest| rest.starts_with('/'));
    if from == to || below(&from, &to) || below(&to, &from) {
        bail!("{from} and {to} are not two stores: one cannot lie in the other");
    }
    Ok((from, to))
}

/// What was done so far.
#[derive(Default)]
struct Sums {
    images: usize,
    copied: usize,
    completed: usize,
    layers_copied: usize,
}

impl Sums {
    fn tell(&mut self, image: &MigratedImage) {
        self.images += 1;
        self.layers_copied += image.copied;
        let word = match image.outcome {
            MigrationOutcome::Copied => {
                self.copied += 1;
                "copied"
            }
            MigrationOutcome::Completed => {
                self.completed += 1;
                "completed"
            }
            MigrationOutcome::Present => "present",
        };
        let names = if image.tags.is_empty() { image.id.to_string() } else { image.tags.join(" ") };
        // A reader that has gone must not keep images from being copied.
        let _ = say(&format!("{word:<9} {names} ({} of {} layers copied)", image.copied, image.layers));
        for tag in &image.tags_left {
            let _ = say(&format!("          {tag} stays with the image that has it there"));
        }
        if image.access_left {
            let _ = say("          pull secrets are shown to the registry once more");
        }
    }

    fn text(&self, from: &str, to: &str) -> String {
        let Self { images, copied, completed, layers_copied, .. } = self;
        let present = images.saturating_sub(copied + completed);
        format!(
            "{from} to {to}: {copied} images copied, {completed} completed, {present} there already; {layers_copied} layers copied"
        )
    }
}
