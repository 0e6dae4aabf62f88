//! High availability: what it looks after, its rules, its state.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{Client, Result, http::Request, lenient};

/// An entry of HA's state: quorum, the master, the local managers, services.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct HaStatus {
    /// Its id, such as `service:ct:101`.
    pub id: String,
    /// `quorum`, `master`, `lrm`, `service` or `fencing`.
    #[serde(rename = "type", default, deserialize_with = "lenient::string")]
    pub kind: String,
    /// The node that it is on.
    #[serde(default, deserialize_with = "lenient::string")]
    pub node: String,
    /// For people.
    #[serde(default, deserialize_with = "lenient::string")]
    pub status: String,
    /// A service's resource, such as `ct:101`.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub sid: Option<String>,
    /// A service's state.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub state: Option<String>,
    /// What is asked of a service.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub request_state: Option<String>,
    /// Whether there is quorum.
    #[serde(default, deserialize_with = "lenient::opt_bool")]
    pub quorate: Option<bool>,
    /// When the state was written, in seconds since 1970. Without any service it grows stale.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub timestamp: Option<u64>,
}

/// A guest that HA looks after.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct HaResource {
    /// The guest, such as `ct:101`.
    pub sid: String,
    /// What is asked for: `started`, `stopped`, `disabled`, `ignored`.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub state: Option<String>,
    /// All else.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// A rule: which nodes, or which guests together or apart.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct HaRule {
    /// Its name.
    pub rule: String,
    /// `node-affinity` or `resource-affinity`.
    #[serde(rename = "type", default, deserialize_with = "lenient::string")]
    pub kind: String,
    /// The guests that it is about, parted by commas.
    #[serde(default, deserialize_with = "lenient::string")]
    pub resources: String,
    /// Whether it is off.
    #[serde(default, deserialize_with = "lenient::bool")]
    pub disable: bool,
    /// All else.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

impl Client {
    /// HA's state.
    ///
    /// # Errors
    /// As every call; wants Sys.Audit on `/`.
    pub async fn ha_status(&self) -> Result<Vec<HaStatus>> {
        self.list(Request::new("GET", "/cluster/ha/status/current"), "HA's state").await
    }

    /// The CTs that HA looks after.
    ///
    /// # Errors
    /// As every call; wants Sys.Audit on `/`.
    pub async fn ha_resources(&self) -> Result<Vec<HaResource>> {
        self.list(Request::new("GET", "/cluster/ha/resources").with("type", "ct"), "HA's resources").await
    }

    /// HA's rules.
    ///
    /// # Errors
    /// As every call; wants Sys.Audit on `/`.
    pub async fn ha_rules(&self) -> Result<Vec<HaRule>> {
        self.list(Request::new("GET", "/cluster/ha/rules"), "HA's rules").await
    }
}
