#!/usr/bin/env bash
# Whether the cluster tests can be built and run on this machine: exit 0, or 1 and a line for each reason.
set -uo pipefail

cache=${XDG_CACHE_HOME:-$HOME/.cache}/tuning-kubernetes
mkdir -p "$cache"
reasons=()
[ "$(uname -s)" = Linux ] || reasons+=("not Linux")
[ "$(id -u)" = 0 ] || reasons+=("not root: packages are installed, and a kubelet makes mounts and cgroups")
if ! grep -qs '^VERSION_CODENAME=bookworm' /etc/os-release; then
  [ -x "$cache/bin/kube-apiserver" ] || reasons+=("not Debian 12, whose source package Kubernetes is built from")
fi
free=$(df --output=avail -BG "$cache" 2>/dev/null | tail -1 | tr -dc 0-9)
[ -x "$cache/bin/kube-apiserver" ] || [ "${free:-0}" -ge 12 ] || reasons+=("less than 12 GB free in $cache")
[ -w /sys/fs/cgroup ] || reasons+=("cgroups cannot be written")
[ ${#reasons[@]} -eq 0 ] && exit 0
printf '%s\n' "${reasons[@]}"
exit 1
