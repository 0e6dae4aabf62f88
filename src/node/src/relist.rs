//! A watch that begins with a list again after each fault, and now and then without one.
//!
//! An API server that was restored from a snapshot counts its versions from an earlier one on: a watch that is resumed at a
//! version of before the restoration waits in silence until the server has come as far again. A list of a node's pods costs
//! little; a pod that nobody hears of any more is lost.

use std::{fmt::Debug, time::Duration};

use futures::{
    Stream, StreamExt,
    stream::{self, BoxStream},
};
use kube::{
    Api, Resource,
    runtime::watcher::{self, Event, watcher},
};
use serde::de::DeserializeOwned;
use tokio::time::Instant;

/// The longest that a watch goes on from one list. Connections that end in between are resumed without a list.
const LONGEST: Duration = Duration::from_secs(300);
/// The pause after a first fault; each further one doubles it, up to [`LAST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// The longest pause between two tries.
const LAST_PAUSE: Duration = Duration::from_secs(10);

struct Watch<K: 'static> {
    api: Api<K>,
    config: watcher::Config,
    longest: Duration,
    /// What goes on from the last list, and until when.
    current: Option<(BoxStream<'static, watcher::Result<Event<K>>>, Instant)>,
    pause: Duration,
    failed: bool,
}

/// The objects of an API by their events: a list, then changes; after a fault, and at least every five minutes, a list again.
/// Faults are passed on; the stream itself does not end.
pub(crate) fn watch<K>(
    api: Api<K>,
    config: watcher::Config,
) -> impl Stream<Item = watcher::Result<Event<K>>> + Send + 'static
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    watch_for(api, config, LONGEST)
}

fn watch_for<K>(
    api: Api<K>,
    config: watcher::Config,
    longest: Duration,
) -> impl Stream<Item = watcher::Result<Event<K>>> + Send + 'static
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let first = Watch { api, config, longest, current: None, pause: FIRST_PAUSE, failed: false };
    stream::unfold(first, |mut watch| async move {
        if std::mem::take(&mut watch.failed) {
            tokio::time::sleep(watch.pause).await;
            watch.pause = (watch.pause * 2).min(LAST_PAUSE);
        }
        loop {
            let (stream, until) = watch.current.get_or_insert_with(|| {
                let events = watcher(watch.api.clone(), watch.config.clone()).boxed();
                (events, Instant::now() + watch.longest)
            });
            let until = *until;
            match tokio::time::timeout_at(until, stream.next()).await {
                Ok(Some(Ok(event))) => {
                    if matches!(event, Event::InitDone) {
                        watch.pause = FIRST_PAUSE;
                    }
                    return Some((Ok(event), watch));
                }
                Ok(Some(Err(error))) => {
                    watch.current = None;
                    watch.failed = true;
                    return Some((Err(error), watch));
                }
                Ok(None) | Err(_) => watch.current = None,
            }
        }
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use std::{
        convert::Infallible,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
    };

    use http::{Request, Response};
    use k8s_openapi::api::core::v1::Pod;
    use kube::{Client, client::Body};
    use serde_json::json;

    use super::*;

    /// An API server whose lists count upwards and whose watches are refused, or never say a word.
    fn server(lists: Arc<AtomicUsize>, silent: bool) -> Api<Pod> {
        let service = tower::service_fn(move |request: Request<Body>| {
            let lists = lists.clone();
            async move {
                let watches = request.uri().query().unwrap_or_default().contains("watch=");
                if watches && silent {
                    std::future::pending::<()>().await;
                }
                let body = if watches {
                    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 500, "reason": "InternalError", "message": "away"})
                } else {
                    let number = lists.fetch_add(1, Ordering::Relaxed);
                    let pod = json!({"metadata": {"name": format!("pod-{number}"), "namespace": "a"}});
                    json!({"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "900"}, "items": [pod]})
                };
                let status = if watches { 500 } else { 200 };
                let answer =
                    Response::builder().status(status).body(Body::from(body.to_string().into_bytes()));
                Ok::<_, Infallible>(answer.unwrap())
            }
        });
        Api::all(Client::new(service, "default"))
    }

    /// Names of the first pods that lists bring.
    async fn listed(api: Api<Pod>, longest: Duration, count: usize) -> Vec<String> {
        let events = watch_for(api, watcher::Config::default(), longest);
        let names = events.filter_map(|event| async {
            match event {
                Ok(Event::InitApply(pod)) => pod.metadata.name,
                _ => None,
            }
        });
        names.take(count).collect().await
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_that_fails_is_followed_by_a_list_and_not_by_a_watch_from_the_old_version() {
        let lists = Arc::new(AtomicUsize::new(0));
        let seen = listed(server(lists, false), Duration::from_secs(3600), 3).await;
        assert_eq!(seen, ["pod-0", "pod-1", "pod-2"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_that_says_nothing_is_given_up_for_a_list() {
        let lists = Arc::new(AtomicUsize::new(0));
        let seen = listed(server(lists, true), Duration::from_secs(300), 3).await;
        assert_eq!(seen, ["pod-0", "pod-1", "pod-2"]);
    }
}
