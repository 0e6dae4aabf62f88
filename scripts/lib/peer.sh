# The node that Moxlet is measured against: an ordinary kubelet with Debian's containerd and runc, a second node `peer` of the
# same cluster, on loopback. To be sourced after common.sh. Only scripts/bench uses it.

# A kubelet refuses a loopback address for its node: it gets one on a bridge of its own that no packet leaves.
PEER_ADDRESS=10.247.240.1
PEER_SYSCTLS="vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops kernel/keys/root_maxkeys kernel/keys/root_maxbytes"

# peer_up DIR CLUSTER_DIR REGISTRY PORT
peer_up() {
  local dir=$1 cluster=$2 registry=$3 port=$4 name
  local pki=$cluster/control-plane/pki
  mkdir -p "$dir"/{cni,manifests,run}
  for name in $PEER_SYSCTLS; do printf '%s %s\n' "$name" "$(cat "/proc/sys/$name")"; done >"$dir/sysctls"
  [ -e /var/log/containers ] || touch "$dir/made-log-containers"

  ip link add name moxlet-peer0 type bridge
  ip address add "$PEER_ADDRESS/32" dev moxlet-peer0
  ip link set dev moxlet-peer0 up

  # The sandbox image: the same busybox, asleep.
  umoci tag --image "$cluster/images/layout:busybox" pause
  umoci config --image "$cluster/images/layout:pause" --config.entrypoint /bin/sleep --config.cmd 2147483647
  skopeo copy -q --dest-tls-verify=false "oci:$cluster/images/layout:pause" "docker://$registry/demo/pause:1"

  cat >"$dir/containerd.toml" <<C
version = 2
root = "$dir/root"
state = "$dir/state"
disabled_plugins = ["io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper"]
[grpc]
address = "$dir/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "$registry/demo/pause:1"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "$dir/cni"
C
  cat >"$dir/cni/10-peer.conflist" <<C
{"cniVersion": "0.4.0", "name": "moxlet-peer", "plugins": [{"type": "bridge", "bridge": "moxlet-peer", "isGateway": true, "ipMasq": false,
 "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.247.0.0/20"}]], "routes": [{"dst": "0.0.0.0/0"}], "dataDir": "$dir/ipam"}}, {"type": "loopback"}]}
C
  local key=$dir/node.key
  openssl ecparam -name prime256v1 -genkey -noout -out "$key"
  for name in client server; do
    openssl req -new -key "$key" -subj "/O=system:nodes/CN=system:node:peer" -out "$dir/$name.csr"
    printf 'basicConstraints=critical,CA:FALSE\nextendedKeyUsage=%sAuth\nsubjectAltName=DNS:peer,IP:%s\n' "$name" "$PEER_ADDRESS" >"$dir/$name.ext"
    openssl x509 -req -in "$dir/$name.csr" -CA "$pki/ca.crt" -CAkey "$pki/ca.key" -CAcreateserial -days 30 -extfile "$dir/$name.ext" -out "$dir/$name.crt" 2>/dev/null
  done
  "$KUBERNETES_BIN/kubectl" --kubeconfig "$cluster/kubeconfig" config view --raw --minify -o json \
    | jq --arg c "$(base64 -w0 "$dir/client.crt")" --arg k "$(base64 -w0 "$key")" \
      '.users[0].user = {"client-certificate-data": $c, "client-key-data": $k}' >"$dir/kubeconfig"
  chmod 600 "$dir/kubeconfig" "$key"
  cat >"$dir/kubelet.yaml" <<C
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix://$dir/containerd.sock
cgroupDriver: cgroupfs
failCgroupV1: false
address: $PEER_ADDRESS
port: $port
healthzPort: 0
podLogsDir: $dir/logs
makeIPTablesUtilChains: false
authentication: {x509: {clientCAFile: $pki/ca.crt}, webhook: {enabled: true}, anonymous: {enabled: false}}
authorization: {mode: Webhook}
tlsCertFile: $dir/server.crt
tlsPrivateKeyFile: $key
evictionHard: {nodefs.available: "1%", imagefs.available: "1%", memory.available: 100Mi}
maxPods: 250
enforceNodeAllocatable: []
resolvConf: ""
localStorageCapacityIsolation: false
containerLogMaxSize: 300Mi
C
  daemon containerd "$dir/run" containerd --config "$dir/containerd.toml"
  daemon_ready containerd "$dir/run" "containerd to answer" 30 ctr -a "$dir/containerd.sock" version
  daemon kubelet "$dir/run" "$KUBERNETES_BIN/kubelet" --config="$dir/kubelet.yaml" --kubeconfig="$dir/kubeconfig" --hostname-override=peer \
    --node-ip="$PEER_ADDRESS" --root-dir="$dir/kubelet" --v=1
  daemon_ready kubelet "$dir/run" "the peer to be Ready" 60 "$KUBERNETES_BIN/kubectl" --kubeconfig "$cluster/kubeconfig" \
    wait --for=condition=Ready node/peer --timeout=1s
}

# peer_down DIR CLUSTER_DIR: pods are deleted by the caller before.
peer_down() {
  local dir=$1 id name value path
  [ -d "$dir" ] || return 0
  stop_daemon kubelet "$dir/run"
  if [ -S "$dir/containerd.sock" ]; then
    for id in $(ctr -a "$dir/containerd.sock" -n k8s.io tasks ls -q 2>/dev/null); do
      ctr -a "$dir/containerd.sock" -n k8s.io tasks kill -s 9 "$id" >/dev/null 2>&1 || true
    done
    sleep 1
    for id in $(ctr -a "$dir/containerd.sock" -n k8s.io containers ls -q 2>/dev/null); do
      ctr -a "$dir/containerd.sock" -n k8s.io tasks rm -f "$id" >/dev/null 2>&1 || true
      ctr -a "$dir/containerd.sock" -n k8s.io containers rm "$id" >/dev/null 2>&1 || true
    done
  fi
  stop_daemon containerd "$dir/run"
  # Shims name containerd's socket on their command line; they outlive it.
  for path in /proc/[0-9]*; do
    case $(tr '\0' ' ' <"$path/cmdline" 2>/dev/null) in *containerd-shim*"$dir/containerd.sock"*) kill -9 "${path#/proc/}" 2>/dev/null || true ;; esac
  done
  mounts_below "$dir" | while read -r path; do umount "$path" 2>/dev/null || umount -l "$path" 2>/dev/null || true; done
  if [ -d /run/netns ]; then for path in $(awk '$5 ~ "^/run/netns/cni-" { print $5 }' /proc/self/mountinfo); do ip netns delete "$(basename "$path")" 2>/dev/null || true; done; fi
  for name in moxlet-peer moxlet-peer0; do if ip link show $name >/dev/null 2>&1; then ip link delete $name; fi; done
  find /sys/fs/cgroup -maxdepth 2 -type d -name kubepods 2>/dev/null | while read -r path; do find "$path" -depth -type d -exec rmdir {} + 2>/dev/null || true; done
  while read -r name value; do echo "$value" >"/proc/sys/$name" 2>/dev/null || true; done <"$dir/sysctls"
  [ ! -e "$dir/made-log-containers" ] || rm -rf /var/log/containers
  rm -rf --one-file-system "$dir"
}
