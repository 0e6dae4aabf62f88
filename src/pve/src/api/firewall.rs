//! The firewall of a CT. It holds for interfaces with `firewall=1` alone.

use serde::Deserialize;

use super::ct::Ct;
use crate::{Result, lenient};

/// The options of a CT's firewall. What is `None` is the server's default, and is left as it is when written.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct FirewallOptions {
    /// Whether it is on.
    #[serde(deserialize_with = "lenient::opt_bool")]
    pub enable: Option<bool>,
    /// Whether DHCP passes.
    #[serde(deserialize_with = "lenient::opt_bool")]
    pub dhcp: Option<bool>,
    /// Whether only the CT's own addresses pass.
    #[serde(deserialize_with = "lenient::opt_bool")]
    pub ipfilter: Option<bool>,
    /// Whether only the CT's own MAC address passes.
    #[serde(deserialize_with = "lenient::opt_bool")]
    pub macfilter: Option<bool>,
    /// Whether neighbour discovery passes.
    #[serde(deserialize_with = "lenient::opt_bool")]
    pub ndp: Option<bool>,
    /// Whether router advertisements of the CT pass.
    #[serde(deserialize_with = "lenient::opt_bool")]
    pub radv: Option<bool>,
    /// What happens to the rest that comes in: `ACCEPT`, `DROP` or `REJECT`.
    #[serde(deserialize_with = "lenient::opt_string")]
    pub policy_in: Option<String>,
    /// What happens to the rest that goes out.
    #[serde(deserialize_with = "lenient::opt_string")]
    pub policy_out: Option<String>,
    /// What a change is guarded with.
    #[serde(deserialize_with = "lenient::opt_string")]
    pub digest: Option<String>,
}

/// A rule. The names are those of the API.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct FirewallRule {
    /// Its place; the first that fits decides. A new rule without one becomes the first.
    #[serde(deserialize_with = "lenient::opt_u64")]
    pub pos: Option<u64>,
    /// `in`, `out` or `group`.
    #[serde(rename = "type", deserialize_with = "lenient::string")]
    pub kind: String,
    /// `ACCEPT`, `DROP`, `REJECT`, or a group's name.
    #[serde(deserialize_with = "lenient::string")]
    pub action: String,
    /// Whether it is on.
    #[serde(deserialize_with = "lenient::opt_bool")]
    pub enable: Option<bool>,
    /// For people.
    #[serde(deserialize_with = "lenient::opt_string")]
    pub comment: Option<String>,
    /// From where.
    #[serde(deserialize_with = "lenient::opt_string")]
    pub source: Option<String>,
    /// To where.
    #[serde(deserialize_with = "lenient::opt_string")]
    pub dest: Option<String>,
    /// The protocol.
    #[serde(deserialize_with = "lenient::opt_string")]
    pub proto: Option<String>,
    /// Source ports.
    #[serde(deserialize_with = "lenient::opt_string")]
    pub sport: Option<String>,
    /// Destination ports.
    #[serde(deserialize_with = "lenient::opt_string")]
    pub dport: Option<String>,
    /// The interface, such as `net0`.
    #[serde(deserialize_with = "lenient::opt_string")]
    pub iface: Option<String>,
    /// A rule that is made up elsewhere.
    #[serde(rename = "macro", deserialize_with = "lenient::opt_string")]
    pub macro_name: Option<String>,
    /// What is logged.
    #[serde(deserialize_with = "lenient::opt_string")]
    pub log: Option<String>,
    /// Which ICMP messages.
    #[serde(deserialize_with = "lenient::opt_string")]
    pub icmp_type: Option<String>,
}

impl Ct<'_> {
    /// The firewall's options.
    ///
    /// # Errors
    /// As every call; wants VM.Audit on `/vms/VMID`.
    pub async fn firewall_options(&self) -> Result<FirewallOptions> {
        let request = self.request("GET", "/nodes/{node}/lxc/{vmid}/firewall/options");
        self.client().get(request, "the firewall's options").await
    }

    /// Sets those options that are not `None`.
    ///
    /// # Errors
    /// As every call; wants VM.Config.Network on `/vms/VMID`.
    pub async fn set_firewall_options(&self, options: &FirewallOptions) -> Result<()> {
        let flag = |on: Option<bool>| on.map(u8::from);
        let request = self
            .request("PUT", "/nodes/{node}/lxc/{vmid}/firewall/options")
            .maybe("enable", flag(options.enable))
            .maybe("dhcp", flag(options.dhcp))
            .maybe("ipfilter", flag(options.ipfilter))
            .maybe("macfilter", flag(options.macfilter))
            .maybe("ndp", flag(options.ndp))
            .maybe("radv", flag(options.radv))
            .maybe("policy_in", options.policy_in.as_ref())
            .maybe("policy_out", options.policy_out.as_ref())
            .maybe("digest", options.digest.as_ref());
        self.client().done(request).await
    }

    /// The rules, in their order.
    ///
    /// # Errors
    /// As every call; wants VM.Audit on `/vms/VMID`.
    pub async fn firewall_rules(&self) -> Result<Vec<FirewallRule>> {
        let request = self.request("GET", "/nodes/{node}/lxc/{vmid}/firewall/rules");
        self.client().list(request, "the firewall's rules").await
    }

    /// Adds a rule.
    ///
    /// # Errors
    /// As every call; wants VM.Config.Network on `/vms/VMID`.
    pub async fn add_firewall_rule(&self, rule: &FirewallRule) -> Result<()> {
        let request = self
            .request("POST", "/nodes/{node}/lxc/{vmid}/firewall/rules")
            .with("type", &rule.kind)
            .with("action", &rule.action)
            .maybe("pos", rule.pos)
            .maybe("enable", rule.enable.map(u8::from))
            .maybe("comment", rule.comment.as_ref())
            .maybe("source", rule.source.as_ref())
            .maybe("dest", rule.dest.as_ref())
            .maybe("proto", rule.proto.as_ref())
            .maybe("sport", rule.sport.as_ref())
            .maybe("dport", rule.dport.as_ref())
            .maybe("iface", rule.iface.as_ref())
            .maybe("macro", rule.macro_name.as_ref())
            .maybe("log", rule.log.as_ref())
            .maybe("icmp-type", rule.icmp_type.as_ref());
        self.client().done(request).await
    }

    /// Removes the rule at a place.
    ///
    /// # Errors
    /// As every call; wants VM.Config.Network on `/vms/VMID`.
    pub async fn delete_firewall_rule(&self, pos: u64) -> Result<()> {
        let request = self.request("DELETE", "/nodes/{node}/lxc/{vmid}/firewall/rules/{pos}").at("pos", pos);
        self.client().done(request).await
    }
}
