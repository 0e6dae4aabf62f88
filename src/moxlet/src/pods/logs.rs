//! `moxlet logs`: a container's log, by `moxlet.host.v1`, since CRI has only the name of a file.

use std::{
    io::Write as _,
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use moxlet_cri::{host, v1};

use super::{
    connect::Agent,
    model::{self, container_name},
    run,
};
use crate::{duration::Span, socket::SocketArgs};

/// What `moxlet logs` takes.
#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
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
    /// Go on as the log grows
    #[arg(long, short)]
    follow: bool,
    /// The log of the container before its last restart
    #[arg(long, short)]
    previous: bool,
    /// Only so many lines from the end
    #[arg(long, value_name = "N")]
    tail: Option<u64>,
    /// Only what is younger, such as 5m
    #[arg(long, value_name = "AGE")]
    since: Option<Span>,
    /// The time before each line
    #[arg(long)]
    timestamps: bool,
}

/// Prints it.
///
/// # Errors
/// There is no such container, or the agent cannot be reached.
pub(crate) fn logs(args: &LogsArgs) -> Result<ExitCode> {
    run(async {
        let mut agent = Agent::connect(&args.socket).await?;
        let pods = model::pods(&mut agent).await?;
        let pod = model::find(&pods, &args.pod, args.namespace.as_deref())?;
        let attempts = pod.container(args.container.as_deref(), |text| eprintln!("{text}"))?;
        let container = chosen(attempts, args.previous)?;
        let request = request(args, container, SystemTime::now());
        let answer = agent.host.stream_logs(request).await.map_err(|e| agent.failed(&e))?;
        let (mut chunks, mut out) = (answer.into_inner(), std::io::stdout());
        while let Some(chunk) = chunks.message().await.map_err(|e| agent.failed(&e))? {
            match out.write_all(&chunk.data).and_then(|()| out.flush()) {
                // `| head` has what it wanted.
                Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => break,
                written => written.context("cannot write to standard output")?,
            }
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// The attempt whose log is wanted.
fn chosen(attempts: &[v1::ContainerStatus], previous: bool) -> Result<&v1::ContainerStatus> {
    match attempts {
        [newest, ..] if !previous => Ok(newest),
        [_, before, ..] => Ok(before),
        [newest] => bail!("there is no container {:?} before the last restart", container_name(newest)),
        [] => bail!("there is no container"),
    }
}

fn request(args: &LogsArgs, container: &v1::ContainerStatus, now: SystemTime) -> host::StreamLogsRequest {
    let since = args.since.map(|age| {
        let at = now.checked_sub(age.0).and_then(|t| t.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
        i64::try_from(at.as_nanos()).unwrap_or(i64::MAX)
    });
    host::StreamLogsRequest {
        container_id: container.id.clone(),
        follow: args.follow,
        tail_lines: args.tail,
        since_nanos: since,
        timestamps: args.timestamps,
        ..host::StreamLogsRequest::default()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use moxlet_cri::v1::ContainerState;

    use super::{super::model::tests::container, *};

    #[test]
    fn the_previous_log_is_that_of_the_attempt_before() {
        let both = [
            container("a", 1, ContainerState::ContainerRunning),
            container("a", 0, ContainerState::ContainerExited),
        ];
        assert_eq!(chosen(&both, false).unwrap().id, "a-1");
        assert_eq!(chosen(&both, true).unwrap().id, "a-0");
        assert!(chosen(&both[..1], true).unwrap_err().to_string().contains("before the last restart"));
    }
}
