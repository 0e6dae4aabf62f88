//! What happens behind a URL of the streaming server once its client is there: a command, a container's own streams, or
//! forwarded ports. A session that is dropped closes its descriptors, which is how its process learns that nobody is left.

use std::{sync::Arc, time::Duration};

use http::Uri;
use moxlet_cri::v1;
use moxlet_errors::chain;
use moxlet_init_proto::{AsyncFile, ExecRequest, client::Client};
use moxlet_stream::{
    Forward, Offer, Outcome, PortForward, RemoteCommand, StreamReader, StreamWriter, TerminalSize,
};
use tokio::{
    io::AsyncWriteExt,
    sync::{OwnedSemaphorePermit, mpsc},
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::{copy, running};
use crate::{
    error::{Error, Result},
    state::{Container, State},
};

/// A client says its terminal's size at once; a command that asks for it early should not be told 0x0.
const FIRST_SIZE: Duration = Duration::from_millis(50);
/// How long the end of a container may take to be known after the end of its output.
const END_KNOWN: Duration = Duration::from_secs(2);

type Streams<T> = moxlet_stream::Result<T>;

fn lost(what: &str, error: &moxlet_stream::Error) -> Error {
    Error::io(format!("{what}: the client's streams"), std::io::Error::other(error.to_string()))
}

/// The streams that a client of this command opens.
pub(super) fn exec_offer(request: &v1::ExecRequest) -> Offer {
    Offer { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr, tty: request.tty }
}

/// The streams that who attaches so opens.
pub(super) fn attach_offer(request: &v1::AttachRequest) -> Offer {
    Offer { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr, tty: request.tty }
}

/// The client's side of a command's outputs.
type Writers = [Option<StreamWriter>; 2];

/// Ends outputs that get nothing: dropped without, they would be reset, as if something was lost.
async fn end(writers: Writers) -> Result<()> {
    for mut writer in writers.into_iter().flatten() {
        writer.shutdown().await.map_err(|e| Error::io("the client has gone", e))?;
    }
    Ok(())
}

/// A command that runs.
struct Started {
    client: Client,
    exec_id: String,
    ends: moxlet_init_proto::client::Streams,
    terminal: Option<AsyncFile>,
    slot: OwnedSemaphorePermit,
}

/// Runs a command for a client.
pub(super) async fn exec(
    state: Arc<State>,
    request: v1::ExecRequest,
    streams: impl Future<Output = Streams<RemoteCommand>> + Send,
) -> Result<()> {
    let RemoteCommand { stdin, stdout, stderr, mut resize, status } =
        streams.await.map_err(|e| lost("exec", &e))?;
    let outcome = match begin(&state, request, &mut resize).await {
        Ok(started) => run(started, stdin, [stdout, stderr], resize).await?,
        Err(error) => {
            end([stdout, stderr]).await?;
            Outcome::Error(format!("error executing command in container: {}", chain(&error)))
        }
    };
    status.finish(outcome).await.map_err(|e| lost("exec", &e))
}

/// Starts a command.
async fn begin(
    state: &State,
    request: v1::ExecRequest,
    resize: &mut mpsc::Receiver<TerminalSize>,
) -> Result<Started> {
    let container = running(state, &request.container_id)?;
    let sandbox = state.sandbox(container.sandbox.as_str())?;
    let (client, slot) = (sandbox.client()?, sandbox.exec_slot()?);
    let mut ask = ExecRequest {
        id: request.container_id,
        args: request.cmd,
        tty: request.tty,
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        ..ExecRequest::default()
    };
    if ask.tty
        && let Ok(Some(size)) = timeout(FIRST_SIZE, resize.recv()).await
    {
        (ask.width, ask.height) = (size.width, size.height);
    }
    let moxlet_init_proto::client::Exec { exec_id, streams: mut ends } = client.exec(ask).await?;
    let terminal = ends.terminal.take();
    if let Some(terminal) = &terminal {
        let clone = || terminal.try_clone().map_err(|e| Error::io("the command's terminal", e));
        ends.stdout = Some(clone()?);
        ends.stdin = request.stdin.then(clone).transpose()?;
    }
    Ok(Started { client, exec_id, ends, terminal, slot })
}

/// Carries a command's streams to its end; all its output has been handed on then.
///
/// # Errors
/// The client has gone.
async fn run(
    started: Started,
    stdin: Option<StreamReader>,
    [stdout, stderr]: Writers,
    mut resize: mpsc::Receiver<TerminalSize>,
) -> Result<Outcome> {
    let Started { client, exec_id, ends, terminal, slot: _slot } = started;
    let over = CancellationToken::new();
    let wait = async {
        let code = client.wait_exec(&exec_id).await;
        over.cancel();
        Ok(code)
    };
    let ended = async {
        tokio::try_join!(
            wait,
            copy::output(ends.stdout, stdout, &over),
            copy::output(ends.stderr, stderr, &over)
        )
    };
    let sizes = async {
        while let Some(size) = resize.recv().await {
            if let Some(terminal) = &terminal
                && let Err(error) = terminal.resize(size.width, size.height)
            {
                debug!(%error, "a terminal cannot be resized");
            }
        }
    };
    let feed = copy::input(stdin, ends.stdin);
    let (code, (), ()) = beside(ended, feed, sizes)
        .await
        .map_err(|e| Error::io("exec: the client does not take the output", e))?;
    Ok(copy::outcome(code))
}

/// Waits for `main` while the two others run, which may end before, or never.
async fn beside<T>(
    main: impl Future<Output = T>,
    feed: impl Future<Output = ()>,
    sizes: impl Future<Output = ()>,
) -> T {
    tokio::select! {
        ended = main => ended,
        // The branch for them is never taken: the inner future does not end.
        () = async { tokio::join!(feed, sizes); std::future::pending().await } => std::future::pending().await,
    }
}

/// Attaches a client to a container's own streams.
pub(super) async fn attach(
    state: Arc<State>,
    request: v1::AttachRequest,
    streams: impl Future<Output = Streams<RemoteCommand>> + Send,
) -> Result<()> {
    let RemoteCommand { stdin, stdout, stderr, resize, status } =
        streams.await.map_err(|e| lost("attach", &e))?;
    let attached = async {
        let container = running(&state, &request.container_id)?;
        let client = state.sandbox(container.sandbox.as_str())?.client()?;
        let want_stderr = stderr.is_some() && !container.record().tty;
        let ends =
            client.attach(container.id.as_str(), stdin.is_some(), stdout.is_some(), want_stderr).await?;
        Ok::<_, Error>((container, client, ends))
    };
    let outcome = match attached.await {
        Ok((container, client, ends)) => {
            follow(&container, &client, ends, stdin, [stdout, stderr], resize).await?
        }
        Err(error) => {
            end([stdout, stderr]).await?;
            Outcome::Error(format!("error attaching to container: {}", chain(&error)))
        }
    };
    status.finish(outcome).await.map_err(|e| lost("attach", &e))
}

/// Carries a container's streams until it ends.
///
/// # Errors
/// The client has gone.
async fn follow(
    container: &Container,
    client: &Client,
    ends: moxlet_init_proto::client::Streams,
    stdin: Option<StreamReader>,
    [stdout, stderr]: Writers,
    mut resize: mpsc::Receiver<TerminalSize>,
) -> Result<Outcome> {
    let tty = container.record().tty;
    let over = CancellationToken::new();
    let feed = copy::input(stdin, ends.stdin);
    let sizes = async {
        while let Some(size) = resize.recv().await {
            let id = container.id.as_str();
            if tty && let Err(error) = client.resize_tty(id, None, size.width, size.height).await {
                debug!(error = chain(&error), "a terminal cannot be resized");
            }
        }
    };
    let watch = async {
        container.ended().await;
        over.cancel();
    };
    if ends.stdout.is_none() && ends.stderr.is_none() {
        // Input alone: its end is the end.
        tokio::select! {
            () = feed => {}
            () = container.ended() => {}
        }
        end([stdout, stderr]).await?;
        return Ok(Outcome::Success);
    }
    let outputs = async {
        tokio::try_join!(copy::output(ends.stdout, stdout, &over), copy::output(ends.stderr, stderr, &over))
    };
    let others = async {
        tokio::join!(sizes, watch);
    };
    beside(outputs, feed, others)
        .await
        .map_err(|e| Error::io("attach: the client does not take the output", e))?;
    if timeout(END_KNOWN, container.ended()).await.is_ok() {
        return Ok(Outcome::Success);
    }
    let text =
        "the output has ended and the container has not: it closed its output, or the client took too little";
    Ok(Outcome::Error(text.to_owned()))
}

/// The URI with the ports of the request in its query; none where it is good as it is.
pub(super) fn with_ports(uri: &Uri, ports: &[i32]) -> Option<Uri> {
    let asked =
        uri.query().unwrap_or_default().split('&').any(|p| p.starts_with("port=") || p.starts_with("ports="));
    if asked || ports.is_empty() {
        return None;
    }
    let query: Vec<String> = ports.iter().map(|p| format!("port={p}")).collect();
    format!("{}?{}", uri.path(), query.join("&")).parse().ok()
}

/// Forwards ports of a pod for a client, each connection in a task of its own.
pub(super) async fn port_forward(
    state: Arc<State>,
    request: v1::PortForwardRequest,
    streams: impl Future<Output = Streams<PortForward>> + Send,
) -> Result<()> {
    let mut forwards = streams.await.map_err(|e| lost("port-forward", &e))?;
    let sandbox = state.sandbox(&request.pod_sandbox_id)?;
    let client = sandbox.client()?;
    let record = sandbox.record();
    let pod: Arc<str> = format!("{}/{}", record.namespace, record.name).into();
    // Dropped with the session, it ends all connections.
    let mut connections = JoinSet::new();
    while let Some(forward) = forwards.next().await {
        while connections.try_join_next().is_some() {}
        connections.spawn(one(client.clone(), pod.clone(), forward));
    }
    Ok(())
}

async fn one(client: Client, pod: Arc<str>, forward: Forward) {
    let Forward { port, mut data, mut error } = forward;
    let ended = match client.connect_port(port).await {
        Ok(socket) => {
            let _ = socket.set_nodelay(true);
            // Nothing is said of a connection that breaks later: kubectl would give up all others for it.
            if let Err(broken) = moxlet_stream::copy(data, socket).await {
                debug!(port, error = %broken, "a forwarded connection broke");
            }
            error.shutdown().await
        }
        Err(refused) => {
            let text = format!("failed to connect to port {port} in pod {pod}: {refused}");
            let text = format!("error forwarding port {port} to pod {pod}: {text}");
            let _ = error.write_all(text.as_bytes()).await;
            let said = error.shutdown().await;
            let _ = data.shutdown().await;
            said
        }
    };
    if let Err(error) = ended {
        debug!(port, %error, "the client of a forwarded port has gone");
    }
}
