#!/usr/bin/env bash
# Trains the bundled checkpoint on one GPU: stage 1, then the conversion and its autoregressive twin side by side.
# Usage: train.sh DATA OUT      DATA: the folder that prepare.py wrote.   About 17 minutes on one H200.
set -euo pipefail
data=$1 out=$2
here=$(dirname "$0")
tidar=${TIDAR:-python3 -m tidar}
mkdir -p "$out"
mix=(--data "$data/python_shared.jsonl=4" --data "$data/python_packages.jsonl=1"
     --data "$data/arithmetic.jsonl=0.45" --data "$data/stepmath.jsonl=6")
held=(--eval-data "python=$data/python_held_out.jsonl" --eval-data "arithmetic=$data/arithmetic_held_out.jsonl"
      --eval-data "stepmath=$data/stepmath_held_out.jsonl")
$tidar train --config "$here/ar.yaml" "${mix[@]}" --out "$out/ar" > "$out/ar.log" 2>&1
$tidar train --config "$here/twin.yaml" --base "$out/ar/model" "${mix[@]}" "${held[@]}" --out "$out/twin" > "$out/twin.log" 2>&1 &
twin=$!
$tidar train --config "$here/joint.yaml" --base "$out/ar/model" "${mix[@]}" "${held[@]}" --eval-prompts 4 --out "$out/joint" > "$out/joint.log" 2>&1
wait $twin
