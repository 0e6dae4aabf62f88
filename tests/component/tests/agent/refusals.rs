//! What a CT cannot be is refused by name before anything is made.

use moxlet_cri::v1;
use moxlet_tests_component::host::{Host, sleeper};
use tonic::{Code, Status};

fn refused(outcome: Result<impl std::fmt::Debug, Status>, words: &str) {
    let error = outcome.unwrap_err();
    assert_eq!(error.code(), Code::Unimplemented, "{error:?}");
    assert!(error.message().contains(words), "{words}: {}", error.message());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_that_no_ct_can_be_is_refused_by_name() {
    let host = Host::start().await;
    let with = |change: &dyn Fn(&mut v1::LinuxSandboxSecurityContext)| {
        let mut config = host.pod_config("refused");
        let mut security = v1::LinuxSandboxSecurityContext::default();
        change(&mut security);
        config.linux.as_mut().unwrap().security_context = Some(security);
        config
    };
    let node = v1::NamespaceMode::Node as i32;
    let names = |options: v1::NamespaceOption| {
        with(&|s: &mut v1::LinuxSandboxSecurityContext| s.namespace_options = Some(options.clone()))
    };
    refused(host.try_pod(with(&|s| s.privileged = true)).await, "privileged");
    refused(
        host.try_pod(names(v1::NamespaceOption { network: node, ..Default::default() })).await,
        "hostNetwork",
    );
    refused(host.try_pod(names(v1::NamespaceOption { pid: node, ..Default::default() })).await, "hostPID");
    refused(host.try_pod(names(v1::NamespaceOption { ipc: node, ..Default::default() })).await, "hostIPC");
    let mut port = host.pod_config("refused");
    port.port_mappings = vec![v1::PortMapping { container_port: 80, host_port: 8080, ..Default::default() }];
    refused(host.try_pod(port).await, "hostPort");
    let config = Some(host.pod_config("refused"));
    let request = v1::RunPodSandboxRequest { config, runtime_handler: "gvisor".into() };
    let error = host.runtime().run_pod_sandbox(request).await.unwrap_err();
    assert!(error.message().contains("gvisor"), "{error:?}");
    host.nothing_is_left().await;
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_no_ct_can_hold_is_refused_by_name_and_nothing_is_left_of_it() {
    let host = Host::start().await;
    let pod = host.pod("refuses").await;
    let with = |change: &dyn Fn(&mut v1::ContainerConfig, &mut v1::LinuxContainerSecurityContext)| {
        let mut config = sleeper("main");
        let mut security = config.linux.as_mut().unwrap().security_context.take().unwrap();
        change(&mut config, &mut security);
        config.linux.as_mut().unwrap().security_context = Some(security);
        config
    };
    refused(host.create(&pod, with(&|_, s| s.privileged = true)).await, "privileged");
    let device = || {
        vec![v1::Device {
            host_path: "/dev/kvm".into(),
            container_path: "/dev/kvm".into(),
            permissions: "rw".into(),
        }]
    };
    refused(host.create(&pod, with(&|c, _| c.devices = device())).await, "/dev/kvm");
    let ambient =
        || v1::Capability { add_ambient_capabilities: vec!["NET_ADMIN".into()], ..Default::default() };
    refused(host.create(&pod, with(&|_, s| s.capabilities = Some(ambient()))).await, "NET_ADMIN");
    let module = || v1::Capability { add_capabilities: vec!["SYS_MODULE".into()], ..Default::default() };
    refused(host.create(&pod, with(&|_, s| s.capabilities = Some(module()))).await, "SYS_MODULE");
    let shared = || v1::Mount {
        host_path: "/tmp".into(),
        container_path: "/x".into(),
        propagation: v1::MountPropagation::PropagationBidirectional as i32,
        ..Default::default()
    };
    refused(host.create(&pod, with(&|c, _| c.mounts = vec![shared()])).await, "propagation of /x");
    let image = || v1::Mount {
        container_path: "/x".into(),
        image: Some(v1::ImageSpec { image: "busybox".into(), ..Default::default() }),
        ..Default::default()
    };
    refused(host.create(&pod, with(&|c, _| c.mounts = vec![image()])).await, "image");
    let user = || Some(v1::Int64Value { value: 70_000 });
    let error = host.create(&pod, with(&|_, s| s.run_as_user = user())).await.unwrap_err();
    assert!(error.message().contains("70000"), "{error:?}");
    let unknown =
        |c: &mut v1::ContainerConfig, _: &mut _| c.image.as_mut().unwrap().image = "no/such-image:1".into();
    let error = host.create(&pod, with(&unknown)).await.unwrap_err();
    assert!(error.code() == Code::NotFound && error.message().contains("no/such-image:1"), "{error:?}");

    let left =
        host.runtime().list_containers(v1::ListContainersRequest::default()).await.unwrap().into_inner();
    assert!(left.containers.is_empty(), "{left:?}");
    let roots = host.root().join("storage/roots");
    assert_eq!(std::fs::read_dir(roots).unwrap().count(), 0);
    host.end().await;
}
