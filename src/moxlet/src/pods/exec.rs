//! `moxlet exec`: a command in a running container. CRI answers with a URL; its streams are fetched from the agent's streaming socket
//! by SPDY, as kubectl does it through the API server.

use std::{io::IsTerminal as _, process::ExitCode};

use anyhow::{Context as _, Result, anyhow, bail};
use bytes::Bytes;
use clap::Args;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Request, StatusCode, Uri, header};
use hyper_util::rt::TokioIo;
use moxlet_cri::{
    host,
    v1::{self, ContainerState},
};
use moxlet_stream::{Offer, StreamReader, client};
use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _},
    net::{TcpStream, UnixStream},
};

use super::{
    connect::Agent,
    model::{self, container_name},
    run, terminal,
};
use crate::socket::SocketArgs;

/// The largest refusal that is read, in bytes.
const MAX_REFUSAL: usize = 64 << 10;

/// What `moxlet exec` takes.
#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    #[command(flatten)]
    socket: SocketArgs,
    /// The pod: NAME, NAMESPACE/NAME, its UID, or the id of its sandbox
    pod: String,
    /// The pod's namespace, where several have one of that name
    #[arg(long, short, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// The container [default: the only one, else the first that runs]
    #[arg(long, short, value_name = "CONTAINER")]
    container: Option<String>,
    /// Pass standard input to the command
    #[arg(long, short = 'i')]
    stdin: bool,
    /// Give the command a terminal
    #[arg(long, short = 't')]
    tty: bool,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs it; its exit status is ours.
///
/// # Errors
/// There is no such running container, the command cannot be started, or the connection was lost.
pub(crate) fn exec(args: &ExecArgs) -> Result<ExitCode> {
    run(async {
        let mut agent = Agent::connect(&args.socket).await?;
        let pods = model::pods(&mut agent).await?;
        let pod = model::find(&pods, &args.pod, args.namespace.as_deref())?;
        let attempts = pod.container(args.container.as_deref(), |text| eprintln!("{text}"))?;
        let container = attempts.first().context("there is no container")?;
        if container.state() != ContainerState::ContainerRunning {
            bail!("container {:?} of pod {} does not run", container_name(container), pod.full_name());
        }
        let offer = Offer { stdin: args.stdin, stdout: true, stderr: !args.tty, tty: args.tty };
        if args.tty && args.stdin && !std::io::stdin().is_terminal() {
            eprintln!("standard input is not a terminal; the command's terminal has no size of it");
        }
        let request = v1::ExecRequest {
            container_id: container.id.clone(),
            cmd: args.command.clone(),
            tty: offer.tty,
            stdin: offer.stdin,
            stdout: offer.stdout,
            stderr: offer.stderr,
        };
        let answer = agent.runtime.exec(request).await.map_err(|e| agent.failed(&e))?;
        let url = answer.into_inner().url;
        let connection = upgraded(&mut agent, &url).await?;
        streams(client::Client::new(connection)?, offer).await
    })
}

/// A connection to the URL, switched to SPDY. The URL is a secret: whoever has it may run the command.
async fn upgraded(
    agent: &mut Agent,
    url: &str,
) -> Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
    let url: Uri = url.parse().map_err(|_| anyhow!("the agent's answer is not a URL"))?;
    let info = agent.host.info(host::InfoRequest {}).await.map_err(|e| agent.failed(&e))?.into_inner();
    let answer = match info.stream_endpoint.strip_prefix("unix://") {
        Some(path) => {
            let stream = UnixStream::connect(path).await;
            post(
                stream.with_context(|| format!("cannot connect to the agent's streaming socket {path}"))?,
                &url,
            )
            .await?
        }
        None => {
            let to = url.authority().context("the agent's answer names no host")?.as_str();
            let stream = TcpStream::connect(to).await;
            post(
                stream.with_context(|| format!("cannot connect to the agent's streaming server {to}"))?,
                &url,
            )
            .await?
        }
    };
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_REFUSAL).collect().await;
        let text = body.map(|b| String::from_utf8_lossy(&b.to_bytes()).trim().to_owned()).unwrap_or_default();
        bail!("the agent's streaming server refused: {status}: {text}");
    }
    Ok(TokioIo::new(hyper::upgrade::on(answer).await.context("the connection was not switched to SPDY")?))
}

async fn post<S>(stream: S, url: &Uri) -> Result<hyper::Response<hyper::body::Incoming>>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .context("the agent's streaming server does not speak HTTP")?;
    // It ends with the connection, whose upgraded half the command's streams hold.
    tokio::spawn(connection.with_upgrades());
    let path = url.path_and_query().map_or("/", |p| p.as_str());
    let request = Request::post(path)
        .header(header::HOST, "agent")
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, "SPDY/3.1")
        .header("X-Stream-Protocol-Version", "v4.channel.k8s.io")
        .body(Empty::<Bytes>::new())?;
    sender.send_request(request).await.context("the agent's streaming server hung up")
}

/// Connects this process's streams with the command's until that ends.
async fn streams(mut client: client::Client, offer: Offer) -> Result<ExitCode> {
    let mut command = client.command(offer).await?;
    let raw = if offer.tty && offer.stdin { terminal::Raw::take()? } else { None };
    let sizes = command.resize.take().map(|to| tokio::spawn(terminal::send_sizes(to)));
    let input = command.stdin.take().map(|mut to| {
        tokio::spawn(async move {
            let _ = tokio::io::copy(&mut tokio::io::stdin(), &mut to).await;
            let _ = to.shutdown().await;
        })
    });
    let output = copied(command.stdout.take(), tokio::io::stdout());
    let errors = copied(command.stderr.take(), tokio::io::stderr());
    let (output, errors) = tokio::join!(output, errors);
    let status = command.status().await;
    for task in [sizes, input].into_iter().flatten() {
        task.abort();
    }
    drop(raw);
    output.and(errors).context("cannot write the command's output")?;
    let code = exit_code(&status?)?;
    client.close().await;
    Ok(code)
}

async fn copied(from: Option<StreamReader>, mut to: impl AsyncWrite + Unpin) -> std::io::Result<()> {
    let Some(mut from) = from else { return Ok(()) };
    tokio::io::copy(&mut from, &mut to).await?;
    to.flush().await
}

/// The `v1.Status` with which a command ends.
#[derive(Debug, Deserialize)]
struct Status {
    status: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    details: Details,
}

#[derive(Debug, Deserialize, Default)]
struct Details {
    #[serde(default)]
    causes: Vec<Cause>,
}

#[derive(Debug, Deserialize)]
struct Cause {
    #[serde(default)]
    reason: String,
    #[serde(default)]
    message: String,
}

/// The exit status of a command by the status that the server wrote.
fn exit_code(text: &str) -> Result<ExitCode> {
    let status: Status = serde_json::from_str(text)
        .map_err(|_| anyhow!("the connection was lost before the command ended"))?;
    if status.status == "Success" {
        return Ok(ExitCode::SUCCESS);
    }
    let code = status.details.causes.iter().find(|c| c.reason == "ExitCode");
    match code.and_then(|c| c.message.parse::<i32>().ok()) {
        // A status over 255 has no exact counterpart here, but must not become success.
        Some(code) => Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))),
        None => bail!("{}", status.message),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_exit_status_is_the_commands() {
        let failure = r#"{"status":"Failure","message":"command terminated with non-zero exit code: 42","reason":"NonZeroExitCode",
            "details":{"causes":[{"reason":"ExitCode","message":"42"}]}}"#;
        assert_eq!(exit_code(failure).unwrap(), ExitCode::from(42));
        assert_eq!(exit_code(r#"{"metadata":{},"status":"Success"}"#).unwrap(), ExitCode::SUCCESS);
        let error = exit_code(r#"{"status":"Failure","message":"no such file: x"}"#).unwrap_err().to_string();
        assert_eq!(error, "no such file: x");
        assert!(exit_code("").unwrap_err().to_string().contains("lost"));
    }
}
