#!/usr/bin/env bash
# Build both targets of the Dockerfile, without docker and without a registry: buildah in a chroot, on a
# base that is made from Debian 12 packages. The engine gets the CPU build of torch.
#
# usage: [ENGINES="cpu cu126 cu130"] build-images.sh [OUTDIR] [CACHEDIR]
#
# ENGINES: the builds of torch that get an engine each, those for CUDA as engine-BUILD.tar (5 GB or more).
# Leaves OUTDIR/{engine,operator}.tar, for `ctr images import`, `podman load`, `skopeo`. Needs root, and
# buildah and mmdebstrap. What pip is configured to use on this machine (folders, certificates) the builds see,
# too; nothing of it stays in the images. Rough figures, two cores: 3 minutes for the base, once; 5 for the
# images; 9 GB of disk while it works, 1 GB afterwards.
set -euo pipefail

cache=${2:-${XDG_CACHE_HOME:-$HOME/.cache}/tuning-kubernetes}
out=${1:-$cache/images}
root=$(readlink -f "$(dirname "$(readlink -f "$0")")/../..")
mkdir -p "$cache" "$out"
storage=$(mktemp -d "$cache/storage.XXXXXX")
store=(--root "$storage/root" --runroot "$storage/run" --storage-driver vfs)
trap 'rm -rf "$storage"' EXIT

if [ ! -f "$cache/base.tar" ]; then
  # shellcheck disable=SC2016  # apt expands REPO_URI
  mirror=$(apt-get indextargets --format '$(REPO_URI)' \
    'Identifier: Packages' 'Codename: bookworm' 'Label: Debian' | awk 'NR==1')
  [ -n "$mirror" ] || { echo "no Debian bookworm source in this machine's apt configuration" >&2; exit 1; }
  mmdebstrap --quiet --variant=minbase --include=python3-venv,python3-pip,ca-certificates \
    bookworm "$cache/base.part" "$mirror"
  mv "$cache/base.part" "$cache/base.tar"
fi
printf 'FROM scratch\nADD base.tar /\n' |
  buildah "${store[@]}" bud --quiet --isolation chroot -t localhost/base -f - "$cache" >/dev/null

# pip's settings of this machine as one file, and every folder and file that they name.
mounts=(--volume "$storage/pip.conf:/etc/pip.conf:ro")
python3 - "$storage/pip.conf" <<'EOF' > "$storage/paths"
import pathlib, re, subprocess, sys

told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
pairs = re.findall(r"^(?:global|:env:)\.([a-z-]+)='(.*)'$", told.stdout, re.M)
pathlib.Path(sys.argv[1]).write_text(
    "[global]\n" + "".join(f"{key} = {value}\n" for key, value in dict(pairs).items())
)
for value in dict(pairs).values():
    for word in value.replace("file://", "").split():
        path = pathlib.Path(word)
        if path.is_absolute() and path.exists():
            print(path.parent if path.name == "simple" else path)  # an index, beside its files
EOF
while read -r path; do
  mounts+=(--volume "$path:$path:ro")
done < <(sort -u "$storage/paths")

build() {  # NAME TARGET TORCH_INDEX
  buildah "${store[@]}" bud --quiet --isolation chroot --network host --format docker \
    --build-arg BASE=localhost/base --build-arg TORCH_INDEX="$3" --target "$2" \
    "${mounts[@]}" -t "localhost/tuning-$1:test" -f "$root/Dockerfile" "$root" >/dev/null
  rm -f "$out/$1.tar"
  buildah "${store[@]}" push --quiet "localhost/tuning-$1:test" \
    "docker-archive:$out/$1.tar:localhost/tuning-$1:test"
}
build operator operator cpu
for index in ${ENGINES:-cpu}; do
  name=engine-$index
  build "${name%-cpu}" engine "$index"
done
ls -l "$out"
