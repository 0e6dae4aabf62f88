//! What stands in a CT's configuration for its network, its pool and the end of its host, as Proxmox VE reads it.

use std::{net::Ipv4Addr, time::Duration};

use moxlet_ids::Vmid;
use moxlet_pve::config::IpConfig;
use moxlet_sandbox::{Engine, Error, Nic, NicAddress, pve::PveConfig};
use serde_json::json;

use crate::world::{FIRST, World, spec, words};

fn nic(name: &str, bridge: &str) -> Nic {
    Nic {
        name: name.into(),
        bridge: bridge.into(),
        mac: None,
        ipv4: None,
        ipv6: None,
        mtu: None,
        vlan: None,
        firewall: false,
    }
}

#[tokio::test]
async fn addresses_by_dhcp_are_asked_for_by_the_ct_and_read_from_it() {
    let world = World::new().await;
    let mut pod = spec("web");
    pod.nics = vec![Nic { ipv4: Some(NicAddress::Dhcp), ..nic("eth0", "vmbr0") }];
    world.engine.create(&pod).await.unwrap();
    let ct = world.admin.ct(&world.node, Vmid::new(FIRST).unwrap());
    let net = ct.config().await.unwrap().net.remove(&0).unwrap();
    assert_eq!((net.ip, net.gw, net.host_managed), (Some(IpConfig::Dhcp), None, Some(true)));
    world.engine.start(&pod.id).await.unwrap();
    // What the fake CT has, which is in nobody's configuration.
    let found = world.engine.addresses(&pod.id).await.unwrap().unwrap();
    assert_eq!(found, [std::net::IpAddr::from([192, 0, 2, 7])]);
    world.engine.delete(&pod.id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn gateway_mtu_vlan_and_further_bridges_stand_in_the_configuration() {
    let world = World::new().await;
    let mut pod = spec("web");
    let address = NicAddress::Static {
        address: Ipv4Addr::new(10, 10, 1, 7),
        prefix: 16,
        gateway: Some(Ipv4Addr::new(10, 10, 0, 1)),
    };
    pod.nics = vec![
        Nic { ipv4: Some(address), mtu: Some(1400), vlan: Some(20), firewall: true, ..nic("eth0", "vmbr0") },
        nic("eth1", "vmbr1"),
        Nic { vlan: Some(100), ..nic("eth2", "vmbr2") },
    ];
    world.engine.create(&pod).await.unwrap();
    let text = world.conf(&pod.id);
    let line = |key: &str| text.lines().find(|l| l.starts_with(key)).unwrap_or_default().to_owned();
    for part in [
        "bridge=vmbr0",
        "ip=10.10.1.7/16",
        "gw=10.10.0.1",
        "mtu=1400",
        "tag=20",
        "firewall=1",
        "host-managed=1",
    ] {
        assert!(line("net0:").contains(part), "{part} is missing in {text}");
    }
    assert!(line("net1:").contains("bridge=vmbr1") && !line("net1:").contains("ip="), "{text}");
    assert!(line("net2:").contains("bridge=vmbr2") && line("net2:").contains("tag=100"), "{text}");
    let macs: std::collections::BTreeSet<_> =
        text.split("hwaddr=").skip(1).filter_map(|t| t.get(..17)).collect();
    assert_eq!(macs.len(), 3, "{text}");
    world.engine.delete(&pod.id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn a_static_ipv6_address_stands_in_the_configuration_and_is_no_other_pods() {
    let world = World::new().await;
    let six = NicAddress::Static {
        address: "fd00:10::7".parse().unwrap(),
        prefix: 64,
        gateway: Some("fd00:10::1".parse().unwrap()),
    };
    let on_bridge = || vec![Nic { ipv6: Some(six), ..nic("eth0", "vmbr0") }];
    let mut pod = spec("web");
    pod.nics = on_bridge();
    world.engine.create(&pod).await.unwrap();
    let ct = world.admin.ct(&world.node, Vmid::new(FIRST).unwrap());
    let net = ct.config().await.unwrap().net.remove(&0).unwrap();
    let written = IpConfig::Static { address: "fd00:10::7".parse().unwrap(), prefix: 64 };
    assert_eq!((net.ip6, net.gw6), (Some(written), Some("fd00:10::1".parse().unwrap())));
    assert_eq!((net.ip, net.gw, net.host_managed), (None, None, Some(true)));
    world.engine.start(&pod.id).await.unwrap();
    let given: [std::net::IpAddr; 1] = ["fd00:10::7".parse().unwrap()];
    assert_eq!(world.engine.addresses(&pod.id).await.unwrap().unwrap(), given);
    let mut other = spec("other");
    other.nics = on_bridge();
    let error = world.engine.create(&other).await.unwrap_err();
    assert!(matches!(error, Error::AddressTaken { address, .. } if address == given[0]), "{}", words(&error));
    world.engine.delete(&pod.id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn a_host_that_goes_down_gives_a_ct_its_pods_grace_and_ten_seconds() {
    let world = World::new().await;
    for (grace, line) in [(0, "startup: down=10"), (600, "startup: down=610")] {
        let mut pod = spec("web");
        pod.stop_grace = Duration::from_secs(grace);
        world.engine.create(&pod).await.unwrap();
        assert!(world.conf(&pod.id).contains(line), "{}", world.conf(&pod.id));
        world.engine.delete(&pod.id).await.unwrap();
    }
    world.assert_as_before();
}

#[tokio::test]
async fn a_pool_that_is_configured_has_the_ct_from_its_first_start_to_its_end() {
    let world = World::new().await;
    let pool = "pods".parse().unwrap();
    let config = PveConfig { pool: Some(pool), ..world.place.pve_config(FIRST + 99) };
    let pool = config.pool.clone().unwrap();
    let engine = world.place.engine_of(config, world.place.client(&world.sim.hosts()[0].url, &world.calls));
    let pod = spec("web");
    engine.create(&pod).await.unwrap();
    let error = engine.start(&pod.id).await.unwrap_err();
    let text = words(&error);
    assert!(
        text.contains("could not put into its pool CT 1000000") && text.contains("'pods' does not exist"),
        "{text}"
    );
    world.admin.create_pool(&pool, None).await.unwrap();
    world.calls.take();
    engine.start(&pod.id).await.unwrap();
    let calls = world.calls.take();
    assert!(calls.contains(&"PUT /pools".to_owned()) && calls.len() <= 6, "{calls:?}");
    let members = async || world.admin.pool(&pool).await.unwrap().unwrap().members;
    assert_eq!(members().await.iter().map(|m| m.id.as_str()).collect::<Vec<_>>(), ["lxc/1000000"]);
    engine.stop(&pod.id, Duration::ZERO).await.unwrap();
    world.calls.take();
    engine.start(&pod.id).await.unwrap();
    assert!(!world.calls.take().contains(&"PUT /pools".to_owned()), "once is enough");
    // Somebody holds the lock that a change of a pool wants: it is said, and tried again later.
    world.control("PUT", "/locks/user.cfg", json!({"held": true})).await;
    let late = spec("late");
    engine.create(&late).await.unwrap();
    let error = engine.start(&late.id).await.unwrap_err();
    assert!(error.is_temporary() && matches!(error, Error::Pve { .. }), "{}", words(&error));
    world.control("PUT", "/locks/user.cfg", json!({"held": false})).await;
    engine.delete(&late.id).await.unwrap();
    engine.delete(&pod.id).await.unwrap();
    assert!(members().await.is_empty());
    world.assert_as_before();
}
