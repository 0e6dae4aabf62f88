//! `moxlet pods`: the pods of this host, in kubectl's columns.

use std::{process::ExitCode, time::SystemTime};

use anyhow::Result;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::{
    connect::Agent,
    inspect, model,
    model::Pod,
    run, status,
    table::{age, print, table},
};
use crate::socket::SocketArgs;

/// What `moxlet pods` takes.
#[derive(Debug, Args)]
pub(crate) struct PodsArgs {
    #[command(flatten)]
    socket: SocketArgs,
    /// Only pods of this namespace
    #[arg(long, short, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// How the list looks
    #[arg(long, short, value_enum, default_value_t = Look::Table)]
    output: Look,
}

/// How a list of pods looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Look {
    /// For people
    Table,
    /// With CT and images
    Wide,
    /// An array of objects, each as `moxlet inspect` shows it
    Json,
}

/// Lists them.
///
/// # Errors
/// The agent cannot be reached.
pub(crate) fn pods(args: &PodsArgs) -> Result<ExitCode> {
    run(async {
        let mut agent = Agent::connect(&args.socket).await?;
        let mut pods = model::pods(&mut agent).await?;
        pods.retain(|p| args.namespace.as_ref().is_none_or(|n| *n == p.namespace));
        let now = SystemTime::now();
        match args.output {
            Look::Json => {
                let all: Value = pods.iter().map(inspect::pod).collect();
                print(&format!("{all:#}\n"))?;
            }
            _ if pods.is_empty() => eprintln!("No pods found on this host."),
            Look::Table => print(&short(&pods, now))?,
            Look::Wide => print(&wide(&pods, now))?,
        }
        Ok(ExitCode::SUCCESS)
    })
}

const HEAD: [&str; 7] = ["NAMESPACE", "NAME", "READY", "STATUS", "RESTARTS", "AGE", "IP"];

fn row(pod: &Pod, now: SystemTime) -> Vec<String> {
    let ip = if pod.ip().is_empty() { "<none>" } else { pod.ip() };
    vec![
        pod.namespace.clone(),
        pod.name.clone(),
        status::ready(pod),
        status::status(pod),
        status::restarts(pod).to_string(),
        age(pod.sandbox.created_at, now),
        ip.to_owned(),
    ]
}

fn short(pods: &[Pod], now: SystemTime) -> String {
    let rows: Vec<_> = pods.iter().map(|p| row(p, now)).collect();
    table(&HEAD, &rows)
}

fn wide(pods: &[Pod], now: SystemTime) -> String {
    let rows: Vec<_> = pods
        .iter()
        .map(|pod| {
            let image = |c: &moxlet_cri::v1::ContainerStatus| {
                let spec = c.image.as_ref()?;
                let asked = Some(&spec.user_specified_image).filter(|name| !name.is_empty());
                Some(asked.unwrap_or(&spec.image).clone())
            };
            let images: Vec<_> = pod.newest().filter_map(image).collect();
            let mut cells = row(pod, now);
            cells.extend([pod.sandbox.id.clone(), images.join(",")]);
            cells
        })
        .collect();
    table(&[&HEAD[..], &["SANDBOX", "IMAGES"]].concat(), &rows)
}

/// The short facts of a pod, for its JSON.
pub(super) fn summary(pod: &Pod) -> Value {
    json!({"ready": status::ready(pod), "status": status::status(pod), "restarts": status::restarts(pod)})
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use moxlet_cri::v1::{ContainerState, PodSandboxNetworkStatus};

    use super::{
        super::model::tests::{container, pod},
        *,
    };

    #[test]
    fn the_table_is_kubectls() {
        let mut one = pod("default", "web", vec![container("main", 2, ContainerState::ContainerRunning)]);
        one.sandbox.created_at = 1_000_000_000_000_000_000;
        one.sandbox.network =
            Some(PodSandboxNetworkStatus { ip: "10.0.0.2".to_owned(), ..Default::default() });
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000_065);
        assert_eq!(
            short(&[one, pod("kube-system", "dns", vec![])], now),
            "NAMESPACE     NAME   READY   STATUS              RESTARTS   AGE         IP\n\
             default       web    1/1     Running             2          65s         10.0.0.2\n\
             kube-system   dns    0/0     ContainerCreating   0          <unknown>   <none>\n"
        );
    }
}
