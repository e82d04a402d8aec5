#!/usr/bin/env bash
# What each loss term is good for: the same model trained again with one term off, and each run beside the whole.
#   bash launch/ablations.sh                                   the quickstart's, after launch/quickstart.sh
#   TERMS="caption refusal keep" CONFIG=configs/smol.py:safety RUN=runs/smol-safety bash launch/ablations.sh
# TERMS are names under config.losses; by default those of the quickstart, whose LLM has no base to prefer or keep to.
# Further flags are the trainings', such as --config.train.steps=100. Run again, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
config=${CONFIG:-configs/quickstart.py} run=${RUN:-runs/quickstart} g4v=.venv/bin/g4v
runs=()
for term in ${TERMS:-caption generation refusal hazard blocked}; do
  printf '\n== without %s\n' "$term"
  "$g4v" train --config="$config" --config.losses."$term"=0.0 "$@" --workdir="$run-without-$term"
  "$g4v" eval --workdir="$run-without-$term"
  runs+=("$run-without-$term")
done
"$g4v" eval --compare "$run" "${runs[@]}" --json="$run/ablations.json"
