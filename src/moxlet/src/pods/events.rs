//! `moxlet events`: what happened to the pods of this host. CRI keeps no history: what is past is read from the times of sandboxes and
//! containers that are still there; what others did to CTs the agent remembers. With `--watch` both go on as they happen.

use std::{
    process::ExitCode,
    time::{Duration, SystemTime},
};

use anyhow::Result;
use clap::Args;
use moxlet_cri::{
    host,
    v1::{self, ContainerEventType},
};

use super::{
    connect::Agent,
    model::{self, Pod, attempt, container_name},
    run,
    table::{age, print, table, time},
};
use crate::socket::SocketArgs;

/// How long nothing comes after the notices that the agent remembers.
const QUIET: Duration = Duration::from_millis(300);

/// What `moxlet events` takes.
#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    #[command(flatten)]
    socket: SocketArgs,
    /// Go on with what happens from now on
    #[arg(long, short)]
    watch: bool,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Event {
    /// Nanoseconds of UNIX time.
    at: i64,
    warning: bool,
    reason: String,
    object: String,
    message: String,
}

/// Prints them.
///
/// # Errors
/// The agent cannot be reached or goes away.
pub(crate) fn events(args: &EventsArgs) -> Result<ExitCode> {
    run(async {
        let mut agent = Agent::connect(&args.socket).await?;
        // Subscribed first, so that nothing falls between what is past and what comes.
        let live = if args.watch {
            let request = v1::GetEventsRequest {};
            let answer = agent.runtime.get_container_events(request).await.map_err(|e| agent.failed(&e))?;
            Some(answer.into_inner())
        } else {
            None
        };
        let request = host::StreamNoticesRequest { since_ns: 0 };
        let answer = agent.host.stream_notices(request).await.map_err(|e| agent.failed(&e))?;
        let mut notices = answer.into_inner();
        let pods = model::pods(&mut agent).await?;
        let mut all: Vec<_> = pods.iter().flat_map(past).collect();
        while let Ok(next) = tokio::time::timeout(QUIET, notices.message()).await {
            match next.map_err(|e| agent.failed(&e))? {
                Some(notice) => all.push(of_notice(notice)),
                None => break,
            }
        }
        all.sort_by_key(|e| e.at);
        print(&rows(&all, SystemTime::now()))?;
        let Some(mut live) = live else { return Ok(ExitCode::SUCCESS) };
        loop {
            let event = tokio::select! {
                next = live.message() => next.map_err(|e| agent.failed(&e))?.map(of_container),
                next = notices.message() => next.map_err(|e| agent.failed(&e))?.map(of_notice),
            };
            let Some(event) = event else { return Ok(ExitCode::SUCCESS) };
            print(&line(&event))?;
        }
    })
}

/// What the times of a pod and its containers tell.
fn past(pod: &Pod) -> Vec<Event> {
    let event = |at: i64, reason: &str, object: String, message: String| Event {
        at,
        warning: false,
        reason: reason.to_owned(),
        object,
        message,
    };
    let object = format!("pod/{}", pod.full_name());
    let sandbox = format!("sandbox {}", pod.sandbox.id);
    let mut all = vec![event(pod.sandbox.created_at, "SandboxCreated", object.clone(), sandbox)];
    for container in pod.containers.iter().flatten() {
        let what = format!("container {} (attempt {})", container_name(container), attempt(container));
        all.push(event(container.created_at, "Created", object.clone(), what.clone()));
        all.push(event(container.started_at, "Started", object.clone(), what.clone()));
        let ended = format!("{what}: exit status {} {}", container.exit_code, container.reason);
        let mut exit = event(container.finished_at, "Exited", object.clone(), ended.trim_end().to_owned());
        exit.warning = container.exit_code != 0;
        all.push(exit);
    }
    all.retain(|e| e.at > 0);
    all
}

fn of_notice(notice: host::Notice) -> Event {
    let object = if notice.pod_name.is_empty() {
        "host".to_owned()
    } else {
        format!("pod/{}/{}", notice.pod_namespace, notice.pod_name)
    };
    Event {
        at: notice.at_ns,
        warning: notice.warning,
        reason: notice.reason,
        object,
        message: notice.message,
    }
}

fn of_container(event: v1::ContainerEventResponse) -> Event {
    let reason = match event.container_event_type() {
        ContainerEventType::ContainerCreatedEvent => "Created",
        ContainerEventType::ContainerStartedEvent => "Started",
        ContainerEventType::ContainerStoppedEvent => "Exited",
        ContainerEventType::ContainerDeletedEvent => "Deleted",
    };
    let metadata = event.pod_sandbox_status.and_then(|s| s.metadata).unwrap_or_default();
    let found = event.containers_statuses.iter().find(|c| c.id == event.container_id);
    let message = found.map_or_else(
        || event.container_id.clone(),
        |c| format!("container {} (attempt {})", container_name(c), attempt(c)),
    );
    Event {
        at: event.created_at,
        warning: false,
        reason: reason.to_owned(),
        object: format!("pod/{}/{}", metadata.namespace, metadata.name),
        message,
    }
}

const fn kind(event: &Event) -> &'static str {
    if event.warning { "Warning" } else { "Normal" }
}

fn rows(events: &[Event], now: SystemTime) -> String {
    let row = |e: &Event| {
        let [reason, object, message] = [&e.reason, &e.object, &e.message].map(Clone::clone);
        vec![age(e.at, now), kind(e).to_owned(), reason, object, message]
    };
    let rows: Vec<_> = events.iter().map(row).collect();
    table(&["LAST SEEN", "TYPE", "REASON", "OBJECT", "MESSAGE"], &rows)
}

/// An event that comes later has no column to line up with.
fn line(e: &Event) -> String {
    format!(
        "{}   {}   {}   {}   {}\n",
        time(e.at).unwrap_or_default(),
        kind(e),
        e.reason,
        e.object,
        e.message
    )
}

#[cfg(test)]
mod tests {
    use moxlet_cri::v1::ContainerState;

    use super::{super::model::tests, *};

    #[test]
    fn what_is_past_is_read_from_what_is_there() {
        let mut ended = tests::container("main", 0, ContainerState::ContainerExited);
        (ended.created_at, ended.started_at, ended.finished_at) = (20, 30, 40);
        (ended.exit_code, ended.reason) = (3, "Error".to_owned());
        let mut pod = tests::pod("default", "web", vec![ended]);
        pod.sandbox.created_at = 10;
        let all: Vec<_> = past(&pod).into_iter().map(|e| (e.at, e.reason, e.warning)).collect();
        let expected = [
            (10, "SandboxCreated", false),
            (20, "Created", false),
            (30, "Started", false),
            (40, "Exited", true),
        ];
        assert_eq!(all, expected.map(|(at, reason, warning)| (at, reason.to_owned(), warning)));
    }
}
