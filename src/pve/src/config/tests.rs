#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::{collection, option, prelude::*};
use serde_json::json;

use super::*;
use crate::{InterfaceName, PropertyText};

const FILE: &str = "\
#pod default/web%3A 100%25
#second line
arch: amd64
cmode: console
cores: 2
cpulimit: 1.5
features: nesting=1
hostname: web
memory: 512
mp0: /var/lib/guard,mp=/run/guard,ro=1
net0: name=eth0,bridge=vmbr0,gw=10.0.0.1,host-managed=1,hwaddr=BC:24:11:00:00:01,ip=10.0.0.2/24,type=veth
newkey: of a later version
onboot: 0
ostype: unmanaged
rootfs: local-zfs:subvol-100-disk-0,size=4G
startup: down=40
swap: 0
tags: moxlet;ns-default
unprivileged: 1
lxc.include: /etc/moxlet/100.conf
lxc.idmap = u 0 100000 65536

[pve:pending]
memory: 1024

[snap1]
hostname: old
";

#[test]
fn a_file_is_read_and_written_back_as_the_server_writes_it() {
    let file = LxcConfig::from_file(FILE).unwrap();
    assert_eq!(file.sections, ["pve:pending", "snap1"]);
    let config = &file.config;
    assert_eq!(config.description.as_deref(), Some("pod default/web: 100%\nsecond line\n"));
    assert_eq!((config.memory, config.hostname.as_deref()), (Some(512), Some("web")));
    assert_eq!(config.net[&0].ip, Some(IpConfig::Static { address: Ipv4Addr::new(10, 0, 0, 2), prefix: 24 }));
    assert_eq!(config.rootfs.as_ref().unwrap().size, Some(DiskSize::from_bytes(4 << 30)));
    assert_eq!(config.lxc[1], ("lxc.idmap".to_owned(), "u 0 100000 65536".to_owned()));
    assert_eq!(config.unknown["newkey"], "of a later version");
    let main = FILE.split("\n[").next().unwrap().replace("lxc.idmap =", "lxc.idmap:");
    assert_eq!(config.to_file().unwrap(), main);
}

#[test]
fn an_answer_is_read_whatever_its_values_types_are() {
    let answer = json!({
        "memory": "512", "swap": 0, "onboot": false, "unprivileged": "1", "cores": 2, "cpulimit": "0.5", "digest": "abc",
        "lxc": [["lxc.include", "/x"]], "tags": "a;b", "net0": "name=eth0,newer=1", "mp0": "nonsense", "parent": null,
    });
    let config = LxcConfig::from_answer(answer.as_object().unwrap());
    assert_eq!(
        (config.memory, config.swap, config.onboot, config.unprivileged),
        (Some(512), Some(0), Some(false), Some(true))
    );
    assert_eq!(config.net[&0].extra["newer"].as_str(), "1");
    assert_eq!(config.unknown["mp0"], "nonsense");
    assert_eq!((config.digest.as_deref(), config.lxc.len(), config.tags.len()), (Some("abc"), 1, 2));
}

#[test]
fn a_value_that_would_make_another_line_is_not_written() {
    for bad in ["a\nlxc.hook.start: /x", "", " a", "a\r"] {
        let config = LxcConfig { hostname: Some(bad.to_owned()), ..LxcConfig::default() };
        assert!(matches!(config.to_file(), Err(InvalidConfig::Value { .. })), "{bad:?}");
    }
    let mut config = LxcConfig::default();
    config.unknown.insert("a: b\nc".into(), "x".into());
    assert!(config.to_file().is_err());
    let config = LxcConfig { description: Some("# a\n\nmemory: 1\n".into()), ..LxcConfig::default() };
    let text = config.to_file().unwrap();
    assert!(text.lines().all(|l| l.starts_with('#')), "{text}");
    assert_eq!(LxcConfig::from_file(&text).unwrap().config.description, config.description);
}

#[test]
fn a_line_that_proxmox_ve_only_warns_of_leaves_the_rest_readable_and_stays() {
    let odd = [
        "nonsense",
        "Memory: 2",
        "foo-bar: 1",
        "swap:",
        "lxc.Foo: x",
        "lxc.include : /x",
        "\u{1b}[31m\tx",
        "[a b]",
        "[x]",
    ];
    let text = format!("memory: 1\n{}\nlxc.include: /y\n", odd.join("\n"));
    let mut config = LxcConfig::from_file(&text).unwrap().config;
    assert_eq!((config.memory, config.unread.as_slice()), (Some(1), &odd.map(str::to_owned)[..]));
    assert_eq!(config.lxc, [("lxc.include".to_owned(), "/y".to_owned())]);
    config.memory = Some(2);
    let written = config.to_file().unwrap();
    assert_eq!(written, format!("memory: 2\nlxc.include: /y\n{}\n", odd.join("\n")));
    assert_eq!(LxcConfig::from_file(&written).unwrap().config, config);
    // What is kept must not become another line.
    for bad in ["a\nmemory: 9", "memory: 9", "[snap]", "[PVE:pending]", "#x", ""] {
        let config = LxcConfig { unread: vec![bad.into()], ..LxcConfig::default() };
        assert!(config.to_file().is_err(), "{bad:?}");
    }
}

#[test]
fn an_empty_raw_value_is_one_and_is_written_back() {
    let text = "lxc.cap.drop: \nlxc.mount.entry: /a\tb none bind 0 0\n";
    for same in [
        text,
        "lxc.cap.drop:\nlxc.mount.entry = /a\tb none bind 0 0",
        "lxc.cap.drop =\nlxc.mount.entry:/a\tb none bind 0 0\r\n",
    ] {
        let config = LxcConfig::from_file(same).unwrap().config;
        assert_eq!(config.lxc[0], ("lxc.cap.drop".to_owned(), String::new()), "{same}");
        assert_eq!(config.to_file().unwrap(), text);
    }
}

#[test]
fn of_a_key_that_stands_there_twice_the_last_holds() {
    let config = LxcConfig::from_file("memory: much\nmemory: 5\n").unwrap().config;
    assert_eq!((config.memory, config.to_file().unwrap().as_str()), (Some(5), "memory: 5\n"));
}

#[test]
fn a_file_that_is_too_long_is_refused() {
    assert!(matches!(LxcConfig::from_file(&"#x\n".repeat(1 << 19)), Err(InvalidConfig::TooLong(_))));
}

#[test]
fn what_is_no_property_string_is_refused() {
    for bad in [
        "",
        "bridge=vmbr0",
        "name=eth0,name=eth1",
        "name=eth0,ip=10.0.0.1",
        "name=eth0,ip=10.0.0.1/33",
        "name=eth0,mtu=x",
        "name=eth0,tag=4095",
        "name=eth0,hwaddr=01:00:00:00:00:00",
        "name=eth0,ip=auto",
        "name=eth0,x",
        "name=e/h",
    ] {
        assert!(bad.parse::<NetInterface>().is_err(), "{bad:?}");
    }
    for bad in ["", "mp=/x", "/a", "/a,mp=", "/a,mp=/b,ro=maybe", "/a,mp=/b,size=4Q"] {
        assert!(bad.parse::<MountPoint>().is_err(), "{bad:?}");
    }
}

prop_compose! {
    fn text()(s in "[!-+\\--:<>-~][ -+\\--:<-~]{0,12}[!-+\\--:<>-~]") -> PropertyText { s.parse().unwrap() }
}

prop_compose! {
    fn interface()(s in "[a-zA-Z0-9._-]{1,15}") -> InterfaceName { s.parse().unwrap() }
}

fn extra() -> impl Strategy<Value = Extra> {
    collection::btree_map("x-[a-z0-9]{1,8}", text(), 0..3)
}

fn ip4() -> impl Strategy<Value = IpConfig<Ipv4Addr>> {
    prop_oneof![
        Just(IpConfig::Dhcp),
        Just(IpConfig::Manual),
        (any::<Ipv4Addr>(), 1u8..=32).prop_map(|(address, prefix)| IpConfig::Static { address, prefix }),
    ]
}

fn ip6() -> impl Strategy<Value = IpConfig<Ipv6Addr>> {
    prop_oneof![
        Just(IpConfig::Auto),
        Just(IpConfig::Dhcp),
        (any::<Ipv6Addr>(), 1u8..=128).prop_map(|(address, prefix)| IpConfig::Static { address, prefix }),
    ]
}

prop_compose! {
    fn net()(
        name in interface(),
        (bridge, kind) in (option::of(interface()), option::of(interface())),
        (firewall, host_managed, link_down) in any::<(Option<bool>, Option<bool>, Option<bool>)>(),
        (gw, gw6, mtu) in any::<(Option<Ipv4Addr>, Option<Ipv6Addr>, Option<u16>)>(),
        hwaddr in option::of(any::<[u8; 6]>()),
        (ip, ip6) in (option::of(ip4()), option::of(ip6())),
        rate in option::of(0.0..1e6),
        tag in option::of(1u16..4095),
        trunks in collection::vec(any::<u16>(), 0..4),
        extra in extra(),
    ) -> NetInterface {
        let hwaddr = hwaddr.map(|[first, rest @ ..]| {
            let [b, c, d, e, f] = rest;
            MacAddr::new([first & 0xfe, b, c, d, e, f]).unwrap()
        });
        NetInterface { name, bridge, firewall, gw, gw6, host_managed, hwaddr, ip, ip6, link_down, mtu, rate, tag, trunks, kind, extra }
    }
}

prop_compose! {
    fn volume()(
        volume in text(),
        (acl, quota, replicate, ro, shared) in any::<(Option<bool>, Option<bool>, Option<bool>, Option<bool>, Option<bool>)>(),
        idmap in option::of(text()),
        mountoptions in collection::vec("[a-z]{1,9}", 0..3),
        size in option::of(any::<u64>()),
        extra in extra(),
    ) -> Volume {
        let mountoptions = mountoptions.iter().map(|o| o.parse().unwrap()).collect();
        Volume { volume, acl, idmap, mountoptions, quota, replicate, ro, shared, size: size.map(DiskSize::from_bytes), extra }
    }
}

fn same<T: FromStr + fmt::Display + PartialEq + fmt::Debug>(value: &T) -> Result<(), TestCaseError>
where
    T::Err: fmt::Debug,
{
    let text = value.to_string();
    let read: T = text.parse().map_err(|e| TestCaseError::fail(format!("{text}: {e:?}")))?;
    prop_assert_eq!(&read, value, "{}", text);
    Ok(())
}

proptest! {
    #[test]
    fn a_network_interface_survives_writing_and_reading(net in net()) {
        same(&net)?;
    }

    #[test]
    fn a_volume_survives_writing_and_reading(volume in volume()) {
        same(&volume)?;
    }

    #[test]
    fn a_mount_point_survives_writing_and_reading(volume in volume(), path in text(), backup: Option<bool>, keepattrs: Option<bool>) {
        same(&MountPoint { path, backup, keepattrs, volume })?;
    }

    #[test]
    fn a_device_survives_writing_and_reading(path in text(), deny_write: Option<bool>, gid: Option<u32>, uid: Option<u32>, mode in option::of(text()), extra in extra()) {
        same(&Device { path, deny_write, gid, mode, uid, extra })?;
    }

    #[test]
    fn features_survive_writing_and_reading(fuse: Option<bool>, nesting: Option<bool>, mount in collection::vec("[a-z]{1,9}", 0..3), extra in extra()) {
        let mount = mount.iter().map(|o| o.parse().unwrap()).collect();
        same(&Features { fuse, nesting, mount, extra, ..Features::default() })?;
    }

    #[test]
    fn a_startup_order_survives_writing_and_reading(order: Option<u32>, up: Option<u32>, down: Option<u32>) {
        same(&Startup { order, up, down })?;
    }

    #[test]
    fn a_configuration_survives_file_and_answer(
        nets in collection::btree_map(0u16..40, net(), 0..3),
        rootfs in option::of(volume()),
        (memory, cores, onboot) in any::<(Option<u64>, Option<u32>, Option<bool>)>(),
        description in option::of("([^\\r\\n]{1,20}\n){1,3}"),
        hostname in option::of("[a-z]{1,10}"),
        lxc in collection::vec(("lxc\\.[a-z.]{1,9}[a-z]", "[!-~]{1,9}"), 0..3),
    ) {
        let description: Option<String> = description.filter(|d| d.lines().count() == d.matches('\n').count());
        let config = LxcConfig { net: nets, rootfs, memory, cores, onboot, description, hostname, lxc, ..LxcConfig::default() };
        let text = config.to_file().unwrap();
        prop_assert_eq!(&LxcConfig::from_file(&text).unwrap().config, &config);
        let mut answer: serde_json::Map<String, Value> = config.pairs().into_iter().map(|(k, v)| (k, json!(v))).collect();
        answer.insert("lxc".into(), json!(config.lxc));
        prop_assert_eq!(&LxcConfig::from_answer(&answer), &config);
    }

    #[test]
    fn no_text_makes_reading_panic(text in "\\PC{0,200}", key in "[a-z]{1,6}[0-9]{0,6}") {
        let _ = LxcConfig::from_file(&text);
        let mut config = LxcConfig::default();
        config.put(&key, &text);
        let _ = config.to_file();
        let _ = (text.parse::<DiskSize>(), text.parse::<MacAddr>(), text.parse::<IpConfig<Ipv6Addr>>());
    }
}
