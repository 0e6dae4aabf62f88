//! The task that brings one pod's status to the API server, newest only, and sees that it stays there.

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::PodStatus;
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tracing::{debug, warn};

use super::{
    Inputs, Progress, Shown,
    compare::{Verdict, agree, judge},
    patch::patch,
};
use crate::{
    cluster::Cluster,
    error::{Error, chain},
};

/// The pause after a first fault; each further one doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// The longest pause after a fault.
const LAST_PAUSE: Duration = Duration::from_secs(10);
/// The pause after a rejection: only somebody's change helps.
const REJECTED_PAUSE: Duration = Duration::from_secs(60);
/// How long a patch may take.
const DEADLINE: Duration = Duration::from_secs(30);

/// What was sent last, and what came of it.
struct Sent {
    status: Arc<PodStatus>,
    /// The object as it was afterwards; none: it is gone.
    answer: Option<Shown>,
    at: Instant,
}

/// What is to be done next.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Patch,
    /// All agree; look again after so long, or at the next change.
    Rest(Option<Duration>),
}

fn next(inputs: &Inputs, sent: Option<&Sent>) -> Step {
    let Some(wanted) = inputs.wanted.as_ref().filter(|_| !inputs.target.uid.is_empty()) else {
        return Step::Rest(None);
    };
    match (sent, &inputs.shown) {
        // Before the first patch of this process the copy that is shown is all that is known.
        (None, Some(shown)) if agree(&shown.status, wanted) => Step::Rest(None),
        (None, _) => Step::Patch,
        (Some(sent), _) if sent.status != *wanted => Step::Patch,
        (Some(Sent { answer: Some(answer), at, .. }), Some(shown)) => {
            match judge(shown, answer, at.elapsed()) {
                Verdict::Same => Step::Rest(None),
                Verdict::Wait(left) => Step::Rest(Some(left)),
                Verdict::Differs => Step::Patch,
            }
        }
        (Some(_), _) => Step::Rest(None),
    }
}

/// Why the API server will not accept this, whenever it is asked.
fn rejection(error: &Error) -> Option<String> {
    match error {
        Error::Api { source, .. } => match source.as_ref() {
            kube::Error::Api(status) if matches!(status.code, 400 | 403 | 405 | 413 | 422) => {
                Some(format!("{} ({}, {})", status.message, status.reason, status.code))
            }
            _ => None,
        },
        _ => None,
    }
}

/// Works until the publisher is gone.
pub(super) async fn run(
    cluster: Arc<dyn Cluster>,
    mut inputs: watch::Receiver<Inputs>,
    progress: watch::Sender<Progress>,
) {
    let mut uid = inputs.borrow().target.uid.clone();
    let mut sent: Option<Sent> = None;
    let mut pause = FIRST_PAUSE;
    loop {
        let now = inputs.borrow_and_update().clone();
        if uid != now.target.uid {
            uid.clone_from(&now.target.uid);
            sent = None;
        }
        let rest = match next(&now, sent.as_ref()) {
            Step::Rest(rest) => {
                progress.send_replace(Progress { number: now.number, rejected: None });
                rest
            }
            Step::Patch => match send(cluster.as_ref(), &now).await {
                Ok(done) => {
                    sent = Some(done);
                    pause = FIRST_PAUSE;
                    continue;
                }
                Err(Failure::Rejected(why)) => {
                    warn!(pod = now.target.name, why, "the API server refuses the status of a pod");
                    progress.send_replace(Progress { number: now.number, rejected: Some(why) });
                    Some(REJECTED_PAUSE)
                }
                Err(Failure::Fault(why)) => {
                    warn!(pod = now.target.name, error = why, "status not accepted, will try again");
                    sleep(pause).await;
                    pause = (pause * 2).min(LAST_PAUSE);
                    continue;
                }
            },
        };
        let again = async {
            match rest {
                Some(rest) => sleep(rest).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = inputs.changed() => if changed.is_err() { return },
            () = again => {}
        }
    }
}

enum Failure {
    Rejected(String),
    Fault(String),
}

async fn send(cluster: &dyn Cluster, now: &Inputs) -> Result<Sent, Failure> {
    let status = now.wanted.clone().unwrap_or_default();
    let target = &now.target;
    let body = patch(&target.uid, &status);
    let answer = match timeout(DEADLINE, cluster.patch_status(&target.namespace, &target.name, &body)).await {
        Ok(Ok(answer)) => answer.map(|pod| Shown::of(&pod)),
        Ok(Err(error)) => {
            return Err(match rejection(&error) {
                Some(why) => Failure::Rejected(why),
                None => Failure::Fault(chain(&error)),
            });
        }
        Err(_) => return Err(Failure::Fault(format!("no answer within {} s", DEADLINE.as_secs()))),
    };
    if answer.as_ref().is_some_and(|a| a.uid != target.uid) {
        debug!(pod = target.name, "another pod of this name has taken its place");
    }
    Ok(Sent { status, answer: answer.filter(|a| a.uid == target.uid), at: Instant::now() })
}
