//! The conditions of the runtime, as `Status` answers them.

use moxlet_cri::v1;
use moxlet_sandbox::Engine;

/// The condition that says whether Proxmox VE can be asked for new pods. Those that run need it for nothing, so that
/// `RuntimeReady`, which costs a Node its pods after a while, holds meanwhile.
const PROXMOX: &str = "ProxmoxReady";

/// The conditions of the runtime; `network` is what is wrong with the pods' network.
pub(super) fn conditions(
    engine: &dyn Engine,
    on_proxmox_ve: bool,
    network: Option<String>,
) -> Vec<v1::RuntimeCondition> {
    let condition = |kind: &str, reason: &str, fault: Option<String>| v1::RuntimeCondition {
        r#type: kind.to_owned(),
        status: fault.is_none(),
        reason: if fault.is_some() { reason.to_owned() } else { String::new() },
        message: fault.unwrap_or_default(),
    };
    let mut all = vec![
        condition("RuntimeReady", "", None),
        condition("NetworkReady", "NetworkPluginNotReady", network),
    ];
    let fault = engine.fault();
    if fault.is_some() || on_proxmox_ve {
        all.push(condition(PROXMOX, "ProxmoxNotReady", fault));
    }
    all
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use moxlet_sandbox::fake::FakeEngine;

    use super::*;

    #[test]
    fn a_fault_of_the_engine_is_a_condition_of_its_own_and_leaves_the_runtime_ready() {
        let engine = FakeEngine::default();
        let shown = |engine: &FakeEngine| {
            let all = conditions(engine, false, None);
            assert!(all.iter().any(|c| c.r#type == "RuntimeReady" && c.status));
            all.into_iter().find(|c| c.r#type == PROXMOX).map(|c| (c.status, c.message))
        };
        assert_eq!(shown(&engine), None, "an engine of another kind says nothing of it");
        engine.break_down("the server is away");
        assert_eq!(shown(&engine), Some((false, "the server is away".into())));
    }
}
