//! Archives of images between files and the store.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, IsTerminal, Read, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use moxlet_cri::host::{self, image_import_request::Part};
use tokio::sync::mpsc;

use super::{
    args::{ExportArgs, ImportArgs},
    connect::Connection,
    say,
};

/// Bytes of a message.
const PIECE: usize = 256 << 10;
/// Pieces on their way.
const WAITING: usize = 4;

/// Writes images to a file, a directory or standard output.
pub(super) async fn export(store: &mut Connection, args: &ExportArgs) -> Result<()> {
    if args.output.is_none() && args.oci_dir.is_none() && io::stdout().is_terminal() {
        bail!(
            "an archive is nothing for a terminal: give --output FILE or --oci-dir DIR, or redirect standard output"
        );
    }
    let request = host::ImageExportRequest { images: args.images.images.clone() };
    let answer = store.client.export(request).await.map_err(|e| store.failed(&e))?;
    let mut chunks = answer.into_inner();
    if let Some(dir) = &args.oci_dir {
        let (feed, source) = moxlet_image::feed();
        let target = dir.clone();
        let unpack = tokio::task::spawn_blocking(move || unpack(source, &target));
        while let Some(chunk) = chunks.message().await.map_err(|e| store.failed(&e))? {
            if !feed.send(chunk.data.into()).await {
                break;
            }
        }
        feed.end().await;
        return unpack.await?;
    }
    let (mut out, finish): (Box<dyn Write>, Option<(PathBuf, PathBuf)>) = match &args.output {
        Some(path) if path.as_os_str() != "-" => {
            let mut draft = path.clone().into_os_string();
            draft.push(".part");
            let draft = PathBuf::from(draft);
            let file = File::create(&draft).with_context(|| format!("cannot write {}", draft.display()))?;
            (Box::new(file), Some((draft, path.clone())))
        }
        _ => (Box::new(io::stdout().lock()), None),
    };
    let written = async {
        while let Some(chunk) = chunks.message().await.map_err(|e| store.failed(&e))? {
            out.write_all(&chunk.data).context("cannot write the archive")?;
        }
        out.flush().context("cannot write the archive")
    };
    let outcome = written.await;
    drop(out);
    if let Some((draft, path)) = finish {
        match outcome {
            Ok(()) => std::fs::rename(&draft, &path)
                .with_context(|| format!("cannot put {} in place", path.display()))?,
            Err(error) => {
                let _ = std::fs::remove_file(&draft);
                return Err(error);
            }
        }
        return Ok(());
    }
    outcome
}

/// Unpacks an OCI layout into a new or empty directory.
fn unpack(source: impl Read, dir: &Path) -> Result<()> {
    let context = || format!("cannot write {}", dir.display());
    std::fs::create_dir_all(dir).with_context(context)?;
    if std::fs::read_dir(dir).with_context(context)?.next().is_some() {
        bail!("{} is not empty", dir.display());
    }
    let mut archive = tar::Archive::new(source);
    archive.set_preserve_mtime(false);
    archive.unpack(dir).with_context(context)
}

/// Takes images from a file, a directory or standard input.
pub(super) async fn import(store: &mut Connection, args: &ImportArgs) -> Result<()> {
    let options = options(args)?;
    let data = data(&args.source, args.rootfs)?;
    let first = host::ImageImportRequest { part: Some(Part::Options(options)) };
    // A failed read of ours ends the stream early; what it was is told rather than what the store makes of it.
    let (broke, mut broken) = mpsc::channel::<io::Error>(1);
    let data = data.scan(broke, |broke, piece| {
        let piece = match piece {
            Ok(bytes) => Some(host::ImageImportRequest { part: Some(Part::Data(bytes.into())) }),
            Err(error) => {
                let _ = broke.try_send(error);
                // Two sets of options are refused: nothing of it counts.
                Some(host::ImageImportRequest { part: None })
            }
        };
        std::future::ready(piece)
    });
    let answer = store.client.import(stream::iter([first]).chain(data)).await;
    if let Ok(error) = broken.try_recv() {
        return Err(error).with_context(|| format!("cannot read {}", args.source.display()));
    }
    let done = answer.map_err(|e| store.failed(&e))?.into_inner();
    for image in done.images {
        say(&image.id)?;
        for name in &image.repo_tags {
            eprintln!("imported {name}");
        }
        if image.repo_tags.is_empty() {
            eprintln!("imported without a name (`moxlet image tag` gives one, or --name at the import)");
        }
    }
    for skipped in &done.skipped {
        eprintln!("left out {skipped}");
    }
    Ok(())
}

fn options(args: &ImportArgs) -> Result<host::ImageImportOptions> {
    let mut labels = BTreeMap::new();
    for label in &args.label {
        let Some((key, value)) = label.split_once('=') else { bail!("--label {label:?} is not KEY=value") };
        labels.insert(key.to_owned(), value.to_owned());
    }
    Ok(host::ImageImportOptions {
        rootfs: args.rootfs,
        name: args.name.clone().unwrap_or_default(),
        cmd: args.cmd.clone(),
        entrypoint: args.entrypoint.clone(),
        env: args.env.clone(),
        workdir: args.workdir.clone().unwrap_or_default(),
        user: args.user.clone().unwrap_or_default(),
        labels: labels.into_iter().collect(),
        architecture: args.arch.clone().unwrap_or_default(),
        file_name: args.source.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default(),
    })
}

type Pieces = std::pin::Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>;

/// The bytes of an archive: of a file, of standard input, or made of a directory's OCI layout.
fn data(source: &Path, rootfs: bool) -> Result<Pieces> {
    let (out, pieces) = mpsc::channel::<io::Result<Bytes>>(WAITING);
    if source.is_dir() {
        if rootfs {
            bail!(
                "{} is a directory, which shows only what this user and file system show of it; make a tarball of it: tar --xattrs \
                 --numeric-owner -C {0} -c . | moxlet image import --rootfs -",
                source.display()
            );
        }
        if !source.join("index.json").is_file() {
            bail!("{} is no OCI layout: it has no index.json", source.display());
        }
        let dir = source.to_owned();
        tokio::task::spawn_blocking(move || {
            let mut sink = Sink(out.clone());
            let mut tar = tar::Builder::new(io::BufWriter::with_capacity(PIECE, &mut sink));
            tar.follow_symlinks(false);
            let done = tar.append_dir_all(".", &dir).and_then(|()| tar.into_inner()?.flush());
            if let Err(error) = done {
                let _ = out.blocking_send(Err(error));
            }
        });
    } else {
        let file: Box<dyn Read + Send> = if source.as_os_str() == "-" {
            Box::new(io::stdin())
        } else {
            Box::new(File::open(source).with_context(|| format!("cannot read {}", source.display()))?)
        };
        tokio::task::spawn_blocking(move || read(file, &out));
    }
    let next = |mut pieces: mpsc::Receiver<_>| async move { pieces.recv().await.map(|p| (p, pieces)) };
    Ok(stream::unfold(pieces, next).boxed())
}

fn read(mut file: Box<dyn Read + Send>, out: &mpsc::Sender<io::Result<Bytes>>) {
    loop {
        let mut piece = vec![0; PIECE];
        let sent = match file.read(&mut piece) {
            Ok(0) => return,
            Ok(n) => {
                piece.truncate(n);
                out.blocking_send(Ok(piece.into()))
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(e) => {
                let _ = out.blocking_send(Err(e));
                return;
            }
        };
        if sent.is_err() {
            return;
        }
    }
}

/// Sends what is written to it.
struct Sink(mpsc::Sender<io::Result<Bytes>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.0.blocking_send(Ok(Bytes::copy_from_slice(bytes)));
        sent.map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the store does not read on"))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
