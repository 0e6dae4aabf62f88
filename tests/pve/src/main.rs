//! `pve-suite`: runs the suite against an endpoint.

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use moxlet_pve::{Client, Endpoint, Fingerprint, NodeName, StorageId, Token, Trust, Vmid, VolumeId};
use moxlet_tests_pve::{
    recorder::Recorder,
    suite::{self, Setup},
};

/// The Proxmox VE client against any endpoint. It makes containers of its own and removes them; it touches nothing else.
#[derive(Debug, Parser)]
#[command(name = "test pve")]
struct Arguments {
    /// Where the API is, such as `https://pve1.example.org:8006`.
    #[arg(long)]
    url: String,
    /// A file of one line, `user@realm!id=secret`.
    #[arg(long)]
    token_file: PathBuf,
    /// The SHA-256 fingerprint of the server's certificate, as Proxmox VE shows it.
    #[arg(long, conflicts_with = "ca")]
    fingerprint: Option<Fingerprint>,
    /// A PEM file of certificate authorities.
    #[arg(long)]
    ca: Option<PathBuf>,
    /// The node to work on; the first that is online if none is given.
    #[arg(long)]
    node: Option<NodeName>,
    /// The storage for root file systems; the first that may hold them if none is given.
    #[arg(long)]
    storage: Option<StorageId>,
    /// The archive that containers are made from; the smallest template of the node if none is given.
    #[arg(long)]
    template: Option<VolumeId>,
    /// VMIDs that may be used, first and last.
    #[arg(long, default_value = "999900000-999900099", value_parser = range)]
    vmids: (Vmid, Vmid),
}

fn range(text: &str) -> Result<(Vmid, Vmid), String> {
    let (first, last) = text.split_once('-').ok_or("two VMIDs with a dash between them are needed")?;
    let parse = |s: &str| s.trim().parse::<Vmid>().map_err(|e| e.to_string());
    let (first, last) = (parse(first)?, parse(last)?);
    if first > last { Err("the first VMID is above the last".into()) } else { Ok((first, last)) }
}

fn setup(arguments: Arguments) -> Result<Setup, Box<dyn std::error::Error>> {
    let token = std::fs::read_to_string(&arguments.token_file)
        .map_err(|e| format!("{}: {e}", arguments.token_file.display()))?;
    let token: Token = token.parse()?;
    let stranger: Token = format!("{}=00000000-0000-0000-0000-000000000000", token.id()).parse()?;
    let trust = match (arguments.fingerprint, &arguments.ca) {
        (Some(fingerprint), _) => Trust::Fingerprint(fingerprint),
        (None, Some(file)) => {
            Trust::Authorities(std::fs::read(file).map_err(|e| format!("{}: {e}", file.display()))?)
        }
        (None, None) => Trust::System,
    };
    let endpoint = Endpoint::new(&arguments.url, trust)?;
    let recorder = Recorder::default();
    Ok(Setup {
        unchecked: Client::builder(token.clone()).endpoint(endpoint.clone()).build()?,
        client: Client::builder(token).endpoint(endpoint.clone()).observer(recorder.clone()).build()?,
        stranger: Client::builder(stranger).endpoint(endpoint).observer(recorder.clone()).build()?,
        recorder,
        node: arguments.node,
        storage: arguments.storage,
        template: arguments.template,
        vmids: arguments.vmids,
    })
}

#[tokio::main]
async fn main() -> ExitCode {
    let setup = match setup(Arguments::parse()) {
        Ok(setup) => setup,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    // The first call shows whether there is anything to test at all.
    if let Err(error) = setup.client.version().await {
        eprintln!("error: {error}");
        return ExitCode::from(2);
    }
    let summary = suite::run(setup).await;
    if summary.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
