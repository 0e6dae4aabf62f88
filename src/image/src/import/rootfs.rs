//! A root file system as an image of one layer. LXC templates as Proxmox VE names them say what they are by their names.

use std::{collections::BTreeMap, sync::Arc};

use moxlet_ids::Digest;
use serde_json::{Map, Value, json};

use super::{Source, bring_layer, decompressed, refused};
use crate::{
    ImageConfig, ImageRecord, ImageStore, Origin, Reference, Result, layer::Claim,
    registry::platform::host_architecture, store::NewImage,
};

/// What an image that is made of a root file system shall say.
#[derive(Debug, Clone, Default)]
pub struct RootfsOptions {
    /// Its tag.
    pub name: Option<String>,
    /// `Cmd`.
    pub cmd: Vec<String>,
    /// `Entrypoint`.
    pub entrypoint: Vec<String>,
    /// `Env`, `NAME=value`.
    pub env: Vec<String>,
    /// `WorkingDir`.
    pub workdir: String,
    /// `User`.
    pub user: String,
    /// `Labels`.
    pub labels: BTreeMap<String, String>,
    /// Go's name of its architecture; the host's if empty.
    pub architecture: String,
    /// Name of the file that it is from, from which a template's name, version and architecture are read.
    pub file_name: String,
}

/// What the name of a template says: `debian-13-standard_13.1-2_amd64.tar.zst`.
#[derive(Debug, PartialEq, Eq)]
struct Template {
    title: String,
    version: String,
    architecture: String,
}

impl Template {
    fn read(file_name: &str) -> Option<Self> {
        let file = file_name.rsplit('/').next()?;
        let stem =
            [".tar.zst", ".tar.gz", ".tar.xz", ".tar"].iter().find_map(|end| file.strip_suffix(end))?;
        let mut parts = stem.rsplitn(3, '_');
        let (architecture, version, title) = (parts.next()?, parts.next()?, parts.next()?);
        let known = ["amd64", "arm64", "i386", "armhf", "ppc64el", "riscv64"];
        let word =
            |t: &str| !t.is_empty() && t.bytes().all(|b| b.is_ascii_alphanumeric() || b"._+-".contains(&b));
        if !known.contains(&architecture) || !word(version) || !word(title) {
            return None;
        }
        let own = |t: &str| t.to_owned();
        Some(Self { title: own(title), version: own(version), architecture: own(architecture) })
    }

    /// Debian's name of an architecture as Go's.
    fn go_architecture(&self) -> &str {
        match self.architecture.as_str() {
            "i386" => "386",
            "armhf" => "arm",
            "ppc64el" => "ppc64le",
            other => other,
        }
    }
}

/// The config of an image; it holds no time, so that the same files give the same image.
fn config(
    options: &RootfsOptions,
    template: Option<&Template>,
    architecture: &str,
    diff_id: &Digest,
) -> Value {
    let mut labels = options.labels.clone();
    if let Some(template) = template {
        for (key, value) in [("title", &template.title), ("version", &template.version)] {
            labels.entry(format!("org.opencontainers.image.{key}")).or_insert_with(|| value.clone());
        }
    }
    let mut run = Map::new();
    for (key, list) in [("Cmd", &options.cmd), ("Entrypoint", &options.entrypoint), ("Env", &options.env)] {
        if !list.is_empty() {
            run.insert(key.to_owned(), json!(list));
        }
    }
    for (key, text) in [("WorkingDir", &options.workdir), ("User", &options.user)] {
        if !text.is_empty() {
            run.insert(key.to_owned(), json!(text));
        }
    }
    if !labels.is_empty() {
        run.insert("Labels".to_owned(), json!(labels));
    }
    json!({
        "architecture": architecture,
        "os": "linux",
        "config": run,
        "rootfs": { "type": "layers", "diff_ids": [diff_id] },
        "history": [{ "created_by": "moxlet image import --rootfs" }],
    })
}

impl ImageStore {
    /// Makes an image of an archive of a root file system (tar; plain or with gzip, zstd or xz).
    ///
    /// # Errors
    /// [`crate::Error::BadArchive`], [`crate::Error::InvalidName`], a failure of the store.
    pub async fn import_rootfs(&self, source: Source, options: RootfsOptions) -> Result<ImageRecord> {
        let template = Template::read(&options.file_name);
        let host = host_architecture();
        let said = template.as_ref().map(Template::go_architecture);
        let architecture = match options.architecture.as_str() {
            "" => said.unwrap_or(host).to_owned(),
            given => given.to_owned(),
        };
        if architecture != host {
            let reason = format!("it is for {architecture}, this host is {host}");
            return Err(refused("the root file system", reason));
        }
        for variable in &options.env {
            if variable.split_once('=').is_none_or(|(name, _)| name.is_empty()) {
                return Err(refused("the options", format!("{variable:?} is not NAME=value")));
            }
        }
        let tag =
            match &options.name {
                Some(name) => {
                    let tag = Reference::parse(name)?.repo_tag();
                    Some(tag.ok_or_else(|| {
                        refused("the name", "an image that is made here cannot have a digest")
                    })?)
                }
                None => None,
            };
        let work = self.make_image(source, &options, template.as_ref(), &architecture, tag);
        let outcome = self.store.unless_stalled(work).await;
        self.tidy(outcome).await
    }

    async fn make_image(
        &self,
        source: Source,
        options: &RootfsOptions,
        template: Option<&Template>,
        architecture: &str,
        tag: Option<String>,
    ) -> Result<ImageRecord> {
        let open = move || decompressed(source);
        let part = "the root file system".to_owned();
        let (chain, unpacked, pins) = bring_layer(&self.store, &[], Claim::default(), part, open).await?;
        let unpacked = unpacked.ok_or(crate::Error::Stopped)?;
        let blob = config(options, template, architecture, &unpacked.diff_id).to_string().into_bytes();
        let parsed = ImageConfig::read(&blob)
            .map_err(|reason| refused("the options", format!("the config: {reason}")))?;
        let image = NewImage {
            id: Digest::of(&blob),
            tags: tag.into_iter().collect(),
            digests: Vec::new(),
            size_bytes: unpacked.unpacked_size.saturating_add(blob.len() as u64),
            layers: vec![chain],
            config: Arc::new(parsed),
            blob: Some(blob),
            manifest: None,
            blobs: Vec::new(),
            origin: Origin::Imported,
            access: None,
        };
        let record = self.store.add(image, pins).await?;
        tracing::info!(id = %record.id, names = ?record.repo_tags, "an image is made of a root file system");
        Ok(record)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn names_of_templates_say_what_they_are() {
        let read =
            Template::read("/var/lib/vz/template/cache/debian-13-standard_13.1-2_amd64.tar.zst").unwrap();
        assert_eq!((read.title.as_str(), read.version.as_str()), ("debian-13-standard", "13.1-2"));
        assert_eq!(Template::read("ubuntu-24.04_1_ppc64el.tar.xz").unwrap().go_architecture(), "ppc64le");
        for other in ["rootfs.tar.gz", "a_b.tar", "a_b_amd64.zip", "_b_amd64.tar", "a_b_z80.tar"] {
            assert_eq!(Template::read(other), None, "{other}");
        }
    }

    #[test]
    fn the_same_files_give_the_same_image() {
        let options = RootfsOptions { cmd: vec!["/sbin/init".into()], ..RootfsOptions::default() };
        let template = Template::read("a_1_amd64.tar");
        let diff_id = Digest::of(b"x");
        let made = config(&options, template.as_ref(), "amd64", &diff_id);
        assert_eq!(made, config(&options, template.as_ref(), "amd64", &diff_id));
        assert_eq!(made["config"]["Labels"]["org.opencontainers.image.version"], "1");
        assert_eq!(made["config"]["Cmd"][0], "/sbin/init");
        assert!(serde_json::from_value::<ImageConfig>(made).is_ok());
    }
}
