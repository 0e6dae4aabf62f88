//! `ExecSync`: a command whose output is collected, as probes and lifecycle hooks run it.

use std::time::Duration;

use moxlet_cri::v1;
use moxlet_init_proto::{
    AsyncFile, ErrorClass, ExecRequest,
    client::{Client, Streams},
};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::{copy, running};
use crate::{
    error::{Error, Result},
    state::State,
    tasks::Tasks,
};

/// What is kept of each output, as containerd does: an answer has to fit into a gRPC message.
const MAX_OUTPUT: usize = 16 << 20;
/// How long the output of a command that has ended is read at all: a child that it left may write for ever.
const READ_ON: Duration = Duration::from_secs(5);
/// How long a killed command may take to be gone.
const KILLED: Duration = Duration::from_secs(2);

/// `ExecSync`. A command that takes too long, or whose caller has gone, is killed with all of its process group.
pub(crate) async fn exec_sync(
    state: &State,
    tasks: &Tasks,
    request: v1::ExecSyncRequest,
) -> Result<v1::ExecSyncResponse> {
    let container = running(state, &request.container_id)?;
    if request.cmd.is_empty() {
        return Err(Error::Invalid("no command is given to execute".to_owned()));
    }
    let seconds = u64::try_from(request.timeout)
        .map_err(|_| Error::Invalid(format!("timeout {} is negative", request.timeout)))?;
    let sandbox = state.sandbox(container.sandbox.as_str())?;
    let (client, slot) = (sandbox.client()?, sandbox.exec_slot()?);
    let what = format!("command {:?} in container {}", shown(&request.cmd), container.id);
    let gone = CancellationToken::new();
    let _caller = gone.clone().drop_guard();
    let stop = tasks.stop.clone();
    let ask = ExecRequest {
        id: container.id.to_string(),
        args: request.cmd,
        stdout: true,
        stderr: true,
        ..ExecRequest::default()
    };
    tasks
        .whole(async move {
            let _slot = slot;
            let exec = client.exec(ask).await?;
            let limit = async {
                match seconds {
                    0 => std::future::pending().await,
                    seconds => sleep(Duration::from_secs(seconds)).await,
                }
            };
            let error = tokio::select! {
                done = run(&client, &exec.exec_id, exec.streams) => return done,
                () = limit => Error::Timeout(format!("{what} timed out: timeout {seconds}s exceeded")),
                () = gone.cancelled() => Error::State(format!("the caller of {what} has gone")),
                () = stop.cancelled() => Error::Unfit("the agent is stopping".to_owned()),
            };
            kill(&client, &exec.exec_id).await;
            Err(error)
        })
        .await
}

/// Kills a command and waits until it is gone.
async fn kill(client: &Client, exec_id: &str) {
    let killed = async {
        client.signal_exec(exec_id, rustix::process::Signal::KILL.as_raw()).await?;
        client.wait_exec(exec_id).await
    };
    match timeout(KILLED, killed).await {
        Ok(Err(error)) if error.class() != Some(ErrorClass::NotFound) => {
            // An init of an older version: a command that writes ends by SIGPIPE, one that sleeps goes on.
            debug!(exec_id, %error, "a command is left to itself");
        }
        Ok(_) => {}
        Err(_) => debug!(exec_id, "a killed command is not gone yet"),
    }
}

/// A command for people, cut.
fn shown(command: &[String]) -> String {
    command.join(" ").chars().take(200).collect()
}

async fn run(client: &Client, exec_id: &str, streams: Streams) -> Result<v1::ExecSyncResponse> {
    let over = CancellationToken::new();
    let wait = async {
        let code = client.wait_exec(exec_id).await;
        over.cancel();
        code
    };
    let (code, stdout, stderr) =
        tokio::join!(wait, collect(streams.stdout, &over), collect(streams.stderr, &over));
    Ok(v1::ExecSyncResponse { exit_code: copy::exit_code(code)?, stdout, stderr })
}

/// Reads an output to its end and keeps its beginning: a full pipe would stop the command.
async fn collect(from: Option<AsyncFile>, over: &CancellationToken) -> Vec<u8> {
    let mut kept = Vec::new();
    let Some(mut from) = from else { return kept };
    let read = async {
        let mut buffer = vec![0; copy::STEP / 4];
        while let Ok(count) = copy::read(&mut from, &mut buffer, over).await
            && count > 0
        {
            let room = MAX_OUTPUT - kept.len();
            kept.extend_from_slice(&buffer[..count.min(room)]);
        }
    };
    tokio::select! {
        () = read => {}
        () = copy::after(over, READ_ON) => {}
    }
    kept
}
