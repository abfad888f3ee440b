#!/usr/bin/env bash
# Makes the CPU part of docs/benchmarks.md: this engine and PyTorch in the same run on this machine. Takes about 10 minutes.
#   PYTHON=python3 THREADS=2 REPEAT=5 bench/run.sh
# PYTHON must have torch, safetensors and sentencepiece (bench/peer_pytorch.py says which).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
threads=${THREADS:-2}
repeat=${REPEAT:-5}
results=build/bench
mkdir -p "$results"
rm -f "$results"/*.json

cmake --preset release >/dev/null
cmake --build --preset release --target attention_bench model_bench >/dev/null
bin=build/release/bench

echo "attention" >&2
"$bin/attention_bench" --threads "$threads" --repeat "$repeat" --dtype bf16 --json >"$results/attention-bf16.json"
"$bin/attention_bench" --threads "$threads" --repeat "$repeat" --dtype f32 --json >"$results/attention-f32.json"
"$python" bench/peer_pytorch.py attention --threads "$threads" --repeat "$repeat" >"$results/attention-peer.json"

for dtype in bf16 f32; do
  for attention in dense csla published sparvar; do
    echo "one picture: $dtype $attention" >&2
    "$bin/model_bench" --threads "$threads" --repeat "$repeat" --dtype "$dtype" --attention "$attention" >"$results/model-$dtype-$attention.json"
  done
  echo "one picture: $dtype PyTorch" >&2
  "$python" bench/peer_pytorch.py model --threads "$threads" --repeat "$repeat" --dtype "$dtype" >"$results/model-$dtype-peer.json"
done

"$python" bench/tables.py "$results" docs/benchmarks.md
echo "docs/benchmarks.md" >&2
