#!/usr/bin/env bash
# Trains a config on a Cloud TPU slice: copies this checkout to every host, installs it there, and starts g4v train on all.
#   bash launch/tpu_vm.sh NAME ZONE --config=configs/g4v_8b.py --workdir=/mnt/shared/runs/8b
# NAME: a TPU VM that is there already. --workdir must be on a disk that all its hosts mount. The same command again copies
# what changed and goes on from the newest checkpoint. Only committed files are copied; records and towers must be on the
# shared disk, named by the config.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 3 ]; then
  echo "usage: bash launch/tpu_vm.sh NAME ZONE --config=FILE --workdir=DIR [--config.path.to.field=value ...]" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
package=$(mktemp -t g4v-XXXXXX.tgz)
trap 'rm -f "$package"' EXIT
git archive --format=tar.gz --output="$package" HEAD
gcloud compute tpus tpu-vm scp "$package" "$name:g4v.tgz" --zone="$zone" --worker=all
# quoted twice: once for this shell, once for the one there
printf -v arguments '%q ' "$@"
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="
set -e
mkdir -p g4v
tar --extract --gzip --file=g4v.tgz --directory=g4v
cd g4v
. launch/environment.sh
environment .venv '.[tpu]'
exec .venv/bin/g4v train --coordinator=auto $arguments"
