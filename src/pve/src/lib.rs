//! A typed client of the Proxmox VE API: the cluster, its nodes, containers (CTs), storages, pools, networks and tasks.
//!
//! It is written for a program that shares a cluster with its administrator: it keeps few connections and fewer calls in
//! flight, never repeats a write that may have arrived, tells apart what a caller must react to differently ([`Error`]),
//! and reads answers as loosely as the server writes them. Proxmox VE 9.1 or later is needed ([`Client::check_version`]).
//!
//! | module | subject |
//! |---|---|
//! | [`api`] | the calls, one file a subject, with the types of their answers |
//! | [`config`] | the configuration of a CT: typed, from and to API and file |
//! | `http` | TLS, endpoints and failover, places at a node, retries |
//! | `classify`, [`Error`] | what the server's words mean |
//! | [`Observer`] | a look at every request, for metrics and tests |
//!
//! A long call returns a task's id ([`Upid`]); that it was answered says nothing on how it will end.
//! [`Client::wait`] waits for the end and returns the task's failure as an error with the last lines of its log.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use moxlet_pve::{Client, Endpoint, NodeName, Trust, Vmid, api::task::Wait};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let fingerprint = "7A:…".parse()?;
//! let client = Client::builder(std::fs::read_to_string("/etc/token")?.parse()?)
//!     .endpoint(Endpoint::new("https://pve1.example.org", Trust::Fingerprint(fingerprint))?)
//!     .endpoint(Endpoint::new("https://pve2.example.org", Trust::Authorities(std::fs::read("/etc/pve-root-ca.pem")?))?)
//!     .build()?;
//! client.check_version().await?;
//!
//! let node: NodeName = "pve1".parse()?;
//! let ct = client.ct(&node, Vmid::new(101)?);
//! if ct.status().await?.is_running() {
//!     let task = ct.shutdown(Some(Duration::from_secs(60)), true).await?;
//!     client.wait(&task, &Wait::within(Duration::from_secs(90))).await?;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! A whole program that talks to a server, here one in the same process:
//!
//! ```
//! use axum::{Json, Router, routing::get};
//! use moxlet_pve::{Client, Endpoint, Trust};
//! use serde_json::json;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let answer = json!({"data": {"version": "9.2.11", "release": "9.2", "repoid": "0123456789abcdef"}});
//! let server = Router::new().route("/api2/json/version", get(async move || Json(answer)));
//! let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
//! let url = format!("http://{}", listener.local_addr()?);
//! let server = tokio::spawn(async move { axum::serve(listener, server).await });
//!
//! let client = Client::builder("user@pve!name=secret".parse()?)
//!     .endpoint(Endpoint::new(&url, Trust::System)?)
//!     .build()?;
//! assert_eq!(client.version().await?.version.to_string(), "9.2.11");
//! server.abort();
//! # Ok(())
//! # }
//! ```

pub mod api;
mod classify;
mod client;
pub mod config;
mod error;
mod http;
mod lenient;
mod names;
mod observe;
mod token;
mod upid;
mod version;

pub use client::{Builder, Client};
pub use error::{CallName, Error, Result};
pub use http::{
    endpoint::Endpoint,
    limits::Limits,
    tls::{Fingerprint, Trust},
};
pub use moxlet_ids::Vmid;
pub use names::{
    InterfaceName, InvalidName, NodeName, PoolId, PropertyText, SnapshotName, StorageId, Tag, VolumeId,
};
pub use observe::{Observed, Observer};
pub use token::{InvalidToken, Token};
pub use upid::Upid;
pub use version::{NEWEST_MAJOR, OLDEST, Version};

#[cfg(test)]
mod tests;
