//! `ExecSync`: a command whose output is collected, as probes and lifecycle hooks run it.

use std::{sync::Arc, time::Duration};

use moxlet_cri::v1;
use moxlet_init_proto::{AsyncFile, ExecRequest, client::Client};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{copy, running};
use crate::{
    core::Core,
    error::{Error, Result},
};

/// What is kept of each output, as containerd does: an answer has to fit into a gRPC message.
const MAX_OUTPUT: usize = 16 << 20;
/// How long the output of a command that has ended is read at all: a child that it left may write for ever.
const READ_ON: Duration = Duration::from_secs(5);

/// `ExecSync`.
///
/// The init knows no way to kill a command, so one that takes too long has its streams closed and is left to itself: a command
/// that writes ends by SIGPIPE, one that only sleeps goes on until the container ends.
pub(crate) async fn exec_sync(
    core: &Arc<Core>,
    request: v1::ExecSyncRequest,
) -> Result<v1::ExecSyncResponse> {
    let container = running(core, &request.container_id)?;
    if request.cmd.is_empty() {
        return Err(Error::Invalid("no command is given to execute".to_owned()));
    }
    let client = core.sandbox(container.sandbox.as_str())?.client()?;
    let what = format!("command {:?} in container {}", shown(&request.cmd), container.id);
    let run = run(&client, container.id.to_string(), request.cmd);
    match u64::try_from(request.timeout) {
        Err(_) => Err(Error::Invalid(format!("timeout {} is negative", request.timeout))),
        Ok(0) => run.await,
        Ok(seconds) => timeout(Duration::from_secs(seconds), run)
            .await
            .map_err(|_| Error::Timeout(format!("{what} timed out: timeout {seconds}s exceeded")))?,
    }
}

/// A command for people, cut.
fn shown(command: &[String]) -> String {
    command.join(" ").chars().take(200).collect()
}

async fn run(client: &Client, id: String, args: Vec<String>) -> Result<v1::ExecSyncResponse> {
    let request = ExecRequest { id, args, stdout: true, stderr: true, ..ExecRequest::default() };
    let exec = client.exec(request).await?;
    let over = CancellationToken::new();
    let wait = async {
        let code = client.wait_exec(&exec.exec_id).await;
        over.cancel();
        code
    };
    let (code, stdout, stderr) =
        tokio::join!(wait, collect(exec.streams.stdout, &over), collect(exec.streams.stderr, &over));
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
