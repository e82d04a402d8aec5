#!/usr/bin/env bash
# What a plan's bound is worth: plans the runs of configs/published.py and sets the MFU that was published beside the bound.
#   bash launch/calibrate.sh            all of them, some minutes each
#   bash launch/calibrate.sh v5e-16b    these alone
# Needs the TPU compiler: .venv/bin/pip install '.[tpu]'. Plans are kept, so run again it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
out=plans/calibration
mkdir -p "$out"
named=$(.venv/bin/python - "$@" << 'END'
import sys

from configs.published import RUNS

if unknown := set(sys.argv[1:]) - set(RUNS):
    sys.exit(f"unknown run {', '.join(sorted(unknown))}; known: {', '.join(RUNS)}")
for run in sys.argv[1:] or RUNS:
    print(run, RUNS[run][0])
END
)
runs=()
while read -r run topology; do
  printf '\n== %s on %s\n' "$run" "$topology"
  .venv/bin/g4v plan --config="configs/published.py:$run" --topology="$topology" --json="$out/$run.json"
  runs+=("$run")
done <<< "$named"
.venv/bin/python - "$out" "${runs[@]}" << 'END'
import json
import statistics
import sys

from configs.published import RUNS

print("\n| run | topology | published MFU | bound | published / bound | limit | GiB a chip |\n|---|---|---|---|---|---|---|")
ratios = []
for run in sys.argv[2:]:
    plan = json.load(open(f"{sys.argv[1]}/{run}.json"))
    topology, _, published = RUNS[run]
    bound, memory = plan["bound"], plan["memory"]
    ratios.append(published / bound["mfu"])
    held = memory["needed"] / 2**30
    print(f"| {run} | {topology} | {published:.3f} | {bound['mfu']:.3f} | {ratios[-1]:.2f} | {bound['limit']} | {held:.1f} |")
print(f"\npublished / bound: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}, n = {len(ratios)}")
END
