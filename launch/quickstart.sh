#!/usr/bin/env bash
# From nothing to a report: environment, clips, records, autoencoder, model, evaluation.
#   bash launch/quickstart.sh            the quickstart
#   bash launch/quickstart.sh --short    the same path in a few steps, to see that it works
# Run again, it goes on where it stopped; a finished stage says so and is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."

size="" run=runs/quickstart
case "${1:-}" in
  "") ;;
  --short) size=",short" run=runs/short ;;
  *) echo "usage: bash launch/quickstart.sh [--short]" >&2; exit 2 ;;
esac

source launch/environment.sh
environment .venv .
g4v=.venv/bin/g4v
mkdir -p "$run"

# Each stage's seconds go to times.txt; the evaluation adds them up.
stage() {
  local name=$1 begin status=0
  shift
  begin=$(date +%s.%N)
  printf '\n== %s\n' "$name"
  "$@" || status=$?
  awk -v n="$name" -v a="$begin" -v b="$(date +%s.%N)" 'BEGIN { printf "%s %.1f\n", n, b - a }' >> "$run/times.txt"
  return "$status"
}

config=configs/quickstart.py
stage make "$g4v" data make --config="$config:model$size"
stage build "$g4v" data build --config="$config:model$size"
stage autoencoder "$g4v" train --config="$config:autoencoder$size" --workdir="$run/autoencoder"
stage model "$g4v" train --config="$config:model$size" --workdir="$run"
printf '\n== evaluate\n'
"$g4v" eval --workdir="$run" --times="$run/times.txt"
