//! A driver for tests of those who extract layers: it applies them one after the other, on any machine.

use std::{path::Path, process::Command};

use async_trait::async_trait;
use moxlet_ids::{ChainId, ContainerId};

use crate::{
    Driver, FsUsage, LayerDraft, LayerView, OverlayDriver, Result, RootOptions, TakenLayer, Usage,
    WhiteoutStyle, error::Attempt,
};

/// A driver whose drafts begin as copies of the layer below, as they do on ZFS. A root is to be made on the uppermost layer
/// alone, for that one holds all below it.
#[derive(Debug, Clone)]
pub struct ApplyingDriver(pub OverlayDriver);

#[async_trait]
impl Driver for ApplyingDriver {
    fn whiteouts(&self) -> WhiteoutStyle {
        WhiteoutStyle::Apply
    }
    async fn has_layer(&self, chain: &ChainId) -> Result<bool> {
        self.0.has_layer(chain).await
    }
    async fn begin_layer(&self, parent: Option<&ChainId>) -> Result<LayerDraft> {
        let draft = self.0.begin_layer(parent).await?;
        if let Some(parent) = parent {
            let below = self.0.open_layer(parent).await?;
            let mut copy = Command::new("cp");
            copy.arg("-aT").arg(below.path()).arg(draft.path());
            let copied = copy.status().attempt("copy", below.path())?;
            if !copied.success() {
                return Err(std::io::Error::other(format!("cp: {copied}"))).attempt("copy", below.path());
            }
        }
        Ok(draft)
    }
    async fn commit_layer(&self, draft: LayerDraft, chain: &ChainId, usage: Usage) -> Result<()> {
        self.0.commit_layer(draft, chain, usage).await
    }
    async fn open_layer(&self, chain: &ChainId) -> Result<LayerView> {
        self.0.open_layer(chain).await
    }
    async fn take_layer(&self, chain: &ChainId) -> Result<TakenLayer> {
        self.0.take_layer(chain).await
    }
    async fn layers(&self) -> Result<Vec<ChainId>> {
        self.0.layers().await
    }
    async fn layer_usage(&self, chain: &ChainId) -> Result<Usage> {
        self.0.layer_usage(chain).await
    }
    async fn layers_usage(&self) -> Result<Usage> {
        self.0.layers_usage().await
    }
    async fn mount_layers(&self, layers: &[ChainId], target: &Path) -> Result<()> {
        let top = layers.last().map_or(layers, std::slice::from_ref);
        self.0.mount_layers(top, target).await
    }
    async fn create_root(&self, id: &ContainerId, layers: &[ChainId], options: RootOptions) -> Result<()> {
        self.0.create_root(id, layers, options).await
    }
    async fn mount_root(&self, id: &ContainerId, target: &Path) -> Result<()> {
        self.0.mount_root(id, target).await
    }
    async fn unmount_root(&self, id: &ContainerId, target: &Path) -> Result<()> {
        self.0.unmount_root(id, target).await
    }
    async fn remove_root(&self, id: &ContainerId) -> Result<()> {
        self.0.remove_root(id).await
    }
    async fn roots(&self) -> Result<Vec<ContainerId>> {
        self.0.roots().await
    }
    async fn root_layers(&self, id: &ContainerId) -> Result<Vec<ChainId>> {
        self.0.root_layers(id).await
    }
    async fn root_usage(&self, id: &ContainerId) -> Result<Usage> {
        self.0.root_usage(id).await
    }
    async fn fs_usage(&self) -> Result<FsUsage> {
        self.0.fs_usage().await
    }
    async fn close(&self) -> Result<()> {
        self.0.close().await
    }
}
