# The two small images of the demo and the tests, made on the spot from Debian's static busybox: `busybox`, and `web`, which
# serves one page on port 80. To be sourced after common.sh.

# make_images DIR: an OCI layout DIR/layout with the tags busybox and web.
make_images() {
  local dir=$1 layout=$1/layout root=$1/busybox applet
  [ -e "$dir/complete" ] && return
  rm -rf "$dir"; mkdir -p "$root"/{bin,etc,proc,sys,dev,tmp,root,home/app,var}
  chmod -R go+rX "$dir"; chmod 1777 "$root/tmp"; chmod 700 "$root/root"
  install -m 755 "$(command -v busybox)" "$root/bin/busybox"
  for applet in $("$root/bin/busybox" --list); do [ -e "$root/bin/$applet" ] || ln -s busybox "$root/bin/$applet"; done
  printf 'root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/home/app:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n' >"$root/etc/passwd"
  printf 'root:x:0:\napp:x:1000:\nnogroup:x:65534:\n' >"$root/etc/group"
  chown -R 1000:1000 "$root/home/app"
  tar -C "$root" --sort=name --mtime=@0 --numeric-owner -cf "$dir/busybox.tar" .

  mkdir -p "$dir/web/www"
  printf '<!doctype html>\n<title>Moxlet</title>\n<p>Hello from a pod that is an LXC container.\n' >"$dir/web/www/index.html"
  chmod -R go+rX "$dir/web"
  tar -C "$dir/web" --sort=name --mtime=@0 --numeric-owner -cf "$dir/web.tar" www

  umoci init --layout "$layout"
  umoci new --image "$layout:busybox"
  umoci raw add-layer --image "$layout:busybox" --history.created_by busybox "$dir/busybox.tar"
  umoci config --image "$layout:busybox" --config.env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    --config.cmd /bin/sh --config.workingdir /
  umoci tag --image "$layout:busybox" web
  umoci raw add-layer --image "$layout:web" --history.created_by web "$dir/web.tar"
  umoci config --image "$layout:web" --config.entrypoint /bin/httpd --config.cmd=-f --config.cmd=-v --config.cmd=-p --config.cmd=80 \
    --config.cmd=-h --config.cmd=/www --config.exposedports 80/tcp
  rm -rf "$root" "$dir/web" "$dir/busybox.tar" "$dir/web.tar"
  touch "$dir/complete"
}

# registry_up DIR PORT: a registry on loopback whose data, log and pid file lie in DIR.
registry_up() {
  local dir=$1 port=$2
  mkdir -p "$dir/data"
  cat >"$dir/config.yml" <<Y
version: 0.1
log: {level: warn}
storage: {filesystem: {rootdirectory: $dir/data}, delete: {enabled: true}}
http: {addr: "${REGISTRY_ADDRESS:-127.0.0.1}:$port"}
Y
  alive registry "$dir" || port_free "$port" "the registry" BASE_PORT
  daemon registry "$dir" env OTEL_TRACES_EXPORTER=none docker-registry serve "$dir/config.yml"
  daemon_ready registry "$dir" "the registry to answer" 20 curl -sf --noproxy '*' "http://${REGISTRY_ADDRESS:-127.0.0.1}:$port/v2/"
}

# push_images IMAGES_DIR PORT: as demo/busybox:1 and demo/web:1.
push_images() {
  local tag address=${REGISTRY_ADDRESS:-127.0.0.1}
  for tag in busybox web; do
    curl -sf --noproxy '*' -o /dev/null "http://$address:$2/v2/demo/$tag/manifests/1" -H 'Accept: application/vnd.oci.image.manifest.v1+json' && continue
    skopeo copy -q --dest-tls-verify=false "oci:$1/layout:$tag" "docker://$address:$2/demo/$tag:1"
  done
}
