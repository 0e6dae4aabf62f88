//! The agent's services, by its socket.

use std::path::PathBuf;

use anyhow::Result;
use moxlet_cri::{
    host::{host_service_client::HostServiceClient, image_store_client::ImageStoreClient},
    v1::runtime_service_client::RuntimeServiceClient,
};
use tonic::{Code, Status, transport::Channel};

use crate::socket::{self, SocketArgs};

/// The largest answer that is taken, in bytes.
const MAX_MESSAGE: usize = 32 << 20;

/// A connected agent.
pub(super) struct Agent {
    /// CRI.
    pub(super) runtime: RuntimeServiceClient<Channel>,
    /// What CRI lacks.
    pub(super) host: HostServiceClient<Channel>,
    /// Its images.
    pub(super) images: ImageStoreClient<Channel>,
    path: PathBuf,
}

impl Agent {
    /// Connects to the agent that the command line names.
    ///
    /// # Errors
    /// There is none, or this user may not.
    pub(super) async fn connect(args: &SocketArgs) -> Result<Self> {
        let path = args.path()?;
        let channel = socket::connect(&path).await?;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE),
            host: HostServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE),
            images: ImageStoreClient::new(channel).max_decoding_message_size(MAX_MESSAGE),
            path,
        })
    }

    /// A failed call in words for the person at the terminal.
    pub(super) fn failed(&self, status: &Status) -> anyhow::Error {
        match status.code() {
            Code::Unimplemented => anyhow::anyhow!(
                "the agent at {} does not know this call: is it of an older version, or another CRI runtime? ({})",
                self.path.display(),
                status.message()
            ),
            Code::Unavailable => {
                anyhow::anyhow!("the agent at {} went away: {}", self.path.display(), status.message())
            }
            _ => anyhow::anyhow!("{}", status.message()),
        }
    }
}
