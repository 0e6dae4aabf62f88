//! A container's image: there by its pull policy, with the kubelet's reasons and events (its `images` package).
//!
//! The agent knows what is here, who may have it and which credentials fit; the node knows the pod, waits after failures,
//! and says what goes on.

use std::time::{Duration, Instant};

use futures::{StreamExt, stream::BoxStream};
use k8s_openapi::api::core::v1::{Container, Pod};
use moxlet_cri::{
    host::{self, image_pull_update::Update},
    v1,
};
use tonic::Code;

use super::{
    act::{Held, words},
    images::{self, Policy},
    worker::{Desired, OBJECTS_DEADLINE, Worker},
};
use crate::{
    error::{Error, Result},
    events::Kind,
};

/// `ErrRegistryUnavailable` of k8s.io/cri-api, the beginning of a text.
const REGISTRY_UNAVAILABLE: &str = "RegistryUnavailable";
/// After how long a pull is worth a first word; each further one comes after twice as long.
const FIRST_WORD: Duration = Duration::from_secs(30);
/// How long a name that is none waits; only a change of the pod helps.
const INVALID: Duration = Duration::from_secs(60);

/// How a pull failed: the reason that the container waits with, and the message.
fn failure(image: &str, error: &Error) -> (&'static str, String) {
    let said = words(error);
    match said.strip_prefix(REGISTRY_UNAVAILABLE) {
        Some(rest) => {
            let text = format!("image pull failed for {image} because the registry is unavailable{rest}");
            (REGISTRY_UNAVAILABLE, text)
        }
        None => ("ErrImagePull", format!("failed to pull and unpack image \"{image}\": {said}")),
    }
}

fn code(error: &Error) -> Option<Code> {
    match error {
        Error::Agent { status, .. } => Some(status.code()),
        _ => None,
    }
}

/// A pull as a text: how much of all layers has come.
fn progress_text(image: &str, progress: &host::ImagePullProgress) -> Option<String> {
    let (mut done, mut all) = (0_u64, 0_u64);
    for layer in &progress.layers {
        all = all.saturating_add(layer.size_bytes);
        done = done.saturating_add(layer.done_bytes.min(layer.size_bytes));
    }
    let percent = (u128::from(done) * 100).checked_div(u128::from(all))?;
    Some(format!("Pulling image \"{image}\": {percent} % ({} of {} MB)", done / 1_000_000, all / 1_000_000))
}

type Updates = BoxStream<'static, Result<host::ImagePullUpdate>>;

impl Worker {
    /// The container's image, pulled where its policy says so.
    pub(super) async fn image(&mut self, pod: &Pod, c: &Container) -> std::result::Result<v1::Image, Held> {
        let name = c.image.as_deref().unwrap_or_default().to_owned();
        let shared = self.shared.clone();
        let mut watch = self.desired.clone();
        // A pod that is deleted does not wait for its image.
        let ensured = tokio::select! {
            ensured = self.ensure(pod, c, &name) => ensured?,
            Ok(_) = async { watch.wait_for(Desired::terminating).await.map(drop) } => {
                return Err(Held::new("ContainerCreating", "", Duration::ZERO));
            }
        };
        let spec = v1::ImageSpec { image: ensured.id, ..v1::ImageSpec::default() };
        let inspect = v1::ImageStatusRequest { image: Some(spec), verbose: false };
        let wait = |message: String| Held::new("ImageInspectError", message, Duration::from_secs(5));
        match shared.agent.image_status(inspect).await {
            Ok(answer) => answer.image.ok_or_else(|| wait(format!("image \"{name}\" is gone again"))),
            Err(e) => Err(wait(format!("Failed to inspect image \"{name}\": {}", words(&e)))),
        }
    }

    /// The pod's pull secrets; those that cannot be had are said.
    async fn pull_secrets(&mut self, pod: &Pod) -> Vec<Vec<u8>> {
        let secrets = images::pull_secrets(self.shared.cluster.as_ref(), pod);
        let Ok((docker_configs, missing)) = tokio::time::timeout(OBJECTS_DEADLINE, secrets).await else {
            let text = "The API server does not answer for the image pull secrets; attempting to pull the image may not succeed.";
            self.emit_event_once(
                pod,
                None,
                Kind::Warning,
                "FailedToRetrieveImagePullSecret",
                text.to_owned(),
            );
            return Vec::new();
        };
        if !missing.is_empty() {
            let text = format!(
                "Unable to retrieve some image pull secrets ({}); attempting to pull the image may not succeed.",
                missing.join(", ")
            );
            self.emit_event_once(pod, None, Kind::Warning, "FailedToRetrieveImagePullSecret", text);
        }
        docker_configs
    }

    async fn ensure(
        &mut self,
        pod: &Pod,
        c: &Container,
        name: &str,
    ) -> std::result::Result<host::ImagePullDone, Held> {
        let shared = self.shared.clone();
        let policy = images::policy(c);
        let waits = self.backoffs.image(name, Instant::now());
        let backing_off = |left: Duration, why: &str| {
            let message = format!("Back-off pulling image \"{name}\"");
            shared.events.pod(pod, Some(&c.name), Kind::Normal, "BackOff", message.clone());
            shared.events.pod(pod, Some(&c.name), Kind::Warning, "Failed", "Error: ImagePullBackOff");
            Held::new("ImagePullBackOff", format!("{message}: {why}"), left)
        };
        if let (Policy::Always, Some((left, why))) = (policy, &waits) {
            return Err(backing_off(*left, why));
        }
        let docker_configs = self.pull_secrets(pod).await;
        // While it waits after a failure, only what is here counts: another pod may have pulled it.
        let asked = if waits.is_some() { Policy::Never } else { policy };
        let request = host::ImageEnsureRequest {
            image: name.to_owned(),
            pull_policy: asked.as_str().to_owned(),
            docker_configs,
        };
        let begun = Instant::now();
        let mut updates = match (shared.agent.ensure_image(request).await, waits) {
            (Ok(updates), _) => updates,
            (Err(e), Some((left, why))) if code(&e) == Some(Code::FailedPrecondition) => {
                return Err(backing_off(left, &why));
            }
            (Err(e), _) => return Err(self.not_begun(pod, c, name, &e)),
        };
        let mut pulls = false;
        match self.follow(pod, c, name, &mut updates, &mut pulls).await {
            Ok(done) => {
                self.backoffs.image_pulled(name);
                let text = arrived(name, &done, begun.elapsed());
                shared.events.pod(pod, Some(&c.name), Kind::Normal, "Pulled", text);
                Ok(done)
            }
            Err(e) if !pulls => Err(self.not_begun(pod, c, name, &e)),
            Err(e) => Err(self.not_pulled(pod, c, name, &e)),
        }
    }

    /// Waits for the end of a pull and says now and then how it gets on; `pulls` tells that there is one.
    async fn follow(
        &self,
        pod: &Pod,
        c: &Container,
        name: &str,
        updates: &mut Updates,
        pulls: &mut bool,
    ) -> Result<host::ImagePullDone> {
        let events = &self.shared.events;
        let (begun, mut next_word) = (Instant::now(), FIRST_WORD);
        while let Some(update) = updates.next().await {
            match update?.update {
                Some(Update::Done(done)) => return Ok(done),
                Some(Update::Progress(progress)) => {
                    if !std::mem::replace(pulls, true) {
                        events.pod(
                            pod,
                            Some(&c.name),
                            Kind::Normal,
                            "Pulling",
                            format!("Pulling image \"{name}\""),
                        );
                    }
                    if begun.elapsed() >= next_word
                        && let Some(text) = progress_text(name, &progress)
                    {
                        events.pod(pod, Some(&c.name), Kind::Normal, "Pulling", text);
                        next_word = begun.elapsed() * 2;
                    }
                }
                None => {}
            }
        }
        Err(Error::AgentAnswer { call: "Ensure", what: "an end" })
    }

    /// The agent did not even begin with a pull.
    fn not_begun(&mut self, pod: &Pod, c: &Container, name: &str, error: &Error) -> Held {
        match code(error) {
            Some(Code::InvalidArgument) => {
                let said = words(error);
                let message = format!(
                    "Failed to apply default image tag \"{name}\": couldn't parse image name \"{name}\": {said}"
                );
                self.emit_event_once(pod, Some(&c.name), Kind::Warning, "InspectFailed", message.clone());
                self.emit_event_once(
                    pod,
                    Some(&c.name),
                    Kind::Warning,
                    "Failed",
                    "Error: InvalidImageName".into(),
                );
                Held::new("InvalidImageName", message, INVALID)
            }
            Some(Code::FailedPrecondition) => {
                let message = words(error);
                self.emit_event_once(pod, Some(&c.name), Kind::Warning, "ErrImageNeverPull", message.clone());
                self.emit_event_once(
                    pod,
                    Some(&c.name),
                    Kind::Warning,
                    "Failed",
                    "Error: ErrImageNeverPull".into(),
                );
                Held::new("ErrImageNeverPull", message, Duration::from_secs(10))
            }
            _ => {
                let message = format!("Failed to inspect image \"{name}\": {}", words(error));
                Held::new("ImageInspectError", message, Duration::from_secs(5))
            }
        }
    }

    /// A pull failed: it waits, each time longer.
    fn not_pulled(&mut self, pod: &Pod, c: &Container, name: &str, error: &Error) -> Held {
        let events = &self.shared.events;
        let (reason, why) = failure(name, error);
        let text = format!("Failed to pull image \"{name}\": {why}");
        events.pod(pod, Some(&c.name), Kind::Warning, "Failed", text);
        events.pod(pod, Some(&c.name), Kind::Warning, "Failed", format!("Error: {reason}"));
        self.backoffs.image_failed(name, format!("{reason}: {why}"), Instant::now());
        // The next pass says that it waits; until then the error itself is shown.
        Held::new(reason, why, Duration::from_secs(1))
    }
}

/// The kubelet's words for an image that a container can have.
fn arrived(name: &str, done: &host::ImagePullDone, took: Duration) -> String {
    if done.present {
        return format!(
            "Container image \"{name}\" already present on machine and can be accessed by the pod"
        );
    }
    let took = format!("{:.3}s", took.as_secs_f64());
    format!(
        "Successfully pulled image \"{name}\" in {took} ({took} including waiting). Image size: {} bytes.",
        done.size_bytes
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn agent(status: tonic::Status) -> Error {
        Error::agent("Ensure")(status)
    }

    #[test]
    fn an_unreachable_registry_is_told_from_other_failures() {
        let away = agent(tonic::Status::unknown("RegistryUnavailable: no route"));
        let (reason, text) = failure("a:1", &away);
        assert_eq!(reason, "RegistryUnavailable");
        assert_eq!(text, "image pull failed for a:1 because the registry is unavailable: no route");
        assert_eq!(failure("a:1", &agent(tonic::Status::not_found("x"))).0, "ErrImagePull");
    }

    #[test]
    fn progress_is_told_once_its_size_is_known() {
        let layer = |size_bytes, done_bytes| host::ImageLayerProgress {
            size_bytes,
            done_bytes,
            ..Default::default()
        };
        assert_eq!(progress_text("a", &host::ImagePullProgress::default()), None);
        let layers = vec![layer(200_000_000, 100_000_000), layer(80_000_000, 20_000_000)];
        let text = progress_text("a", &host::ImagePullProgress { layers }).unwrap();
        assert_eq!(text, "Pulling image \"a\": 42 % (120 of 280 MB)");
    }
}
