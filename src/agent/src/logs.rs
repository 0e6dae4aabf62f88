//! `StreamLogs`: a container's log as `kubectl logs` wants it, read from the CRI files that moxlet-init writes.
//!
//! Blocks are read on the threads that may wait for a disk, one at a time, and handed to the caller through a short queue: a slow
//! caller holds up the reading, never memory. A follower sleeps until the kernel says that something in the log's directory
//! changed; of the host's limited inotify instances none may be left, so it looks now and then anyhow.

mod files;
mod record;
#[cfg(test)]
mod tests;

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use moxlet_cri::host;
use moxlet_init_proto::AsyncFile;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::{io::AsyncReadExt, sync::mpsc, time::sleep};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::debug;

use crate::{
    beneath,
    error::{Error, Result},
    state::{Container, State},
    tasks::{Tasks, blocking},
};
use files::{LogDir, Reader, Step};
use record::{Filter, Stream};

/// Chunks that wait for the caller.
const QUEUE: usize = 4;
/// How often a log is looked at without being told that it changed.
const POLL: Duration = Duration::from_millis(100);
/// The same where the kernel tells.
const CHECK: Duration = Duration::from_secs(1);

/// What the host service streams.
pub(crate) type LogStream = ReceiverStream<std::result::Result<host::LogChunk, Status>>;
type Sender = mpsc::Sender<std::result::Result<host::LogChunk, Status>>;

/// A log and what is wanted of it.
#[derive(Debug)]
struct Job {
    /// A directory that no container can replace.
    base: PathBuf,
    /// The log below it.
    path: PathBuf,
    follow: bool,
    tail: Option<u64>,
    filter: Filter,
}

/// `StreamLogs`. To be called on the runtime.
///
/// # Errors
/// There is no such container, or the request makes no sense; what happens later is in the stream.
pub(crate) fn stream(
    state: Arc<State>,
    tasks: &Tasks,
    logs: &Path,
    request: host::StreamLogsRequest,
) -> Result<LogStream> {
    let host::StreamLogsRequest { container_id, log_path, follow, tail_lines: tail, since_nanos, .. } =
        request;
    let mut filter =
        Filter { timestamps: request.timestamps, limit: request.limit_bytes, ..Filter::default() };
    if let Some(nanos) = since_nanos {
        filter.set_since(nanos);
    }
    if let Some(name) = &request.stream {
        let text = || Error::Invalid(format!("stream {name:?} is neither stdout nor stderr"));
        filter.stream = Some(Stream::parse(name.as_bytes()).ok_or_else(text)?);
    }
    let (sender, receiver) = mpsc::channel(QUEUE);
    let (location, container) = if container_id.is_empty() {
        let path = beneath::relative(&log_path).map_err(|e| Error::Invalid(format!("log_path: {e}")))?;
        (Some((logs.to_owned(), path)), None)
    } else {
        let container = state.container(&container_id)?;
        (location(&state, &container)?, Some(container))
    };
    let Some((base, path)) = location else { return Ok(ReceiverStream::new(receiver)) };
    let job = Job { base, path, follow, tail, filter };
    let over = CancellationToken::new();
    let stop = tasks.stop.clone();
    tasks.spawn(async move {
        tokio::select! {
            () = stop.cancelled() => {
                let _ = sender.try_send(Err(Status::unavailable("the agent is stopping")));
            }
            () = sender.closed() => {}
            () = run(job, &over, &sender) => {}
            () = watch(&state, container, &over) => {}
        }
    });
    Ok(ReceiverStream::new(receiver))
}

/// Where a container's log is: a trusted directory and the path below it, which the container's root may change.
fn location(state: &State, container: &Container) -> Result<Option<(PathBuf, PathBuf)>> {
    let Some(file) = container.record().log_file else { return Ok(None) };
    let base = state.sandbox(container.sandbox.as_str())?.record().log_directory;
    let below = base.and_then(|base| Some((base.clone(), file.strip_prefix(&base).ok()?.to_owned())));
    match below {
        Some(location) => Ok(Some(location)),
        None => Err(Error::State(format!("log {} is not in the pod's log directory", file.display()))),
    }
}

/// Says when nothing more will be written; does not end.
async fn watch(state: &State, container: Option<Arc<Container>>, over: &CancellationToken) {
    if let Some(container) = container {
        // One that is removed before it was started never ends.
        let removed = async {
            while state.container(container.id.as_str()).is_ok() {
                sleep(CHECK).await;
            }
        };
        tokio::select! {
            () = container.ended() => {}
            () = removed => {}
        }
    }
    over.cancel();
    std::future::pending::<()>().await;
}

/// Sends a log; an error as its last word.
async fn run(job: Job, over: &CancellationToken, sender: &Sender) {
    let shown = job.base.join(&job.path);
    if let Err(error) = send(job, over, sender).await {
        let error = match error {
            Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Error::NotFound(format!("log {}", shown.display()))
            }
            Error::Io { source, .. } => Error::io(format!("log {}", shown.display()), source),
            other => other,
        };
        let _ = sender.send(Err(error.into())).await;
    }
}

async fn send(job: Job, over: &CancellationToken, sender: &Sender) -> Result<()> {
    let Job { base, path, follow, tail, filter } = job;
    let dir = loop {
        let ended = over.is_cancelled();
        match open(&base, &path).await {
            // A follower may come before the container's first word.
            Err(Error::Io { source, .. }) if follow && !ended && source.kind() == io::ErrorKind::NotFound => {
                pause(POLL, over).await;
            }
            other => break other?,
        }
    };
    let mut wake = Wake::new(dir.dir());
    let gone = {
        let sender = sender.clone().downgrade();
        move || sender.upgrade().is_none_or(|s| s.is_closed())
    };
    let mut reader = blocking(move || {
        let mut reader = Reader::new(dir, filter, follow).map_err(|e| Error::io("log", e))?;
        if reader.is_empty() && !follow {
            return Err(Error::io("log", io::Error::from(io::ErrorKind::NotFound)));
        }
        if let Some(count) = tail {
            reader.tail(count, &gone).map_err(|e| Error::io("log", e))?;
        }
        Ok(reader)
    })
    .await?;
    loop {
        // Asked before reading: what is written before a container's end is known has been read after it.
        let last = over.is_cancelled();
        let step;
        (reader, step) = blocking(move || {
            let step = reader.step().map_err(|e| Error::io("log", e))?;
            Ok((reader, step))
        })
        .await?;
        match step {
            Step::More(data) => {
                if !say(sender, data).await {
                    return Ok(());
                }
            }
            Step::Idle if !last => wake.changed(over).await,
            Step::Idle | Step::Done => {
                say(sender, reader.finish()).await;
                return Ok(());
            }
        }
    }
}

async fn open(base: &Path, path: &Path) -> Result<LogDir> {
    let (base, path) = (base.to_owned(), path.to_owned());
    blocking(move || LogDir::open(&base, &path).map_err(|e| Error::io("log", e))).await
}

/// Sends what there is; `false` when nobody wants it.
async fn say(sender: &Sender, data: Vec<u8>) -> bool {
    data.is_empty() || sender.send(Ok(host::LogChunk { data })).await.is_ok()
}

async fn pause(time: Duration, over: &CancellationToken) {
    tokio::select! {
        () = over.cancelled() => {}
        () = sleep(time) => {}
    }
}

/// Wakes a follower.
struct Wake(Option<AsyncFile>);

impl Wake {
    fn new(dir: &OwnedFd) -> Self {
        let watched = (|| {
            let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
            let flags = WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::DELETE;
            // Through the descriptor: the path may lead elsewhere by now.
            inotify::add_watch(&watch, format!("/proc/self/fd/{}", dir.as_raw_fd()), flags)?;
            AsyncFile::new(watch)
        })();
        Self(watched.inspect_err(|error| debug!(%error, "a log is polled")).ok())
    }

    /// Waits until something has changed, or may have.
    async fn changed(&mut self, over: &CancellationToken) {
        let Some(file) = &mut self.0 else { return pause(POLL, over).await };
        // What has changed is not of interest: the files are looked at anyhow.
        let mut events = [0; 4096];
        let read = tokio::select! {
            () = pause(CHECK, over) => return,
            read = file.read(&mut events) => read,
        };
        if read.is_err() {
            self.0 = None;
        }
    }
}
