//! The images as they lie in the OCI layout that the registry was filled from.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use moxlet_ids::{ChainId, Digest};
use serde_json::Value;

/// An OCI layout.
pub(crate) struct Source {
    dir: PathBuf,
    index: Value,
}

/// An image in it.
pub(crate) struct Image {
    pub(crate) tag: String,
    pub(crate) layers: Vec<Layer>,
    /// The chain IDs, the bottom one first.
    pub(crate) chains: Vec<ChainId>,
}

/// A layer's blob.
#[derive(PartialEq, Eq)]
pub(crate) struct Layer {
    pub(crate) digest: String,
    pub(crate) size: u64,
    pub(crate) zstd: bool,
}

impl Image {
    /// Whether some of its layers are compressed with zstd.
    pub(crate) fn zstd(&self) -> bool {
        self.layers.iter().any(|l| l.zstd)
    }
}

impl Source {
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        Ok(Self { dir: dir.to_owned(), index: read(&dir.join("index.json"))? })
    }

    pub(crate) fn image(&self, tag: &str) -> Result<Image> {
        let named = |m: &&Value| m["annotations"]["org.opencontainers.image.ref.name"] == tag;
        let found = list(&self.index["manifests"]).iter().find(named);
        let manifest =
            self.blob(&found.with_context(|| format!("the layout has no image {tag}"))?["digest"])?;
        let config = self.blob(&manifest["config"]["digest"])?;
        let mut chains: Vec<ChainId> = Vec::new();
        for diff_id in list(&config["rootfs"]["diff_ids"]) {
            let diff_id: Digest = word(diff_id)?.parse().context("a DiffID is no digest")?;
            chains
                .push(chains.last().map_or_else(|| ChainId::base(&diff_id), |parent| parent.push(&diff_id)));
        }
        let layer = |l: &Value| {
            let zstd = word(&l["mediaType"])?.ends_with("zstd");
            let size = l["size"].as_u64().context("a layer has no size")?;
            Ok(Layer { digest: word(&l["digest"])?.to_owned(), size, zstd })
        };
        let layers = list(&manifest["layers"]).iter().map(layer).collect::<Result<_>>()?;
        Ok(Image { tag: tag.to_owned(), layers, chains })
    }

    fn blob(&self, digest: &Value) -> Result<Value> {
        read(&self.dir.join("blobs").join(word(digest)?.replace(':', "/")))
    }
}

fn read(path: &Path) -> Result<Value> {
    let context = || format!("cannot read {}", path.display());
    serde_json::from_slice(&fs::read(path).with_context(context)?).with_context(context)
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn word(value: &Value) -> Result<&str> {
    value.as_str().context("the layout lacks a text")
}
