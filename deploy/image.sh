#!/usr/bin/env bash
# Builds the container image with buildah, runs the service in it, and checks its answers. `make image` calls this script.
#
#   BASE=IMAGE          the base image. By default, that of the Containerfile or, if no registry can be reached, a Debian
#                       image that debootstrap makes (localhost/broker-filter-base; this needs root)
#   BUILD_FLAGS=FLAGS   further options of `buildah build`, such as --build-arg EXTRAS=[gpu] for the GPU image.
#                       This example uses a Python package index on the local disk:
#                       --volume /opt/pypi:/opt/pypi:ro --build-arg PIP_EXTRA_INDEX_URL=file:///opt/pypi/simple
set -euo pipefail
cd "$(dirname "$0")/.."

image=localhost/broker-filter
debian_base=localhost/broker-filter-base
debian=bookworm  # the first release with Python 3.11
read -ra build_flags <<<"${BUILD_FLAGS:-}"
# The build uses this machine's certificate authorities and pip configuration, because a proxy may need them.
for path in /etc/ssl/certs /etc/pip.conf /etc/xdg/pip; do
    [ ! -e "$path" ] || build_flags+=(--volume "$path:$path:ro")
done
export BUILDAH_ISOLATION=chroot  # needs only the right to chroot, so that it also works inside a container

command -v buildah >/dev/null || { echo 'buildah is needed (Debian: apt-get install buildah)' >&2; exit 1; }
scratch=$(mktemp -d)
container=
trap '[ -z "$container" ] || buildah rm "$container" >/dev/null; rm -rf "$scratch"' EXIT

make_debian_base() {
    command -v debootstrap >/dev/null || { echo 'debootstrap is needed to make a base' >&2; exit 1; }
    debootstrap --variant=minbase --include=python3-venv,ca-certificates \
        "$debian" "$scratch/root" >"$scratch/log" || { cat "$scratch/log" >&2; exit 1; }
    rm -rf "$scratch"/root/var/cache/apt/* "$scratch"/root/var/lib/apt/lists/*
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$scratch/root" /
    buildah commit --quiet --rm "$container" "$debian_base"
    container=
}

has_image() { buildah inspect --type image "$1" >/dev/null 2>&1; }

base=${BASE:-$(sed -n 's/^ARG BASE=//p' deploy/Containerfile)}
if ! has_image "$base" && ! buildah pull --quiet "$base"; then
    [ -z "${BASE:-}" ] || exit 1
    echo "$base cannot be pulled: building on Debian $debian instead"
    base=$debian_base
    has_image "$base" || make_debian_base
fi

buildah build --format docker --layers=false --build-arg "BASE=$base" "${build_flags[@]}" \
    --file deploy/Containerfile --tag "$image" .

[ "$(buildah inspect --type image --format '{{.Docker.Config.Healthcheck}}' "$image")" != '<nil>' ] ||
    { echo "$image has no health check" >&2; exit 1; }

# No broker listens at this address. The service waits for it, after it has loaded its models and started to answer.
cat >"$scratch/service.yaml" <<'YAML'
input: {bootstrap_servers: "127.0.0.1:1", group_id: image-check, topics: [none], start: earliest}
output: {prefix: image-check}
http: {host: 127.0.0.1, port: 9108}
YAML
cat >"$scratch/check" <<'SH'
get() { python -c 'import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=4).read().decode())' "http://127.0.0.1:9108$1"; }
broker-filter run --config /etc/broker-filter/service.yaml &
service=$!
until get /livez 2>/dev/null; do kill -0 $service; sleep 1; done
get /metrics | grep 'broker_filter_build_info{decoder="c"'
get /metrics | grep broker_filter_model_info{
kill -TERM $service
wait $service
SH
chmod -R a+rX "$scratch"
container=$(buildah from "$image")
buildah run --volume "$scratch:/etc/broker-filter:ro" "$container" sh -eu /etc/broker-filter/check
echo "$image is built on $base; the service ran in it and ended with status 0 after SIGTERM"
